// Backpropagation through time: dh_t = dy_t + (what t + 1 passed back) + dgates_{t+1} W_hh, then the cell's derivative
// applied to each block while it is in cache. With a projection dh_t reaches the cell through a second product, with
// W_hr. dx, dW and db follow from dgates in products.h.
#pragma once

#include "forward.h"
#include "products.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class Cell, class T>
struct BackwardLayout {
  using A = Acc<T>;
  // The GEMM with W_hh reads the step after's dgates where they were put for dW_hh. Not so tiles: they read past the
  // last row, into what another thread may be writing.
  static constexpr bool kCopies = kRowPad<T> > 1;
  struct GroupBuffers {
    Panels<T> hh, hr;  // W_hh and W_hr by columns
    // Of the rows of one part:
    T* dgates[2];              // [step_rows, depth] of the step after, in turn, where kCopies
    T* dh;                     // [step_rows, products.proj_depth] of the projected states: likewise
    A* dstates[Cell::states];  // [blocks, step_rows, kUnitPad] passed back past W_hh
    T* h0;                     // [step_rows, Op] initial states, zeros where none were given
    A* c0;                     // [blocks, step_rows, kUnitPad]
  };
  // Where one batch row's vectors lie in one step.
  struct Row {
    Strided<const A> gates, c_before;
    const T *h_before, *dy, *dc;
    T *dgates, *dgates_x, *dgates_h, *dh, *dprojection;
    Strided<A> dstates[Cell::states];
  };

  BackwardLayout(const BackwardArgs& args, const Plan& plan, void* base, const Share& share)
      : Hp(round_up(args.H, kUnitPad)),
        Op(round_up(args.out(), kUnitPad)),
        depth(round_up(Cell::gates * Hp, kDepthPad<T>)),
        step_rows(ceil_div(args.seq.B, plan.row_parts)),
        arena_(base),
        products(arena_, args, plan, Cell::gates, Cell::shared_dgates, share) {
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      const int vectors = args.P ? plan.proj_vectors : plan.panel_vectors;
      buffers.hh = Panels<T>::make(arena_, args.out(), vectors, 1, depth, false, plan.pack, share.of_weights());
      buffers.hr = Panels<T>::make(arena_, args.H, plan.panel_vectors, 1, products.proj_depth, false, args.P > 0,
                                   share.of_weights());
      const int64_t padded = step_rows + kRowPad<T>;
      const Copies parts = share.of_row_parts();
      for (T*& d : buffers.dgates) d = arena_.template take<T>(kCopies ? padded * depth : 0, parts);
      buffers.dh = arena_.template take<T>(args.P ? padded * products.proj_depth : 0, parts);
      for (int k = 0; k < Cell::states; ++k) {
        buffers.dstates[k] = arena_.template take<A>(step_rows * (k ? Hp : Op), parts);
      }
      buffers.h0 = arena_.template take<T>(step_rows * Op, parts);
      buffers.c0 = arena_.template take<A>(Cell::states > 1 ? step_rows * Hp : 0, parts);
    }
    rows = arena_.template take<Row>(step_rows, share.of_threads());
  }
  int64_t bytes() const { return arena_.used(); }

  int64_t Hp, Op, depth;
  int64_t step_rows;  // most of a step that one thread has
  GroupBuffers group[kMaxGroups];
  Row* rows = nullptr;

 private:
  Arena arena_;

 public:
  ProductsLayout<T> products;
};

template <class Cell, class T>
class BackwardScan {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = BackwardLayout<Cell, T>;
  static constexpr int lanes = kLanes<A>;

