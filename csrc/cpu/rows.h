// The right and the left side of a product over all rows of a batch, as gemm.h multiplies them: the sum may be of all
// rows, or of each sample's apart.
#pragma once

#include "pack.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Rows that one part of the inner dimension spans, and spans that are summed up one after the other: sums of more are
// taken pairwise, so that rounding errors do not grow with the number of rows.
inline constexpr int64_t kSpan = 256, kChainSpans = 8;

// How often `spans` spans must be halved until chains of them are left.
constexpr int halvings(int64_t spans) { return spans <= kChainSpans ? 0 : 1 + halvings(ceil_div(spans, 2)); }
// Most outputs of a task. The more, the less often the right-hand sides are fetched from beyond L2, which tiles wait
// for longer than vectors do.
inline constexpr int64_t kTaskRows = kTiles ? 256 : 96;

// Rows [first, first + rows) of an order, which are padded to `depth` rows and packed from row `at` on.
struct Span {
  int64_t first, rows, at, depth;
};

// The rows of a batch, one sample's after another's; of a single sample, as they lie. Spans are padded to `pad` rows.
class RowOrder {
 public:
  RowOrder(Arena& arena, const Sequence& seq, const Samples& samples, int64_t pad)
      : seq_(seq),
        samples_(samples),
        pad_(pad),
        rows_(samples.number > 1 ? arena.take<int64_t>(seq.N) : nullptr),
        begin_(arena.take<int64_t>(samples.number + 1)),
        first_span_(arena.take<int64_t>(samples.number + 1)),
        spans_(arena.take<Span>(seq.N / kSpan + samples.number)) {}

  int64_t row(int64_t i) const { return rows_ ? rows_[i] : i; }
  Range rows_of(int64_t sample) const { return {begin_[sample], begin_[sample + 1]}; }
  Range spans_of(int64_t sample) const { return {first_span_[sample], first_span_[sample + 1]}; }
  int64_t spans() const { return first_span_[samples_.number]; }
  const Span& span(int64_t i) const { return spans_[i]; }
  // Of what is packed.
  int64_t most_rows() const { return round_up(seq_.N, pad_) + (samples_.number - 1) * pad_; }

  void find() const {
    find_rows();
    int64_t spans = 0, at = 0;
    for (int64_t s = 0; s < samples_.number; ++s) {
      first_span_[s] = spans;
      for (int64_t i = begin_[s]; i < begin_[s + 1]; i += kSpan) {
        const int64_t left = begin_[s + 1] - i, rows = left < kSpan ? left : kSpan;
        spans_[spans] = {i, rows, at, round_up(rows, pad_)};
        at += spans_[spans++].depth;
      }
    }
    first_span_[samples_.number] = spans;
  }

 private:
  // Sorted by counting.
  void find_rows() const {
    begin_[0] = 0;
    begin_[samples_.number] = seq_.N;
    if (!rows_) return;
    for (int64_t s = 0; s <= samples_.number; ++s) begin_[s] = 0;
    for_each_row_back([this](int64_t, int64_t sample) { ++begin_[sample]; });
    for (int64_t s = 0, end = 0; s <= samples_.number; ++s) begin_[s] = end += begin_[s];
    for_each_row_back([this](int64_t n, int64_t sample) { rows_[--begin_[sample]] = n; });
  }

  template <class Body>
  void for_each_row_back(Body body) const {
    for (int64_t n = seq_.N, t = seq_.T - 1; t >= 0; --t) {
      for (int64_t b = seq_.active(t) - 1; b >= 0; --b) {
        --n;
        body(n, samples_.of(n, b, seq_.B));
      }
    }
  }

  Sequence seq_;
  Samples samples_;
  int64_t pad_;
  int64_t *rows_, *begin_, *first_span_;
  Span* spans_;
};

// Rows as the right-hand side of a product: spans of them, each cut into panels [depth][nv][lanes], of values or of
// their parts.
template <class T>
struct RowPanels {
  char* data;
  int64_t columns, panels;
  int nv;
  bool split;

  static RowPanels make(int64_t columns, bool split) {
    const int64_t vectors = ceil_div(columns, kLanes<Acc<T>>);
    const int nv = static_cast<int>(vectors < kMaxVectors ? vectors : kMaxVectors);
    return {nullptr, columns, ceil_div(vectors, nv), nv, split};
  }
  int64_t width() const { return nv * kLanes<Acc<T>>; }
  int64_t bytes(int64_t rows) const { return rows * panels * width() * value_bytes<T>(split); }
  T* panel(const Span& span, int64_t p) const { return reinterpret_cast<T*>(start(span, p)); }
  Split<bf16> parts(const Span& span, int64_t p) const {
    return {reinterpret_cast<bf16*>(start(span, p)), span.depth * width()};
  }
  Panel<T> at(const Span& span, int64_t p) const {
    if (split) return {nullptr, parts(span, p)};
    return {panel(span, p), {}};
  }

