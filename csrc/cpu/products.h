// The gradients that are matrix products over all timesteps, from dgates [N, gates Hp]:
//   dx = dgates_x W_ih,  dW_ih = dgates_x^T x,  dW_hh = dgates_h^T h_before,  db = column sums,
// and, with a projection, dW_hr = dprojection^T (what is projected). Those of weights may be wanted of each sample
// apart. Threads take tasks from a counter, so that one that lost its core delays the others by no more than a task;
// what a task computes does not depend on who takes it. Each part of the threads has a counter, for the tasks whose
// dgates it has in its caches, and helps out the others when that has run down; of samples each row part has one.
#pragma once

#include "operands.h"
#include "thin.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// A task's rows are a multiple of this, which those of a projection are few of.
inline constexpr int64_t kTaskUnit = kTiles ? 32 : 48;

template <class T>
class Products {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = ProductsLayout<T>;
  static constexpr int lanes = kLanes<A>;
  static constexpr A kZeros[kMaxVectors * lanes] = {};

 public:
  Products(const BackwardArgs& args, const Layout& layout, const Team& team, const Share& share, int gates, bool shared)
      : args_(args),
        seq_(args.seq),
        layout_(layout),
        order_(layout.order),
        team_(team),
        share_(share),
        of_(args, layout, share, gates),
        gates_(gates),
        shared_(shared),
        Hp_(round_up(args.H, kUnitPad)) {}