 public:
  BackwardScan(const BackwardArgs& args, const Layout& layout, const Share& share, int g)
      : args_(args),
        seq_(args.seq),
        layout_(layout),
        share_(share),
        group_(args.groups[g]),
        buffers_(layout.group[g]),
        rows_(layout.rows),
        out_(args.out()),
        cell_panels_(args.P ? buffers_.hr : buffers_.hh),
        units_(share.units_of(cell_panels_.count, cell_panels_.width(), layout.Hp)),
        out_units_(share.units_of(buffers_.hh.count, buffers_.hh.width(), layout.Op)),
        gates_(group_matrix<A>(args.gates, g, seq_.N, Cell::saved * layout.Hp)),
        cells_(group_matrix<A>(args.cells, g, seq_.N, layout.Hp)),
        h0_(group_matrix<T>(args.h0, g, seq_.B, out_)),
        c0_(group_matrix<T>(args.c0, g, seq_.B, args.H)),
        dh_n_(group_matrix<T>(args.dh_n, g, seq_.B, out_)),
        dc_n_(group_matrix<T>(args.dc_n, g, seq_.B, args.H)),
        dh0_(group_matrix<T>(args.dh0, g, seq_.B, out_)),
        dc0_(group_matrix<T>(args.dc0, g, seq_.B, args.H)),
        dgates_x_(layout.products.group[g].dgates_x),
        dgates_h_(layout.products.group[g].dgates_h),
        dprojection_(layout.products.group[g].dprojection),
        y_(group_columns<T>(args.y, g, out_)),
        dy_(group_columns<T>(args.dy, g, out_)),
        dc_(group_columns<T>(args.dc, g, args.H)),
        stage_(layout.products.stage(0)) {}

  void run() {
    start_states();
    share_.sync();
    for (int64_t s = seq_.T - 1; s >= 0; --s) {
      step(s);
      if (s || dh0_) share_.sync();
    }
    if (dh0_) {
      const int64_t rows = share_.count(seq_.active(group_.step_to_time(0, seq_.T)));
      for_each_run(buffers_.hh, dgates_after(-1), dgates_ld(), rows, -1,
                   [&](int64_t j0, int n, int64_t p) { initial_gradient(j0, 0, n, p); });
      store_state_gradient(0, dh0_, out_units_, out_, share_.count(seq_.active(0)));
    }
    if constexpr (Cell::states > 1) {
      if (dc0_) store_state_gradient(1, dc0_, units_, args_.H, 0);
    }
  }

 private:
  // Gradients of the final states wait in dstates for the step at which their row wakes.
  void start_states() {
    for (int64_t j = 0; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      if constexpr (Layout::kCopies) {
        for (T* d : buffers_.dgates) clear_padding(d + j * layout_.depth);
      }
      start_state(buffers_.dstates[0], j, dh_n_, out_units_, out_);
      T* const h = buffers_.h0 + j * layout_.Op;
      for (int64_t u = out_units_.begin; u < out_units_.end; ++u) h[u] = h0_ && u < out_ ? h0_[b * out_ + u] : T{};
      if constexpr (Cell::states > 1) {
        start_state(buffers_.dstates[1], j, dc_n_, units_, args_.H);
        start_state(buffers_.c0, j, c0_, units_, args_.H);
      }
    }
  }

  // My j-th row of an array of cell states or of what is passed back.
  template <class State>
  Strided<State> state_row(State* states, int64_t j) const {
    return strided_row(states, layout_.step_rows, j, 1);
  }

  void start_state(A* states, int64_t j, const T* values, Range units, int64_t columns) const {
    const Strided<A> row = state_row(states, j);
    const int64_t b = share_.row(j);
    for (int64_t u = units.begin; u < units.end; u += lanes) {
      store(row.vector(u), values && u < columns ? load_first(values + b * columns + u, columns - u) : V{});
    }
  }

  // Units that no vector covers, and the depth's padding, are read by the GEMM and must be zero.
  void clear_padding(T* row) const {
    if (units_.end != layout_.Hp) return;
    const int64_t covered = round_up(args_.H, lanes);
    for (int k = 0; k < Cell::gates; ++k) clear(row + k * layout_.Hp, covered, layout_.Hp);
    clear(row, Cell::gates * layout_.Hp, layout_.depth);
  }

