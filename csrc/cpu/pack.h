// Weights rewritten as panels (see gemm.h), and the product with weights as they lie in memory for calls too small to
// pay for that.
#pragma once

#include <stdexcept>
#include <type_traits>
#include <utility>

#include "arena.h"
#include "split.h"

// GCC 12 and clang spell a shuffle alike; older GCC has its own builtin.
#if defined(__has_builtin)
#define FASTRNN_HAS_SHUFFLEVECTOR __has_builtin(__builtin_shufflevector)
#else
#define FASTRNN_HAS_SHUFFLEVECTOR 0
#endif

namespace fastrnn {
namespace FASTRNN_ISA {

// Bytes that a value takes, or its parts (split.h).
template <class T>
constexpr int64_t value_bytes(bool split) {
  return static_cast<int64_t>(split ? kParts * sizeof(bf16) : sizeof(T));
}

// One panel from some depth on: of values, or of their parts.
template <class T>
struct Panel {
  const T* values;
  Split<bf16> parts;
};

// A weight matrix as outputs x depth, cut into panels. Output (unit, gate) is weight row gate * H + unit, or,
// transposed for backward, output unit is weight column `unit` and depth runs over the padded gates [gates][Hp].
template <class T>
struct Panels {
  char* data;
  Acc<T>* bias;   // [panels][nv * lanes]
  int64_t count;  // panels
  int64_t depth;  // padded K
  int nv;         // vectors in a panel
  bool split;     // they are of parts of the values (split.h)
  bool in_turn;   // each is packed where the one before it was, just before its only product

  // Of `vectors` vectors of units, each with all its gates; without room if it is not wanted. Throws std::logic_error
  // for more vectors than there are products of, which only products by parts have many of.
  static Panels make(Arena& arena, int64_t units, int vectors, int gates, int64_t K, bool split, bool wanted,
                     Copies copies, bool in_turn = false) {
    Panels p{nullptr, nullptr, ceil_div(units, vectors * kLanes<Acc<T>>), 0, vectors * gates, split, in_turn};
    if (p.nv > (split ? kMostVectors : kMaxVectors)) throw std::logic_error("a panel has too many vectors");
    p.depth = round_up(K, split ? kTileDepth : kDepthPad<T>);
    if (!wanted) return p;
    const int64_t kept = in_turn ? 1 : p.count;
    p.data = arena.take<char>(kept * p.bytes(), copies);
    p.bias = arena.take<Acc<T>>(kept * p.width(), copies);
    return p;
  }

  int width() const { return nv * kLanes<Acc<T>>; }
  int64_t size() const { return depth * width(); }
  int64_t bytes() const { return size() * value_bytes<T>(split); }
  // Which of those kept the p-th one is.
  int64_t place(int64_t p) const { return in_turn ? 0 : p; }
  T* panel(int64_t p) const { return reinterpret_cast<T*>(data + place(p) * bytes()); }
  Split<bf16> parts(int64_t p) const { return {reinterpret_cast<bf16*>(data + place(p) * bytes()), size()}; }
  Panel<T> from(int64_t p, int64_t k) const {
    if (split) return {nullptr, parts(p).from(k * width())};
    return {panel(p) + k * width(), {}};
  }
  Acc<T>* panel_bias(int64_t p) const { return bias + place(p) * width(); }
  // What block i of a run over panel p fetches ahead: its part of the panel that comes next, while there is any left.
  const void* ahead(int64_t p, int64_t next, int64_t i) const {
    const int64_t part = depth / (split ? 2 : kPair<T>)*kLineBytes;
    const bool left = !in_turn && next >= 0 && next < count && (i + 1) * part <= bytes();
    return left ? data + next * bytes() + i * part : data + place(p) * bytes();
  }
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

// A square block of vectors, transposed by exchanging ever smaller halves between pairs of them. Pairs of bf16 travel
// as one 32-bit lane, which is just how a panel wants them.
template <class T>
using Lane = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
inline constexpr int kBlockDepth = kLanes<Lane<T>> * kPair<T>;

template <class L, int Half, int... I>
FASTRNN_INLINE void exchange_halves(Vec<L>& a, Vec<L>& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if FASTRNN_HAS_SHUFFLEVECTOR
  const Vec<L> low = __builtin_shufflevector(a, b, (I & Half ? I - Half + n : I)...);
  const Vec<L> high = __builtin_shufflevector(a, b, (I & Half ? I + n : I + Half)...);
#else
  const Vec<L> low = __builtin_shuffle(a, b, Vec<L>{(I & Half ? I - Half + n : I)...});
  const Vec<L> high = __builtin_shuffle(a, b, Vec<L>{(I & Half ? I + n : I + Half)...});
#endif
  a = low;
  b = high;
}

template <class L, int Half>
FASTRNN_INLINE void transpose(Vec<L>* rows) {
  if constexpr (Half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<L>; ++i) {
      if (!(i & Half)) exchange_halves<L, Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, kLanes<L>>{});
    }
    transpose<L, Half / 2>(rows);
  }
}

// out[k][lane] = in[lane][k] for one block, 0 where `in` has no row; rows of `out` are `width` lanes apart, those of
// `in`, of which there are `valid`, `ld` elements.
template <class T>
void transpose_block(T* out, int width, const T* in, int64_t ld, int valid) {
  using L = Lane<T>;
  Vec<L> rows[kLanes<L>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<L>; ++i) rows[i] = i < valid ? load_as<Vec<L>>(in + i * ld) : Vec<L>{};
  transpose<L, kLanes<L> / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<L>; ++i) std::memcpy(out + i * width * kPair<T>, &rows[i], sizeof rows[i]);
}

