// What the products over all timesteps multiply, and where their results go.
#pragma once

#include "rows.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// From this many rows on, which a product sums up, floats are split into parts for the tile unit. Fewer do not pay for
// being taken apart and filled up to whole tiles.
inline constexpr int64_t kSplitRows = 128;
// Batches of fewer rows, over all timesteps, are thin: see thin.h.
inline constexpr int64_t kThinRows = 4;

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
    // For all N rows, since one sample may have nearly all of them.
    const int levels = 1 + halvings(ceil_div(args.seq.N, kSpan));
    level_size = kTaskRows * (1 + columns);
    level_data = arena.take<A>(levels * level_size, threads);
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
  // A task's column sums [kTaskRows] and C [panels][kTaskRows][width], once for each level of a pairwise sum.
  int64_t level_size;
  A* level_data;
  A* sums(int level) const { return level_data + level * level_size; }
  A* stage(int level) const { return sums(level) + kTaskRows; }
};

// What stands to the left in a weight's gradient: dgates, or the gradient of the projected states.
template <class T>
struct Left {
  const T* data;  // [N, ld]
  int64_t ld, gates;
  int64_t units, padded;  // of one gate
  int64_t rows() const { return gates * units; }
};

// A weight's gradient and its bias's, and what stands to the right.
template <class T>
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

// The operands of all products of a call, as one thread sees them.
template <class T>
class Operands {
  using Layout = ProductsLayout<T>;

 public:
  Operands(const BackwardArgs& args, const Layout& layout, const Share& share, int gates)
      : args_(args), seq_(args.seq), layout_(layout), share_(share), gates_(gates) {}

  // Everything that does not depend on dgates: the right-hand sides.
  void find_rows() const {
    layout_.order.find();
    for (int i = 0; i < args_.inputs(); ++i) {
      if (layout_.input[i].rows) find_x_rows(i);
    }
    for (int g = 0; g < args_.G; ++g) {
      if (layout_.group[g].h_rows) find_h_rows(g);
      if (layout_.group[g].whole_h_rows) find_whole_h_rows(g);
    }
  }

  Left<T> left(int g, bool recurrent) const {
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    const T* const dgates = recurrent ? buffers.dgates_h : buffers.dgates_x;
    return {dgates, layout_.depth, gates_, args_.H, round_up(args_.H, kUnitPad)};
  }
  Left<T> projection(int g) const {
    return {layout_.group[g].dprojection, layout_.proj_depth, 1, args_.P, round_up(args_.P, kUnitPad)};
  }
  Target<T> ih(int g) const {
    const typename Layout::Input& input = layout_.input[own_inputs() ? g : 0];
    return {args_.gradients[g].dw_ih, args_.gradients[g].db_ih, &input.panels, input.rows};
  }
  Target<T> hh(int g) const {
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    return {args_.gradients[g].dw_hh, args_.gradients[g].db_hh, &buffers.h, buffers.h_rows};
  }
  Target<T> hr(int g) const {
    const typename Layout::GroupBuffers& buffers = layout_.group[g];
    return {args_.gradients[g].dw_hr, nullptr, &buffers.whole_h, buffers.whole_h_rows};
  }

  bool own_inputs() const { return args_.inputs() > 1; }
  // Of the inputs' gradients, what a part of the threads has to do: whole ones of its own groups, or some of `blocks`
  // blocks of the one that all groups have.
  Range inputs_of(int part) const { return own_inputs() ? share_.groups_of(part) : Range{0, args_.dx ? 1 : 0}; }
  Range input_blocks(int part, int64_t blocks) const {
    return own_inputs() ? Range{0, blocks} : split(blocks, share_.parts, part);
  }
  // The groups that read an input.
  Range readers(int input) const { return own_inputs() ? Range{input, input + 1} : Range{0, args_.G}; }
  T* dx_row(int input, int64_t n) const { return static_cast<T*>(args_.dx) + (n * args_.inputs() + input) * args_.I; }

 private:
  void find_x_rows(int i) const {
    for (int64_t t = 0; t < seq_.T; ++t) {
      for (int64_t b = 0; b < seq_.active(t); ++b) {
        layout_.input[i].rows[seq_.offset(t) + b] = args_.template x_row<T>(i, t, b);
      }
    }
  }

  void find_whole_h_rows(int g) const {
    const T* const h = group_columns<T>(args_.whole_h, g, args_.H);
    for (int64_t n = 0; n < seq_.N; ++n) layout_.group[g].whole_h_rows[n] = h + n * args_.G * args_.H;
  }

  // The state before each row's step: an earlier row of y, the initial state, or nothing, which stands for zeros.
  void find_h_rows(int g) const {
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

  const BackwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const Share& share_;
  int gates_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
