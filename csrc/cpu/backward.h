// Backpropagation through time: dh_t = dy_t + (what t + 1 passed back) + dgates_{t+1} W_hh, then the cell's derivative
// applied to each block while it is in cache. dx, dW and db follow from dgates by large GEMMs outside.
#pragma once

#include "forward.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class Cell, class T>
struct BackwardLayout {
  using A = Acc<T>;
  struct GroupBuffers {
    Panels<T> hh;             // W_hh by columns
    T* dgates[2];             // [B, depth] of the step after, in turn: the GEMM's A
    A* dstates[Cell::states]; // [B, Hp] passed back past W_hh
  };

  BackwardLayout(const BackwardArgs& args, const Plan& plan, void* base)
      : Hp(round_up(args.H, kUnitPad)),
        depth(round_up(Cell::gates * Hp, kDepthPad<T>)),
        nv(plan.panel_vectors),
        panels(ceil_div(args.H, nv * kLanes<A>)),
        arena_(base) {
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      Panels<T>& p = buffers.hh = {nullptr, nullptr, panels, depth, nv};
      p.data = plan.pack ? arena_.template take<T>(panels * p.stride()) : nullptr;
      p.bias = plan.pack ? arena_.template take<A>(panels * p.width()) : nullptr;
      const int64_t rows = args.seq.B + kRowPad<T> * plan.row_parts;
      for (T*& d : buffers.dgates) d = arena_.template take<T>(rows * depth);
      for (A*& d : buffers.dstates) d = arena_.template take<A>(args.seq.B * Hp);
    }
  }
  int64_t bytes() const { return arena_.used(); }

  int64_t Hp, depth;
  int nv;
  int64_t panels;
  GroupBuffers group[kMaxGroups];

 private:
  Arena arena_;
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
        panels_(split(layout.panels, share.unit_parts, share.unit_part)),
        gates_(group_matrix<A>(args.gates, g, seq_.N, Cell::saved * layout.Hp)),
        cells_(group_matrix<A>(args.cells, g, seq_.N, layout.Hp)),
        h0_(group_matrix<T>(args.h0, g, seq_.B, args.H)),
        c0_(group_matrix<T>(args.c0, g, seq_.B, args.H)),
        dh_n_(group_matrix<T>(args.dh_n, g, seq_.B, args.H)),
        dc_n_(group_matrix<T>(args.dc_n, g, seq_.B, args.H)),
        dh0_(group_matrix<T>(args.dh0, g, seq_.B, args.H)),
        dc0_(group_matrix<T>(args.dc0, g, seq_.B, args.H)),
        dgates_x_(group_matrix<T>(args.dgates_x, g, seq_.N, Cell::gates * layout.Hp)),
        dgates_h_(group_matrix<T>(args.dgates_h, g, seq_.N, Cell::gates * layout.Hp)),
        y_(static_cast<const T*>(args.y) + g * args.H),
        dy_(args.dy ? static_cast<const T*>(args.dy) + g * args.H : nullptr),
        y_ld_(args.G * args.H) {
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
      for_each_block(rows, 0, [&](int r, int64_t p, int64_t b) { initial_gradient(r, p, b); });
    }
    if (dc0_) store_state_gradient(1, dc0_);
  }

 private:
  // Gradients of the final states wait in dstates for the step at which their row wakes.
  void start_states() {
    const T* const finals[] = {dh_n_, dc_n_};
    for (int64_t j = 0; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (int k = 0; k < Cell::states; ++k) {
        A* const out = buffers_.dstates[k] + b * layout_.Hp;
        for (int64_t u = units_.begin; u < units_.end; ++u) {
          out[u] = finals[k] && u < args_.H ? widen_one(finals[k][b * args_.H + u]) : 0;
        }
      }
      for (T* d : buffers_.dgates) clear_padding(d + b * layout_.depth);
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

  // Calls body(row of the tile, panel, batch row) over my panels for my first `rows` rows, the tile holding
  // dgates W_hh of the step that wrote buffer `from`.
  template <class Body>
  void for_each_block(int64_t rows, int from, Body body) {
    const RowBlocks<T> blocks(rows, layout_.nv);
    const int64_t ld = share_.row_parts * layout_.depth;
    for (int64_t p = panels_.begin; p < panels_.end; ++p) {
      for (int64_t i = 0; i < blocks.count(); ++i) {
        const int64_t j0 = blocks.begin(i);
        const int n = blocks.size(i);
        const T* const a = buffers_.dgates[from] + share_.row(j0) * layout_.depth;
        blocks.kernel(layout_.nv, n)(a, ld, buffers_.hh.panel(p), layout_.depth, buffers_.hh.panel_bias(p), tile_.c);
        for (int r = 0; r < n; ++r) body(r, p, share_.row(j0 + r));
      }
    }
  }

  // Rows that were active at the step after get its gradient through W_hh; rows that wake here have none; rows that
  // fall silent here (reverse direction) have reached their initial state.
  void step(int64_t s) {
    const int64_t t = group_.step_to_time(s, seq_.T);
    const int64_t rows = share_.count(seq_.active(t));
    const int64_t before = s + 1 < seq_.T ? share_.count(seq_.active(group_.time_after(t))) : 0;
    const int64_t active = seq_.active(t);
    if (before > rows && !dh0_) {
      for_each_block(rows, (s + 1) & 1, [&](int r, int64_t p, int64_t b) { apply_cell(r, p, b, t, s & 1); });
      return;
    }
    for_each_block(before, (s + 1) & 1, [&](int r, int64_t p, int64_t b) {
      b < active ? apply_cell(r, p, b, t, s & 1) : initial_gradient(r, p, b);
    });
    if (before >= rows) return;
    std::memset(tile_.c, 0, sizeof tile_.c);
    for (int64_t p = panels_.begin; p < panels_.end; ++p) {
      for (int64_t j = before; j < rows; ++j) apply_cell(0, p, share_.row(j), t, s & 1);
    }
  }

  void apply_cell(int r, int64_t p, int64_t b, int64_t t, int to) const {
    const int64_t row = seq_.offset(t) + b;
    const A* const gates = gates_ + row * Cell::saved * layout_.Hp;
    T* const dgates = buffers_.dgates[to] + b * layout_.depth;
    T* const dgates_x = dgates_x_ + row * Cell::gates * layout_.Hp;
    T* const dgates_h = dgates_h_ ? dgates_h_ + row * Cell::gates * layout_.Hp : nullptr;
    const Before before = states_before(t, b);
    for (int v = 0; v < layout_.nv; ++v) {
      const int64_t u = (p * layout_.nv + v) * lanes;
      if (u >= layout_.Hp) return;
      if (u >= args_.H) {
        clear_vector(dgates_x, dgates_h, u);
        continue;
      }
      V save[Cell::saved], state[Cell::states], ds[Cell::states], dx[Cell::gates], dr[Cell::gates];
      for (int k = 0; k < Cell::saved; ++k) save[k] = load(gates + k * layout_.Hp + u);
      state[0] = before.h ? load_first(before.h + u, args_.H - u) : V{};
      if constexpr (Cell::states > 1) state[1] = before.load_c(u, args_.H);
      for (int k = 0; k < Cell::states; ++k) ds[k] = load(buffers_.dstates[k] + b * layout_.Hp + u);
      ds[0] += tile_.at(r, layout_.nv, v);
      if (dy_) ds[0] += load_first(dy_ + row * y_ld_ + u, args_.H - u);
      Cell::backward(save, state, ds, dx, dr);
      for (int k = 0; k < Cell::states; ++k) store(buffers_.dstates[k] + b * layout_.Hp + u, ds[k]);
      for (int k = 0; k < Cell::gates; ++k) {
        store(dgates + k * layout_.Hp + u, dr[k]);
        store(dgates_x + k * layout_.Hp + u, dx[k]);
        if (dgates_h) store(dgates_h + k * layout_.Hp + u, dr[k]);
      }
    }
    if (p == layout_.panels - 1) clear_tail(dgates_x, dgates_h);
  }

  void clear_vector(T* dgates_x, T* dgates_h, int64_t u) const {
    for (int k = 0; k < Cell::gates; ++k) {
      store(dgates_x + k * layout_.Hp + u, V{});
      if (dgates_h) store(dgates_h + k * layout_.Hp + u, V{});
    }
  }

  // Padded units beyond the last panel, where vectors are narrower than the padding.
  void clear_tail(T* dgates_x, T* dgates_h) const {
    for (int64_t u = layout_.panels * layout_.nv * lanes; u < layout_.Hp; u += lanes) clear_vector(dgates_x, dgates_h, u);
  }

  struct Before {
    const T* h;        // null: zeros
    const A* c;        // null: take c_initial
    const T* c_initial;
    FASTRNN_INLINE V load_c(int64_t u, int64_t H) const {
      if (c) return load(c + u);
      return c_initial ? load_first(c_initial + u, H - u) : V{};
    }
  };

  Before states_before(int64_t t, int64_t b) const {
    const int64_t before = group_.time_before(t);
    if (b < seq_.active_or_none(before)) {
      const int64_t row = seq_.offset(before) + b;
      return {y_ + row * y_ld_, cells_ ? cells_ + row * layout_.Hp : nullptr, nullptr};
    }
    return {h0_ ? h0_ + b * args_.H : nullptr, nullptr, c0_ ? c0_ + b * args_.H : nullptr};
  }

  void initial_gradient(int r, int64_t p, int64_t b) const {
    for (int v = 0; v < layout_.nv; ++v) {
      const int64_t u = (p * layout_.nv + v) * lanes;
      if (u >= args_.H) return;
      const V d = tile_.at(r, layout_.nv, v) + load(buffers_.dstates[0] + b * layout_.Hp + u);
      store_first(dh0_ + b * args_.H + u, d, args_.H - u);
    }
  }

  void store_state_gradient(int k, T* out) const {
    for (int64_t j = 0; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (int64_t u = units_.begin; u < units_.end && u < args_.H; u += lanes) {
        store_first(out + b * args_.H + u, load(buffers_.dstates[k] + b * layout_.Hp + u), args_.H - u);
      }
    }
  }

  const BackwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const Share& share_;
  const Group& group_;
  const typename Layout::GroupBuffers& buffers_;
  Range panels_, units_;
  const A *gates_, *cells_;
  const T *h0_, *c0_, *dh_n_, *dc_n_;
  T *dh0_, *dc0_, *dgates_x_, *dgates_h_;
  const T *y_, *dy_;
  int64_t y_ld_;
  Tile<T> tile_;
};

template <class Cell, class T>
void backward(const BackwardArgs& args, const Plan& plan, const Team& team, int thread) {
  const TileScope tiles;
  const BackwardLayout<Cell, T> layout(args, plan, args.workspace);
  const Range mine = split(plan.pack ? layout.panels : 0, plan.threads, thread);
  for (int g = 0; g < args.G; ++g) {
    const T* const w = static_cast<const T*>(args.groups[g].w_hh);
    for (int64_t p = mine.begin; p < mine.end; ++p) pack_columns(layout.group[g].hh, p, w, Cell::gates, args.H);
  }
  team.everyone->wait(plan.threads);
  const Share share = Share::of(plan, team, args.G, thread);
  if (share.idle) return;
  for (int g = share.group_begin; g < share.group_end; ++g) BackwardScan<Cell, T>(args, layout, share, g).run();
}

template <class Cell, class T>
int64_t backward_bytes(const BackwardArgs& args, const Plan& plan) {
  return BackwardLayout<Cell, T>(args, plan, nullptr).bytes();
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