// Depths k and on of vector v of a panel, from as many rows of w, of which `valid` exist.
template <class T>
void split_block(const Panels<T>& out, int64_t p, int64_t k, int v, const T* w, int64_t K, int valid) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T block[lanes * lanes];
  if (valid == lanes && k + lanes <= K) {
    transpose_block(block, lanes, w + k, K, lanes);
  } else {
    std::memset(block, 0, sizeof block);
    for (int lane = 0; lane < valid; ++lane) {
      for (int64_t i = 0; i < lanes && k + i < K; ++i) block[i * lanes + lane] = w[lane * K + k + i];
    }
  }
  for (int i = 0; i < lanes; i += 2) {
    store_pair(out.parts(p).from(pair_at(k + i, v, out.nv)), load(block + i * lanes), load(block + (i + 1) * lanes));
  }
}

// The rows of w [gates * H, K] that vector v of panel p holds, unit vectors outermost: vector v is gate v % gates of
// unit vector v / gates.
struct VectorRows {
  int64_t first;
  int valid;  // how many there are: past the last unit fewer than lanes

  template <class T>
  static VectorRows of(const Panels<T>& panels, int64_t p, int v, int gates, int64_t H) {
    constexpr int64_t lanes = kLanes<Acc<T>>;
    const int64_t unit = (p * (panels.nv / gates) + v / gates) * lanes, left = H - unit;
    return {v % gates * H + unit, static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes)};
  }
};

template <class T>
void pack_bias(const Panels<T>& out, int64_t p, const T* bias, int gates, int64_t H) {
  constexpr int lanes = kLanes<Acc<T>>;
  for (int v = 0; v < out.nv; ++v) {
    const VectorRows rows = VectorRows::of(out, p, v, gates, H);
    for (int lane = 0; lane < lanes; ++lane) {
      out.panel_bias(p)[v * lanes + lane] = bias && lane < rows.valid ? widen_one(bias[rows.first + lane]) : 0;
    }
  }
}

// Panel p of w [gates * H, K].
template <class T>
void pack_rows(const Panels<T>& out, int64_t p, const T* w, int gates, int64_t H, int64_t K) {
  constexpr int lanes = kLanes<Acc<T>>;
  for (int v = 0; v < out.nv; ++v) {
    const auto [row0, valid] = VectorRows::of(out, p, v, gates, H);
    int64_t k = 0;
    if constexpr (kSplits<T>) {
      for (; out.split && k < out.depth; k += lanes) split_block(out, p, k, v, w + row0 * K, K, valid);
    }
    for (; k + kBlockDepth<T> <= K; k += kBlockDepth<T>) {
      transpose_block(&out.at(p, k, v, 0), out.width(), w + row0 * K + k, K, valid);
    }
    for (; k < out.depth; ++k) {
      const int n = k < K ? valid : 0;
      for (int lane = 0; lane < n; ++lane) out.at(p, k, v, lane) = w[(row0 + lane) * K + k];
      for (int lane = n; lane < lanes; ++lane) out.at(p, k, v, lane) = T{};
    }
  }
}

// Row k of w [gates * H, columns] with its rows padded to [gates][Hp], null where there is none.
template <class T>
const T* row_of_depth(const T* w, int64_t k, int gates, int64_t H, int64_t columns) {
  const int64_t Hp = round_up(H, kUnitPad), gate = k / Hp, unit = k % Hp;
  return gate < gates && unit < H ? w + (gate * H + unit) * columns : nullptr;
}