  // Everything that does not depend on dgates; one thread does it.
  void prepare() const { of_.find_rows(); }

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
    const Range inputs = of_.own_inputs() ? share_.groups : Range{0, 1};
    for (int64_t i = inputs.begin; i < inputs.end; ++i) {
      const typename Layout::Input& input = l.input[i];
      if (!input.rows) continue;
      const int64_t count = order_.spans() * input.panels.panels;
      pack_rows_of(input.panels, input.rows, of_.own_inputs() ? share_.packs(count) : share_.packs_of_all(count));
    }
  }

  void run() {
    if (layout_.thin) return ThinProducts<T>(args_, layout_, share_, gates_).run();
    const int parts = sample_parts(), queues = share_.parts * parts;
    const int row_part = share_.scans ? share_.row_part : 0;
    const int mine = share_.part * parts + row_part * parts / share_.row_parts;
    for (int i = 0; i < queues; ++i) run_tasks((mine + i) % queues);
  }

 private:
  static Range split_of(Range range, int parts, int part) {
    const Range within = split(range.size(), parts, part);
    return {range.begin + within.begin, range.begin + within.end};
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
    const Range inputs = of_.inputs_of(part);
    const int64_t dx_rows = task_rows(seq_.N, args_.inputs());
    const Range row_blocks = split_of(of_.input_blocks(part, ceil_div(seq_.N, dx_rows)), parts, queue % parts);
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
        weight_gradients(of_.projection(g), sample, m0, kTaskUnit, of_.hr(g), Target<T>{});
      } else {
        Digits task{i - weight_tasks};
        const int64_t n0 = (row_blocks.begin + task.take(row_blocks.size())) * dx_rows, left = seq_.N - n0;
        input_gradient(static_cast<int>(inputs.begin + task.rest), n0, left < dx_rows ? left : dx_rows);
      }
    }
  }

  // Rows from m0 on of dW_ih and db_ih, of dW_hh and db_hh, or of both where one dgates serves both.
  void gate_gradients(int g, int64_t sample, bool recurrent, int64_t m0, int64_t rows) {
    const Left<T> left = of_.left(g, recurrent);
    weight_gradients(left, sample, m0, rows, recurrent ? of_.hh(g) : of_.ih(g), shared_ ? of_.hh(g) : Target<T>{});
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
    const Range groups = of_.readers(input);
    const int64_t width = x.width();
    bool first = true;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Panels<T>& w = layout_.group[g].w_ih;
      for (int64_t k = 0; k < layout_.depth; k += kSpan, first = false) {
        const int64_t left = layout_.depth - k, depth = left < kSpan ? left : kSpan;
        const T* const dgates = layout_.group[g].dgates_x + n0 * layout_.depth + k;
        const LeftRows<T> lhs = left_rows(dgates, layout_.depth, rows, depth);
        for (int64_t p = 0; p < x.panels; ++p) {
          A* const c = layout_.stage(0) + p * kTaskRows * width;
          multiply(lhs, rows, w.from(p, k), depth, x.nv, first ? kZeros : c, first ? 0 : width, c, width,
                   w.from(p + 1 < x.panels ? p + 1 : 0, k));
        }
      }
    }
    for (int64_t p = 0; p < x.panels; ++p) {
      for (int64_t r = 0; r < rows; ++r) {
        store_panel(of_.dx_row(input, n0 + r), args_.I, layout_.stage(0) + (p * kTaskRows + r) * width, p, x.nv);
      }
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
  void weight_gradients(const Left<T>& left, int64_t sample, int64_t m0, int64_t most, const Target<T>& a,
                        const Target<T>& b) {
    if (!a.wanted() && !b.wanted()) return;
    const int64_t M = left.gates * left.padded, rows = M - m0 < most ? M - m0 : most;
    const WeightTask task{left, a, b, sample, m0, rows};
    sum_spans(task, order_.spans_of(sample), 0);
    store_gradient(task, a, a_stage(0));
    store_gradient(task, b, b_stage(task, 0));
  }

  // Rows [m0, m0 + rows) of the gradients of a weight, or of two that have their left side in common.
  struct WeightTask {
    const Left<T>& left;
    const Target<T>&a, &b;
    int64_t sample, m0, rows;
  };

  A* a_stage(int level) const { return layout_.stage(level); }
  A* b_stage(const WeightTask& task, int level) const {
    return a_stage(level) + task.a.right->panels * kTaskRows * task.a.right->width();
  }

  // Column sums and C of a task over the spans, into a level. Many spans are halved, and the second half's sums come by
  // way of the next level.
  void sum_spans(const WeightTask& task, Range spans, int level) {
    if (spans.size() <= kChainSpans) return chain_spans(task, spans, level);
    const int64_t middle = spans.begin + ceil_div(spans.size(), 2);
    sum_spans(task, {spans.begin, middle}, level);
    sum_spans(task, {middle, spans.end}, level + 1);
    add(layout_.sums(level), layout_.sums(level + 1), kTaskRows);
    add_products(task.a, task.rows, a_stage(level), a_stage(level + 1));
    add_products(task.b, task.rows, b_stage(task, level), b_stage(task, level + 1));
  }

  static void add(A* to, const A* from, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) store(to + i, load(to + i) + load(from + i));
  }

  static void add_products(const Target<T>& target, int64_t rows, A* to, const A* from) {
    if (!target.dw) return;
    const int64_t width = target.right->width();
    for (int64_t p = 0; p < target.right->panels; ++p, to += kTaskRows * width, from += kTaskRows * width) {
      add(to, from, rows * width);
    }
  }

  void chain_spans(const WeightTask& task, Range spans, int level) {
    A* const sums = layout_.sums(level);
    std::memset(sums, 0, kTaskRows * sizeof(A));
    for (int64_t i = spans.begin; i < spans.end; ++i) {
      const Span& span = order_.span(i);
      const bool first = i == spans.begin, last = i + 1 == spans.end;
      pack_transposed(layout_.lhs, sums, task.left.data + task.m0, task.left.ld, order_, span, task.rows);
      const LeftRows<T> lhs = left_rows(layout_.lhs, transposed_ld<T>(span), task.rows, span.depth);
      add_span(lhs, task.a, span, first, task.rows, a_stage(level), last ? direct_rows(task, task.a) : nullptr);
      add_span(lhs, task.b, span, first, task.rows, b_stage(task, level), last ? direct_rows(task, task.b) : nullptr);
    }
  }

  // Where C of the last span is wanted, if nothing else is to be added and its rows lie there as they are computed.
  A* direct_rows(const WeightTask& task, const Target<T>& out) const {
    if constexpr (std::is_same_v<T, A>) {
      const bool whole = order_.spans_of(task.sample).size() <= kChainSpans;
      const Left<T>& left = task.left;
      if (out.dw && whole && left.units == left.padded) return out.dw_row(task.sample, left.rows(), task.m0);
    }
    return nullptr;
  }
  static bool is_whole(const RowPanels<T>& right, int64_t p) { return (p + 1) * right.width() <= right.columns; }

  // Panels that are whole go to `direct`, where it is given.
  void add_span(const LeftRows<T>& lhs, const Target<T>& out, const Span& span, bool first, int64_t rows, A* stage,
                A* direct) const {
    if (!out.dw) return;
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

  void store_gradient(const WeightTask& task, const Target<T>& out, const A* stage) const {
    if (!out.wanted()) return;
    const Left<T>& left = task.left;
    const int64_t sample = task.sample, all = left.rows();
    const Range spans = order_.spans_of(sample);
    const RowPanels<T>& right = *out.right;
    const bool direct = direct_rows(task, out) != nullptr;
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t gate = (task.m0 + r) / left.padded, unit = (task.m0 + r) % left.padded;
      if (unit >= left.units) continue;
      const int64_t row = gate * left.units + unit;
      if (out.db) store_first(out.db_row(sample, all, row), broadcast(layout_.sums(0)[r]), 1);
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
  const Operands<T> of_;
  int gates_;
  bool shared_;
  int64_t Hp_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
