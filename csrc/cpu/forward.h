// The forward scan: gates_x = x W_ih^T + b_ih for a chunk of timesteps, then step by step
// h_{t-1} W_hh^T + b_hh with the cell applied to each block while it is in cache.
#pragma once

#include "../cells/cells.h"
#include "arena.h"
#include "pack.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class T>
const T* group_matrix(const void* base, int g, int64_t rows, int64_t columns) {
  return base ? static_cast<const T*>(base) + g * rows * columns : nullptr;
}
template <class T>
T* group_matrix(void* base, int g, int64_t rows, int64_t columns) {
  return base ? static_cast<T*>(base) + g * rows * columns : nullptr;
}

// Sizes that follow from the problem, the cell and the type.
template <class Cell, class T>
struct ForwardLayout {
  using A = Acc<T>;
  struct GroupBuffers {
    Weights<T> ih, hh;
    T* h[2];     // [B, Hk] before and after a step, in turn
    A* c;        // [B, Hp] where the cell states are not saved
    A* gates_x;  // [chunk, B, gates Hp] where the gates are not saved
  };
  struct ThreadBuffers {
    T* x;  // [rows of a chunk, Ik]
  };

  ForwardLayout(const ForwardArgs& args, const Plan& plan, void* base)
      : Hp(round_up(args.H, kUnitPad)),
        Hk(round_up(Hp, kDepthPad<T>)),
        Ik(round_up(args.I, kDepthPad<T>)),
        unit_vectors(plan.panel_vectors),
        nv(unit_vectors * Cell::gates),
        panels(ceil_div(args.H, unit_vectors * kLanes<A>)),
        arena_(base) {
    const Sequence& seq = args.seq;
    const int64_t chunk = plan.chunk < seq.T ? plan.chunk : seq.T;
    for (int g = 0; g < args.G; ++g) {
      GroupBuffers& buffers = group[g];
      buffers.ih = weights(args.groups[g].w_ih, args.groups[g].b_ih, args, args.I, Ik, plan.pack);
      buffers.hh = weights(args.groups[g].w_hh, args.groups[g].b_hh, args, args.H, Hk, plan.pack);
      const int64_t rows = seq.B + kRowPad<T> * plan.row_parts;
      for (T*& h : buffers.h) h = arena_.template take<T>(rows * Hk);
      buffers.c = Cell::states > 1 && !args.gates ? arena_.template take<A>(seq.B * Hp) : nullptr;
      buffers.gates_x = args.gates ? nullptr : arena_.template take<A>(chunk * seq.B * Cell::gates * Hp);
    }
    const int64_t rows = chunk * ceil_div(seq.B, plan.row_parts) + kRowPad<T>;
    thread_bytes_ = round_up(rows * Ik * static_cast<int64_t>(sizeof(T)), 64);
    threads_ = arena_.template take<char>(thread_bytes_ * plan.threads);
  }

  ThreadBuffers thread(int i) const { return {reinterpret_cast<T*>(threads_ + thread_bytes_ * i)}; }
  int64_t bytes() const { return arena_.used(); }

  int64_t Hp, Hk, Ik;
  int unit_vectors, nv;
  int64_t panels;
  GroupBuffers group[kMaxGroups];

 private:
  Weights<T> weights(const void* w, const void* b, const ForwardArgs& args, int64_t K, int64_t depth, bool pack) {
    Panels<T> p{nullptr, nullptr, panels, depth, nv};
    if (pack) {
      p.data = arena_.template take<T>(panels * p.stride());
      p.bias = arena_.template take<A>(panels * p.width());
    }
    return {p, static_cast<const T*>(w), static_cast<const T*>(b), Cell::gates, args.H, K, pack};
  }

  Arena arena_;
  char* threads_;
  int64_t thread_bytes_;
};

template <class Cell, class T>
class ForwardScan {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = ForwardLayout<Cell, T>;
  static constexpr int lanes = kLanes<A>;

 public:
  ForwardScan(const ForwardArgs& args, const Plan& plan, const Layout& layout, const Share& share, int thread, int g)
      : args_(args),
        seq_(args.seq),
        layout_(layout),
        share_(share),
        group_(args.groups[g]),
        buffers_(layout.group[g]),
        x_rows_(layout.thread(thread).x),
        chunk_(plan.chunk),
        panels_(split(layout.panels, share.unit_parts, share.unit_part)),
        gates_ld_((args.gates ? Cell::saved : Cell::gates) * layout.Hp),
        gates_(group_matrix<A>(args.gates, g, seq_.N, Cell::saved * layout.Hp)),
        cells_(group_matrix<A>(args.cells, g, seq_.N, layout.Hp)),
        h0_(group_matrix<T>(args.h0, g, seq_.B, args.H)),
        c0_(group_matrix<T>(args.c0, g, seq_.B, args.H)),
        h_n_(group_matrix<T>(args.h_n, g, seq_.B, args.H)),
        c_n_(group_matrix<T>(args.c_n, g, seq_.B, args.H)),
        y_(static_cast<T*>(args.y) + g * args.H),
        y_ld_(args.G * args.H) {}

