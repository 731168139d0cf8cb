// The gradients that are matrix products over all timesteps, from dgates [N, gates Hp]:
//   dx = dgates_x W_ih,  dW_ih = dgates_x^T x,  dW_hh = dgates_h^T h_before,  db = column sums,
// and, with a projection, dW_hr = dprojection^T (what is projected). Those of weights may be wanted of each sample
// apart. Threads take tasks from a counter, so that one that lost its core delays the others by no more than a task;
// what a task computes does not depend on who takes it. Each part of the threads has a counter, for the tasks whose
// dgates it has in its caches, and helps out the others when that has run down; of samples each row part has one.
#pragma once

#include "rows.h"
#include "thin.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// From this many rows on, which a product sums up, floats are split into parts for the tile unit. Fewer do not pay for
// being taken apart and filled up to whole tiles.
inline constexpr int64_t kSplitRows = 128;
// A task's rows are a multiple of this, which those of a projection are few of.
inline constexpr int64_t kTaskUnit = kTiles ? 32 : 48;

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

  ProductsLayout(Arena& arena, const BackwardArgs& args, const Plan& plan, int gates, bool shared, const Share& share)
      : depth(round_up(gates * round_up(args.H, kUnitPad), kDepthPad<T>)),
        proj_depth(round_up(round_up(args.P, kUnitPad), kDepthPad<T>)),
        split(kSplits<T> && args.seq.N >= kSplitRows * args.samples.number),
        x(RowPanels<T>::make(args.I, split)),
        order(arena, args.seq, args.samples, split ? kTileDepth : kDepthPad<T>) {
    const int64_t N = args.seq.N, rows = N + kRowPad<T> * plan.row_parts;
    thin = N < kThinRows;
    const auto room = [&](const RowPanels<T>& p, bool wanted) {
      return wanted && !thin ? arena.take<char>(p.bytes(order.most_rows())) : nullptr;
    };
    for (int i = 0; i < args.inputs(); ++i) {
      input[i].panels = x;
      input[i].panels.data = room(x, args.wants_dw_ih());
      input[i].rows = args.wants_dw_ih() ? arena.take<const T*>(N) : nullptr;
    }
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      buffers.dgates_x = arena.take<T>(rows * depth);
      buffers.dgates_h = shared ? buffers.dgates_x : arena.take<T>(rows * depth);
      buffers.dprojection = arena.take<T>(args.P ? rows * proj_depth : 0);
      buffers.h = RowPanels<T>::make(args.out(), split);
      buffers.whole_h = RowPanels<T>::make(args.H, split);
      buffers.w_ih = Panels<T>::make(arena, args.I, x.nv, 1, depth, split, args.dx && !thin, {1, 0});
      buffers.h.data = room(buffers.h, args.wants_dw_hh());
      buffers.h_rows = args.wants_dw_hh() ? arena.take<const T*>(N) : nullptr;
      buffers.whole_h.data = room(buffers.whole_h, args.wants_dw_hr());
      buffers.whole_h_rows = args.wants_dw_hr() ? arena.take<const T*>(N) : nullptr;
    }
    // At least one panel, for the scan uses it too.
    const GroupBuffers& first = group[0];
    const int64_t columns = x.panels * x.width() + first.h.panels * first.h.width() +
                            (args.P ? first.whole_h.panels * first.whole_h.width() : kMaxVectors * kLanes<A>);
    const Copies threads = share.of_threads();
    lhs = arena.take<T>(kTaskRows * kSpan, threads);
    sums = arena.take<A>(kTaskRows, threads);
    stage = arena.take<A>(kTaskRows * columns, threads);
    lhs_parts = {arena.take<bf16>(split ? kParts * kTaskRows * kSpan : 0, threads), kTaskRows * kSpan};
  }

  int64_t depth, proj_depth;
  bool split;  // products are of parts
  bool thin;
  RowPanels<T> x;  // what all inputs have in common
  RowOrder order;
  Input input[kMaxGroups];
  GroupBuffers group[kMaxGroups];
  T* lhs;                 // [kTaskRows, kSpan] of this thread: dgates transposed
  Split<bf16> lhs_parts;  // the same split
  A* sums;                // [kTaskRows]
  A* stage;               // [panels][kTaskRows][width]: the C of a task
};

