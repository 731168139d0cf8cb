// The gradients that are matrix products over all timesteps, from dgates [N, gates Hp]:
//   dx = dgates_x W_ih,  dW_ih = dgates_x^T x,  dW_hh = dgates_h^T h_before,  db = column sums.
// Threads take tasks from a counter, so that one that lost its core delays the others by no more than a task; what a
// task computes does not depend on who takes it.
#pragma once

#include "arena.h"
#include "pack.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Rows n of dgates that one part of dW's inner dimension spans.
inline constexpr int64_t kSpan = 256;
// So few rows do not pay for packing anything: they are multiplied as they lie.
inline constexpr int64_t kThinRows = 4;
// Rows of a task: a multiple of each kernel's height. Smaller ones where the larger would be too few to share out.
inline constexpr int64_t kTaskRows = 96, kSmallTaskRows = kTiles ? 32 : 48;

// Rows of the user's tensors as the right-hand side of dW: spans of kSpan rows, each cut into panels [rows][nv][lanes].
template <class T>
struct RowPanels {
  T* data;
  int64_t columns, panels, N;
  int nv;

  static RowPanels make(int64_t columns, int64_t N) {
    const int64_t vectors = ceil_div(columns, kLanes<Acc<T>>);
    const int nv = static_cast<int>(vectors < kMaxVectors ? vectors : kMaxVectors);
    return {nullptr, columns, ceil_div(vectors, nv), N, nv};
  }
  int64_t width() const { return nv * kLanes<Acc<T>>; }
  int64_t spans() const { return ceil_div(N, kSpan); }
  int64_t real_rows(int64_t span) const { return N - span * kSpan < kSpan ? N - span * kSpan : kSpan; }
  int64_t rows(int64_t span) const { return round_up(real_rows(span), kDepthPad<T>); }
  int64_t size() const { return round_up(N, kDepthPad<T>) * panels * width(); }
  T* panel(int64_t span, int64_t p) const { return data + (span * kSpan * panels + p * rows(span)) * width(); }
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
void pack_span(const RowPanels<T>& out, const T* const* rows, int64_t span, int64_t p) {
  constexpr int lanes = kLanes<Acc<T>>;
  const int64_t real = out.real_rows(span);
  T* to = out.panel(span, p);
  for (int64_t n = 0; n < out.rows(span); n += kPair<T>) {
    const T* const first = n < real ? rows[span * kSpan + n] : nullptr;
    const T* const second = n + 1 < real ? rows[span * kSpan + n + 1] : nullptr;
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

// dgates columns [m0, m0 + rows) of one span, transposed to rows [m][n], and their sums added to `sums`. Rows of dgates
// lie pages apart: what is wanted of each is read at once, and the next ones are fetched meanwhile.
template <class T>
void pack_transposed(T* out, int64_t ld, Acc<T>* sums, const T* dgates, int64_t dgates_ld, int64_t real, int64_t rows) {
  using L = Lane<T>;
  constexpr int lanes = kLanes<L>, step = lanes * kPair<T>;
  alignas(64) Acc<T> span_sums[kTaskRows] = {};
  for (int64_t n = 0; n < ld; n += step) {
    const int64_t left = (ld - n) * static_cast<int64_t>(sizeof(T));
    const bool whole = left >= kVectorBytes;
    const size_t bytes = static_cast<size_t>(whole ? kVectorBytes : left);
    for (int64_t i = n + step; i < n + 2 * step && i < real; ++i) {
      for (int64_t m = 0; m < rows; m += kLineBytes / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(dgates + i * dgates_ld + m);
      }
    }
    for (int64_t m = 0; m < rows; m += lanes) {
      AccVec<T> sum = load(span_sums + m);
      Vec<L> block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const int64_t row = n + i * kPair<T>;
        const T* const first = row < real ? dgates + row * dgates_ld + m : nullptr;
        const T* const second = kPair<T> == 2 && row + 1 < real ? first + dgates_ld : nullptr;
        block[i] = depth_row(first, second);
        if (first) sum += load(first);
        if (second) sum += load(second);
      }
      store(span_sums + m, sum);
      transpose<L, lanes / 2>(block);
      for (int i = 0; i < lanes; ++i) {
        T* const to = out + (m + i) * ld + n;
        if (whole) {
          std::memcpy(to, &block[i], kVectorBytes);
        } else {
          std::memcpy(to, &block[i], bytes);
        }
      }
    }
  }
  for (int64_t m = 0; m < rows; m += lanes) store(sums + m, load(sums + m) + load(span_sums + m));
}

template <class T>
struct ProductsLayout {
  using A = Acc<T>;
  struct Input {
    RowPanels<T> panels;
    const T** rows;  // [N]
  };
  struct GroupBuffers {
    Panels<T> w_ih;          // by columns, for dx
    T *dgates_x, *dgates_h;  // [N, depth], the same where the cell's two kinds are
    RowPanels<T> h;
    const T** h_rows;  // [N]
  };

  ProductsLayout(Arena& arena, const BackwardArgs& args, const Plan& plan, int gates, bool shared, int thread_index)
      : depth(round_up(gates * round_up(args.H, kUnitPad), kDepthPad<T>)), x(RowPanels<T>::make(args.I, args.seq.N)) {
    const int64_t N = args.seq.N;
    const int64_t dgates_size = (N + kRowPad<T>)*depth;
    thin = N < kThinRows;
    for (int i = 0; i < args.inputs(); ++i) {
      input[i].panels = x;
      input[i].panels.data = args.wants_dw_ih() && !thin ? arena.take<T>(x.size()) : nullptr;
      input[i].rows = args.wants_dw_ih() ? arena.take<const T*>(N) : nullptr;
    }
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      buffers.dgates_x = arena.take<T>(dgates_size);
      buffers.dgates_h = shared ? buffers.dgates_x : arena.take<T>(dgates_size);
      buffers.h = RowPanels<T>::make(args.H, N);
      buffers.w_ih = {nullptr, nullptr, x.panels, depth, x.nv};
      if (args.dx && !thin) {
        buffers.w_ih.data = arena.take<T>(x.panels * buffers.w_ih.stride());
        buffers.w_ih.bias = arena.take<A>(x.panels * x.width());
      }
      buffers.h.data = args.wants_dw_hh() && !thin ? arena.take<T>(buffers.h.size()) : nullptr;
      buffers.h_rows = args.wants_dw_hh() ? arena.take<const T*>(N) : nullptr;
    }
    // At least one panel, for the scan uses it too.
    const int64_t columns = x.panels * x.width() + group[0].h.panels * group[0].h.width() + kMaxVectors * kLanes<A>;
    for (int i = 0; i < plan.threads; ++i) {
      T* const a = arena.take<T>(kTaskRows * kSpan);
      A* const s = arena.take<A>(kTaskRows);
      A* const c = arena.take<A>(kTaskRows * columns);
      if (i == thread_index) lhs = a, sums = s, stage = c;
    }
  }

  int64_t depth;
  bool thin;
  RowPanels<T> x;  // what all inputs have in common
  Input input[kMaxGroups];
  GroupBuffers group[kMaxGroups];
  T* lhs = nullptr;    // [kTaskRows, kSpan] of this thread: dgates transposed
  A* sums = nullptr;   // [kTaskRows]
  A* stage = nullptr;  // [panels][kTaskRows][width]: the C of a task
};

template <class T>
class Products {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = ProductsLayout<T>;
  static constexpr int lanes = kLanes<A>;
  static constexpr int64_t kThinColumns = 2 * kMaxVectors * lanes;
  static constexpr A kZeros[kMaxVectors * lanes] = {};

