// Backpropagation through time: dh_t = dy_t + (what t + 1 passed back) + dgates_{t+1} W_hh, then the cell's derivative
// applied to each block while it is in cache. dx, dW and db follow from dgates in products.h.
#pragma once

#include "forward.h"
#include "products.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class Cell, class T>
struct BackwardLayout {
  using A = Acc<T>;
  struct GroupBuffers {
    Panels<T> hh;              // W_hh by columns
    T* dgates[2];              // [B, depth] of the step after, in turn: the GEMM's A
    A* dstates[Cell::states];  // [blocks, B, kUnitPad] passed back past W_hh
    T* h0;                     // [B, Hp] initial states, zeros where none were given
    A* c0;                     // [blocks, B, kUnitPad]
  };
  // Where one batch row's vectors lie in one step.
  struct Row {
    Strided<const A> gates, c_before;
    const T *h_before, *dy, *dc;
    T *dgates, *dgates_x, *dgates_h;
    Strided<A> dstates[Cell::states];
  };

  BackwardLayout(const BackwardArgs& args, const Plan& plan, void* base, int thread_index)
      : Hp(round_up(args.H, kUnitPad)),
        depth(round_up(Cell::gates * Hp, kDepthPad<T>)),
        nv(plan.panel_vectors),
        panels(ceil_div(args.H, nv * kLanes<A>)),
        arena_(base),
        products(arena_, args, plan, Cell::gates, Cell::shared_dgates, thread_index) {
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      Panels<T>& p = buffers.hh = {nullptr, nullptr, panels, depth, nv};
      p.data = plan.pack ? arena_.template take<T>(panels * p.stride()) : nullptr;
      p.bias = plan.pack ? arena_.template take<A>(panels * p.width()) : nullptr;
      const int64_t rows = args.seq.B + kRowPad<T> * plan.row_parts;
      for (T*& d : buffers.dgates) d = arena_.template take<T>(rows * depth);
      for (A*& d : buffers.dstates) d = arena_.template take<A>(args.seq.B * Hp);
      buffers.h0 = arena_.template take<T>(args.seq.B * Hp);
      buffers.c0 = Cell::states > 1 ? arena_.template take<A>(args.seq.B * Hp) : nullptr;
    }
    for (int i = 0; i < plan.threads; ++i) {
      Row* const r = arena_.template take<Row>(ceil_div(args.seq.B, plan.row_parts));
      if (i == thread_index) rows = r;
    }
  }
  int64_t bytes() const { return arena_.used(); }
  int64_t width() const { return nv * kLanes<A>; }

  int64_t Hp, depth;
  int nv;
  int64_t panels;
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
        panels_(split(layout.panels, share.unit_parts, share.unit_part)),
        gates_(group_matrix<A>(args.gates, g, seq_.N, Cell::saved * layout.Hp)),
        cells_(group_matrix<A>(args.cells, g, seq_.N, layout.Hp)),
        h0_(group_matrix<T>(args.h0, g, seq_.B, args.H)),
        c0_(group_matrix<T>(args.c0, g, seq_.B, args.H)),
        dh_n_(group_matrix<T>(args.dh_n, g, seq_.B, args.H)),
        dc_n_(group_matrix<T>(args.dc_n, g, seq_.B, args.H)),
        dh0_(group_matrix<T>(args.dh0, g, seq_.B, args.H)),
        dc0_(group_matrix<T>(args.dc0, g, seq_.B, args.H)),
        dgates_x_(layout.products.group[g].dgates_x),
        dgates_h_(layout.products.group[g].dgates_h),
        y_(static_cast<const T*>(args.y) + g * args.H),
        dy_(args.dy ? static_cast<const T*>(args.dy) + g * args.H : nullptr),
        dc_(args.dc ? static_cast<const T*>(args.dc) + g * args.H : nullptr),
        y_ld_(args.G * args.H),
        stage_(layout.products.stage) {
    const int64_t width = layout.nv * lanes;
    units_ = {panels_.begin * width, panels_.end == layout.panels ? layout.Hp : panels_.end * width};
  }

  void run() {
    start_states();
    share_.sync();
    for (int64_t s = seq_.T - 1; s >= 0; --s) {
      step(s);
      share_.sync();
    }
    if (dh0_) {
      const int64_t rows = share_.count(seq_.active(group_.step_to_time(0, seq_.T)));
      for_each_run(rows, -1, [&](int64_t j0, int n, int64_t p) { initial_gradient(j0, 0, n, p); });
      store_state_gradient(0, dh0_, share_.count(seq_.active(0)));
    }
    if constexpr (Cell::states > 1) {
      if (dc0_) store_state_gradient(1, dc0_, 0);
    }
  }

 private:
  // Gradients of the final states wait in dstates for the step at which their row wakes.
  void start_states() {
    const T* const finals[] = {dh_n_, dc_n_};
    for (int64_t j = 0; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (int k = 0; k < Cell::states; ++k) start_state(buffers_.dstates[k], b, finals[k]);
      for (T* d : buffers_.dgates) clear_padding(d + b * layout_.depth);
      T* const h = buffers_.h0 + b * layout_.Hp;
      for (int64_t u = units_.begin; u < units_.end; ++u) h[u] = h0_ && u < args_.H ? h0_[b * args_.H + u] : T{};
      if constexpr (Cell::states > 1) start_state(buffers_.c0, b, c0_);
    }
  }

  void start_state(A* states, int64_t b, const T* values) const {
    const Strided<A> row = strided_row(states, seq_.B, b, 1);
    for (int64_t u = units_.begin; u < units_.end; u += lanes) {
      store(row.vector(u), values && u < args_.H ? load_first(values + b * args_.H + u, args_.H - u) : V{});
    }
  }

  // Units that no vector covers, and the depth's padding, are read by the GEMM and must be zero.
  void clear_padding(T* row) const {
    if (panels_.end != layout_.panels) return;
    const int64_t covered = round_up(args_.H, lanes);
    for (int k = 0; k < Cell::gates; ++k) {
      for (int64_t u = covered; u < layout_.Hp; ++u) row[k * layout_.Hp + u] = T{};
    }
    for (int64_t k = Cell::gates * layout_.Hp; k < layout_.depth; ++k) row[k] = T{};
  }

  // Calls body(first row, rows, panel) over my panels for runs of my first `rows` rows, `stage_` holding
  // dgates W_hh of step s + 1 for them.
  template <class Body>
  void for_each_run(int64_t rows, int64_t s, Body body) {
    const int64_t ld = share_.row_parts * layout_.depth;
    const Panels<T>& w = buffers_.hh;
    const T* const dgates = buffers_.dgates[(s + 1) & 1];
    const Sweep sweep(panels_, s);
    for (int64_t p = sweep.first; p != sweep.end; p += sweep.stride) {
      const T* const next = w.panel(p + sweep.stride == sweep.end ? p : p + sweep.stride);
      for (int64_t j0 = 0; j0 < rows; j0 += kTaskRows) {
        const int n = static_cast<int>(rows - j0 < kTaskRows ? rows - j0 : kTaskRows);
        multiply_deep(dgates + share_.row(j0) * layout_.depth, ld, n, w.panel(p), w.depth, w.nv, w.panel_bias(p), 0,
                      stage_, next);
        body(j0, n, p);
      }
    }
  }

  // Rows that were active at the step after get its gradient through W_hh; rows that wake here have none; rows that
  // fall silent here (reverse direction) have reached their initial state.
  void step(int64_t s) {
    const int64_t t = group_.step_to_time(s, seq_.T);
    const int64_t rows = share_.count(seq_.active(t));
    const int64_t before = s + 1 < seq_.T ? share_.count(seq_.active(group_.time_after(t))) : 0;
    for (int64_t j = 0; j < rows; ++j) rows_[j] = find_row(share_.row(j), s, t);
    for_each_run(before, s, [&](int64_t j0, int n, int64_t p) {
      const int active = static_cast<int>(rows - j0 < 0 ? 0 : rows - j0 < n ? rows - j0 : n);
      apply_cell(rows_ + j0, active, p, layout_.width());
      if (dh0_) initial_gradient(j0, active, n, p);
    });
    if (before >= rows) return;
    std::memset(stage_, 0, layout_.width() * sizeof(A));
    const int woken = static_cast<int>(rows - before);
    for (int64_t p = panels_.begin; p < panels_.end; ++p) apply_cell(rows_ + before, woken, p, 0);
  }

  typename Layout::Row find_row(int64_t b, int64_t s, int64_t t) const {
    const int64_t row = seq_.offset(t) + b, before = group_.time_before(t);
    typename Layout::Row r{};
    r.gates = strided_row(gates_ + seq_.offset(t) * Cell::saved * layout_.Hp, seq_.active(t), b, Cell::saved);
    r.dy = dy_ ? dy_ + row * y_ld_ : nullptr;
    r.dgates = buffers_.dgates[s & 1] + b * layout_.depth;
    r.dgates_x = dgates_x_ + row * layout_.depth;
    r.dgates_h = dgates_h_ + row * layout_.depth;
    for (int k = 0; k < Cell::states; ++k) r.dstates[k] = strided_row(buffers_.dstates[k], seq_.B, b, 1);
    const int64_t rows_before = seq_.active_or_none(before);
    const bool initial = b >= rows_before;
    r.h_before = initial ? buffers_.h0 + b * layout_.Hp : y_ + (seq_.offset(before) + b) * y_ld_;
    if constexpr (Cell::states > 1) {
      r.c_before = initial ? strided_row<const A>(buffers_.c0, seq_.B, b, 1)
                           : strided_row(cells_ + seq_.offset(before) * layout_.Hp, rows_before, b, 1);
      r.dc = dc_ ? dc_ + row * y_ld_ : nullptr;
    }
    return r;
  }

  // Row r of the run takes what lies r * stride into the stage.
  void apply_cell(const typename Layout::Row* rows, int n, int64_t p, int64_t stride) const {
    for (int v = 0; v < layout_.nv; ++v) {
      const int64_t u = (p * layout_.nv + v) * lanes;
      if (u >= layout_.Hp) break;
      for (int r = 0; r < n; ++r) {
        u < args_.H ? apply_cell(rows[r], load(stage_ + r * stride + v * lanes), u) : clear_vector(rows[r], u);
      }
    }
    if (p + 1 < layout_.panels) return;
    for (int r = 0; r < n; ++r) {
      for (int64_t u = layout_.panels * layout_.nv * lanes; u < layout_.Hp; u += lanes) clear_vector(rows[r], u);
      for (int64_t k = Cell::gates * layout_.Hp; k < layout_.depth; ++k)
        rows[r].dgates_x[k] = rows[r].dgates_h[k] = T{};
    }
  }

  FASTRNN_INLINE void apply_cell(const typename Layout::Row& row, V dh, int64_t u) const {
    V save[Cell::saved], state[Cell::states], ds[Cell::states], dx[Cell::gates], dr[Cell::gates];
    const A* const gates = row.gates.vector(u);
    for (int k = 0; k < Cell::saved; ++k) save[k] = load(gates + k * kUnitPad);
    state[0] = load_first(row.h_before + u, args_.H - u);
    if constexpr (Cell::states > 1) state[1] = load(row.c_before.vector(u));
    for (int k = 0; k < Cell::states; ++k) ds[k] = load(row.dstates[k].vector(u));
    ds[0] += dh;
    if (row.dy) ds[0] += load_first(row.dy + u, args_.H - u);
    if constexpr (Cell::states > 1) {
      if (row.dc) ds[1] += load_first(row.dc + u, args_.H - u);
    }
    Cell::backward(save, state, ds, dx, dr);
    for (int k = 0; k < Cell::states; ++k) store(row.dstates[k].vector(u), ds[k]);
    for (int k = 0; k < Cell::gates; ++k) {
      store(row.dgates + k * layout_.Hp + u, dr[k]);
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
    for (int v = 0; v < layout_.nv; ++v) {
      const int64_t u = (p * layout_.nv + v) * lanes;
      if (u >= args_.H) return;
      for (int r = from; r < n; ++r) {
        const int64_t b = share_.row(j0 + r);
        const V d = load(stage_ + r * layout_.width() + v * lanes) +
                    load(strided_row(buffers_.dstates[0], seq_.B, b, 1).vector(u));
        store_first(dh0_ + b * args_.H + u, d, args_.H - u);
      }
    }
  }

  // What has reached the beginning of my rows from the first-th on; of rows without a step all there is.
  void store_state_gradient(int k, T* out, int64_t first) const {
    for (int64_t j = first; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (int64_t u = units_.begin; u < units_.end && u < args_.H; u += lanes) {
        store_first(out + b * args_.H + u, load(strided_row(buffers_.dstates[k], seq_.B, b, 1).vector(u)), args_.H - u);
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
  Range panels_, units_;
  const A *gates_, *cells_;
  const T *h0_, *c0_, *dh_n_, *dc_n_;
  T *dh0_, *dc0_, *dgates_x_, *dgates_h_;
  const T *y_, *dy_, *dc_;
  int64_t y_ld_;
  A* stage_;
};

template <class Cell, class T>
void backward(const BackwardArgs& args, const Plan& plan, const Team& team, int thread) {
  const TileScope tiles;
  const BackwardLayout<Cell, T> layout(args, plan, args.workspace, thread);
  Products<T> products(args, layout.products, team, plan.threads, Cell::gates, Cell::shared_dgates);
  if (thread == 0) products.prepare();
  const Range mine = split(plan.pack ? layout.panels : 0, plan.threads, thread);
  for (int g = 0; g < args.G; ++g) {
    const T* const w = static_cast<const T*>(args.groups[g].w_hh);
    for (int64_t p = mine.begin; p < mine.end; ++p) pack_columns(layout.group[g].hh, p, w, Cell::gates, args.H, args.H);
  }
  team.everyone->wait(plan.threads);
  products.pack(thread, plan.threads);
  const Share share = Share::of(plan, team, args.G, thread);
  for (int g = share.group_begin; g < share.group_end; ++g) BackwardScan<Cell, T>(args, layout, share, g).run();
  team.everyone->wait(plan.threads);
  products.run(thread);
}

template <class Cell, class T>
int64_t backward_bytes(const BackwardArgs& args, const Plan& plan) {
  return BackwardLayout<Cell, T>(args, plan, nullptr, 0).bytes();
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
