// The one matrix product: a block of rows times a packed panel of weights, C[rows][NV vectors] = bias + A . panel.
//
// A panel holds NV vectors of outputs for every k, in the order in which the inner loop reads them: [K][NV][lanes], for
// bf16 [K/2][NV][lanes][2], which is both what vdpbf16ps wants and the layout of an AMX B tile. K is padded to
// kDepthPad<T> with zeros. The inner loop keeps MR x NV accumulators in registers: 24 of AVX-512's 32, 12 of 16.
#pragma once

#include <limits>

#include "problem.h"
#include "vec.h"

namespace fastrnn {
namespace FASTRNN_ISA {

inline constexpr int kLineBytes = 64;

#if defined(__AMX_BF16__)
inline constexpr bool kTiles = true;
#else
inline constexpr bool kTiles = false;
#endif
// Rows of a tile, and of a block of them, which is two tiles high.
inline constexpr int kTileRows = 16, kBlockRows = 2 * kTileRows;
// Vectors in a panel of parts.
inline constexpr int kMostVectors = kTiles ? 6 : kMaxVectors;

template <class T>
inline constexpr int kDepthPad = 1;
template <>
inline constexpr int kDepthPad<bf16> = kTiles ? 32 : 2;

// Rows of A may be read, though not used, up to a multiple of this.
template <class T>
inline constexpr int kRowPad = 1;
template <>
inline constexpr int kRowPad<bf16> = kTiles ? 32 : 1;

#if defined(__AVX512F__)
inline constexpr int kAccumulators = 24;
#else
inline constexpr int kAccumulators = 12;
#endif

constexpr int max_rows(int nv) { return nv == 1 ? kAccumulators / 2 : kAccumulators / nv; }
inline constexpr int kMaxRows = kTiles ? kBlockRows : 16;
static_assert(max_rows(1) <= kMaxRows && max_rows(2) <= kMaxRows);

// C of one block: kMaxRows rows of nv vectors.
template <class T>
struct alignas(64) Tile {
  Acc<T> c[kMaxRows * kMostVectors * kLanes<Acc<T>>];
  FASTRNN_INLINE AccVec<T> at(int row, int nv, int v) const { return load(c + (row * nv + v) * kLanes<Acc<T>>); }
};

template <class T>
FASTRNN_INLINE void multiply_add(AccVec<T>* acc, int mr, int nv, const T* a, int64_t lda, const T* panel) {
  Vec<T> b[kMaxVectors];
#pragma GCC unroll 4
  for (int v = 0; v < nv; ++v) b[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < mr; ++r) {
    const Vec<T> ar = broadcast(a[r * lda]);
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) acc[r * nv + v] += ar * b[v];
  }
}

// Two steps of k at once: each lane holds a pair.
FASTRNN_INLINE void multiply_add(Vec<float>* acc, int mr, int nv, const bf16* a, int64_t lda, const bf16* panel) {
  using Pairs = Vec<uint32_t>;
  Pairs b[kMaxVectors];
#pragma GCC unroll 4
  for (int v = 0; v < nv; ++v) b[v] = load_as<Pairs>(panel + v * 2 * kLanes<float>);
#pragma GCC unroll 16
  for (int r = 0; r < mr; ++r) {
    uint32_t pair;
    std::memcpy(&pair, a + r * lda, sizeof pair);
    const Pairs ar = broadcast(pair);
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) {
#if defined(__AVX512BF16__)
      acc[r * nv + v] =
          _mm512_dpbf16_ps(acc[r * nv + v], reinterpret_cast<__m512bh>(ar), reinterpret_cast<__m512bh>(b[v]));
#else
      using V = Vec<float>;
      acc[r * nv + v] += reinterpret_cast<V>(ar << 16) * reinterpret_cast<V>(b[v] << 16);
      acc[r * nv + v] += reinterpret_cast<V>(ar & 0xffff0000u) * reinterpret_cast<V>(b[v] & 0xffff0000u);
#endif
    }
  }
}

// One vector of a row times one of another, lane by lane; of bf16 twice as many elements.
template <class T>
FASTRNN_INLINE void multiply_add_along(Vec<T>& acc, const T* a, const T* b) {
  acc += load(a) * load(b);
}

FASTRNN_INLINE void multiply_add_along(Vec<float>& acc, const bf16* a, const bf16* b) {
#if defined(__AVX512BF16__)
  acc = _mm512_dpbf16_ps(acc, load_as<__m512bh>(a), load_as<__m512bh>(b));
#else
  constexpr int lanes = kLanes<float>;
  acc += load(a) * load(b);
  acc += load(a + lanes) * load(b + lanes);
#endif
}

template <class T>
inline constexpr int kPair = 1;
template <>
inline constexpr int kPair<bf16> = 2;