 public:
  Products(const BackwardArgs& args, const Layout& layout, const Team& team, int threads, int gates, bool shared)
      : args_(args),
        seq_(args.seq),
        layout_(layout),
        team_(team),
        threads_(threads),
        gates_(gates),
        shared_(shared),
        Hp_(round_up(args.H, kUnitPad)) {}

  // Everything that does not depend on dgates: the right-hand sides.
  void prepare() {
    for (int i = 0; i < args_.inputs(); ++i) {
      if (layout_.input[i].rows) find_x_rows(i);
    }
    for (int g = 0; g < args_.G; ++g) {
      if (layout_.group[g].h_rows) find_h_rows(g);
    }
  }

  void pack(int thread, int threads) {
    const Layout& l = layout_;
    if (l.thin) return;
    for (int g = 0; g < args_.G; ++g) {
      if (args_.dx) {
        const T* const w = static_cast<const T*>(args_.groups[g].w_ih);
        const Range mine = split(l.x.panels, threads, thread);
        for (int64_t p = mine.begin; p < mine.end; ++p) pack_columns(l.group[g].w_ih, p, w, gates_, args_.H, args_.I);
      }
      if (l.group[g].h_rows) pack_rows_of(l.group[g].h, l.group[g].h_rows, thread, threads);
    }
    for (int i = 0; i < args_.inputs(); ++i) {
      if (l.input[i].rows) pack_rows_of(l.input[i].panels, l.input[i].rows, thread, threads);
    }
  }