  void run() {
    start_states();
    share_.sync();
    for (int64_t s0 = 0; s0 < seq_.T; s0 += chunk_) {
      const int64_t s1 = s0 + chunk_ < seq_.T ? s0 + chunk_ : seq_.T;
      input_gates(s0, s1);
      for (int64_t s = s0; s < s1; ++s) {
        step(s, s0);
        finish_rows(group_.step_to_time(s, seq_.T));
        share_.sync();
      }
    }
  }

 private:
  struct Units {
    int64_t begin, end;  // in padded units
  };
  Units my_units() const {
    const int64_t width = layout_.unit_vectors * lanes;
    const int64_t end = panels_.end == layout_.panels ? layout_.Hp : panels_.end * width;
    return {panels_.begin * width, end};
  }

  // Both buffers take the initial state: a packed row may wake at any step.
  void start_states() {
    const Units units = my_units();
    for (int64_t j = 0; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (T* h : buffers_.h) {
        copy_padded(h + b * layout_.Hk, h0_ ? h0_ + b * args_.H : nullptr, units.begin, units.end);
        if (share_.unit_part == 0) std::memset(h + b * layout_.Hk + layout_.Hp, 0, (layout_.Hk - layout_.Hp) * sizeof(T));
      }
      if constexpr (Cell::states > 1) {
        if (buffers_.c) widen_padded(buffers_.c + b * layout_.Hp, c0_ ? c0_ + b * args_.H : nullptr, units);
      }
    }
  }

  void copy_padded(T* out, const T* in, int64_t begin, int64_t end) const {
    const int64_t real = in ? (end < args_.H ? end : args_.H) : begin;
    for (int64_t u = begin; u < real; ++u) out[u] = in[u];
    for (int64_t u = real > begin ? real : begin; u < end; ++u) out[u] = T{};
  }

  void widen_padded(A* out, const T* in, Units units) const {
    for (int64_t u = units.begin; u < units.end; ++u) out[u] = in && u < args_.H ? widen_one(in[u]) : 0;
  }

  A* gates_row(int64_t t, int64_t s0, int64_t b) const {
    if (gates_) return gates_ + (seq_.offset(t) + b) * gates_ld_;
    const int64_t step = group_.reverse ? seq_.T - 1 - s0 - t : t - s0;
    return buffers_.gates_x + (step * seq_.B + b) * gates_ld_;
  }

