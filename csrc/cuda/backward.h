// A backward step's epilogue: dh = dy + (what the later step passed back) + dgates W_hh, then the cell's derivative.
//
// The blocks gather dgates, gates values a unit, rather than scatter partial sums of dh: through L2 either moves the
// same number of bytes (16-bit dgates of four gates against float32 sums, written and read), the sum has one order on
// any number of blocks, and the loop is the forward's. One more step after a row's last hands its initial states their
// gradient.
#pragma once

#include "math.h"
#include "scan.h"

namespace fastrnn::cuda {

template <class Cell, class P>
class Backward {
 public:
  using Args = BackwardArgs;
  using Precision = P;
  using Value = typename P::Value;
  static constexpr int gate_tiles = 1, depth = Cell::gates;
  static constexpr int lag = 1;  // step m multiplies operand m - 1, the dgates of the step before it

  // Gradients of the states after the next step, and the sums of those that ended at resets.
  static constexpr int slot_floats = 4 * 2 * Cell::states;
  struct Slot {
    float value[2 * Cell::states][4];
  };
  struct Work {
    Value saved[4][Cell::saved], h_before[4], dy[4], dc[4];
    float c_before[4];
    float dx[4][Cell::gates], dr[4][Cell::gates];
  };

  FASTRNN_DEVICE Backward(const Args& args, int g)
      : args_(args), group_(args.groups[g]), rows_{args, g, group_.reverse}, clock_{!group_.reverse} {}

  FASTRNN_DEVICE int64_t steps(int64_t p) const {
    return (args_.pass_steps ? args_.pass_steps[p] : args_.T) + args_.initial;
  }

  // Column `unit` of W_hh, at row k of gate `gate`.
  FASTRNN_DEVICE typename P::Operand weight(int64_t unit, int, int64_t k, int gate) const {
    return P::operand(P::widen(static_cast<const Value*>(group_.w_hh)[(gate * args_.H + k) * args_.H + unit]));
  }

  FASTRNN_DEVICE void begin(const Corner& corner, Slot& slot, float (&)[depth][4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e);
      const bool inside = b < args_.B && u < args_.H;
      slot.value[0][e] = inside ? rows_.state(args_.dh_n, b, u) : 0.0f;
      if constexpr (Cell::states > 1) slot.value[1][e] = inside ? rows_.state(args_.dc_n, b, u) : 0.0f;
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) slot.value[Cell::states + k][e] = 0.0f;
    }
  }

  FASTRNN_DEVICE void load(int64_t m, const Corner& corner, Work& work) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e), length = rows_.length(b);
      if (m >= length || u >= args_.H) continue;
      const int64_t t = clock_.time(m, length);
      const Value* const gates = static_cast<const Value*>(args_.gates) + rows_.in_gates(t, b, u, Cell::saved);
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) work.saved[e][k] = gates[k * args_.H];
      work.dy[e] = load_or_zero<Value>(args_.dy, rows_.in_output(t, b, u));
      const bool fresh = rows_.fresh(t, b, length), given = fresh || m + 1 == length;
      const int64_t before = rows_.before(t), at = rows_.in_state(b, u);
      work.h_before[e] = given ? load_or_zero<Value>(fresh ? args_.h_reset : args_.h0, at)
                               : static_cast<const Value*>(args_.y)[rows_.in_output(before, b, u)];
      if constexpr (Cell::states > 1) {
        work.c_before[e] = given ? P::widen(load_or_zero<Value>(fresh ? args_.c_reset : args_.c0, at))
                                 : args_.cells[rows_.in_gates(before, b, u, 1)];
        work.dc[e] = load_or_zero<Value>(args_.dc, rows_.in_output(t, b, u));
      }
    }
  }

  FASTRNN_DEVICE void compute(int64_t m, const Corner& corner, Slot& slot, const float (&sums)[1][4], Work& work,
                              float (&next)[depth][4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e), length = rows_.length(b);
      if (b >= args_.B || m > length || u >= args_.H) continue;
      slot.value[0][e] += sums[0][e];
      if (m > 0 && rows_.fresh(clock_.time(m - 1, length), b, length)) end_at_reset(e, slot);
      if (m == length) {
        finish(e, b, u, slot);
        continue;
      }
      float save[Cell::saved], before[Cell::states], ds[Cell::states];
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) save[k] = P::widen(work.saved[e][k]);
      before[0] = P::widen(work.h_before[e]);
      ds[0] = slot.value[0][e] + P::widen(work.dy[e]);
      if constexpr (Cell::states > 1) {
        before[1] = work.c_before[e];
        ds[1] = slot.value[1][e] + P::widen(work.dc[e]);
      }
      Cell::backward(save, before, ds, work.dx[e], work.dr[e]);
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) slot.value[k][e] = ds[k];
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k) next[k][e] = work.dr[e][k];
    }
  }

  FASTRNN_DEVICE void store(int64_t m, const Corner& corner, const Work& work) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e), length = rows_.length(b);
      if (m >= length || u >= args_.H) continue;
      const int64_t at = rows_.in_gates(clock_.time(m, length), b, u, Cell::gates);
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k) {
        static_cast<Value*>(args_.dgates_x)[at + k * args_.H] = P::round(work.dx[e][k]);
        if (!Cell::shared_dgates) {
          static_cast<Value*>(args_.dgates_h)[at + k * args_.H] = P::round(work.dr[e][k]);
        }
      }
    }
  }

  FASTRNN_DEVICE void poison(const Corner& corner) const {
    const float nan = from_bits(0x7fc00000u);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t b = corner.row(e), u = corner.unit(e);
      if (b >= args_.B || u >= args_.H) continue;
      for (int64_t t = 0; t < rows_.length(b); ++t) {
        const int64_t at = rows_.in_gates(t, b, u, Cell::gates);
        for (int k = 0; k < Cell::gates; ++k) {
          static_cast<Value*>(args_.dgates_x)[at + k * args_.H] = P::round(nan);
          if (!Cell::shared_dgates) static_cast<Value*>(args_.dgates_h)[at + k * args_.H] = P::round(nan);
        }
      }
      for (void* gradient : {args_.dh0, args_.dc0, args_.dh_reset, args_.dc_reset}) {
        rows_.set_state(gradient, b, u, nan);
      }
    }
  }

 private:
  // The later step started from the reset states: what it passed back is theirs.
  FASTRNN_DEVICE void end_at_reset(int e, Slot& slot) const {
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) {
      slot.value[Cell::states + k][e] += slot.value[k][e];
      slot.value[k][e] = 0.0f;
    }
  }

  FASTRNN_DEVICE void finish(int e, int64_t b, int64_t u, const Slot& slot) const {
    rows_.set_state(args_.dh0, b, u, slot.value[0][e]);
    rows_.set_state(args_.dh_reset, b, u, slot.value[Cell::states][e]);
    if constexpr (Cell::states > 1) {
      rows_.set_state(args_.dc0, b, u, slot.value[1][e]);
      rows_.set_state(args_.dc_reset, b, u, slot.value[Cell::states + 1][e]);
    }
  }

  const Args& args_;
  const Group& group_;
  const Rows<P> rows_;
  const RowClock clock_;
};

}  // namespace fastrnn::cuda
