// Gated recurrent unit (Cho et al. 2014), in torch's variant: the reset gate acts on W_hn h + b_hn.
//   r, z = sigmoid(x + r)    n = tanh(x_n + r * r_n)    h' = n + z (h - n)
#pragma once

#include "math.h"

namespace fastrnn {

struct Gru {
  static constexpr const char* name = "gru";
  static constexpr int gates = 3, states = 1, saved = 4;
  static constexpr bool shared_dgates = false;

  template <class V>
  static FASTRNN_HD void forward(const V x[gates], const V r[gates], V s[states], V save[saved]) {
    using M = Math<V>;
    const V reset = M::sigmoid(x[0] + r[0]), z = M::sigmoid(x[1] + r[1]);
    const V n = M::tanh(x[2] + reset * r[2]);
    s[0] = n + z * (s[0] - n);
    save[0] = reset, save[1] = z, save[2] = n, save[3] = r[2];
  }

  template <class V>
  static FASTRNN_HD void backward(const V save[saved], const V s_before[states], V ds[states], V dx[gates],
                                  V dr[gates]) {
    const V reset = save[0], z = save[1], n = save[2], r_n = save[3];
    const V dh = ds[0];
    dx[2] = dh * (1 - z) * (1 - n * n);
    dx[1] = dh * (s_before[0] - n) * z * (1 - z);
    dx[0] = dx[2] * r_n * reset * (1 - reset);
    dr[0] = dx[0];
    dr[1] = dx[1];
    dr[2] = dx[2] * reset;
    ds[0] = dh * z;
  }
};

}  // namespace fastrnn
