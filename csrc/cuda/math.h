// The cells' elementwise functions for float, branch-free, on the device and (for the tests) on the host.
#pragma once

#include "../cells/cells.h"
#include "device.h"

namespace fastrnn {

// e^x = scale * (1 + p), kept apart because tanh needs e^x - 1 without cancellation.
// Cody-Waite: x = n ln2 + r, |r| <= ln2 / 2; p = r + r^2 q(r), with q as cpu/vec.h has it.
struct ExpParts {
  float scale, p;
};

FASTRNN_DEVICE ExpParts exp_parts(float x) {
  using namespace cuda;
  constexpr float log2e = 1.44269504f, ln2_hi = 0.693145752f, ln2_lo = 1.42860677e-6f;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = multiply_add(x, log2e, magic);
  const float n = shifted - magic;
  const float r = multiply_add(n, -ln2_lo, multiply_add(n, -ln2_hi, x));
  float q = 0.001388250696f;
  q = multiply_add(q, r, 0.008366521376f);
  q = multiply_add(q, r, 0.04166720007f);
  q = multiply_add(q, r, 0.1666654361f);
  q = multiply_add(q, r, 0.4999999815f);
  return {from_bits((to_bits(shifted) + 127u) << 23), multiply_add(q, r * r, r)};
}

// Comparisons are written so that NaN passes.
template <>
struct Math<float> {
  // Exactly zero where e^-x would overflow: see cpu/vec.h.
  static FASTRNN_DEVICE float sigmoid(float x) {
    constexpr float max = 87.3365f;
    const ExpParts e = exp_parts(x > max ? -max : -x);
    const float y = cuda::divide(1.0f, cuda::multiply_add(e.scale, e.p, e.scale) + 1.0f);
    return x < -max ? 0.0f : y;
  }

  // With m = e^2|x| - 1, m / (m + 2) keeps relative accuracy near 0.
  static FASTRNN_DEVICE float tanh(float x) {
    const float size = x < 0.0f ? -x : x;
    const ExpParts e = exp_parts(2.0f * (size > 10.0f ? 10.0f : size));
    const float m = cuda::multiply_add(e.scale, e.p, e.scale - 1.0f);
    const float t = cuda::divide(m, m + 2.0f);
    return x < 0.0f ? -t : t;
  }

  static FASTRNN_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }
  static FASTRNN_DEVICE float step(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

}  // namespace fastrnn
