// The forward scan: gates_x = x W_ih^T + b_ih for a chunk of timesteps, then step by step
// h_{t-1} W_hh^T + b_hh with the cell applied to each block while it is in cache. With a projection (Sak et al. 2014) a
// second product makes h_t of what the cell gives.
#pragma once

#include "../cells/cells.h"
#include "pack.h"
#include "team.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Values of accumulate type are kept [block][row][..][kUnitPad] within a step, about the order in which the scan visits
// them. No instruction set's width is in that, so that backward may run on another one than forward did. This is one
// row of such an array.
template <class A>
struct Strided {
  A* data;
  int64_t stride;  // from one block of units to the next
  A* vector(int64_t u) const { return data + u / kUnitPad * stride + u % kUnitPad; }
};

template <class A>
Strided<A> strided_row(A* step, int64_t rows, int64_t b, int64_t values) {
  const int64_t width = values * kUnitPad;
  return {step + b * width, rows * width};
}

// Sizes that follow from the problem, the cell and the type.
template <class Cell, class T>
struct ForwardLayout {
  using A = Acc<T>;
  struct GroupBuffers {
    Weights<T> ih, hh, hr;
    // Of the rows of one part:
    T* h[2];     // [step_rows, Ok] before and after a step, in turn
    T* whole_h;  // [step_rows, Hk] what is projected
    A* c;        // [blocks, step_rows, kUnitPad] initial cell states, and the current ones where they are not saved
    A* gates_x;  // [panels][gates_rows, panel width] as the product with the input leaves them
  };
  // Where one batch row's vectors lie in one step.
  struct Row {
    Strided<A> gates, c_before, c_after;
    const T* h_before;
    T *h_after, *y, *c;
  };
  struct ThreadBuffers {
    T* x;               // [rows of a chunk, Ik]
    Split<bf16> parts;  // of the rows of a product
    Row* rows;          // [rows of a step]
  };

  ForwardLayout(const ForwardArgs& args, const Plan& plan, void* base, const Share& share)
      : Hp(round_up(args.H, kUnitPad)),
        Hk(round_up(Hp, kDepthPad<T>)),
        Op(round_up(args.out(), kUnitPad)),
        Ok(round_up(Op, kDepthPad<T>)),
        Ik(round_up(args.I, kDepthPad<T>)),
        step_rows(ceil_div(args.seq.B, plan.row_parts)),
        arena_(base),
        pack_(plan.pack),
        in_turn_(plan.in_turn),
        copies_(plan.in_turn ? share.of_threads() : share.of_weights()) {
    const Sequence& seq = args.seq;
    chunk_rows = (plan.chunk < seq.T ? plan.chunk : seq.T) * step_rows;
    gates_rows = RowBlocks<T>::written(chunk_rows, plan.split_input) | 1;
    for (int g = 0; g < args.G; ++g) {
      const Group& given = args.groups[g];
      GroupBuffers& buffers = group[g];
      buffers.ih = weights(given.w_ih, given.b_ih, Cell::gates, args.H, args.I, plan.panel_vectors, plan.split_input);
      buffers.hh =
          weights(given.w_hh, given.b_hh, Cell::gates, args.H, args.out(), plan.panel_vectors, plan.split_state);
      const int64_t rows = step_rows + kRowPad<T>;
      const Copies parts = share.of_row_parts();
      for (T*& h : buffers.h) h = arena_.template take<T>(rows * Ok, parts);
      if (args.P) {
        buffers.hr = weights(given.w_hr, nullptr, 1, args.P, args.H, plan.proj_vectors, plan.split_state);
        buffers.whole_h = arena_.template take<T>(rows * Hk, parts);
      }
      buffers.c = arena_.template take<A>(Cell::states > 1 ? step_rows * Hp : 0, parts);
      const Panels<T>& panels = buffers.ih.panels;
      buffers.gates_x = arena_.template take<A>(panels.count * gates_rows * panels.width(), parts);
    }
    const int64_t part = split_size(args, plan);
    const Copies threads = share.of_threads();
    thread.x = arena_.template take<T>((chunk_rows + kRowPad<T>)*Ik, threads);
    thread.parts = {arena_.template take<bf16>(kParts * part, threads), part};
    thread.rows = arena_.template take<Row>(step_rows, threads);
  }
  int64_t bytes() const { return arena_.used(); }