// Steps of depth that one accumulator sums up. A deeper product is the sum of such sums, for the error of a sum grows
// with the square root of its terms. The result of bf16 is rounded by far more than any sum of floats errs.
template <class T>
inline constexpr int64_t kSumDepth = 128;
template <>
inline constexpr int64_t kSumDepth<bf16> = std::numeric_limits<int64_t>::max();

// C, rows c_stride apart, is the product plus the rows at `init`: the bias, repeated by init_stride 0, or the C of an
// earlier part of K. `ahead` is weights soon wanted: one cache line of it is fetched into L2 for every k, so that
// panels that come from beyond L2 arrive while earlier ones are multiplied.
template <class T, int MR, int NV>
void block(const T* a, int64_t lda, const T* panel, int64_t K, const Acc<T>* init, int64_t init_stride, Acc<T>* c,
           int64_t c_stride, const void* ahead) {
  using A = Acc<T>;
  const char* line = static_cast<const char*>(ahead);
  int64_t k = 0;
  do {
    const int64_t end = K - k < kSumDepth<T> ? K : k + kSumDepth<T>;
    AccVec<T> acc[MR * NV] = {};
    for (; k < end; k += kPair<T>) {
      __builtin_prefetch(line, 0, 2);
      line += kLineBytes;
      multiply_add(acc, MR, NV, a + k, lda, panel);
      panel += NV * kLanes<A> * kPair<T>;
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        store(c + r * c_stride + v * kLanes<A>, load(init + r * init_stride + v * kLanes<A>) + acc[r * NV + v]);
      }
    }
    init = c;
    init_stride = c_stride;
  } while (k < K);
}

template <class T>
using Block = void (*)(const T*, int64_t, const T*, int64_t, const Acc<T>*, int64_t, Acc<T>*, int64_t, const void*);

template <class T, int NV, int MR>
Block<T> find_block(int rows) {
  if constexpr (MR == 0) {
    return nullptr;
  } else {
    return rows == MR ? block<T, MR, NV> : find_block<T, NV, MR - 1>(rows);
  }
}

template <class T>
Block<T> find_block(int nv, int rows) {
  switch (nv) {
    case 1:
      return find_block<T, 1, max_rows(1)>(rows);
    case 2:
      return find_block<T, 2, max_rows(2)>(rows);
    case 3:
      return find_block<T, 3, max_rows(3)>(rows);
    default:
      return find_block<T, 4, max_rows(4)>(rows);
  }
}

#if defined(__AMX_BF16__)
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles that hold fewer rows take less time: [rows], for products by parts of up to a block's rows, whose tiles are
// told in split.h.
struct TileConfigs {
  TileConfig of[kBlockRows + 1];
};
constexpr TileConfigs tile_configs() {
  TileConfigs configs;
  for (int rows = 1; rows <= kBlockRows; ++rows) {
    uint8_t* const of_tile = configs.of[rows].rows;
    if (rows > kTileRows) {  // the lower of two tiles
      of_tile[2] = of_tile[3] = of_tile[5] = static_cast<uint8_t>(rows - kTileRows);
      continue;
    }
    for (int tile = 0; tile < 5; ++tile) of_tile[tile] = static_cast<uint8_t>(rows);  // all but the weights'
  }
  return configs;
}

// Tiles 0 and 1 hold sums of 16 rows side by side, where there is a pair; 2 and 3 those of the 16 rows below.
template <bool Two>
FASTRNN_INLINE void load_sums(const float* from, int64_t stride, bool pair) {
  const float* const low = from + 16 * stride;
  _tile_loadd(0, from, stride * 4);
  if (pair) _tile_loadd(1, from + 16, stride * 4);
  if constexpr (Two) _tile_loadd(2, low, stride * 4);
  if (Two && pair) _tile_loadd(3, low + 16, stride * 4);
}

template <bool Two>
FASTRNN_INLINE void store_sums(float* to, int64_t stride, bool pair) {
  float* const low = to + 16 * stride;
  _tile_stored(0, to, stride * 4);
  if (pair) _tile_stored(1, to + 16, stride * 4);
  if constexpr (Two) _tile_stored(2, low, stride * 4);
  if (Two && pair) _tile_stored(3, low + 16, stride * 4);
}

// Blocks of up to 32 rows. Two tiles of A meet two of B at a time, so that each B tile, the one that comes from L2, is
// loaded once: tiles 0-3 accumulate, 4-5 hold A, 6-7 B.
template <int NV, bool Two>
void tile_block(const bf16* a, int64_t lda, const bf16* panel, int64_t K, const float* init, int64_t init_stride,
                float* c, int64_t c_stride, const void* ahead) {
  constexpr int ld = NV * 64;
  const char* line = static_cast<const char*>(ahead);
  for (int v = 0; v < NV; v += 2) {
    const bool pair = v + 1 < NV;
    load_sums<Two>(init + v * 16, init_stride, pair);
    const char* b = reinterpret_cast<const char*>(panel) + v * 64;
    for (int64_t k = 0; k < K; k += 32) {
      for (int i = 0; i < 16; ++i) __builtin_prefetch(line + i * kLineBytes, 0, 2);
      line += 16 * kLineBytes;
      _tile_loadd(6, b, ld);
      _tile_loadd(4, a + k, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Two) _tile_loadd(5, a + 16 * lda + k, lda * 2);
      if constexpr (Two) _tile_dpbf16ps(2, 5, 6);
      if (pair) {
        _tile_loadd(7, b + 64, ld);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (Two) _tile_dpbf16ps(3, 5, 7);
      }
      b += 16 * ld;
    }
    store_sums<Two>(c + v * 16, c_stride, pair);
  }
}

