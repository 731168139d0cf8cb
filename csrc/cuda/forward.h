// What a forward step does with a value: the recurrent gates are summed, the cell makes the new states of them.
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

  // The states before the next step.
  static constexpr int slot_floats = Cell::states;
  struct Slot {
    float value[Cell::states];
  };
  struct Work {
    bool cut;  // whether the row's next step starts from the reset states
    Value gates_x[Cell::gates];
    float save[Cell::saved], state[Cell::states];
  };

  FASTRNN_DEVICE Forward(const Args& args, int g)
      : args_(args), group_(args.groups[g]), rows_{args, g, group_.reverse}, clock_{group_.reverse} {}

  FASTRNN_DEVICE int64_t steps(int64_t p) const { return args_.pass_steps ? args_.pass_steps[p] : args_.T; }
  FASTRNN_DEVICE Element element(int64_t b, int64_t u) const { return rows_.element(b, u); }

  // Row `unit` of gate `gate` of W_hh, at column k.
  FASTRNN_DEVICE typename P::Operand weight(int64_t unit, int gate, int64_t k, int) const {
    return P::operand(P::widen(static_cast<const Value*>(group_.w_hh)[(gate * args_.H + unit) * args_.H + k]));
  }

  // What is added to the product.
  FASTRNN_DEVICE float bias(int64_t unit, int gate) const {
    return P::widen(load_or_zero<Value>(group_.b_hh, gate * args_.H + unit));
  }

  FASTRNN_DEVICE void begin(const Element& e, Slot& slot, float (&next)[1]) const {
    start(e, e.length > 0 && rows_.fresh(clock_.time(0, e.length), e), slot);
    next[0] = e.inside() ? slot.value[0] : 0.0f;
    if (e.length > 0 || !e.inside()) return;
    rows_.set_state(args_.h_n, e, rows_.state(args_.h0, e));
    rows_.set_state(args_.c_n, e, rows_.state(args_.c0, e));
  }

  FASTRNN_DEVICE void load(int64_t m, const Element& e, Work& work) const {
    const int64_t at = rows_.at(clock_.readable_time(m, e.length), e);
    work.cut = m + 1 < e.length && rows_.fresh(clock_.time(m + 1, e.length), e);
    const Value* const gates = static_cast<const Value*>(args_.gates_x) + rows_.in_gates(at, e, Cell::gates);
#pragma unroll
    for (int k = 0; k < Cell::gates; ++k) work.gates_x[k] = gates[k * args_.H];
  }

  // Rows that are over, and places where there is nothing, compute what nobody reads; there, 0 is published, because
  // the weights' zeros do not make a zero of everything.
  FASTRNN_DEVICE void compute(int64_t, const Element& e, Slot& slot, const float (&sums)[gate_tiles], Work& work,
                              float (&next)[1]) const {
    float x[Cell::gates];
#pragma unroll
    for (int k = 0; k < Cell::gates; ++k) x[k] = P::widen(work.gates_x[k]);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) work.state[k] = slot.value[k];
    Cell::forward(x, sums, work.state, work.save);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) slot.value[k] = work.state[k];
    if (work.cut) start(e, true, slot);
    next[0] = e.inside() ? slot.value[0] : 0.0f;
  }

  FASTRNN_DEVICE void store(int64_t m, const Element& e, const Work& work) const {
    if (m >= e.length) return;
    const int64_t at = rows_.at(clock_.time(m, e.length), e);
    rows_.set_output(args_.y, at, e, work.state[0]);
    if (args_.gates) {
      Value* const gates = static_cast<Value*>(args_.gates) + rows_.in_gates(at, e, Cell::saved);
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) gates[k * args_.H] = P::round(work.save[k]);
    }
    if constexpr (Cell::states > 1) {
      if (args_.cells) args_.cells[rows_.in_gates(at, e, 1)] = work.state[1];
      rows_.set_output(args_.c, at, e, work.state[1]);
    }
    if (m + 1 < e.length) return;
    rows_.set_state(args_.h_n, e, work.state[0]);
    if constexpr (Cell::states > 1) rows_.set_state(args_.c_n, e, work.state[1]);
  }

  FASTRNN_DEVICE void poison(const Element& e) const {
    if (!e.inside()) return;
    const float nan = from_bits(0x7fc00000u);
    for (int64_t t = 0; t < e.length; ++t) rows_.set_output(args_.y, rows_.at(t, e), e, nan);
    rows_.set_state(args_.h_n, e, nan);
    rows_.set_state(args_.c_n, e, nan);
  }

 private:
  FASTRNN_DEVICE void start(const Element& e, bool fresh, Slot& slot) const {
    slot.value[0] = rows_.state(fresh ? args_.h_reset : args_.h0, e);
    if constexpr (Cell::states > 1) slot.value[1] = rows_.state(fresh ? args_.c_reset : args_.c0, e);
  }

  const Args& args_;
  const Group& group_;
  const Rows<P> rows_;
  const RowClock clock_;
};

}  // namespace fastrnn::cuda