  int64_t Hp, Hk, Op, Ok, Ik;
  int64_t step_rows;       // most of a step that one thread has
  int64_t chunk_rows = 0;  // most of a chunk that one thread has
  int64_t gates_rows = 0;  // that its product may write; odd, or a step's would all lie in the same sets of a cache
  GroupBuffers group[kMaxGroups];
  ThreadBuffers thread{};

 private:
  Weights<T> weights(const void* w, const void* b, int gates, int64_t H, int64_t K, int vectors, bool split) {
    const Panels<T> panels = Panels<T>::make(arena_, H, vectors, gates, K, split, pack_, copies_, in_turn_);
    return {panels, static_cast<const T*>(w), static_cast<const T*>(b), gates, H, K, pack_};
  }

  // Values in a part of the rows of any product: whole tiles of them.
  int64_t split_size(const ForwardArgs& args, const Plan& plan) const {
    const int64_t input = plan.split_input ? round_up(chunk_rows, kTileRows) * round_up(args.I, kTileDepth) : 0;
    const int64_t deeper = args.H > args.out() ? args.H : args.out();
    const int64_t state = plan.split_state ? round_up(step_rows, kTileRows) * round_up(deeper, kTileDepth) : 0;
    return input > state ? input : state;
  }

  Arena arena_;
  bool pack_, in_turn_;
  Copies copies_;
};

template <class Cell, class T>
class ForwardScan {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = ForwardLayout<Cell, T>;
  static constexpr int lanes = kLanes<A>;

 public:
  ForwardScan(const ForwardArgs& args, const Plan& plan, const Layout& layout, const Share& share, int g,
              TileScope& tiles)
      : args_(args),
        seq_(args.seq),
        layout_(layout),
        share_(share),
        tiles_(tiles),
        g_(g),
        group_(args.groups[g]),
        buffers_(layout.group[g]),
        x_rows_(layout.thread.x),
        rows_(layout.thread.rows),
        chunk_(plan.chunk),
        unit_vectors_(plan.panel_vectors),
        panels_(share.panels(buffers_.hh.panels.count)),
        units_(share.units_of(buffers_.hh.panels.count, unit_vectors_ * lanes, layout.Hp)),
        out_units_(args.P ? share.units_of(buffers_.hr.panels.count, buffers_.hr.panels.width(), layout.Op) : units_),
        out_(args.out()),
        panel_width_(buffers_.ih.panels.width()),
        gates_x_(buffers_.gates_x),
        gates_(group_matrix<A>(args.gates, g, seq_.N, Cell::saved * layout.Hp)),
        cells_(group_matrix<A>(args.cells, g, seq_.N, layout.Hp)),
        h0_(group_matrix<T>(args.h0, g, seq_.B, out_)),
        c0_(group_matrix<T>(args.c0, g, seq_.B, args.H)),
        h_n_(group_matrix<T>(args.h_n, g, seq_.B, out_)),
        c_n_(group_matrix<T>(args.c_n, g, seq_.B, args.H)),
        y_(group_columns<T>(args.y, g, out_)),
        c_(group_columns<T>(args.c, g, args.H)),
        whole_h_(group_columns<T>(args.whole_h, g, args.H)) {}

  void run() {
    start_states();
    finish_idle_rows();
    share_.sync();
    for (int64_t s0 = 0, s1; s0 < seq_.T; s0 = s1) {
      s1 = end_of_chunk(s0);
      input_gates(s0, s1);
      for (int64_t s = s0, row = 0; s < s1; ++s) {
        row += step(s, row);
        if (args_.P) project(s);
        finish_rows(group_.step_to_time(s, seq_.T));
        if (s + 1 < seq_.T) share_.sync();
      }
    }
  }

 private:
  // Both buffers take the initial state: a packed row may wake at any step.
  void start_states() {
    for (int64_t j = 0; j < share_.count(seq_.B); ++j) {
      const int64_t b = share_.row(j);
      for (T* h : buffers_.h) {
        copy_padded(h + j * layout_.Ok, h0_ ? h0_ + b * out_ : nullptr);
        if (share_.unit_part == 0) clear(h + j * layout_.Ok, layout_.Op, layout_.Ok);
      }
      if (args_.P && share_.unit_part == 0) {
        clear(buffers_.whole_h + j * layout_.Hk, round_up(args_.H, lanes), layout_.Hk);
      }
      if constexpr (Cell::states > 1) {
        const Strided<A> c = current_cell_row(j);
        for (int64_t u = units_.begin; u < units_.end; u += lanes) {
          store(c.vector(u), c0_ && u < args_.H ? load_first(c0_ + b * args_.H + u, args_.H - u) : V{});
        }
      }
    }
  }

