// The gradients that are matrix products over all timesteps, from dgates [N, gates Hp]:
//   dx = dgates_x W_ih,  dW_ih = dgates_x^T x,  dW_hh = dgates_h^T h_before,  db = column sums,
// and, with a projection, dW_hr = dprojection^T (what is projected).
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
    T* dprojection;          // [N, proj_depth]
    RowPanels<T> h, whole_h;
    const T **h_rows, **whole_h_rows;  // [N]
  };

  ProductsLayout(Arena& arena, const BackwardArgs& args, const Plan& plan, int gates, bool shared, int thread_index)
      : depth(round_up(gates * round_up(args.H, kUnitPad), kDepthPad<T>)),
        proj_depth(round_up(round_up(args.P, kUnitPad), kDepthPad<T>)),
        x(RowPanels<T>::make(args.I, args.seq.N)) {
    const int64_t N = args.seq.N, rows = N + kRowPad<T> * plan.row_parts;
    thin = N < kThinRows;
    for (int i = 0; i < args.inputs(); ++i) {
      input[i].panels = x;
      input[i].panels.data = args.wants_dw_ih() && !thin ? arena.take<T>(x.size()) : nullptr;
      input[i].rows = args.wants_dw_ih() ? arena.take<const T*>(N) : nullptr;
    }
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      buffers.dgates_x = arena.take<T>(rows * depth);
      buffers.dgates_h = shared ? buffers.dgates_x : arena.take<T>(rows * depth);
      buffers.dprojection = arena.take<T>(args.P ? rows * proj_depth : 0);
      buffers.h = RowPanels<T>::make(args.out(), N);
      buffers.whole_h = RowPanels<T>::make(args.H, N);
      buffers.w_ih = {nullptr, nullptr, x.panels, depth, x.nv};
      if (args.dx && !thin) {
        buffers.w_ih.data = arena.take<T>(x.panels * buffers.w_ih.stride());
        buffers.w_ih.bias = arena.take<A>(x.panels * x.width());
      }
      buffers.h.data = args.wants_dw_hh() && !thin ? arena.take<T>(buffers.h.size()) : nullptr;
      buffers.h_rows = args.wants_dw_hh() ? arena.take<const T*>(N) : nullptr;
      buffers.whole_h.data = args.wants_dw_hr() && !thin ? arena.take<T>(buffers.whole_h.size()) : nullptr;
      buffers.whole_h_rows = args.wants_dw_hr() ? arena.take<const T*>(N) : nullptr;
    }
    // At least one panel, for the scan uses it too.
    const GroupBuffers& first = group[0];
    const int64_t columns = x.panels * x.width() + first.h.panels * first.h.width() +
                            (args.P ? first.whole_h.panels * first.whole_h.width() : kMaxVectors * kLanes<A>);
    for (int i = 0; i < plan.threads; ++i) {
      T* const a = arena.take<T>(kTaskRows * kSpan);
      A* const s = arena.take<A>(kTaskRows);
      A* const c = arena.take<A>(kTaskRows * columns);
      if (i == thread_index) lhs = a, sums = s, stage = c;
    }
  }

  int64_t depth, proj_depth;
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
      if (layout_.group[g].whole_h_rows) find_whole_h_rows(g);
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
      if (l.group[g].whole_h_rows) pack_rows_of(l.group[g].whole_h, l.group[g].whole_h_rows, thread, threads);
    }
    for (int i = 0; i < args_.inputs(); ++i) {
      if (l.input[i].rows) pack_rows_of(l.input[i].panels, l.input[i].rows, thread, threads);
    }
  }

  void run(int thread) {
    copy_gradients(split(seq_.N, threads_, thread));
    layout_.thin ? run_thin() : run_tasks();
  }

 private:
  // What stands to the left in a weight's gradient: dgates, or the gradient of the projected states.
  struct Left {
    const T* data;  // [N, ld]
    int64_t ld, gates;
    int64_t units, padded;  // of one gate
  };
  struct Target {
    void *dw, *db;
    const RowPanels<T>* right;
    const T* const* rows;
    bool wanted() const { return dw || db; }
  };

  Left left_of(int g, bool recurrent) const {
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    return {recurrent ? buffers.dgates_h : buffers.dgates_x, layout_.depth, gates_, args_.H, Hp_};
  }
  Left projection_of(int g) const {
    return {layout_.group[g].dprojection, layout_.proj_depth, 1, args_.P, round_up(args_.P, kUnitPad)};
  }
  Target ih(int g) const {
    const typename Layout::Input& input = layout_.input[args_.inputs() > 1 ? g : 0];
    return {args_.gradients[g].dw_ih, args_.gradients[g].db_ih, &input.panels, input.rows};
  }
  Target hh(int g) const {
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    return {args_.gradients[g].dw_hh, args_.gradients[g].db_hh, &buffers.h, buffers.h_rows};
  }
  Target hr(int g) const {
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    return {args_.gradients[g].dw_hr, nullptr, &buffers.whole_h, buffers.whole_h_rows};
  }

  // The long tasks first, so that the short ones even out the end.
  void run_tasks() {
    const int64_t M = gates_ * Hp_, P = args_.P, kinds = shared_ ? 1 : 2;
    const int64_t rows = M >= kTaskRows * 4 * threads_ ? kTaskRows : kSmallTaskRows, blocks = ceil_div(M, rows);
    const int64_t row_blocks = ceil_div(seq_.N, kTaskRows), proj_blocks = ceil_div(P, kSmallTaskRows);
    const int64_t gate_tasks = args_.G * kinds * blocks, weight_tasks = gate_tasks + args_.G * proj_blocks;
    const int64_t tasks = weight_tasks + (args_.dx ? args_.inputs() * row_blocks : 0);
    for (int64_t i = team_.next_task(); i < tasks; i = team_.next_task()) {
      if (i < gate_tasks) {
        gate_gradients(static_cast<int>(i / blocks / kinds), i / blocks % kinds == 1, i % blocks * rows, rows);
      } else if (i < weight_tasks) {
        const int64_t j = i - gate_tasks;
        const int g = static_cast<int>(j / proj_blocks);
        weight_gradients(projection_of(g), j % proj_blocks * kSmallTaskRows, kSmallTaskRows, hr(g), Target{});
      } else {
        const int64_t j = i - weight_tasks, n0 = j % row_blocks * kTaskRows;
        input_gradient(static_cast<int>(j / row_blocks), n0, seq_.N - n0 < kTaskRows ? seq_.N - n0 : kTaskRows);
      }
    }
  }

  // Rows from m0 on of dW_ih and db_ih, of dW_hh and db_hh, or of both where one dgates serves both.
  void gate_gradients(int g, bool recurrent, int64_t m0, int64_t rows) {
    const Left left = left_of(g, recurrent);
    weight_gradients(left, m0, rows, recurrent ? hh(g) : ih(g), shared_ ? hh(g) : Target{});
  }

  // For whoever wants them: without the padding of units.
  void copy_gradients(Range rows) const {
    for (int g = 0; g < args_.G; ++g) {
      copy_rows(args_.dgates_x, left_of(g, false), g, rows);
      copy_rows(args_.dgates_h, left_of(g, true), g, rows);
      copy_rows(args_.dprojection, projection_of(g), g, rows);
    }
  }

  void copy_rows(void* out, const Left& left, int g, Range rows) const {
    if (!out) return;
    T* to = static_cast<T*>(out) + (g * seq_.N + rows.begin) * left.gates * left.units;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      for (int64_t k = 0; k < left.gates; ++k, to += left.units) {
        std::memcpy(to, left.data + n * left.ld + k * left.padded, left.units * sizeof(T));
      }
    }
  }

  void find_x_rows(int i) {
    for (int64_t t = 0; t < seq_.T; ++t) {
      for (int64_t b = 0; b < seq_.active(t); ++b) {
        layout_.input[i].rows[seq_.offset(t) + b] = args_.template x_row<T>(i, t, b);
      }
    }
  }

  void find_whole_h_rows(int g) {
    const T* const h = group_columns<T>(args_.whole_h, g, args_.H);
    for (int64_t n = 0; n < seq_.N; ++n) layout_.group[g].whole_h_rows[n] = h + n * args_.G * args_.H;
  }

  // The state before each row's step: an earlier row of y, the initial state, or nothing, which stands for zeros.
  void find_h_rows(int g) {
    const int64_t out = args_.out();
    const T* const y = group_columns<T>(args_.y, g, out);
    const T* const h0 = group_matrix<T>(args_.h0, g, seq_.B, out);
    for (int64_t t = 0; t < seq_.T; ++t) {
      const int64_t before = args_.groups[g].time_before(t), rows_before = seq_.active_or_none(before);
      for (int64_t b = 0; b < seq_.active(t); ++b) {
        const T* const initial = h0 ? h0 + b * out : nullptr;
        layout_.group[g].h_rows[seq_.offset(t) + b] =
            b < rows_before ? y + (seq_.offset(before) + b) * args_.G * out : initial;
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
    const int64_t blocks = ceil_div(args_.H, kTaskRows), proj_blocks = ceil_div(args_.P, kTaskRows);
    const int64_t gate_tasks = columns + args_.G * gates_ * blocks, tasks = gate_tasks + args_.G * proj_blocks;
    for (int64_t i = team_.next_task(); i < tasks; i = team_.next_task()) {
      if (i < columns) {
        thin_input_gradient(static_cast<int>(i / parts), i % parts * kThinColumns);
      } else if (i < gate_tasks) {
        const int64_t j = i - columns, gate = j / blocks % gates_, unit = j % blocks * kTaskRows;
        const int g = static_cast<int>(j / blocks / gates_);
        thin_weight_gradients(left_of(g, false), gate, unit, ih(g));
        thin_weight_gradients(left_of(g, true), gate, unit, hh(g));
      } else {
        const int64_t j = i - gate_tasks;
        const int g = static_cast<int>(j / proj_blocks);
        thin_weight_gradients(projection_of(g), 0, j % proj_blocks * kTaskRows, hr(g));
      }
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

  // Up to kTaskRows rows of dW and db.
  void thin_weight_gradients(const Left& left, int64_t gate, int64_t unit, const Target& out) const {
    if (!out.wanted()) return;
    const int64_t end = left.units - unit < kTaskRows ? left.units : unit + kTaskRows;
    for (; unit < end; ++unit) thin_row(left, gate, unit, out);
  }

  // One row: the sum over n of one element on the left times a row on the right.
  void thin_row(const Left& left, int64_t gate, int64_t unit, const Target& out) const {
    const int64_t row = gate * left.units + unit, columns = out.right->columns;
    const T* const element = left.data + gate * left.padded + unit;
    A d[kThinRows] = {}, sum = 0;
    for (int64_t n = 0; n < seq_.N; ++n) sum += d[n] = widen_one(element[n * left.ld]);
    if (out.db) store_first(static_cast<T*>(out.db) + row, broadcast(sum), 1);
    if (!out.dw) return;
    T* const to = static_cast<T*>(out.dw) + row * columns;
    for (int64_t column = 0; column < columns; column += lanes) {
      V c = {};
      for (int64_t n = 0; n < seq_.N; ++n) {
        if (out.rows[n]) c += d[n] * load_first(out.rows[n] + column, columns - column);
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

  // Up to `most` rows from m0 on of one weight's gradient, or of two that have their left side in common.
  void weight_gradients(const Left& left, int64_t m0, int64_t most, const Target& a, const Target& b) {
    if (!a.wanted() && !b.wanted()) return;
    const int64_t M = left.gates * left.padded, rows = M - m0 < most ? M - m0 : most;
    A* const a_stage = layout_.stage;
    A* const b_stage = a_stage + a.right->panels * kTaskRows * a.right->width();
    std::memset(layout_.sums, 0, kTaskRows * sizeof(A));
    for (int64_t span = 0; span < layout_.x.spans(); ++span) {
      pack_transposed(layout_.lhs, layout_.x.rows(span), layout_.sums, left.data + m0 + span * kSpan * left.ld, left.ld,
                      layout_.x.real_rows(span), rows);
      if (a.dw) add_span(*a.right, span, rows, a_stage);
      if (b.dw) add_span(*b.right, span, rows, b_stage);
    }
    store_gradient(left, m0, rows, a, a_stage);
    store_gradient(left, m0, rows, b, b_stage);
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

  void store_gradient(const Left& left, int64_t m0, int64_t rows, const Target& out, const A* stage) const {
    if (!out.wanted()) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t gate = (m0 + r) / left.padded, unit = (m0 + r) % left.padded;
      if (unit >= left.units) continue;
      const int64_t row = gate * left.units + unit;
      if (out.db) store_first(static_cast<T*>(out.db) + row, broadcast(layout_.sums[r]), 1);
      if (!out.dw) continue;
      const RowPanels<T>& right = *out.right;
      for (int64_t p = 0; p < right.panels; ++p) {
        const A* const c = stage + (p * kTaskRows + r) * right.width();
        store_panel(static_cast<T*>(out.dw) + row * right.columns, right.columns, c, p, right.nv);
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
