// Products of floats on the tile unit, which multiplies bf16 sixteen times as fast as vectors multiply floats. A float
// is the sum of three bf16, and a product of two floats that of nine; the six largest leave out less than a float's
// rounding (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations", 2019). Sums are of floats, the small terms first or apart, so that only the large ones round as much
// as in a product of floats. What is not finite comes out as NaN.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class T>
inline constexpr bool kSplits = kTiles && std::is_same_v<T, float>;
inline constexpr int kParts = 3;
// Steps of depth of a tile, to which that of a product is padded.
inline constexpr int64_t kTileDepth = 32;

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

// Both sides of a product lie in memory tile after tile: of its 16 lines one follows the other, which is the fastest
// order to load them in. So one vector of a panel, [depth / 2][lanes][2], is cut into tiles of 32 steps of depth, and
// vectors take turns; and so are 16 rows.
inline constexpr int64_t kTileSize = kTileRows * kTileDepth;

// Two steps of depth of one vector.
FASTRNN_INLINE void store_pair(const Split<bf16>& out, Vec<float> first, Vec<float> second) {
  const Parts low = parts_of(first), high = parts_of(second);
  for (int j = 0; j < kParts; ++j) {
    const Vec<uint32_t> pairs = low.of[j] >> 16 | high.of[j];
    std::memcpy(out.of(j), &pairs, sizeof pairs);
  }
}

// Where step k, an even one, of vector v stands in a panel of nv vectors.
constexpr int64_t pair_at(int64_t k, int v, int nv) {
  return (k / kTileDepth * nv + v) * kTileSize + k % kTileDepth * kLanes<float>;
}

// A panel whose row k is columns of row(k), null for zeros.
template <class RowOf>
void split_panel(const Split<bf16>& out, int64_t depth, int nv, int64_t columns, int64_t p, RowOf row) {
  constexpr int lanes = kLanes<float>;
  for (int64_t k = 0; k < depth; k += 2) {
    const float *const first = row(k), *const second = row(k + 1);
    for (int v = 0; v < nv; ++v) {
      const int64_t column = (p * nv + v) * lanes, left = columns - column;
      store_pair(out.from(pair_at(k, v, nv)), first && left > 0 ? load_first(first + column, left) : Vec<float>{},
                 second && left > 0 ? load_first(second + column, left) : Vec<float>{});
    }
  }
}

// Where row r stands at depth k among rows so deep.
constexpr int64_t row_at(int64_t r, int64_t k, int64_t depth) {
  return r / kTileRows * kTileRows * depth + k / kTileDepth * kTileSize + r % kTileRows * kTileDepth + k % kTileDepth;
}

// Rows of `depth` floats, which is padded to round_up(depth, kTileDepth). Whether all of them are finite.
inline bool split_rows(const Split<bf16>& out, const float* a, int64_t lda, int64_t rows, int64_t depth) {
  constexpr int lanes = kLanes<float>;
  const int64_t ld = round_up(depth, kTileDepth);
  Vec<float> zeros = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < ld; k += lanes) {
      const Vec<float> x = k < depth ? load_first(a + r * lda + k, depth - k) : Vec<float>{};
      const Parts parts = parts_of(x);
      zeros += x - x;
      for (int j = 0; j < kParts; ++j) {
        const HalfVec part = __builtin_convertvector(parts.of[j] >> 16, HalfVec);
        std::memcpy(out.of(j) + row_at(r, k, ld), &part, sizeof part);
      }
    }
  }
  float zero = 0;
  for (int lane = 0; lane < lanes; ++lane) zero += zeros[lane];
  return zero == 0;
}

// Rows of two tiles. Two tiles of A meet two of B at a time, as in tile_block.
template <int NV>
struct SplitBlock {
  Split<const bf16> a, b;
  int64_t depth;