  static void clear(T* row, int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) row[u] = T{};
  }

  // dgates of step s + 1, my rows, dgates_ld() apart. Past the last step there are none.
  const T* dgates_after(int64_t s) const {
    if constexpr (Layout::kCopies) return buffers_.dgates[(s + 1) & 1];
    if (s + 1 == seq_.T) return nullptr;
    return dgates_h_ + (seq_.offset(group_.step_to_time(s + 1, seq_.T)) + share_.row(0)) * layout_.depth;
  }

  int64_t dgates_ld() const { return Layout::kCopies ? layout_.depth : share_.row_step * layout_.depth; }

  // Calls body(first row, rows, panel) over my panels of `w` for runs of my first `rows` rows, `stage_` holding their
  // product with the panel. Row j of `a` is my j-th one.
  template <class Body>
  void for_each_run(const Panels<T>& w, const T* a, int64_t ld, int64_t rows, int64_t s, Body body) {
    const Sweep sweep(share_.panels(w.count), s);
    for (int64_t p = sweep.first; p != sweep.end; p += sweep.stride) {
      const T* const next = w.panel(p + sweep.stride == sweep.end ? p : p + sweep.stride);
      for (int64_t j0 = 0; j0 < rows; j0 += kTaskRows) {
        const int n = static_cast<int>(rows - j0 < kTaskRows ? rows - j0 : kTaskRows);
        multiply_deep(a + j0 * ld, ld, n, w.panel(p), w.depth, w.nv, w.panel_bias(p), 0, stage_, next);
        body(j0, n, p);
      }
    }
  }

  // The gradient of the state after step s, through W_hh of the step after it: body(rows, how many, panel, stride) has
  // row r of the block at r * stride in the stage. Rows that wake here have none; rows that fall silent here (reverse
  // direction) have reached their initial state.
  template <class Body>
  void for_each_state(int64_t s, int64_t rows, int64_t before, Body body) {
    const Panels<T>& w = buffers_.hh;
    for_each_run(w, dgates_after(s), dgates_ld(), before, s, [&](int64_t j0, int n, int64_t p) {
      const int active = static_cast<int>(rows - j0 < 0 ? 0 : rows - j0 < n ? rows - j0 : n);
      body(rows_ + j0, active, p, w.width());
      if (dh0_) initial_gradient(j0, active, n, p);
    });
    if (before >= rows) return;
    std::memset(stage_, 0, w.width() * sizeof(A));
    const Range mine = share_.panels(w.count);
    for (int64_t p = mine.begin; p < mine.end; ++p) body(rows_ + before, static_cast<int>(rows - before), p, 0);
  }

  void step(int64_t s) {
    using Row = typename Layout::Row;
    const int64_t t = group_.step_to_time(s, seq_.T);
    const int64_t rows = share_.count(seq_.active(t));
    const int64_t before = s + 1 < seq_.T ? share_.count(seq_.active(group_.time_after(t))) : 0;
    for (int64_t j = 0; j < rows; ++j) rows_[j] = find_row(j, s, t);
    if (!args_.P) {
      for_each_state(s, rows, before,
                     [&](const Row* r, int n, int64_t p, int64_t stride) { apply_cell(r, n, p, stride); });
      return;
    }
    for_each_state(s, rows, before,
                   [&](const Row* r, int n, int64_t p, int64_t stride) { add_output_gradient(r, n, p, stride); });
    share_.sync();
    for_each_run(buffers_.hr, buffers_.dh, buffers_.hr.depth, rows, s,
                 [&](int64_t j0, int n, int64_t p) { apply_cell(rows_ + j0, n, p, buffers_.hr.width()); });
  }

  typename Layout::Row find_row(int64_t j, int64_t s, int64_t t) const {
    const int64_t b = share_.row(j), n = seq_.offset(t) + b, before = group_.time_before(t);
    typename Layout::Row r{};
    r.gates = strided_row(gates_ + seq_.offset(t) * Cell::saved * layout_.Hp, seq_.active(t), b, Cell::saved);
    r.dy = dy_ ? dy_ + n * args_.G * out_ : nullptr;
    if constexpr (Layout::kCopies) r.dgates = buffers_.dgates[s & 1] + j * layout_.depth;
    r.dgates_x = dgates_x_ + n * layout_.depth;
    r.dgates_h = dgates_h_ + n * layout_.depth;
    r.dh = args_.P ? buffers_.dh + j * buffers_.hr.depth : nullptr;
    r.dprojection = args_.P ? dprojection_ + n * buffers_.hr.depth : nullptr;
    for (int k = 0; k < Cell::states; ++k) r.dstates[k] = state_row(buffers_.dstates[k], j);
    const int64_t rows_before = seq_.active_or_none(before);
    const bool initial = b >= rows_before;
    if (!args_.P) {
      r.h_before = initial ? buffers_.h0 + j * layout_.Op : y_ + (seq_.offset(before) + b) * args_.G * out_;
    }
    if constexpr (Cell::states > 1) {
      r.c_before = initial ? state_row<const A>(buffers_.c0, j)
                           : strided_row(cells_ + seq_.offset(before) * layout_.Hp, rows_before, b, 1);
      r.dc = dc_ ? dc_ + n * args_.G * args_.H : nullptr;
    }
    return r;
  }

  // All that reaches a projected state, kept for dW_hr and for the product with W_hr.
  void add_output_gradient(const typename Layout::Row* rows, int n, int64_t p, int64_t stride) const {
    const int nv = buffers_.hh.nv;
    for (int v = 0; v < nv; ++v) {
      const int64_t u = (p * nv + v) * lanes;
      if (u >= args_.P) break;
      for (int r = 0; r < n; ++r) {
        A* const waiting = rows[r].dstates[0].vector(u);
        V dh = load(stage_ + r * stride + v * lanes) + load(waiting);
        if (rows[r].dy) dh += load_first(rows[r].dy + u, args_.P - u);
        store(waiting, V{});
        dh = keep_first<A>(dh, args_.P - u);
        store(rows[r].dh + u, dh);
        store(rows[r].dprojection + u, dh);
      }
    }
    if (p + 1 < buffers_.hh.count) return;
    for (int r = 0; r < n; ++r) {
      clear(rows[r].dh, round_up(args_.P, lanes), buffers_.hr.depth);
      clear(rows[r].dprojection, round_up(args_.P, lanes), buffers_.hr.depth);
    }
  }

  // Row r of the run takes what lies r * stride into the stage.
  void apply_cell(const typename Layout::Row* rows, int n, int64_t p, int64_t stride) const {
    const int nv = cell_panels_.nv;
    for (int v = 0; v < nv; ++v) {
      const int64_t u = (p * nv + v) * lanes;
      if (u >= layout_.Hp) break;
      for (int r = 0; r < n; ++r) {
        u < args_.H ? apply_cell(rows[r], load(stage_ + r * stride + v * lanes), u) : clear_vector(rows[r], u);
      }
    }
    if (p + 1 < cell_panels_.count) return;
    for (int r = 0; r < n; ++r) {
      for (int64_t u = cell_panels_.count * cell_panels_.width(); u < layout_.Hp; u += lanes) clear_vector(rows[r], u);
      for (int64_t k = Cell::gates * layout_.Hp; k < layout_.depth; ++k)
        rows[r].dgates_x[k] = rows[r].dgates_h[k] = T{};
    }
  }

  FASTRNN_INLINE void apply_cell(const typename Layout::Row& row, V dh, int64_t u) const {
    V save[Cell::saved], state[Cell::states], ds[Cell::states], dx[Cell::gates], dr[Cell::gates];
    const A* const gates = row.gates.vector(u);
    for (int k = 0; k < Cell::saved; ++k) save[k] = load(gates + k * kUnitPad);
    state[0] = row.h_before ? load_first(row.h_before + u, args_.H - u) : V{};
    if constexpr (Cell::states > 1) state[1] = load(row.c_before.vector(u));
    ds[0] = dh;
    if (!row.dh) {
      ds[0] += load(row.dstates[0].vector(u));
      if (row.dy) ds[0] += load_first(row.dy + u, args_.H - u);
    }
    for (int k = 1; k < Cell::states; ++k) ds[k] = load(row.dstates[k].vector(u));
    if constexpr (Cell::states > 1) {
      if (row.dc) ds[1] += load_first(row.dc + u, args_.H - u);
    }
    Cell::backward(save, state, ds, dx, dr);
    if (!row.dh) store(row.dstates[0].vector(u), ds[0]);
    for (int k = 1; k < Cell::states; ++k) store(row.dstates[k].vector(u), ds[k]);
    for (int k = 0; k < Cell::gates; ++k) {
      dx[k] = keep_first<A>(dx[k], args_.H - u);
      dr[k] = keep_first<A>(dr[k], args_.H - u);
      if constexpr (Layout::kCopies) store(row.dgates + k * layout_.Hp + u, dr[k]);
      store(row.dgates_x + k * layout_.Hp + u, dx[k]);
      if (!Cell::shared_dgates) store(row.dgates_h + k * layout_.Hp + u, dr[k]);
    }
  }

  void clear_vector(const typename Layout::Row& row, int64_t u) const {
    for (int k = 0; k < Cell::gates; ++k) {
      store(row.dgates_x + k * layout_.Hp + u, V{});
      if (!Cell::shared_dgates) store(row.dgates_h + k * layout_.Hp + u, V{});
    }
  }

  // Rows [from, n) of the run have no earlier step: what would go there is their initial state's gradient.
  void initial_gradient(int64_t j0, int from, int n, int64_t p) const {
    const Panels<T>& w = buffers_.hh;
    for (int v = 0; v < w.nv; ++v) {
      const int64_t u = (p * w.nv + v) * lanes;
      if (u >= out_) return;
      for (int r = from; r < n; ++r) {
        const A* const waiting = state_row(buffers_.dstates[0], j0 + r).vector(u);
        const V d = load(stage_ + r * w.width() + v * lanes) + load(waiting);
        store_first(dh0_ + share_.row(j0 + r) * out_ + u, d, out_ - u);
      }
    }
  }

  // What has reached the beginning of my rows from the first-th on; of rows without a step all there is.
  void store_state_gradient(int k, T* out, Range units, int64_t columns, int64_t first) const {
    for (int64_t j = first; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (int64_t u = units.begin; u < units.end && u < columns; u += lanes) {
        store_first(out + b * columns + u, load(state_row(buffers_.dstates[k], j).vector(u)), columns - u);
      }
    }
  }

  const BackwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const Share& share_;
  const Group& group_;
  const typename Layout::GroupBuffers& buffers_;
  typename Layout::Row* rows_;
  int64_t out_;
  const Panels<T>& cell_panels_;  // those whose product the cell's derivative is applied to
  Range units_, out_units_;
  const A *gates_, *cells_;
  const T *h0_, *c0_, *dh_n_, *dc_n_;
  T *dh0_, *dc0_, *dgates_x_, *dgates_h_, *dprojection_;
  const T *y_, *dy_, *dc_;
  A* stage_;
};

