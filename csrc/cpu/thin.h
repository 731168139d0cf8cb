// Products of so few rows that packing anything does not pay: they are sums of rows, read as they lie.
#pragma once

#include "operands.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Outputs of a task: few, for tasks are dealt out evenly.
inline constexpr int64_t kThinTaskRows = 16;

// Rows and what each is multiplied by.
template <class T>
struct Terms {
  // A null pointer stands for a row of zeros.
  void add(Acc<T> by, const T* of) {
    if (!of) {
      of_zeros += by * 0;
      return;
    }
    factor[count] = by;
    row[count++] = of;
  }

  Acc<T> factor[kThinRows];
  const T* row[kThinRows];
  int count = 0;
  Acc<T> of_zeros = 0;  // what rows of zeros, which are not in memory, amount to: NaN, if a factor is no finite number
};

template <int Count, class T>
FASTRNN_INLINE void store_terms(T* to, const Terms<T>& terms, int64_t columns) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  const auto sum = [&](auto load_at) {
    AccVec<T> c = broadcast(terms.of_zeros);
    for (int i = 0; i < Count; ++i) c += terms.factor[i] * load_at(terms.row[i]);
    return c;
  };
  int64_t k = 0;
  for (; k + lanes <= columns; k += lanes) store(to + k, sum([&](const T* row) { return load(row + k); }));
  const int64_t left = columns - k;
  if (left) store_first(to + k, sum([&](const T* row) { return load_first(row + k, left); }), left);
}

// The sum of the terms.
template <class T>
void store_terms(T* to, const Terms<T>& terms, int64_t columns) {
  if (terms.count == 0) return store_terms<0>(to, terms, columns);
  if (terms.count == 1) return store_terms<1>(to, terms, columns);
  if (terms.count == 2) return store_terms<2>(to, terms, columns);
  static_assert(kThinRows == 4, "each number of terms has its loop");
  store_terms<3>(to, terms, columns);
}

// Columns that are summed up at once: enough sums to hide how long an addition takes.
inline constexpr int kSummedVectors = 8;

// sums += the sum of `rows` rows, ld apart, each times its own factor.
template <class T>
FASTRNN_INLINE void add_rows(AccVec<T> (&sums)[kSummedVectors], const T* factors, const T* first, int64_t ld,
                             int64_t rows, int64_t columns) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  const bool whole = columns >= kSummedVectors * lanes;
  for (int64_t r = 0; r < rows; ++r, first += ld) {
    const AccVec<T> factor = broadcast(widen_one(factors[r]));
    for (int v = 0; v < kSummedVectors && whole; ++v) sums[v] += factor * load(first + v * lanes);
    for (int v = 0; v * lanes < columns && !whole; ++v) {
      sums[v] += factor * load_first(first + v * lanes, columns - v * lanes);
    }
  }
}

// What Products does, of a thin batch.
template <class T>
class ThinProducts {
  using A = Acc<T>;
  using V = AccVec<T>;
  using Layout = ProductsLayout<T>;
  static constexpr int lanes = kLanes<A>;
  static constexpr int64_t kThinColumns = kSummedVectors * lanes;

 public:
  ThinProducts(const BackwardArgs& args, const Layout& layout, const Share& share, int gates)
      : args_(args),
        layout_(layout),
        share_(share),
        of_(args, layout, share, gates),
        gates_(gates),
        Hp_(round_up(args.H, kUnitPad)) {}

