// Products of so few rows that packing anything does not pay: they are sums of rows, read as they lie.
#pragma once

#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Batches of fewer rows, over all timesteps, are thin.
inline constexpr int64_t kThinRows = 4;
// Outputs of a task: few, for tasks are dealt out evenly.
inline constexpr int64_t kThinTaskRows = 16;

// Rows and what each is multiplied by.
template <class T>
struct Terms {
  Acc<T> factor[kThinRows];
  const T* row[kThinRows];
  int count = 0;
};

template <int Count, class T>
FASTRNN_INLINE void store_terms(T* to, const Terms<T>& terms, int64_t columns) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  const auto sum = [&](auto load_at) {
    AccVec<T> c = {};
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

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