 private:
  char* start(const Span& span, int64_t p) const {
    return data + (span.at * panels + p * span.depth) * width() * value_bytes<T>(split);
  }
};

// One step of depth, of `lanes` columns: a row, or for bf16 two rows zipped. Rows that do not exist are zero.
template <class T>
FASTRNN_INLINE Vec<Lane<T>> depth_row(const T* first, const T* second) {
  if constexpr (kPair<T> == 1) {
    static_cast<void>(second);
    return first ? load_as<Vec<Lane<T>>>(first) : Vec<Lane<T>>{};
  } else {
    using Wide = Vec<uint32_t>;
    const Wide low = first ? __builtin_convertvector(load_as<HalfVec>(first), Wide) : Wide{};
    const Wide high = second ? __builtin_convertvector(load_as<HalfVec>(second), Wide) : Wide{};
    return low | high << 16;
  }
}

template <class T>
void pack_span(const RowPanels<T>& out, const T* const* rows, const RowOrder& order, const Span& span, int64_t p) {
  constexpr int lanes = kLanes<Acc<T>>;
  if constexpr (kSplits<T>) {
    const auto row = [&](int64_t n) { return n < span.rows ? rows[order.row(span.first + n)] : nullptr; };
    if (out.split) return split_panel(out.parts(span, p), span.depth, out.nv, out.columns, p, row);
  }
  T* to = out.panel(span, p);
  for (int64_t n = 0; n < span.depth; n += kPair<T>) {
    const T* const first = n < span.rows ? rows[order.row(span.first + n)] : nullptr;
    const T* const second = n + 1 < span.rows ? rows[order.row(span.first + n + 1)] : nullptr;
    for (int v = 0; v < out.nv; ++v, to += lanes * kPair<T>) {
      const int64_t column = (p * out.nv + v) * lanes, left = out.columns - column;
      if (left >= lanes) {
        const Vec<Lane<T>> row = depth_row(first ? first + column : nullptr, second ? second + column : nullptr);
        std::memcpy(to, &row, sizeof row);
        continue;
      }
      T tail[2][lanes] = {};
      const size_t bytes = static_cast<size_t>(left > 0 ? left : 0) * sizeof(T);
      if (first && bytes) std::memcpy(tail[0], first + column, bytes);
      if (second && bytes) std::memcpy(tail[1], second + column, bytes);
      const Vec<Lane<T>> row = depth_row<T>(tail[0], tail[1]);
      std::memcpy(to, &row, sizeof row);
    }
  }
}

// Elements from one row of a transposed span to the next: whole blocks of a transposition.
template <class T>
int64_t transposed_ld(const Span& span) {
  return round_up(span.depth, kBlockDepth<T>);
}

// Columns [0, columns) of one span of a matrix, transposed to rows [column][n], and their sums added to `sums`. Its
// rows lie pages apart: what is wanted of each is read at once, and the next ones are fetched meanwhile.
template <class T>
void pack_transposed(T* out, Acc<T>* sums, const T* in, int64_t in_ld, const RowOrder& order, const Span& span,
                     int64_t columns) {
  using L = Lane<T>;
  constexpr int lanes = kLanes<L>, step = kBlockDepth<T>;
  const int64_t ld = transposed_ld<T>(span);
  const auto row = [&](int64_t n) { return in + order.row(span.first + n) * in_ld; };
  alignas(64) Acc<T> span_sums[kTaskRows] = {};
  for (int64_t n = 0; n < ld; n += step) {
    for (int64_t i = n + step; i < n + 2 * step && i < span.rows; ++i) {
      for (int64_t m = 0; m < columns; m += kLineBytes / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(row(i) + m);
      }
    }
    const T* lines[step];
    for (int i = 0; i < step; ++i) lines[i] = n + i < span.rows ? row(n + i) : nullptr;
    for (int64_t m = 0; m < columns; m += lanes) {
      AccVec<T> sum = {};
      Vec<L> block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const T* const first = lines[i * kPair<T>] ? lines[i * kPair<T>] + m : nullptr;
        const T* const last = lines[(i + 1) * kPair<T> - 1];
        const T* const second = kPair<T> == 2 && last ? last + m : nullptr;
        block[i] = depth_row(first, second);
        if (first) sum += load(first);
        if (second) sum += load(second);
      }
      store(span_sums + m, load(span_sums + m) + sum);
      transpose<L, lanes / 2>(block);
      for (int i = 0; i < lanes; ++i) std::memcpy(out + (m + i) * ld + n, &block[i], kVectorBytes);
    }
  }
  for (int64_t m = 0; m < columns; m += lanes) store(sums + m, load(sums + m) + load(span_sums + m));
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
