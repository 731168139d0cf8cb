// What a backward step does with a value: dh = dy + (what the later step passed back) + dgates W_hh, then the cell's
// derivative.
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
  static constexpr int slot_floats = 2 * Cell::states;
  struct Slot {
    float value[2 * Cell::states];
  };
  struct Work {
    bool ended;  // whether the row's later step started from the reset states
    Value saved[Cell::saved], h_before, dy, dc;
    float c_before;
    float dx[Cell::gates], dr[Cell::gates];
  };

  FASTRNN_DEVICE Backward(const Args& args, int g)
      : args_(args), group_(args.groups[g]), rows_{args, g, group_.reverse}, clock_{!group_.reverse} {}

  FASTRNN_DEVICE int64_t steps(int64_t p) const {
    return (args_.pass_steps ? args_.pass_steps[p] : args_.T) + args_.initial;
  }

  FASTRNN_DEVICE Element element(int64_t b, int64_t u) const { return rows_.element(b, u); }

  // Column `unit` of W_hh, at row k of gate `gate`.
  FASTRNN_DEVICE typename P::Operand weight(int64_t unit, int, int64_t k, int gate) const {
    return P::operand(P::widen(static_cast<const Value*>(group_.w_hh)[(gate * args_.H + k) * args_.H + unit]));
  }

  FASTRNN_DEVICE float bias(int64_t, int) const { return 0.0f; }

  FASTRNN_DEVICE void begin(const Element& e, Slot& slot, float (&)[depth]) const {
    slot.value[0] = rows_.state(args_.dh_n, e);
    if constexpr (Cell::states > 1) slot.value[1] = rows_.state(args_.dc_n, e);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) slot.value[Cell::states + k] = 0.0f;
  }

  FASTRNN_DEVICE void load(int64_t m, const Element& e, Work& work) const {
    const int64_t t = clock_.readable_time(m, e.length);
    const int64_t at = rows_.at(t, e);
    work.ended = m > 0 && m <= e.length && rows_.fresh(clock_.time(m - 1, e.length), e);
    const Value* const gates = static_cast<const Value*>(args_.gates) + rows_.in_gates(at, e, Cell::saved);
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) work.saved[k] = gates[k * args_.H];
    const int64_t output = rows_.in_output(at, e);
    work.dy = load_or_zero<Value>(args_.dy, output);
    if constexpr (Cell::states > 1) work.dc = load_or_zero<Value>(args_.dc, output);

    const bool fresh = rows_.fresh(t, e), given = fresh || m + 1 >= e.length;
    const int64_t before = given ? at : rows_.at(group_.reverse ? t + 1 : t - 1, e), state = rows_.in_state(e);
    work.h_before = given ? load_or_zero<Value>(fresh ? args_.h_reset : args_.h0, state)
                          : static_cast<const Value*>(args_.y)[rows_.in_output(before, e)];
    if constexpr (Cell::states > 1) {
      work.c_before = given ? P::widen(load_or_zero<Value>(fresh ? args_.c_reset : args_.c0, state))
                            : args_.cells[rows_.in_gates(before, e, 1)];
    }
  }

  // Rows that are over, and places where there is nothing, compute what nobody reads: see Forward.
  FASTRNN_DEVICE void compute(int64_t m, const Element& e, Slot& slot, const float (&sums)[1], Work& work,
                              float (&next)[depth]) const {
    slot.value[0] += sums[0];
    if (work.ended) end_at_reset(slot);
    if (m == e.length) finish(e, slot);
    float save[Cell::saved], before[Cell::states], ds[Cell::states];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) save[k] = P::widen(work.saved[k]);
    before[0] = P::widen(work.h_before);
    ds[0] = slot.value[0] + P::widen(work.dy);
    if constexpr (Cell::states > 1) {
      before[1] = work.c_before;
      ds[1] = slot.value[1] + P::widen(work.dc);
    }
    Cell::backward(save, before, ds, work.dx, work.dr);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) slot.value[k] = ds[k];
#pragma unroll
    for (int k = 0; k < Cell::gates; ++k) next[k] = e.inside() ? work.dr[k] : 0.0f;
  }

  FASTRNN_DEVICE void store(int64_t m, const Element& e, const Work& work) const {
    if (m >= e.length) return;
    const int64_t at = rows_.in_gates(rows_.at(clock_.time(m, e.length), e), e, Cell::gates);
#pragma unroll
    for (int k = 0; k < Cell::gates; ++k) {
      static_cast<Value*>(args_.dgates_x)[at + k * args_.H] = P::round(work.dx[k]);
      if (!Cell::shared_dgates) static_cast<Value*>(args_.dgates_h)[at + k * args_.H] = P::round(work.dr[k]);
    }
  }

  FASTRNN_DEVICE void poison(const Element& e) const {
    if (!e.inside()) return;
    const float nan = from_bits(0x7fc00000u);
    for (int64_t t = 0; t < e.length; ++t) {
      const int64_t at = rows_.in_gates(rows_.at(t, e), e, Cell::gates);
      for (int k = 0; k < Cell::gates; ++k) {
        static_cast<Value*>(args_.dgates_x)[at + k * args_.H] = P::round(nan);
        if (!Cell::shared_dgates) static_cast<Value*>(args_.dgates_h)[at + k * args_.H] = P::round(nan);
      }
    }
    for (void* gradient : {args_.dh0, args_.dc0, args_.dh_reset, args_.dc_reset}) rows_.set_state(gradient, e, nan);
  }

 private:
  // The later step started from the reset states: what it passed back is theirs.
  FASTRNN_DEVICE void end_at_reset(Slot& slot) const {
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) {
      slot.value[Cell::states + k] += slot.value[k];
      slot.value[k] = 0.0f;
    }
  }

  FASTRNN_DEVICE void finish(const Element& e, const Slot& slot) const {
    rows_.set_state(args_.dh0, e, slot.value[0]);
    rows_.set_state(args_.dh_reset, e, slot.value[Cell::states]);
    if constexpr (Cell::states > 1) {
      rows_.set_state(args_.dc0, e, slot.value[1]);
      rows_.set_state(args_.dc_reset, e, slot.value[Cell::states + 1]);
    }
  }

  const Args& args_;
  const Group& group_;
  const Rows<P> rows_;
  const RowClock clock_;
};

}  // namespace fastrnn::cuda