  void run(int thread) {
    if (args_.dgates_x || args_.dgates_h) copy_dgates(split(seq_.N, threads_, thread));
    layout_.thin ? run_thin() : run_tasks();
  }

 private:
  const typename Layout::Input& input_of(int g) const { return layout_.input[args_.inputs() > 1 ? g : 0]; }

  // The long tasks first, so that the short ones even out the end.
  void run_tasks() {
    const int64_t M = gates_ * Hp_, kinds = shared_ ? 1 : 2;
    const int64_t rows = M >= kTaskRows * 4 * threads_ ? kTaskRows : kSmallTaskRows, blocks = ceil_div(M, rows);
    const int64_t weight_tasks = args_.G * kinds * blocks;
    const int64_t row_blocks = ceil_div(seq_.N, kTaskRows);
    const int64_t tasks = weight_tasks + (args_.dx ? args_.inputs() * row_blocks : 0);
    for (int64_t i = team_.next_task(); i < tasks; i = team_.next_task()) {
      if (i < weight_tasks) {
        const int64_t m0 = i % blocks * rows;
        weight_gradient(static_cast<int>(i / blocks / kinds), i / blocks % kinds == 1, m0,
                        M - m0 < rows ? M - m0 : rows);
      } else {
        const int64_t n0 = (i - weight_tasks) % row_blocks * kTaskRows;
        input_gradient(static_cast<int>((i - weight_tasks) / row_blocks), n0,
                       seq_.N - n0 < kTaskRows ? seq_.N - n0 : kTaskRows);
      }
    }
  }

  // Without the padding of units.
  void copy_dgates(Range rows) const {
    for (int g = 0; g < args_.G; ++g) {
      const typename Layout::GroupBuffers& buffers = layout_.group[g];
      for (int64_t n = rows.begin; n < rows.end; ++n) {
        copy_gates(args_.dgates_x, buffers.dgates_x + n * layout_.depth, g * seq_.N + n);
        copy_gates(args_.dgates_h, buffers.dgates_h + n * layout_.depth, g * seq_.N + n);
      }
    }
  }

  void copy_gates(void* out, const T* dgates, int64_t row) const {
    if (!out) return;
    T* const to = static_cast<T*>(out) + row * gates_ * args_.H;
    for (int k = 0; k < gates_; ++k) std::memcpy(to + k * args_.H, dgates + k * Hp_, args_.H * sizeof(T));
  }

  void find_x_rows(int i) {
    for (int64_t t = 0; t < seq_.T; ++t) {
      for (int64_t b = 0; b < seq_.active(t); ++b) {
        layout_.input[i].rows[seq_.offset(t) + b] = args_.template x_row<T>(i, t, b);
      }
    }
  }

  // The state before each row's step: an earlier row of y, the initial state, or nothing, which stands for zeros.
  void find_h_rows(int g) {
    const T* const y = static_cast<const T*>(args_.y) + g * args_.H;
    const T* const h0 = args_.h0 ? static_cast<const T*>(args_.h0) + g * seq_.B * args_.H : nullptr;
    for (int64_t t = 0; t < seq_.T; ++t) {
      const int64_t before = args_.groups[g].time_before(t), rows_before = seq_.active_or_none(before);
      for (int64_t b = 0; b < seq_.active(t); ++b) {
        const T* const initial = h0 ? h0 + b * args_.H : nullptr;
        layout_.group[g].h_rows[seq_.offset(t) + b] =
            b < rows_before ? y + (seq_.offset(before) + b) * args_.G * args_.H : initial;
      }
    }
  }