  // Each thread has its own tasks here: what it writes of dW is still in its cache from the last call, as a rule, and
  // there is too little work for others to help out.
  void run() const {
    const Range groups = share_.groups, inputs = of_.inputs_of(share_.part);
    const Range column_blocks = of_.input_blocks(share_.part, ceil_div(args_.I, kThinColumns));
    const int64_t products = groups.size() * args_.samples.number;
    const int64_t blocks = ceil_div(args_.H, kThinTaskRows), proj_blocks = ceil_div(args_.P, kThinTaskRows);
    for_my_tasks(args_.dx ? inputs.size() * column_blocks.size() : 0, [&](Digits task) {
      const int64_t column = (column_blocks.begin + task.take(column_blocks.size())) * kThinColumns;
      input_gradient(static_cast<int>(inputs.begin + task.rest), column);
    });
    for_my_tasks(products * gates_ * blocks, [&](Digits task) {
      const int64_t unit = task.take(blocks) * kThinTaskRows, gate = task.take(gates_);
      const int64_t sample = task.take(args_.samples.number);
      const int g = static_cast<int>(groups.begin + task.rest);
      weight_gradients(of_.left(g, false), sample, gate, unit, of_.ih(g));
      weight_gradients(of_.left(g, true), sample, gate, unit, of_.hh(g));
    });
    for_my_tasks(products * proj_blocks, [&](Digits task) {
      const int64_t unit = task.take(proj_blocks) * kThinTaskRows, sample = task.take(args_.samples.number);
      const int g = static_cast<int>(groups.begin + task.rest);
      weight_gradients(of_.projection(g), sample, 0, unit, of_.hr(g));
    });
  }

 private:
  template <class Body>
  void for_my_tasks(int64_t number, Body body) const {
    const Range mine = share_.packs(number);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(Digits{i});
  }

  // Columns of dx as a sum of rows of W_ih.
  void input_gradient(int input, int64_t column) const {
    const Range groups = of_.readers(input);
    const int64_t columns = args_.I - column, H = args_.H;
    for (int64_t n = 0; n < args_.seq.N; ++n) {
      V sums[kSummedVectors] = {};
      for (int64_t g = groups.begin; g < groups.end; ++g) {
        const T* w = static_cast<const T*>(args_.groups[g].w_ih) + column;
        const T* const dgates = layout_.group[g].dgates_x + n * layout_.depth;
        for (int k = 0; k < gates_; ++k) add_gate(sums, dgates + k * Hp_, w + k * H * args_.I, columns);
      }
      for (int64_t v = 0; v < kSummedVectors && v * lanes < columns; ++v) {
        store_first(of_.dx_row(input, n) + column + v * lanes, sums[v], columns - v * lanes);
      }
    }
  }

  // sums += dgates of one gate times its rows of W_ih, in blocks as gemm.h sums them.
  void add_gate(V (&sums)[kSummedVectors], const T* dgates, const T* w, int64_t columns) const {
    for (int64_t u = 0; u < args_.H; u += kSumDepth<A>) {
      const int64_t left = args_.H - u, rows = left < kSumDepth<A> ? left : kSumDepth<A>;
      V block[kSummedVectors] = {};
      add_rows(block, dgates + u, w + u * args_.I, args_.I, rows, columns);
      for (int v = 0; v < kSummedVectors; ++v) sums[v] += block[v];
    }
  }

  // Up to kThinTaskRows rows of dW and db: each the sum over n of one element on the left times a row on the right.
  void weight_gradients(const Left<T>& left, int64_t sample, int64_t gate, int64_t unit, const Target<T>& out) const {
    if (!out.wanted()) return;
    const int64_t end = left.units - unit < kThinTaskRows ? left.units : unit + kThinTaskRows;
    const int64_t rows = left.rows();
    const Range mine = layout_.order.rows_of(sample);
    for (; unit < end; ++unit) {
      const T* const element = left.data + gate * left.padded + unit;
      Terms<T> terms;
      A sum = 0;
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t n = layout_.order.row(i);
        const A d = widen_one(element[n * left.ld]);
        sum += d;
        if (out.dw) terms.add(d, out.rows[n]);
      }
      const int64_t row = gate * left.units + unit;
      if (out.db) store_first(out.db_row(sample, rows, row), broadcast(sum), 1);
      if (out.dw) store_terms(out.dw_row(sample, rows, row), terms, out.right->columns);
    }
  }

  const BackwardArgs& args_;
  const Layout& layout_;
  const Share& share_;
  const Operands<T> of_;
  int gates_;
  int64_t Hp_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