  void copy_padded(T* to, const T* from) const {
    const auto [begin, end] = out_units_;
    const int64_t real = from ? (end < out_ ? end : out_) : begin;
    for (int64_t u = begin; u < real; ++u) to[u] = from[u];
    clear(to, real > begin ? real : begin, end);
  }

  static void clear(T* row, int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) row[u] = T{};
  }

  // Calls body(first row, rows, panel) over a sweep of panels for blocks of rows `ld` apart, their product being where
  // to(first row, panel) says.
  template <class To, class Body>
  void for_each_block(const Weights<T>& w, const Sweep& sweep, const T* a, int64_t ld, int64_t rows, To to, Body body) {
    const RowBlocks<T> blocks(rows, w.panels.nv, w.panels.split);
    const LeftRows<T> left = w.left(a, ld, rows, layout_.thread.parts);
    if (rows > 0 && left.parts.data) tiles_.fit(rows);
    for (int64_t p = sweep.first; p != sweep.end; p += sweep.stride) {
      if (w.panels.in_turn) w.pack_in_turn(p, a);
      for (int64_t i = 0; i < blocks.count(); ++i) {
        const int64_t j = blocks.begin(i);
        const int n = blocks.size(i);
        w.multiply(to(j, p), left, j, n, p, w.panels.ahead(p, p + sweep.stride, i));
        body(j, n, p);
      }
    }
  }

  // The same, the product of each block being in tile_ while it is the body's turn.
  template <class Body>
  void for_each_tile(const Weights<T>& w, const Sweep& sweep, const T* a, int64_t ld, int64_t rows, Body body) {
    for_each_block(w, sweep, a, ld, rows, [this](int64_t, int64_t) { return tile_.c; }, body);
  }

  // Of my row-th row of the chunk, and of those that follow, panel_width_ apart.
  A* gates_x(int64_t row, int64_t p) const { return gates_x_ + (p * layout_.gates_rows + row) * panel_width_; }

  // As many steps as have no more rows than the chunk of full ones: the thin ones of a packed batch are gathered.
  int64_t end_of_chunk(int64_t s) const {
    const auto most = [this](int64_t rows) { return ceil_div(rows, share_.row_parts); };
    int64_t left = chunk_ * most(seq_.B);
    for (; s < seq_.T; ++s) {
      left -= most(seq_.active(group_.step_to_time(s, seq_.T)));
      if (left < 0) break;
    }
    return s;
  }

  // My rows of steps [s0, s1), gathered side by side unless they lie so, then multiplied panel by panel.
  void input_gates(int64_t s0, int64_t s1) {
    const bool gathered = x_is_gathered(s0, s1);
    int64_t rows = 0;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = group_.step_to_time(s, seq_.T);
      const int64_t count = share_.count(seq_.active(t));
      for (int64_t j = 0; j < count && !gathered; ++j) {
        copy_x(rows + j, args_.template x_row<T>(g_, t, share_.row(j)));
      }
      rows += count;
    }
    const T* const x = gathered ? args_.template x_row<T>(g_, group_.step_to_time(s0, seq_.T), 0) : x_rows_;
    for_each_block(
        buffers_.ih, Sweep(panels_, 0), x, gathered ? args_.x_stride_b : layout_.Ik, rows,
        [this](int64_t row, int64_t p) { return gates_x(row, p); }, [](int64_t, int, int64_t) {});
  }

  // Whether all rows of these steps are mine and follow each other in memory, nothing being read past the last.
  bool x_is_gathered(int64_t s0, int64_t s1) const {
    if (kRowPad<T> > 1 || layout_.Ik != args_.I || share_.row_parts > 1) return false;
    if (s1 - s0 == 1) return true;
    return !group_.reverse && (seq_.batch_sizes || args_.x_stride_t == seq_.B * args_.x_stride_b);
  }

  void copy_x(int64_t row, const T* x) const {
    T* const out = x_rows_ + row * layout_.Ik;
    std::memcpy(out, x, args_.I * sizeof(T));
    std::memset(out + args_.I, 0, (layout_.Ik - args_.I) * sizeof(T));
  }

  // How many rows of it are mine, of which the first is the chunk's first-th.
  int64_t step(int64_t s, int64_t first) {
    const int64_t t = group_.step_to_time(s, seq_.T);
    const int64_t rows = share_.count(seq_.active(t));
    for (int64_t j = 0; j < rows; ++j) rows_[j] = find_row(j, s, t);
    const T* const h = s || h0_ ? buffers_.h[s & 1] : nullptr;
    for_each_tile(buffers_.hh, Sweep(panels_, s), h, layout_.Ok, rows,
                  [&](int64_t j, int n, int64_t p) { apply_cell(rows_ + j, n, gates_x(first + j, p), p); });
    return rows;
  }

  typename Layout::Row find_row(int64_t j, int64_t s, int64_t t) const {
    const int64_t b = share_.row(j), n = seq_.offset(t) + b;
    typename Layout::Row row{};
    if (gates_) {
      row.gates = strided_row(gates_ + seq_.offset(t) * Cell::saved * layout_.Hp, seq_.active(t), b, Cell::saved);
    }
    if (args_.P) {
      row.h_after = buffers_.whole_h + j * layout_.Hk;
      row.y = whole_h_ ? whole_h_ + n * args_.G * args_.H : nullptr;
    } else {
      row.h_before = buffers_.h[s & 1] + j * layout_.Ok;
      row.h_after = buffers_.h[(s + 1) & 1] + j * layout_.Ok;
      row.y = y_row(n);
    }
    if constexpr (Cell::states > 1) {
      const int64_t before = group_.time_before(t);
      const bool initial = b >= seq_.active_or_none(before);
      row.c_before = initial ? current_cell_row(j) : cell_row(before, j);
      row.c_after = cell_row(t, j);
      row.c = c_ ? c_ + n * args_.G * args_.H : nullptr;
    }
    return row;
  }

  T* y_row(int64_t n) const { return y_ + n * args_.G * out_; }

  // Where the cell state after a step lies: with the row of that step, or always in place while nothing is saved.
  Strided<A> cell_row(int64_t t, int64_t j) const {
    if (!cells_) return current_cell_row(j);
    return strided_row(cells_ + seq_.offset(t) * layout_.Hp, seq_.active(t), share_.row(j), 1);
  }
  Strided<A> current_cell_row(int64_t j) const { return strided_row(buffers_.c, layout_.step_rows, j, 1); }

  void apply_cell(const typename Layout::Row* rows, int n, const A* gates_x, int64_t p) const {
    for (int j = 0; j < unit_vectors_; ++j) {
      const int64_t u = (p * unit_vectors_ + j) * lanes;
      if (u >= args_.H) break;
      for (int r = 0; r < n; ++r) apply_cell(rows[r], r, gates_x + r * panel_width_, j * Cell::gates, u);
    }
    if (!gates_ || p + 1 < buffers_.hh.panels.count) return;
    for (int r = 0; r < n; ++r) clear_padding(rows[r]);
  }

  // Units that no vector of this instruction set covers, but a wider one's would in backward.
  void clear_padding(const typename Layout::Row& row) const {
    for (int64_t u = round_up(args_.H, lanes); u < layout_.Hp; u += lanes) {
      for (int k = 0; k < Cell::saved; ++k) store(row.gates.vector(u) + k * kUnitPad, V{});
      if constexpr (Cell::states > 1) store(row.c_after.vector(u), V{});
    }
  }

  FASTRNN_INLINE void apply_cell(const typename Layout::Row& row, int r, const A* gates_x, int v, int64_t u) const {
    V x[Cell::gates], rec[Cell::gates], state[Cell::states], save[Cell::saved];
    for (int k = 0; k < Cell::gates; ++k) {
      x[k] = load(gates_x + (v + k) * lanes);
      rec[k] = tile_.at(r, buffers_.hh.panels.nv, v + k);
    }
    state[0] = row.h_before ? load(row.h_before + u) : V{};
    if constexpr (Cell::states > 1) state[1] = load(row.c_before.vector(u));
    Cell::forward(x, rec, state, save);
    store(row.h_after + u, keep_first<A>(state[0], args_.H - u));
    if (row.y) store_first(row.y + u, state[0], args_.H - u);
    if constexpr (Cell::states > 1) {
      store(row.c_after.vector(u), state[1]);
      if (row.c) store_first(row.c + u, state[1], args_.H - u);
    }
    if (!gates_) return;
    A* const gates = row.gates.vector(u);
    for (int k = 0; k < Cell::saved; ++k) store(gates + k * kUnitPad, save[k]);
  }

  // The output, and what the next step multiplies by, is h W_hr^T.
  void project(int64_t s) {
    share_.sync();
    const int64_t t = group_.step_to_time(s, seq_.T);
    const Panels<T>& panels = buffers_.hr.panels;
    for_each_tile(buffers_.hr, Sweep(share_.panels(panels.count), s), buffers_.whole_h, layout_.Hk,
                  share_.count(seq_.active(t)), [&](int64_t j, int n, int64_t p) {
                    for (int r = 0; r < n; ++r) {
                      T* const h = buffers_.h[(s + 1) & 1] + (j + r) * layout_.Ok;
                      store_output(h, y_row(seq_.offset(t) + share_.row(j + r)), r, p);
                    }
                  });
  }

  void store_output(T* h, T* y, int r, int64_t p) const {
    const int nv = buffers_.hr.panels.nv;
    for (int v = 0; v < nv; ++v) {
      const int64_t u = (p * nv + v) * lanes;
      if (u >= args_.P) return;
      const V value = tile_.at(r, nv, v);
      store(h + u, keep_first<A>(value, args_.P - u));
      store_first(y + u, value, args_.P - u);
    }
  }

  // Rows whose sequence ends with step t hand out their final state.
  void finish_rows(int64_t t) const {
    const int64_t going_on = share_.count(seq_.active_or_none(group_.time_after(t)));
    for (int64_t j = going_on; j < share_.count(seq_.active(t)); ++j) {
      const int64_t b = share_.row(j);
      finish_row(b, y_row(seq_.offset(t) + b), cell_row(t, j));
    }
  }

  // Rows without a step end as they begin.
  void finish_idle_rows() const {
    for (int64_t j = share_.count(seq_.active(0)); j < share_.count(seq_.B); ++j) {
      finish_row(share_.row(j), buffers_.h[0] + j * layout_.Ok, current_cell_row(j));
    }
  }

  // Each thread its own units.
  void finish_row(int64_t b, const T* h, Strided<A> c) const {
    for (int64_t u = out_units_.begin; u < out_units_.end && u < out_; ++u) h_n_[b * out_ + u] = h[u];
    if constexpr (Cell::states > 1) {
      const int64_t end = units_.end < args_.H ? units_.end : args_.H;
      for (int64_t u = units_.begin; u < end; u += lanes)
        store_first(c_n_ + b * args_.H + u, load(c.vector(u)), end - u);
    }
  }

  const ForwardArgs& args_;
  const Sequence& seq_;
  const Layout& layout_;
  const Share& share_;
  TileScope& tiles_;
  int g_;
  const Group& group_;
  const typename Layout::GroupBuffers& buffers_;
  T* x_rows_;
  typename Layout::Row* rows_;
  int64_t chunk_;
  int unit_vectors_;
  Range panels_, units_, out_units_;
  int64_t out_, panel_width_;
  A *gates_x_, *gates_, *cells_;
  const T *h0_, *c0_;
  T *h_n_, *c_n_, *y_, *c_, *whole_h_;
  Tile<T> tile_;
};