  void pack_rows_of(const RowPanels<T>& out, const T* const* rows, int thread, int threads) {
    const Range mine = split(out.spans() * out.panels, threads, thread);
    for (int64_t i = mine.begin; i < mine.end; ++i) pack_span(out, rows, i / out.panels, i % out.panels);
  }

  // The groups that read an input.
  Range readers(int input) const { return args_.inputs() > 1 ? Range{input, input + 1} : Range{0, args_.G}; }
  T* dx_row(int input, int64_t n) const { return static_cast<T*>(args_.dx) + (n * args_.inputs() + input) * args_.I; }

  void input_gradient(int input, int64_t n0, int64_t rows) {
    const RowPanels<T>& x = layout_.x;
    const Range groups = readers(input);
    for (int64_t p = 0; p < x.panels; ++p) {
      for (int64_t g = groups.begin; g < groups.end; ++g) {
        const Panels<T>& w = layout_.group[g].w_ih;
        const T* const next = w.panel(p + 1 < x.panels ? p + 1 : 0);
        const bool first = g == groups.begin;
        multiply_deep(layout_.group[g].dgates_x + n0 * layout_.depth, layout_.depth, rows, w.panel(p), layout_.depth,
                      x.nv, first ? kZeros : layout_.stage, first ? 0 : x.width(), layout_.stage, next);
      }
      for (int64_t r = 0; r < rows; ++r)
        store_panel(dx_row(input, n0 + r), args_.I, layout_.stage + r * x.width(), p, x.nv);
    }
  }

  void run_thin() {
    const int64_t parts = ceil_div(args_.I, kThinColumns), columns = args_.dx ? args_.inputs() * parts : 0;
    const int64_t blocks = ceil_div(args_.H, kTaskRows), tasks = columns + args_.G * gates_ * blocks;
    for (int64_t i = team_.next_task(); i < tasks; i = team_.next_task()) {
      if (i < columns) {
        thin_input_gradient(static_cast<int>(i / parts), i % parts * kThinColumns);
        continue;
      }
      const int64_t j = i - columns, unit = j % blocks * kTaskRows, gate = j / blocks % gates_;
      const int64_t rows = args_.H - unit < kTaskRows ? args_.H - unit : kTaskRows;
      const int g = static_cast<int>(j / blocks / gates_);
      for (int64_t r = 0; r < rows; ++r) thin_weight_gradient(g, gate, unit + r);
    }
  }

  // Columns of dx as a sum of rows of W_ih.
  void thin_input_gradient(int input, int64_t column0) const {
    const int64_t end = args_.I - column0 < kThinColumns ? args_.I : column0 + kThinColumns;
    for (int64_t n = 0; n < seq_.N; ++n) {
      for (int64_t column = column0; column < end; column += kMaxVectors * lanes) thin_columns(input, n, column, end);
    }
  }

  void thin_columns(int input, int64_t n, int64_t column, int64_t end) const {
    V sums[kMaxVectors] = {};
    const Range groups = readers(input);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const T* w = static_cast<const T*>(args_.groups[g].w_ih) + column;
      const T* const dgates = layout_.group[g].dgates_x + n * layout_.depth;
      for (int64_t row = 0; row < gates_ * args_.H; ++row, w += args_.I) {
        const V d = broadcast(widen_one(dgates[row / args_.H * Hp_ + row % args_.H]));
        for (int v = 0; v < kMaxVectors && column + v * lanes < end; ++v) {
          sums[v] += d * load_first(w + v * lanes, end - column - v * lanes);
        }
      }
    }
    for (int v = 0; v < kMaxVectors && column + v * lanes < end; ++v) {
      store_first(dx_row(input, n) + column + v * lanes, sums[v], end - column - v * lanes);
    }
  }

  void thin_weight_gradient(int g, int64_t gate, int64_t unit) const {
    const GroupGradients& out = args_.gradients[g];
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    const int64_t row = gate * args_.H + unit, column = gate * Hp_ + unit;
    thin_row(out.dw_ih, out.db_ih, row, buffers.dgates_x + column, input_of(g).rows, args_.I);
    thin_row(out.dw_hh, out.db_hh, row, buffers.dgates_h + column, buffers.h_rows, args_.H);
  }

