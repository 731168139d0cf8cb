// A forward step's epilogue: the recurrent gates are summed, the cell makes the new states of them.
#pragma once

#include "math.h"
#include "scan.h"

namespace fastrnn::cuda {

template <class Cell, class P>
class Forward {
 public:
  using Args = ForwardArgs;
  using Precision = P;
  using Value = typename P::Value;
  static constexpr int gate_tiles = Cell::gates, depth = 1;
  static constexpr int lag = 0;  // step m multiplies operand m, h before it

  // States before the next step, [state][element].
  static constexpr int slot_floats = 4 * Cell::states;
  struct Slot {
    float value[Cell::states][4];
  };
  struct Work {
    Value gates_x[4][Cell::gates];
    float save[4][Cell::saved], state[4][Cell::states];
  };

  FASTRNN_DEVICE Forward(const Args& args, int g)
      : args_(args), group_(args.groups[g]), rows_{args, g, group_.reverse}, clock_{group_.reverse} {}

  FASTRNN_DEVICE int64_t steps(int64_t p) const { return args_.pass_steps ? args_.pass_steps[p] : args_.T; }

  // Row `unit` of gate `gate` of W_hh, at column k.
  FASTRNN_DEVICE typename P::Operand weight(int64_t unit, int gate, int64_t k, int) const {
    return P::operand(P::widen(static_cast<const Value*>(group_.w_hh)[(gate * args_.H + unit) * args_.H + k]));
  }

  FASTRNN_DEVICE void begin(const Corner& corner, Slot& slot, float (&next)[1][4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e);
      if (b >= args_.B || u >= args_.H) continue;
      const int64_t length = rows_.length(b);
      if (length == 0) {
        rows_.set_state(args_.h_n, b, u, rows_.state(args_.h0, b, u));
        rows_.set_state(args_.c_n, b, u, rows_.state(args_.c0, b, u));
        continue;
      }
      start(e, b, u, rows_.fresh(clock_.time(0, length), b, length), slot);
      next[0][e] = slot.value[0][e];
    }
  }

  FASTRNN_DEVICE void load(int64_t m, const Corner& corner, Work& work) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e), length = rows_.length(b);
      if (m >= length || u >= args_.H) continue;
      const Value* const gates =
          static_cast<const Value*>(args_.gates_x) + rows_.in_gates(clock_.time(m, length), b, u, Cell::gates);
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k) work.gates_x[e][k] = gates[k * args_.H];
    }
  }

  FASTRNN_DEVICE void compute(int64_t m, const Corner& corner, Slot& slot, const float (&sums)[gate_tiles][4],
                              Work& work, float (&next)[1][4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e), length = rows_.length(b);
      if (m >= length || u >= args_.H) continue;
      float x[Cell::gates], r[Cell::gates];
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k) {
        x[k] = P::widen(work.gates_x[e][k]);
        r[k] = sums[k][e] + P::widen(load_or_zero<Value>(group_.b_hh, k * args_.H + u));
      }
      float (&state)[Cell::states] = work.state[e];
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) state[k] = slot.value[k][e];
      Cell::forward(x, r, state, work.save[e]);
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) slot.value[k][e] = state[k];
      const bool cut = m + 1 < length && rows_.fresh(clock_.time(m + 1, length), b, length);
      if (cut) start(e, b, u, true, slot);
      next[0][e] = slot.value[0][e];
    }
  }

  FASTRNN_DEVICE void store(int64_t m, const Corner& corner, const Work& work) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e), length = rows_.length(b);
      if (m >= length || u >= args_.H) continue;
      const int64_t t = clock_.time(m, length);
      rows_.set_output(args_.y, t, b, u, work.state[e][0]);
      if (args_.gates) {
        Value* const gates = static_cast<Value*>(args_.gates) + rows_.in_gates(t, b, u, Cell::saved);
#pragma unroll
        for (int k = 0; k < Cell::saved; ++k) gates[k * args_.H] = P::round(work.save[e][k]);
      }
      if constexpr (Cell::states > 1) {
        if (args_.cells) args_.cells[rows_.in_gates(t, b, u, 1)] = work.state[e][1];
        rows_.set_output(args_.c, t, b, u, work.state[e][1]);
      }
      if (m + 1 < length) continue;
      rows_.set_state(args_.h_n, b, u, work.state[e][0]);
      if constexpr (Cell::states > 1) rows_.set_state(args_.c_n, b, u, work.state[e][1]);
    }
  }

  FASTRNN_DEVICE void poison(const Corner& corner) const {
    const float nan = from_bits(0x7fc00000u);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e);
      if (b >= args_.B || u >= args_.H) continue;
      for (int64_t t = 0; t < rows_.length(b); ++t) rows_.set_output(args_.y, t, b, u, nan);
      rows_.set_state(args_.h_n, b, u, nan);
      rows_.set_state(args_.c_n, b, u, nan);
    }
  }

 private:
  FASTRNN_DEVICE void start(int e, int64_t b, int64_t u, bool fresh, Slot& slot) const {
    slot.value[0][e] = rows_.state(fresh ? args_.h_reset : args_.h0, b, u);
    if constexpr (Cell::states > 1) slot.value[1][e] = rows_.state(fresh ? args_.c_reset : args_.c0, b, u);
  }

  const Args& args_;
  const Group& group_;
  const Rows<P> rows_;
  const RowClock clock_;
};

}  // namespace fastrnn::cuda