template <int NV>
Block<bf16> find_tile_block(int rows) {
  return rows > 16 ? tile_block<NV, true> : tile_block<NV, false>;
}

inline Block<bf16> find_tile_block(int nv, int rows) {
  switch (nv) {
    case 1:
      return find_tile_block<1>(rows);
    case 2:
      return find_tile_block<2>(rows);
    case 3:
      return find_tile_block<3>(rows);
    default:
      return find_tile_block<4>(rows);
  }
}
#endif

// The tile unit is configured for as long as one of these lives; nothing elsewhere.
class TileScope {
 public:
#if defined(__AMX_BF16__)
  TileScope() { load(); }
  ~TileScope() { _tile_release(); }
  // For products by parts of so many rows, or of more with kBlockRows, which fits all others too.
  void fit(int64_t rows) {
    const int wanted = static_cast<int>(rows < kBlockRows ? rows : kBlockRows);
    if (wanted == rows_) return;
    rows_ = wanted;
    load();
  }
#else
  TileScope() {}
  void fit(int64_t) {}
#endif
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

#if defined(__AMX_BF16__)
 private:
  void load() const { _tile_loadconfig(&kConfigs.of[rows_]); }

  // Static: GCC believes that the intrinsic reads but eight bytes, and leaves out what fills the rest of a local one.
  static constexpr TileConfigs kConfigs = tile_configs();
  int rows_ = kBlockRows;
#endif
};

// A row alone leaves a tile emptier than the vectors' slower arithmetic costs.
inline constexpr int kVectorRows = 1;

// A run of rows cut into blocks: of nearly equal height, so that none is left a thin, slow one, or, for tiles, of 32
// and a rest.
template <class T>
class RowBlocks {
 public:
  RowBlocks(int64_t rows, int nv, bool split = false)
      : rows_(rows), tiles_(uses_tiles(split)), count_(ceil_div(rows, tiles_ ? kBlockRows : max_rows(nv))) {}
  // As many rows of C may be written where so many are wanted.
  static int64_t written(int64_t rows, bool split) {
    return uses_tiles(split) && rows > kVectorRows ? round_up(rows, kBlockRows) : rows;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t i) const {
    if (tiles_) return i * kBlockRows < rows_ ? i * kBlockRows : rows_;
    return rows_ * i / count_;
  }
  int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }

  static Block<T> kernel(int nv, int rows) {
#if defined(__AMX_BF16__)
    if constexpr (kPair<T> == 2) {
      if (rows > kVectorRows) return find_tile_block(nv, rows);
    }
#endif
    return find_block<T>(nv, rows);
  }

 private:
  static constexpr bool uses_tiles(bool split) { return split || (kTiles && kPair<T> == 2); }

  int64_t rows_;
  bool tiles_;
  int64_t count_;
};

// C [rows, nv vectors] = init + A [rows, K] . panel, block by block; `next` is the panel wanted after this one.
template <class T>
void multiply_rows(const T* a, int64_t lda, int64_t rows, const T* panel, int64_t K, int nv, const Acc<T>* init,
                   int64_t init_stride, Acc<T>* c, int64_t c_stride, const T* next) {
  constexpr int lanes = kLanes<Acc<T>>;
  const RowBlocks<T> blocks(rows, nv);
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t begin = blocks.begin(i);
    const T* const ahead = i < nv ? next + i * K * lanes : panel;
    blocks.kernel(nv, blocks.size(i))(a + begin * lda, lda, panel, K, init + begin * init_stride, init_stride,
                                      c + begin * c_stride, c_stride, ahead);
  }
}

// The same for a deep product, a part of the depth at a time, so that a part of the panel stays near while rows pass.
template <class T>
void multiply_deep(const T* a, int64_t lda, int64_t rows, const T* panel, int64_t K, int nv, const Acc<T>* init,
                   int64_t init_stride, Acc<T>* c, const T* next) {
  constexpr int64_t most = 512;
  const int64_t width = nv * kLanes<Acc<T>>;
  for (int64_t k = 0; k < K; k += most) {
    const int64_t depth = K - k < most ? K - k : most;
    const bool last = k + depth == K;
    multiply_rows(a + k, lda, rows, panel + k * width, depth, nv, k ? c : init, k ? width : init_stride, c, width,
                  last ? next : panel + (k + depth) * width);
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