template <class T>
class Products {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = ProductsLayout<T>;
  static constexpr int lanes = kLanes<A>;
  static constexpr int64_t kThinColumns = kSummedVectors * lanes;
  static constexpr A kZeros[kMaxVectors * lanes] = {};

 public:
  Products(const BackwardArgs& args, const Layout& layout, const Team& team, const Share& share, int gates, bool shared)
      : args_(args),
        seq_(args.seq),
        layout_(layout),
        order_(layout.order),
        team_(team),
        share_(share),
        gates_(gates),
        shared_(shared),
        Hp_(round_up(args.H, kUnitPad)) {}

  // Everything that does not depend on dgates: the right-hand sides.
  void prepare() {
    order_.find();
    for (int i = 0; i < args_.inputs(); ++i) {
      if (layout_.input[i].rows) find_x_rows(i);
    }
    for (int g = 0; g < args_.G; ++g) {
      if (layout_.group[g].h_rows) find_h_rows(g);
      if (layout_.group[g].whole_h_rows) find_whole_h_rows(g);
    }
  }

  void pack() {
    const Layout& l = layout_;
    if (l.thin) return;
    for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
      if (args_.dx) {
        const T* const w = static_cast<const T*>(args_.groups[g].w_ih);
        const Range mine = share_.packs(l.x.panels);
        for (int64_t p = mine.begin; p < mine.end; ++p) pack_w_ih(g, p, w);
      }
      const typename Layout::GroupBuffers& buffers = l.group[g];
      const int64_t spans = order_.spans();
      if (buffers.h_rows) pack_rows_of(buffers.h, buffers.h_rows, share_.packs(spans * buffers.h.panels));
      if (buffers.whole_h_rows) {
        pack_rows_of(buffers.whole_h, buffers.whole_h_rows, share_.packs(spans * buffers.whole_h.panels));
      }
    }
    const Range inputs = own_inputs() ? share_.groups : Range{0, 1};
    for (int64_t i = inputs.begin; i < inputs.end; ++i) {
      const typename Layout::Input& input = l.input[i];
      if (!input.rows) continue;
      const int64_t count = order_.spans() * input.panels.panels;
      pack_rows_of(input.panels, input.rows, own_inputs() ? share_.packs(count) : share_.packs_of_all(count));
    }
  }

  void run() {
    if (layout_.thin) return run_thin();
    const int parts = sample_parts(), queues = share_.parts * parts;
    const int row_part = share_.scans ? share_.row_part : 0;
    const int mine = share_.part * parts + row_part * parts / share_.row_parts;
    for (int i = 0; i < queues; ++i) run_tasks((mine + i) % queues);
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
    // Where row `row` of dW, or of db, of a sample stands in one of `rows` rows.
    T* dw_row(int64_t sample, int64_t rows, int64_t row) const {
      return static_cast<T*>(dw) + (sample * rows + row) * right->columns;
    }
    T* db_row(int64_t sample, int64_t rows, int64_t row) const { return static_cast<T*>(db) + sample * rows + row; }
  };
  // A task's number as digits, of which the last is taken first.
  struct Digits {
    int64_t rest;
    int64_t take(int64_t base) {
      const int64_t digit = rest % base;
      rest /= base;
      return digit;
    }
  };

  bool own_inputs() const { return args_.inputs() > 1; }
  // Of the inputs' gradients, what a part of the threads has to do: whole ones of its own groups, or some of `blocks`
  // blocks of the one that all groups have.
  Range inputs_of(int part) const { return own_inputs() ? share_.groups_of(part) : Range{0, args_.dx ? 1 : 0}; }
  Range input_blocks(int part, int64_t blocks) const {
    return own_inputs() ? Range{0, blocks} : split(blocks, share_.parts, part);
  }
  static Range split_of(Range range, int parts, int part) {
    const Range within = split(range.size(), parts, part);
    return {range.begin + within.begin, range.begin + within.end};
  }

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

  // Samples are dealt out as rows are: the thread that has found a sample's dgates takes its tasks, too.
  int sample_parts() const {
    const int64_t samples = args_.samples.number;
    return samples < share_.row_parts ? static_cast<int>(samples) : share_.row_parts;
  }

  // Of products that each have so many: tasks are as large as they may be, and can be dealt out evenly.
  int64_t task_rows(int64_t rows, int64_t products) const {
    const int64_t tasks = round_up(products * ceil_div(rows, kTaskRows), share_.threads);
    return round_up(ceil_div(rows, ceil_div(tasks, products)), kTaskUnit);
  }

  // The long tasks first, so that the short ones even out the end.
  void run_tasks(int queue) {
    const int parts = sample_parts(), part = queue / parts;
    const Range groups = share_.groups_of(part), samples = split(args_.samples.number, parts, queue % parts);
    const int64_t M = gates_ * Hp_, kinds = shared_ ? 1 : 2, products = groups.size() * samples.size();
    const int64_t rows = task_rows(M, groups.size() * args_.samples.number * kinds), blocks = ceil_div(M, rows);
    const int64_t proj_blocks = ceil_div(args_.P, kTaskUnit);
    const int64_t gate_tasks = products * kinds * blocks, weight_tasks = gate_tasks + products * proj_blocks;
    const Range inputs = inputs_of(part);
    const int64_t dx_rows = task_rows(seq_.N, args_.inputs());
    const Range row_blocks = split_of(input_blocks(part, ceil_div(seq_.N, dx_rows)), parts, queue % parts);
    const int64_t tasks = weight_tasks + (args_.dx ? inputs.size() * row_blocks.size() : 0);
    for (int64_t i = team_.next_task(queue); i < tasks; i = team_.next_task(queue)) {
      if (i < gate_tasks) {
        Digits task{i};
        const int64_t m0 = task.take(blocks) * rows, kind = task.take(kinds);
        const int64_t sample = samples.begin + task.take(samples.size());
        gate_gradients(static_cast<int>(groups.begin + task.rest), sample, kind == 1, m0, rows);
      } else if (i < weight_tasks) {
        Digits task{i - gate_tasks};
        const int64_t m0 = task.take(proj_blocks) * kTaskUnit, sample = samples.begin + task.take(samples.size());
        const int g = static_cast<int>(groups.begin + task.rest);
        weight_gradients(projection_of(g), sample, m0, kTaskUnit, hr(g), Target{});
      } else {
        Digits task{i - weight_tasks};
        const int64_t n0 = (row_blocks.begin + task.take(row_blocks.size())) * dx_rows, left = seq_.N - n0;
        input_gradient(static_cast<int>(inputs.begin + task.rest), n0, left < dx_rows ? left : dx_rows);
      }
    }
  }

  // Rows from m0 on of dW_ih and db_ih, of dW_hh and db_hh, or of both where one dgates serves both.
  void gate_gradients(int g, int64_t sample, bool recurrent, int64_t m0, int64_t rows) {
    const Left left = left_of(g, recurrent);
    weight_gradients(left, sample, m0, rows, recurrent ? hh(g) : ih(g), shared_ ? hh(g) : Target{});
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

  void pack_rows_of(const RowPanels<T>& out, const T* const* rows, Range mine) {
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const Span& span = order_.span(i / out.panels);
      pack_span(out, rows, order_, span, i % out.panels);
    }
  }

  void pack_w_ih(int64_t g, int64_t p, const T* w) {
    pack_columns(layout_.group[g].w_ih, p, w, gates_, args_.H, args_.I);
  }

  // The groups that read an input.
  Range readers(int input) const { return own_inputs() ? Range{input, input + 1} : Range{0, args_.G}; }
  T* dx_row(int input, int64_t n) const { return static_cast<T*>(args_.dx) + (n * args_.inputs() + input) * args_.I; }

  // The left side of a product, split where the right one is.
  LeftRows<T> left_rows(const T* a, int64_t ld, int64_t rows, int64_t K) const {
    if constexpr (kSplits<T>) {
      if (layout_.split) {
        split_rows(layout_.lhs_parts, a, ld, rows, K);
        return {a, ld, layout_.lhs_parts};
      }
    }
    return {a, ld, {}};
  }

  // A part of the depth at a time, so that it stays near, and is split but once, while panels pass.
  void input_gradient(int input, int64_t n0, int64_t rows) {
    const RowPanels<T>& x = layout_.x;
    const Range groups = readers(input);
    const int64_t width = x.width();
    bool first = true;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Panels<T>& w = layout_.group[g].w_ih;
      for (int64_t k = 0; k < layout_.depth; k += kSpan, first = false) {
        const int64_t left = layout_.depth - k, depth = left < kSpan ? left : kSpan;
        const T* const dgates = layout_.group[g].dgates_x + n0 * layout_.depth + k;
        const LeftRows<T> lhs = left_rows(dgates, layout_.depth, rows, depth);
        for (int64_t p = 0; p < x.panels; ++p) {
          A* const c = layout_.stage + p * kTaskRows * width;
          multiply(lhs, rows, w.from(p, k), depth, x.nv, first ? kZeros : c, first ? 0 : width, c, width,
                   w.from(p + 1 < x.panels ? p + 1 : 0, k));
        }
      }
    }
    for (int64_t p = 0; p < x.panels; ++p) {
      for (int64_t r = 0; r < rows; ++r) {
        store_panel(dx_row(input, n0 + r), args_.I, layout_.stage + (p * kTaskRows + r) * width, p, x.nv);
      }
    }
  }

  // Each thread has its own tasks here: what it writes of dW is still in its cache from the last call, as a rule, and
  // there is too little work for others to help out.
  void run_thin() {
    const Range groups = share_.groups, inputs = inputs_of(share_.part);
    const Range column_blocks = input_blocks(share_.part, ceil_div(args_.I, kThinColumns));
    const int64_t products = groups.size() * args_.samples.number;
    const int64_t blocks = ceil_div(args_.H, kThinTaskRows), proj_blocks = ceil_div(args_.P, kThinTaskRows);
    for_my_tasks(args_.dx ? inputs.size() * column_blocks.size() : 0, [&](Digits task) {
      const int64_t column = (column_blocks.begin + task.take(column_blocks.size())) * kThinColumns;
      thin_input_gradient(static_cast<int>(inputs.begin + task.rest), column);
    });
    for_my_tasks(products * gates_ * blocks, [&](Digits task) {
      const int64_t unit = task.take(blocks) * kThinTaskRows, gate = task.take(gates_);
      const int64_t sample = task.take(args_.samples.number);
      const int g = static_cast<int>(groups.begin + task.rest);
      thin_weight_gradients(left_of(g, false), sample, gate, unit, ih(g));
      thin_weight_gradients(left_of(g, true), sample, gate, unit, hh(g));
    });
    for_my_tasks(products * proj_blocks, [&](Digits task) {
      const int64_t unit = task.take(proj_blocks) * kThinTaskRows, sample = task.take(args_.samples.number);
      const int g = static_cast<int>(groups.begin + task.rest);
      thin_weight_gradients(projection_of(g), sample, 0, unit, hr(g));
    });
  }

  template <class Body>
  void for_my_tasks(int64_t number, Body body) const {
    const Range mine = share_.packs(number);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(Digits{i});
  }

  // Columns of dx as a sum of rows of W_ih.
  void thin_input_gradient(int input, int64_t column) const {
    const Range groups = readers(input);
    const int64_t columns = args_.I - column, H = args_.H;
    for (int64_t n = 0; n < seq_.N; ++n) {
      V sums[kSummedVectors] = {};
      for (int64_t g = groups.begin; g < groups.end; ++g) {
        const T* w = static_cast<const T*>(args_.groups[g].w_ih) + column;
        const T* const dgates = layout_.group[g].dgates_x + n * layout_.depth;
        for (int k = 0; k < gates_; ++k) add_rows(sums, dgates + k * Hp_, w + k * H * args_.I, args_.I, H, columns);
      }
      for (int64_t v = 0; v < kSummedVectors && v * lanes < columns; ++v) {
        store_first(dx_row(input, n) + column + v * lanes, sums[v], columns - v * lanes);
      }
    }
  }

  // Up to kThinTaskRows rows of dW and db: each the sum over n of one element on the left times a row on the right.
  void thin_weight_gradients(const Left& left, int64_t sample, int64_t gate, int64_t unit, const Target& out) const {
    if (!out.wanted()) return;
    const int64_t end = left.units - unit < kThinTaskRows ? left.units : unit + kThinTaskRows;
    const int64_t rows = left.gates * left.units;
    const Range mine = order_.rows_of(sample);
    for (; unit < end; ++unit) {
      const T* const element = left.data + gate * left.padded + unit;
      Terms<T> terms;
      A sum = 0;
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t n = order_.row(i);
        const A d = widen_one(element[n * left.ld]);
        sum += d;
        if (!out.dw || !out.rows[n]) continue;
        terms.factor[terms.count] = d;
        terms.row[terms.count++] = out.rows[n];
      }
      const int64_t row = gate * left.units + unit;
      if (out.db) store_first(out.db_row(sample, rows, row), broadcast(sum), 1);
      if (out.dw) store_terms(out.dw_row(sample, rows, row), terms, out.right->columns);
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
  void weight_gradients(const Left& left, int64_t sample, int64_t m0, int64_t most, const Target& a, const Target& b) {
    if (!a.wanted() && !b.wanted()) return;
    const int64_t M = left.gates * left.padded, rows = M - m0 < most ? M - m0 : most;
    A* const a_stage = layout_.stage;
    A* const b_stage = a_stage + a.right->panels * kTaskRows * a.right->width();
    std::memset(layout_.sums, 0, kTaskRows * sizeof(A));
    const Range spans = order_.spans_of(sample);
    for (int64_t i = spans.begin; i < spans.end; ++i) {
      const Span& span = order_.span(i);
      const bool first = i == spans.begin, last = i + 1 == spans.end;
      pack_transposed(layout_.lhs, layout_.sums, left.data + m0, left.ld, order_, span, rows);
      const LeftRows<T> lhs = left_rows(layout_.lhs, transposed_ld<T>(span), rows, span.depth);
      if (a.dw) add_span(lhs, a, span, first, rows, a_stage, last ? direct_rows(left, sample, m0, a) : nullptr);
      if (b.dw) add_span(lhs, b, span, first, rows, b_stage, last ? direct_rows(left, sample, m0, b) : nullptr);
    }
    store_gradient(left, sample, m0, rows, a, a_stage);
    store_gradient(left, sample, m0, rows, b, b_stage);
  }

  // Where C of the last span is wanted from m0 on, if its rows lie there as they are computed.
  static A* direct_rows(const Left& left, int64_t sample, int64_t m0, const Target& out) {
    if constexpr (std::is_same_v<T, A>) {
      if (left.units == left.padded) return out.dw_row(sample, left.gates * left.units, m0);
    }
    return nullptr;
  }
  static bool is_whole(const RowPanels<T>& right, int64_t p) { return (p + 1) * right.width() <= right.columns; }

  // Panels that are whole go to `direct`, where it is given.
  void add_span(const LeftRows<T>& lhs, const Target& out, const Span& span, bool first, int64_t rows, A* stage,
                A* direct) const {
    const RowPanels<T>& right = *out.right;
    const int64_t width = right.width();
    for (int64_t p = 0; p < right.panels; ++p) {
      A* const c = stage + p * kTaskRows * width;
      const bool there = direct && is_whole(right, p);
      multiply(lhs, rows, right.at(span, p), span.depth, right.nv, first ? kZeros : c, first ? 0 : width,
               there ? direct + p * width : c, there ? right.columns : width,
               right.at(span, p + 1 < right.panels ? p + 1 : 0));
    }
  }

  void store_gradient(const Left& left, int64_t sample, int64_t m0, int64_t rows, const Target& out,
                      const A* stage) const {
    if (!out.wanted()) return;
    const Range spans = order_.spans_of(sample);
    const RowPanels<T>& right = *out.right;
    const int64_t all = left.gates * left.units;
    const bool direct = out.dw && direct_rows(left, sample, m0, out);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t gate = (m0 + r) / left.padded, unit = (m0 + r) % left.padded;
      if (unit >= left.units) continue;
      const int64_t row = gate * left.units + unit;
      if (out.db) store_first(out.db_row(sample, all, row), broadcast(layout_.sums[r]), 1);
      if (!out.dw) continue;
      T* const to = out.dw_row(sample, all, row);
      if (spans.begin == spans.end) std::memset(to, 0, right.columns * sizeof(T));
      for (int64_t p = 0; p < right.panels && spans.begin < spans.end; ++p) {
        if (direct && is_whole(right, p)) continue;
        store_panel(to, right.columns, stage + (p * kTaskRows + r) * right.width(), p, right.nv);
      }
    }
  }

  const BackwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const RowOrder& order_;
  const Team& team_;
  const Share& share_;
  int gates_;
  bool shared_;
  int64_t Hp_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