template <class Cell, class T>
void backward(const BackwardArgs& args, const Plan& plan, const Team& team, int thread) {
  const TileScope tiles;
  const Share share = Share::of(plan, team, args, thread);
  const BackwardLayout<Cell, T> layout(args, plan, args.workspace, share);
  Products<T> products(args, layout.products, team, share, Cell::gates, Cell::shared_dgates);
  if (thread == 0) products.prepare();
  for (int64_t g = share.groups.begin; g < share.groups.end; ++g) {
    const Panels<T>&hh = layout.group[g].hh, &hr = layout.group[g].hr;
    const Range mine = share.packs_of_weights(plan.pack ? hh.count : 0);
    const T* const w_hh = static_cast<const T*>(args.groups[g].w_hh);
    for (int64_t p = mine.begin; p < mine.end; ++p) pack_columns(hh, p, w_hh, Cell::gates, args.H, args.out());
    const Range projected = share.packs_of_weights(args.P ? hr.count : 0);
    const T* const w_hr = static_cast<const T*>(args.groups[g].w_hr);
    for (int64_t p = projected.begin; p < projected.end; ++p) pack_columns(hr, p, w_hr, 1, args.P, args.H);
  }
  if (plan.pack || args.P || !layout.products.thin) team.everyone->wait(plan.threads);
  products.pack();
  for (int64_t g = share.groups.begin; g < share.groups.end && share.scans; ++g) {
    BackwardScan<Cell, T>(args, layout, share, static_cast<int>(g)).run();
  }
  team.everyone->wait(plan.threads);
  products.run();
}

template <class Cell, class T>
int64_t backward_bytes(const BackwardArgs& args, const Plan& plan) {
  return BackwardLayout<Cell, T>(args, plan, nullptr, Share::of(plan, Team{}, args, 0)).bytes();
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