// One thread's whole part of a layer call.
template <class Cell, class T>
void forward(const ForwardArgs& args, const Plan& plan, const Team& team, int thread) {
  TileScope tiles;
  const Share share = Share::of(plan, team, args, thread);
  const ForwardLayout<Cell, T> layout(args, plan, args.workspace, share);
  for (int64_t g = share.groups.begin; g < share.groups.end && !plan.in_turn; ++g) {
    const auto& buffers = layout.group[g];
    const Range mine = share.packs_of_weights(buffers.hh.panels.count);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      buffers.ih.pack(p);
      buffers.hh.pack(p);
    }
    const Range projected = share.packs_of_weights(args.P ? buffers.hr.panels.count : 0);
    for (int64_t p = projected.begin; p < projected.end; ++p) buffers.hr.pack(p);
  }
  if (plan.pack && !plan.own_panels && !plan.in_turn) team.everyone->wait(plan.threads);
  if (!share.scans) return;
  for (int64_t g = share.groups.begin; g < share.groups.end; ++g) {
    ForwardScan<Cell, T>(args, plan, layout, share, static_cast<int>(g), tiles).run();
  }
}

template <class Cell, class T>
int64_t forward_bytes(const ForwardArgs& args, const Plan& plan) {
  return ForwardLayout<Cell, T>(args, plan, nullptr, Share::of(plan, Team{}, args, 0)).bytes();
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