// Panel p of the transpose of w [gates * H, columns]: outputs are columns, depth is [gates][Hp].
template <class T>
void pack_columns(const Panels<T>& out, int64_t p, const T* w, int gates, int64_t H, int64_t columns) {
  constexpr int lanes = kLanes<Acc<T>>;
  for (int i = 0; i < out.width(); ++i) out.panel_bias(p)[i] = 0;
  if constexpr (kSplits<T>) {
    const auto row = [&](int64_t k) { return row_of_depth(w, k, gates, H, columns); };
    if (out.split) return split_panel(out.parts(p), out.depth, out.nv, columns, p, row);
  }
  for (int64_t k = 0; k < out.depth; ++k) {
    const T* const row = row_of_depth(w, k, gates, H, columns);
    for (int v = 0; v < out.nv; ++v) {
      const int64_t column0 = (p * out.nv + v) * lanes;
      const int64_t left = row ? columns - column0 : 0;
      const int n = static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes);
      T* const to = &out.at(p, k, v, 0);
      if (kPair<T> == 1 && n == lanes) {
        std::memcpy(to, row + column0, lanes * sizeof(T));
        continue;
      }
      for (int lane = 0; lane < lanes; ++lane) to[lane * kPair<T>] = lane < n ? row[column0 + lane] : T{};
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

// Products of a with as many rows as a vector has lanes. A sum of each row's own stays in registers until the end, when
// all are added up by one transposition.
template <class T>
FASTRNN_INLINE AccVec<T> dots(const T* rows, const T* a, int64_t n) {
  using A = Acc<T>;
  using L = Lane<A>;
  constexpr int lanes = kLanes<A>, step = lanes * kPair<T>;
  AccVec<T> sums[lanes] = {};
  int64_t k = 0;
  for (; k + step <= n; k += step) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) multiply_add_along(sums[i], rows + i * n + k, a + k);
  }
  for (; k < n; k += lanes) {
    const AccVec<T> last = load_first(a + k, n - k);
    for (int i = 0; i < lanes; ++i) sums[i] += load_first(rows + i * n + k, n - k) * last;
  }
  Vec<L> block[lanes];
  std::memcpy(block, sums, sizeof block);
  transpose<L, lanes / 2>(block);
  AccVec<T> total = {};
  for (int i = 0; i < lanes; ++i) total += reinterpret_cast<AccVec<T>>(block[i]);
  return total;
}

// What stands to the left in a product: rows `ld` apart, and their parts where it is these that are multiplied. Null
// stands for zeros.
template <class T>
struct LeftRows {
  const T* values;
  int64_t ld;
  Split<bf16> parts;
};

// C [rows, nv vectors] = init + A [rows, K] . panel: see multiply_rows.
template <class T>
void multiply(const LeftRows<T>& a, int64_t rows, const Panel<T>& panel, int64_t K, int nv, const Acc<T>* init,
              int64_t init_stride, Acc<T>* c, int64_t c_stride, const Panel<T>& next) {
  if constexpr (kSplits<T>) {
    if (a.parts.data) {
      const int64_t depth = round_up(K, kTileDepth);
      return multiply_split(a.parts, rows, panel.parts, depth, nv, init, init_stride, c, c_stride, next.parts.data);
    }
  }
  multiply_rows(a.values, a.ld, rows, panel.values, K, nv, init, init_stride, c, c_stride, next.values);
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
    if (!packed) return;
    pack_bias(panels, p, b, gates, H);
    pack_rows(panels, p, w, gates, H, K);
  }

  // For a product with `a`, of which null stands for zeros.
  void pack_in_turn(int64_t p, const T* a) const {
    if (a) return pack(p);
    pack_bias(panels, p, b, gates, H);
  }

  // `room` is for parts. What is not finite they cannot tell from NaN: then there are none.
  LeftRows<T> left(const T* a, int64_t ld, int64_t rows, const Split<bf16>& room) const {
    if constexpr (kSplits<T>) {
      if (a && panels.split && split_rows(room, a, ld, rows, K)) return {a, ld, room};
    }
    return {a, ld, {}};
  }

  // C of up to kMaxRows rows from `row` on, a panel's width apart.
  void multiply(Acc<T>* c, const LeftRows<T>& a, int64_t row, int rows, int64_t p, const void* ahead) const {
    const int64_t depth = a.values ? panels.depth : 0, width = panels.width();
    if constexpr (kSplits<T>) {
      if (a.parts.data) {
        return multiply_split(a.parts.from(row * depth), rows, panels.parts(p), depth, panels.nv, panels.panel_bias(p),
                              0, c, width, ahead);
      }
    }
    const T* const first = a.values ? a.values + row * a.ld : nullptr;
    if (packed && !panels.split) {
      const Block<T> kernel = RowBlocks<T>::kernel(panels.nv, rows);
      return kernel(first, a.ld, panels.panel(p), depth, panels.panel_bias(p), 0, c, width, ahead);
    }
    for (int r = 0; r < rows; ++r) multiply_unpacked(c + r * width, first ? first + r * a.ld : nullptr, p);
  }

 private:
  void multiply_unpacked(Acc<T>* c, const T* a, int64_t p) const {
    constexpr int lanes = kLanes<Acc<T>>;
    const int64_t depth = a ? K : 0;
    for (int v = 0; v < panels.nv; ++v) {
      const int64_t unit0 = (p * (panels.nv / gates) + v / gates) * lanes;
      if (unit0 + lanes <= H) {
        const int64_t row0 = v % gates * H + unit0;
        const AccVec<T> sums = dots(w + row0 * K, a, depth);
        store(c + v * lanes, b ? sums + load(b + row0) : sums);
        continue;
      }
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t row = v % gates * H + unit0 + lane;
        const bool real = unit0 + lane < H;
        c[v * lanes + lane] = real ? dot(w + row * K, a, depth) + (b ? widen_one(b[row]) : 0) : 0;
      }
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
