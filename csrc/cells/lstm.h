// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), gates in torch's order.
//   i, f, o = sigmoid(x + r)    g = tanh(x + r)    c' = f c + i g    h' = o tanh(c')
#pragma once

#include "math.h"

namespace fastrnn {

struct Lstm {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4, states = 2, saved = 4;
  static constexpr bool shared_dgates = true;

  template <class V>
  static FASTRNN_HD void forward(const V x[gates], const V r[gates], V s[states], V save[saved]) {
    using M = Math<V>;
    const V i = M::sigmoid(x[0] + r[0]), f = M::sigmoid(x[1] + r[1]);
    const V g = M::tanh(x[2] + r[2]), o = M::sigmoid(x[3] + r[3]);
    const V c = f * s[1] + i * g;
    s[0] = o * M::tanh(c);
    s[1] = c;
    save[0] = i, save[1] = f, save[2] = g, save[3] = o;
  }

  // c' is one multiply-add from what is saved, so it is recomputed rather than stored.
  template <class V>
  static FASTRNN_HD void backward(const V save[saved], const V s_before[states], V ds[states], V dx[gates],
                                  V dr[gates]) {
    const V i = save[0], f = save[1], g = save[2], o = save[3];
    const V tanh_c = Math<V>::tanh(f * s_before[1] + i * g);
    const V dh = ds[0];
    const V dc = ds[1] + dh * o * (1 - tanh_c * tanh_c);
    dx[0] = dc * g * i * (1 - i);
    dx[1] = dc * s_before[1] * f * (1 - f);
    dx[2] = dc * i * (1 - g * g);
    dx[3] = dh * tanh_c * o * (1 - o);
    for (int k = 0; k < gates; ++k) dr[k] = dx[k];
    ds[0] = V{};
    ds[1] = dc * f;
  }
};

}  // namespace fastrnn
