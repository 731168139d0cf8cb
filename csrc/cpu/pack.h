// Weights rewritten as panels (see gemm.h), and the product with weights as they lie in memory for calls too small to
// pay for that.
#pragma once

#include "gemm.h"
#include "problem.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// A weight matrix as outputs x depth, cut into panels. Output (unit, gate) is weight row gate * H + unit, or, transposed
// for backward, output unit is weight column `unit` and depth runs over the padded gates [gates][Hp].
template <class T>
struct Panels {
  T* data;
  Acc<T>* bias;    // [panels][nv * lanes]
  int64_t count;   // panels
  int64_t depth;   // padded K
  int nv;          // vectors in a panel

  int width() const { return nv * kLanes<Acc<T>>; }
  int64_t stride() const { return depth * width(); }
  T* panel(int64_t p) const { return data + p * stride(); }
  const Acc<T>* panel_bias(int64_t p) const { return bias + p * width(); }
  // Where output (vector v, lane) at depth k stands in panel p.
  T& at(int64_t p, int64_t k, int v, int lane) const {
    constexpr int pair = kPair<T>;
    return panel(p)[(k / pair * width() + v * kLanes<Acc<T>> + lane) * pair + k % pair];
  }
};

template <class T>
FASTRNN_INLINE Acc<T> widen_one(T x) {
  if constexpr (kPair<T> == 2) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  } else {
    return x;
  }
}

// Panel p of w [gates * H, K], unit vectors outermost: vector v is gate v % gates of unit vector v / gates.
template <class T>
void pack_rows(const Panels<T>& out, int64_t p, const T* w, const T* bias, int gates, int64_t H, int64_t K) {
  constexpr int lanes = kLanes<Acc<T>>;
  for (int v = 0; v < out.nv; ++v) {
    const int64_t unit0 = (p * (out.nv / gates) + v / gates) * lanes;
    const int valid = static_cast<int>(unit0 >= H ? 0 : (H - unit0 < lanes ? H - unit0 : lanes));
    const int64_t row0 = v % gates * H + unit0;
    for (int lane = 0; lane < lanes; ++lane) {
      out.bias[p * out.width() + v * lanes + lane] = bias && lane < valid ? widen_one(bias[row0 + lane]) : 0;
    }
    for (int64_t k = 0; k < out.depth; ++k) {
      const int n = k < K ? valid : 0;
      for (int lane = 0; lane < n; ++lane) out.at(p, k, v, lane) = w[(row0 + lane) * K + k];
      for (int lane = n; lane < lanes; ++lane) out.at(p, k, v, lane) = T{};
    }
  }
}

// Panel p of the transpose of w [gates * H, H]: outputs are columns, depth is [gates][Hp].
template <class T>
void pack_columns(const Panels<T>& out, int64_t p, const T* w, int gates, int64_t H) {
  constexpr int lanes = kLanes<Acc<T>>;
  const int64_t Hp = round_up(H, kUnitPad);
  for (int i = 0; i < out.width(); ++i) out.bias[p * out.width() + i] = 0;
  for (int64_t k = 0; k < out.depth; ++k) {
    const int64_t gate = k / Hp, unit = k % Hp;
    const bool real = gate < gates && unit < H;
    for (int v = 0; v < out.nv; ++v) {
      const int64_t column0 = (p * out.nv + v) * lanes;
      for (int lane = 0; lane < lanes; ++lane) {
        out.at(p, k, v, lane) = real && column0 + lane < H ? w[(gate * H + unit) * H + column0 + lane] : T{};
      }
    }
  }
}

template <class T>
FASTRNN_INLINE Acc<T> dot(const T* a, const T* b, int64_t n) {
  constexpr int lanes = kLanes<Acc<T>>;
  AccVec<T> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * lanes <= n; k += 4 * lanes) {
    for (int i = 0; i < 4; ++i) sums[i] += load(a + k + i * lanes) * load(b + k + i * lanes);
  }
  for (; k < n; k += lanes) sums[0] += load_first(a + k, n - k) * load_first(b + k, n - k);
  const AccVec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  Acc<T> total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
  return total;
}

// What a forward GEMM multiplies by: packed panels, or the weights as they are.
template <class T>
struct Weights {
  Panels<T> panels;
  const T *w, *b;
  int gates;
  int64_t H, K;
  bool packed;

  void pack(int64_t p) const {
    if (packed) pack_rows(panels, p, w, b, gates, H, K);
  }

  void multiply(Tile<T>& out, Block<T> kernel, int rows, const T* a, int64_t lda, int64_t p) const {
    if (packed) return kernel(a, lda, panels.panel(p), panels.depth, panels.panel_bias(p), out.c);
    for (int r = 0; r < rows; ++r) multiply_unpacked(out.c + r * panels.width(), a + r * lda, p);
  }

 private:
  void multiply_unpacked(Acc<T>* c, const T* a, int64_t p) const {
    constexpr int lanes = kLanes<Acc<T>>;
    for (int v = 0; v < panels.nv; ++v) {
      const int64_t unit0 = (p * (panels.nv / gates) + v / gates) * lanes;
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t row = v % gates * H + unit0 + lane;
        const bool real = unit0 + lane < H;
        c[v * lanes + lane] = real ? dot(w + row * K, a, K) + (b ? widen_one(b[row]) : 0) : 0;
      }
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
