// Elman network (Elman 1990) with tanh:   h' = tanh(x + r)
#pragma once

#include "math.h"

namespace fastrnn {

struct RnnTanh {
  static constexpr const char* name = "rnn_tanh";
  static constexpr int gates = 1, states = 1, saved = 1;
  static constexpr bool shared_dgates = true;

  template <class V>
  static FASTRNN_HD void forward(const V x[gates], const V r[gates], V s[states], V save[saved]) {
    s[0] = save[0] = Math<V>::tanh(x[0] + r[0]);
  }

  template <class V>
  static FASTRNN_HD void backward(const V save[saved], const V*, V ds[states], V dx[gates], V dr[gates]) {
    dr[0] = dx[0] = ds[0] * (1 - save[0] * save[0]);
    ds[0] = V{};
  }
};

}  // namespace fastrnn