  // My rows of steps [s0, s1) gathered side by side, then multiplied panel by panel.
  void input_gates(int64_t s0, int64_t s1) {
    int64_t rows = 0;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = group_.step_to_time(s, seq_.T);
      for (int64_t j = 0; j < share_.count(seq_.active(t)); ++j) copy_x(rows++, t, share_.row(j));
    }
    const RowBlocks<T> blocks(rows, layout_.nv);
    for (int64_t p = panels_.begin; p < panels_.end; ++p) {
      RowCursor cursor{*this, s0};
      for (int64_t i = 0; i < blocks.count(); ++i) {
        const int n = blocks.size(i);
        buffers_.ih.multiply(tile_, blocks.kernel(layout_.nv, n), n, x_rows_ + blocks.begin(i) * layout_.Ik, layout_.Ik, p);
        for (int r = 0; r < n; ++r) store_input_gates(r, p, cursor.next());
      }
    }
  }

  // Walks the rows in the order in which input_gates gathered them.
  struct RowCursor {
    const ForwardScan& scan;
    int64_t s0, s = s0, j = 0;
    A* next() {
      int64_t t = scan.group_.step_to_time(s, scan.seq_.T);
      while (j >= scan.share_.count(scan.seq_.active(t))) {
        j = 0;
        t = scan.group_.step_to_time(++s, scan.seq_.T);
      }
      return scan.gates_row(t, s0, scan.share_.row(j++));
    }
  };

  void copy_x(int64_t row, int64_t t, int64_t b) const {
    const int64_t at = seq_.offsets ? (seq_.offset(t) + b) * args_.x_stride_b : t * args_.x_stride_t + b * args_.x_stride_b;
    T* const out = x_rows_ + row * layout_.Ik;
    std::memcpy(out, static_cast<const T*>(args_.x) + at, args_.I * sizeof(T));
    std::memset(out + args_.I, 0, (layout_.Ik - args_.I) * sizeof(T));
  }

  void store_input_gates(int r, int64_t p, A* gates) const {
    for (int j = 0; j < layout_.unit_vectors; ++j) {
      const int64_t u = (p * layout_.unit_vectors + j) * lanes;
      if (u >= layout_.Hp) return;
      for (int k = 0; k < Cell::gates; ++k) {
        store(gates + k * layout_.Hp + u, tile_.at(r, layout_.nv, j * Cell::gates + k));
      }
    }
  }

  void step(int64_t s, int64_t s0) {
    const int64_t t = group_.step_to_time(s, seq_.T);
    const RowBlocks<T> blocks(share_.count(seq_.active(t)), layout_.nv);
    const T* const h = buffers_.h[s & 1];
    const int64_t ld = share_.row_parts * layout_.Hk;
    for (int64_t p = panels_.begin; p < panels_.end; ++p) {
      for (int64_t i = 0; i < blocks.count(); ++i) {
        const int64_t j0 = blocks.begin(i);
        const int n = blocks.size(i);
        buffers_.hh.multiply(tile_, blocks.kernel(layout_.nv, n), n, h + share_.row(j0) * layout_.Hk, ld, p);
        for (int r = 0; r < n; ++r) apply_cell(r, p, share_.row(j0 + r), s, t, s0);
      }
    }
  }

  void apply_cell(int r, int64_t p, int64_t b, int64_t s, int64_t t, int64_t s0) const {
    A* const gates = gates_row(t, s0, b);
    const T* const h_prev = buffers_.h[s & 1] + b * layout_.Hk;
    T* const h_next = buffers_.h[(s + 1) & 1] + b * layout_.Hk;
    T* const y = y_ + (seq_.offset(t) + b) * y_ld_;
    const CellRow c = cell_row(t, b);
    for (int j = 0; j < layout_.unit_vectors; ++j) {
      const int64_t u = (p * layout_.unit_vectors + j) * lanes;
      if (u >= args_.H) return;
      V x[Cell::gates], rec[Cell::gates], state[Cell::states], save[Cell::saved];
      for (int k = 0; k < Cell::gates; ++k) {
        x[k] = load(gates + k * layout_.Hp + u);
        rec[k] = tile_.at(r, layout_.nv, j * Cell::gates + k);
      }
      state[0] = load(h_prev + u);
      if constexpr (Cell::states > 1) state[1] = c.load_before(u, args_.H);
      Cell::forward(x, rec, state, save);
      store(h_next + u, state[0]);
      store_first(y + u, state[0], args_.H - u);
      if constexpr (Cell::states > 1) store(c.after + u, state[1]);
      if (!gates_) continue;
      for (int k = 0; k < Cell::saved; ++k) store(gates + k * layout_.Hp + u, save[k]);
    }
  }

  // Where the cell state before and after a step lies: in place while nothing is saved, else in the row of each step.
  struct CellRow {
    const A* before;
    const T* initial;
    A* after;
    FASTRNN_INLINE V load_before(int64_t u, int64_t H) const {
      if (before) return load(before + u);
      return initial ? load_first(initial + u, H - u) : V{};
    }
  };

  CellRow cell_row(int64_t t, int64_t b) const {
    if constexpr (Cell::states == 1) return {};
    if (!cells_) return {buffers_.c + b * layout_.Hp, nullptr, buffers_.c + b * layout_.Hp};
    A* const after = cells_ + (seq_.offset(t) + b) * layout_.Hp;
    const int64_t before = group_.time_before(t);
    if (b < seq_.active_or_none(before)) return {cells_ + (seq_.offset(before) + b) * layout_.Hp, nullptr, after};
    return {nullptr, c0_ ? c0_ + b * args_.H : nullptr, after};
  }

  // Rows whose sequence ends with step t hand out their final state, each thread its own units.
  void finish_rows(int64_t t) const {
    const Units units = my_units();
    const int64_t end = units.end < args_.H ? units.end : args_.H;
    const int64_t going_on = share_.count(seq_.active_or_none(group_.time_after(t)));
    for (int64_t j = going_on; j < share_.count(seq_.active(t)); ++j) {
      const int64_t b = share_.row(j);
      const T* const y = y_ + (seq_.offset(t) + b) * y_ld_;
      for (int64_t u = units.begin; u < end; ++u) h_n_[b * args_.H + u] = y[u];
      if constexpr (Cell::states > 1) {
        const A* const c = cell_row(t, b).after;
        for (int64_t u = units.begin; u < end; u += lanes) store_first(c_n_ + b * args_.H + u, load(c + u), end - u);
      }
    }
  }

  const ForwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const Share& share_;
  const Group& group_;
  const typename Layout::GroupBuffers& buffers_;
  T* x_rows_;
  int64_t chunk_;
  Range panels_;
  int64_t gates_ld_;
  A *gates_, *cells_;
  const T *h0_, *c0_;
  T *h_n_, *c_n_, *y_;
  int64_t y_ld_;
  Tile<T> tile_;
};

// One thread's whole part of a layer call.
template <class Cell, class T>
void forward(const ForwardArgs& args, const Plan& plan, const Team& team, int thread) {
  const TileScope tiles;
  const ForwardLayout<Cell, T> layout(args, plan, args.workspace);
  for (int g = 0; g < args.G; ++g) {
    const Range mine = split(layout.panels, plan.threads, thread);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      layout.group[g].ih.pack(p);
      layout.group[g].hh.pack(p);
    }
  }
  team.everyone->wait(plan.threads);
  const Share share = Share::of(plan, team, args.G, thread);
  if (share.idle) return;
  for (int g = share.group_begin; g < share.group_end; ++g) {
    ForwardScan<Cell, T>(args, plan, layout, share, thread, g).run();
  }
}

template <class Cell, class T>
int64_t forward_bytes(const ForwardArgs& args, const Plan& plan) {
  return ForwardLayout<Cell, T>(args, plan, nullptr).bytes();
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