  FASTRNN_INLINE void load_a(int part, int64_t k) const {
    _tile_loadd(4, a.of(part) + row_at(0, k, depth), kLineBytes);
    _tile_loadd(5, a.of(part) + row_at(kTileRows, k, depth), kLineBytes);
  }
  FASTRNN_INLINE void load_b(int part, int64_t k, int v, bool pair) const {
    _tile_loadd(6, b.of(part) + pair_at(k, v, NV), kLineBytes);
    if (pair) _tile_loadd(7, b.of(part) + pair_at(k, v + 1, NV), kLineBytes);
  }
  FASTRNN_INLINE static void multiply(bool pair) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (pair) _tile_dpbf16ps(1, 4, 7);
    if (pair) _tile_dpbf16ps(3, 5, 7);
  }

  void run(const float* init, int64_t init_stride, float* c, int64_t c_stride, const void* ahead) const {
    const char* line = static_cast<const char*>(ahead);
    for (int v = 0; v < NV; v += 2) {
      const bool pair = v + 1 < NV;
      load_sums<true>(init + v * 16, init_stride, pair);
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        for (int i = 0; i < 16; ++i) __builtin_prefetch(line + i * kLineBytes, 0, 2);
        line += 16 * kLineBytes;
        add_small(k, v, pair);
      }
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        load_a(0, k);
        load_b(0, k, v, pair);
        multiply(pair);
      }
      store_sums<true>(c + v * 16, c_stride, pair);
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

// Rows of one tile, by one vector after the other. The small products have a sum of their own, tile 1, so that each
// tile of B, which comes from L2 and is used but once or twice, is loaded once; and a tile has been out of use for a
// while when the next one takes its place.
template <int NV>
struct SplitTile {
  Split<const bf16> a, b;
  int64_t depth;

  void run(int64_t rows, const float* init, int64_t init_stride, float* c, int64_t c_stride, const void* ahead) const {
    const char* line = static_cast<const char*>(ahead);
    for (int v = 0; v < NV; ++v) {
      _tile_loadd(0, init + v * 16, init_stride * 4);
      _tile_zero(1);
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        for (int i = 0; i < 8; ++i) __builtin_prefetch(line + i * kLineBytes, 0, 2);
        line += 8 * kLineBytes;
        add(row_at(0, k, depth), pair_at(k, v, NV));
      }
      store_sum(rows, c + v * 16, c_stride);
    }
  }

 private:
  FASTRNN_INLINE void add(int64_t a_at, int64_t b_at) const {
    _tile_loadd(2, a.of(0) + a_at, kLineBytes);
    _tile_loadd(7, b.of(2) + b_at, kLineBytes);
    _tile_dpbf16ps(1, 2, 7);
    _tile_loadd(6, b.of(1) + b_at, kLineBytes);
    _tile_dpbf16ps(1, 2, 6);
    _tile_loadd(5, b.of(0) + b_at, kLineBytes);
    _tile_dpbf16ps(0, 2, 5);
    _tile_loadd(3, a.of(1) + a_at, kLineBytes);
    _tile_dpbf16ps(1, 3, 6);
    _tile_dpbf16ps(1, 3, 5);
    _tile_loadd(4, a.of(2) + a_at, kLineBytes);
    _tile_dpbf16ps(1, 4, 5);
  }

  static void store_sum(int64_t rows, float* c, int64_t stride) {
    alignas(64) float small[kTileRows * 16];
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, small, kLineBytes);
    for (int64_t r = 0; r < rows; ++r) store(c + r * stride, load(c + r * stride) + load(small + r * 16));
  }
};

// C [rows, nv vectors] = init + A [rows, depth] . panel: see multiply_rows. It writes, and reads of A and init, as many
// rows as the tiles are configured for.
template <int NV>
void multiply_split(const Split<bf16>& a, int64_t rows, const Split<bf16>& panel, int64_t depth, const float* init,
                    int64_t init_stride, float* c, int64_t c_stride, const void* ahead) {
  const Split<const bf16> b{panel.data, panel.part};
  for (int64_t r = 0; r < rows; r += kBlockRows) {
    const Split<const bf16> mine{a.data + r * depth, a.part};
    const float* const from = init + r * init_stride;
    float* const to = c + r * c_stride;
    if (rows - r > kTileRows) {
      SplitBlock<NV>{mine, b, depth}.run(from, init_stride, to, c_stride, ahead);
    } else {
      SplitTile<NV>{mine, b, depth}.run(rows - r, from, init_stride, to, c_stride, ahead);
    }
  }
}

inline void multiply_split(const Split<bf16>& a, int64_t rows, const Split<bf16>& panel, int64_t depth, int nv,
                           const float* init, int64_t init_stride, float* c, int64_t c_stride, const void* ahead) {
  const auto kernel = nv == 1   ? multiply_split<1>
                      : nv == 2 ? multiply_split<2>
                      : nv == 3 ? multiply_split<3>
                      : nv == 4 ? multiply_split<4>
                                : multiply_split<6>;
  kernel(a, rows, panel, depth, init, init_stride, c, c_stride, ahead);
}

#endif

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