  // Row `row` of dW and db: the sum over n of one element of dgates times a row of the right-hand side.
  void thin_row(void* dw, void* db, int64_t row, const T* dgates, const T* const* right, int64_t columns) const {
    A d[kThinRows] = {}, sum = 0;
    for (int64_t n = 0; n < seq_.N; ++n) sum += d[n] = widen_one(dgates[n * layout_.depth]);
    if (db) store_first(static_cast<T*>(db) + row, broadcast(sum), 1);
    if (!dw) return;
    T* const to = static_cast<T*>(dw) + row * columns;
    for (int64_t column = 0; column < columns; column += lanes) {
      V c = {};
      for (int64_t n = 0; n < seq_.N; ++n) {
        if (right[n]) c += d[n] * load_first(right[n] + column, columns - column);
      }
      store_first(to + column, c, columns - column);
    }
  }

  static void store_panel(T* row, int64_t columns, const A* c, int64_t p, int nv) {
    for (int v = 0; v < nv; ++v) {
      const int64_t column = (p * nv + v) * lanes;
      if (column >= columns) return;
      store_first(row + column, load(c + v * lanes), columns - column);
    }
  }

  // Rows [m0, m0 + rows) of dW_ih and db_ih, of dW_hh and db_hh, or of both where one dgates serves both.
  void weight_gradient(int g, bool recurrent, int64_t m0, int64_t rows) {
    const GroupGradients& out = args_.gradients[g];
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    const bool ih = !recurrent, hh = recurrent || shared_;
    const bool any = (ih && (out.dw_ih || out.db_ih)) || (hh && (out.dw_hh || out.db_hh));
    if (!any) return;
    const T* const dgates = (recurrent ? buffers.dgates_h : buffers.dgates_x) + m0;
    A* const h_stage = layout_.stage + layout_.x.panels * kTaskRows * layout_.x.width();
    std::memset(layout_.sums, 0, kTaskRows * sizeof(A));
    for (int64_t span = 0; span < layout_.x.spans(); ++span) {
      const int64_t ld = layout_.x.rows(span);
      pack_transposed(layout_.lhs, ld, layout_.sums, dgates + span * kSpan * layout_.depth, layout_.depth,
                      layout_.x.real_rows(span), rows);
      if (ih && out.dw_ih) add_span(input_of(g).panels, span, rows, layout_.stage);
      if (hh && out.dw_hh) add_span(buffers.h, span, rows, h_stage);
    }
    if (ih) store_gradient(out.dw_ih, out.db_ih, layout_.x, layout_.stage, m0, rows);
    if (hh) store_gradient(out.dw_hh, out.db_hh, buffers.h, h_stage, m0, rows);
  }

  void add_span(const RowPanels<T>& right, int64_t span, int64_t rows, A* stage) const {
    const int64_t K = right.rows(span);
    for (int64_t p = 0; p < right.panels; ++p) {
      A* const c = stage + p * kTaskRows * right.width();
      const T* const next = right.panel(p + 1 < right.panels ? span : 0, p + 1 < right.panels ? p + 1 : 0);
      multiply_rows(layout_.lhs, K, rows, right.panel(span, p), K, right.nv, span ? c : kZeros,
                    span ? right.width() : 0, c, next);
    }
  }

  void store_gradient(void* dw, void* db, const RowPanels<T>& right, const A* stage, int64_t m0, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t gate = (m0 + r) / Hp_, unit = (m0 + r) % Hp_;
      if (unit >= args_.H) continue;
      const int64_t row = gate * args_.H + unit;
      if (db) store_first(static_cast<T*>(db) + row, broadcast(layout_.sums[r]), 1);
      if (!dw) continue;
      for (int64_t p = 0; p < right.panels; ++p) {
        const A* const c = stage + (p * kTaskRows + r) * right.width();
        store_panel(static_cast<T*>(dw) + row * right.columns, right.columns, c, p, right.nv);
      }
    }
  }

  const BackwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const Team& team_;
  int threads_, gates_;
  bool shared_;
  int64_t Hp_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
