// Products of floats on the tile unit, which multiplies bf16 sixteen times as fast as vectors multiply floats. A float
// is the sum of three bf16, and a product of two floats that of nine; the six largest leave out less than a float's
// rounding (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations", 2019). Sums are of floats, the small terms first, so that only the large ones round as much as in a
// product of floats. What is not finite comes out as NaN.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class T>
inline constexpr bool kSplits = kTiles && std::is_same_v<T, float>;
inline constexpr int kParts = 3;
// The depth of such a product is padded to this.
inline constexpr int64_t kSplitPad = 32;

// The parts one after the other; from the first to the last each is 2^-8 times as large, or less.
template <class P>
struct Split {
  P* data;
  int64_t part;  // from one part to the next
  P* of(int j) const { return data + j * part; }
  Split from(int64_t i) const { return {data + i, part}; }
};

#if defined(__AMX_BF16__)

struct Parts {
  Vec<uint32_t> of[kParts];  // each in the upper half of its lane
};

// Cut off rather than rounded, so that nothing overflows and the parts add up to x.
FASTRNN_INLINE Parts parts_of(Vec<float> x) {
  Parts parts;
  for (auto& part : parts.of) {
    part = reinterpret_cast<Vec<uint32_t>>(x) & 0xffff0000u;
    x -= reinterpret_cast<Vec<float>>(part);
  }
  return parts;
}

// Two steps of depth of one vector, in the order of bf16 panels (see gemm.h).
FASTRNN_INLINE void store_pair(const Split<bf16>& out, Vec<float> first, Vec<float> second) {
  const Parts low = parts_of(first), high = parts_of(second);
  for (int j = 0; j < kParts; ++j) {
    const Vec<uint32_t> pairs = low.of[j] >> 16 | high.of[j];
    std::memcpy(out.of(j), &pairs, sizeof pairs);
  }
}

// A panel [depth][nv][lanes] whose row k is columns of row(k), null for zeros.
template <class RowOf>
void split_panel(const Split<bf16>& out, int64_t depth, int nv, int64_t columns, int64_t p, RowOf row) {
  constexpr int lanes = kLanes<float>;
  int64_t at = 0;
  for (int64_t k = 0; k < depth; k += 2) {
    const float *const first = row(k), *const second = row(k + 1);
    for (int v = 0; v < nv; ++v, at += 2 * lanes) {
      const int64_t column = (p * nv + v) * lanes, left = columns - column;
      store_pair(out.from(at), first && left > 0 ? load_first(first + column, left) : Vec<float>{},
                 second && left > 0 ? load_first(second + column, left) : Vec<float>{});
    }
  }
}

// Rows of `depth` floats as rows of round_up(depth, kSplitPad). Whether all of them are finite.
inline bool split_rows(const Split<bf16>& out, const float* a, int64_t lda, int64_t rows, int64_t depth) {
  constexpr int lanes = kLanes<float>;
  const int64_t ld = round_up(depth, kSplitPad);
  Vec<float> zeros = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < ld; k += lanes) {
      const Vec<float> x = k < depth ? load_first(a + r * lda + k, depth - k) : Vec<float>{};
      const Parts parts = parts_of(x);
      zeros += x - x;
      for (int j = 0; j < kParts; ++j) {
        const HalfVec part = __builtin_convertvector(parts.of[j] >> 16, HalfVec);
        std::memcpy(out.of(j) + r * ld + k, &part, sizeof part);
      }
    }
  }
  float zero = 0;
  for (int lane = 0; lane < lanes; ++lane) zero += zeros[lane];
  return zero == 0;
}

template <int NV, bool Two>
struct SplitBlock {
  Split<const bf16> a, b;
  int64_t lda;

  FASTRNN_INLINE void load_a(int part, int64_t k) const {
    _tile_loadd(4, a.of(part) + k, lda * 2);
    if constexpr (Two) _tile_loadd(5, a.of(part) + 16 * lda + k, lda * 2);
  }
  FASTRNN_INLINE void load_b(int part, int64_t k, int v, bool pair) const {
    const bf16* const from = b.of(part) + (k / 2 * NV + v) * 32;
    _tile_loadd(6, from, NV * 64);
    if (pair) _tile_loadd(7, from + 32, NV * 64);
  }
  FASTRNN_INLINE static void multiply(bool pair) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Two) _tile_dpbf16ps(2, 5, 6);
    if (pair) _tile_dpbf16ps(1, 4, 7);
    if (Two && pair) _tile_dpbf16ps(3, 5, 7);
  }

  void run(int64_t K, const float* init, int64_t init_stride, float* c, int64_t c_stride, const void* ahead) const {
    const char* line = static_cast<const char*>(ahead);
    for (int v = 0; v < NV; v += 2) {
      const bool pair = v + 1 < NV;
      load_sums<Two>(init + v * 16, init_stride, pair);
      for (int64_t k = 0; k < K; k += 32) {
        for (int i = 0; i < 16; ++i) __builtin_prefetch(line + i * kLineBytes, 0, 2);
        line += 16 * kLineBytes;
        add_small(k, v, pair);
      }
      for (int64_t k = 0; k < K; k += 32) {
        load_a(0, k);
        load_b(0, k, v, pair);
        multiply(pair);
      }
      store_sums<Two>(c + v * 16, c_stride, pair);
    }
  }

  // All but the product of the first parts, in an order that loads few tiles.
  FASTRNN_INLINE void add_small(int64_t k, int v, bool pair) const {
    load_a(0, k);
    load_b(2, k, v, pair);
    multiply(pair);
    load_b(1, k, v, pair);
    multiply(pair);
    load_a(1, k);
    multiply(pair);
    load_b(0, k, v, pair);
    multiply(pair);
    load_a(2, k);
    multiply(pair);
  }
};

// C [rows, nv vectors] = init + A [rows, K] . panel: see multiply_rows. It writes, and reads of A and init, whole tiles
// of 16 rows.
template <int NV>
void multiply_split(const Split<bf16>& a, int64_t lda, int64_t rows, const Split<bf16>& panel, int64_t K,
                    const float* init, int64_t init_stride, float* c, int64_t c_stride, const void* ahead) {
  const Split<const bf16> b{panel.data, panel.part};
  for (int64_t r = 0; r < rows; r += 32) {
    const Split<const bf16> mine{a.data + r * lda, a.part};
    const float* const from = init + r * init_stride;
    float* const to = c + r * c_stride;
    if (rows - r > 16) {
      SplitBlock<NV, true>{mine, b, lda}.run(K, from, init_stride, to, c_stride, ahead);
    } else {
      SplitBlock<NV, false>{mine, b, lda}.run(K, from, init_stride, to, c_stride, ahead);
    }
  }
}

inline void multiply_split(const Split<bf16>& a, int64_t lda, int64_t rows, const Split<bf16>& panel, int64_t K, int nv,
                           const float* init, int64_t init_stride, float* c, int64_t c_stride, const void* ahead) {
  const auto kernel = nv == 1   ? multiply_split<1>
                      : nv == 2 ? multiply_split<2>
                      : nv == 3 ? multiply_split<3>
                      : nv == 4 ? multiply_split<4>
                                : multiply_split<6>;
  kernel(a, lda, rows, panel, K, init, init_stride, c, c_stride, ahead);
}

#endif

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
