// What the kernels are asked to do, free of any instruction set: sizes, pointers, and who does which part.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2 };
inline constexpr int kDtypes = 3;

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Vectors in a panel of weights whose products registers accumulate.
inline constexpr int kMaxVectors = 4;

// Hidden units of every internal buffer are padded to this, a multiple of each instruction set's vector width.
inline constexpr int64_t kUnitPad = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of all steps lie one after the other; step t has active(t) of them, row b of step t is row offset(t) + b.
// A dense batch has B everywhere; a packed one has its rows sorted by length, so that active() never grows with t. Rows
// that are not even active at step 0 have no step, and their states stay what they are.
struct Sequence {
  int64_t T, B, N;
  const int64_t* batch_sizes;  // [T], or null for a dense batch
  const int64_t* offsets;      // [T], or null for a dense batch

  int64_t active(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * B; }
  // Rows that are active at step t, none outside [0, T).
  int64_t active_or_none(int64_t t) const { return t < 0 || t >= T ? 0 : active(t); }
};

// One group: its own weights and its own direction of time. Two directions of a layer are two groups.
inline constexpr int kMaxGroups = 64;

struct Group {
  const void *w_ih, *w_hh, *b_ih, *b_hh;  // [gates H, I], [gates H, out], [gates H] or null
  const void* w_hr;                       // [P, H] or null
  bool reverse;

  int64_t step_to_time(int64_t s, int64_t T) const { return reverse ? T - 1 - s : s; }
  int64_t time_before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  int64_t time_after(int64_t t) const { return reverse ? t - 1 : t + 1; }
};

// The matrix [rows, columns] of group g.
template <class T>
const T* group_matrix(const void* base, int g, int64_t rows, int64_t columns) {
  return base ? static_cast<const T*>(base) + g * rows * columns : nullptr;
}
template <class T>
T* group_matrix(void* base, int g, int64_t rows, int64_t columns) {
  return base ? static_cast<T*>(base) + g * rows * columns : nullptr;
}

// Columns of group g in rows that hold the groups side by side.
template <class T>
T* group_columns(void* base, int g, int64_t columns) {
  return base ? static_cast<T*>(base) + g * columns : nullptr;
}
template <class T>
const T* group_columns(const void* base, int g, int64_t columns) {
  return base ? static_cast<const T*>(base) + g * columns : nullptr;
}

// How a team of threads divides the work: groups side by side, batch rows (no barrier), hidden units (a barrier a
// step).
struct Plan {
  int threads;
  int group_parts, row_parts, unit_parts;  // their product is at most `threads`
  int panel_vectors;                       // vectors of hidden units in one weight panel
  int proj_vectors;                        // vectors of projected units in one weight panel
  int64_t chunk;                           // timesteps whose input GEMM is done at once
  bool pack;                               // false: too few rows to pay for packing the weights
  bool own_panels;                         // each row part packs the weights for itself
  bool in_turn;                            // a panel is packed just before its only product (forward)
  bool split_input, split_state;           // products of x, and of h, are of parts of the values (split.h)
};

// What forward and backward are both told.
struct LayerArgs {
  Sequence seq;
  int64_t I, H;
  int64_t P;  // size of the projection, 0 without one
  int G;
  const Group* groups;
  const void* x;
  int64_t x_stride_t, x_stride_b;
  int64_t x_stride_g;   // from one group's input to the next, 0: all groups read the same one
  const void *h0, *c0;  // [G, B, out] and [G, B, H] or null (zeros)
  void* workspace;

  // Width of one group's output.
  int64_t out() const { return P ? P : H; }

  template <class T>
  const T* x_row(int g, int64_t t, int64_t b) const {
    const int64_t at = seq.offsets ? (seq.offset(t) + b) * x_stride_b : t * x_stride_t + b * x_stride_b;
    return static_cast<const T*>(x) + g * x_stride_g + at;
  }
};

struct ForwardArgs : LayerArgs {
  void* y;          // [N, G out]
  void *h_n, *c_n;  // [G, B, out], [G, B, H]
  void* c;          // [N, G H] the second state after every step, or null: not wanted
  void* gates;      // [G, N, saved Hp] accumulate type (see forward.h's Strided), or null: nothing is saved
  void* cells;      // [G, N, Hp] accumulate type, likewise, for cells with a second state
  void* whole_h;    // [N, G H] likewise, for layers with a projection: what is projected
};

// Blocks of rows, whose weights' gradients come each apart.
struct Samples {
  int64_t number;
  const int64_t* of_row;  // [N] which sample a row of a step belongs to, or null: equal runs of the rows of each step

  // Of row b of its step, the n-th of all.
  int64_t of(int64_t n, int64_t b, int64_t B) const { return of_row ? of_row[n] : b * number / B; }
};

struct GroupGradients {
  void *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr;  // [samples] times as the weights, or null: not wanted
};

struct BackwardArgs : LayerArgs {
  const void* y;                        // [N, G out]
  const void *gates, *cells, *whole_h;  // as saved by forward
  const void *dy, *dc;                  // [N, G out], [N, G H] or null (zeros)
  const void *dh_n, *dc_n;              // [G, B, out], [G, B, H] or null (zeros)
  void* dx;                             // [N, I], of groups with their own inputs [N, G I], or null: not wanted
  void *dh0, *dc0;                      // [G, B, out], [G, B, H] or null
  const GroupGradients* gradients;      // [G]
  Samples samples;

  // Inputs, each with a gradient of its own.
  int inputs() const { return x_stride_g ? G : 1; }
  bool wants_dw_ih() const { return wants(&GroupGradients::dw_ih); }
  bool wants_dw_hh() const { return wants(&GroupGradients::dw_hh); }
  bool wants_dw_hr() const { return wants(&GroupGradients::dw_hr); }

 private:
  bool wants(void* GroupGradients::* gradient) const {
    for (int g = 0; g < G; ++g) {
      if (gradients[g].*gradient) return true;
    }
    return false;
  }
};

}  // namespace fastrnn
