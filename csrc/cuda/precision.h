// Number formats: what tensors hold, what the products take, and how one chunk of a product is done.
//
// A chunk is 64 bytes of every row of an operand, four vectors of 16 bytes. The sum over k may take any order as long
// as both factors take the same, so a lane of a tensor-core tile reads 16 consecutive bytes of its row, which are its
// registers of two multiplications: vector q of a row belongs to the lanes with lane % 4 == q, and memory is ordered by
// lane. Of weights, whose rows r and r + 8 a lane reads, the words of both are interleaved, so that a vector is what
// one multiplication takes. Fragments: PTX ISA, mma.m16n8k16 and m16n8k8.
//
// The accumulator of a tile holds, for lane = 4 r + q: (row r, column 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1).
#pragma once

#include "args.h"
#include "device.h"

namespace fastrnn::cuda {

// Where vector `quarter` of row `row` (0..7) lies among the 32 of a chunk of an operand, tensor-core order; and of
// weights, the words of row `row` + 8 * half among the 2 * 32 vectors of a chunk of a tile.
struct LaneOrder {
  static FASTRNN_HD int place(int row, int quarter) { return row * 4 + quarter; }
  static FASTRNN_HD int weight_word(int half, int row, int quarter, int word) {
    return (word / 2 * kChunkVectors + place(row, quarter)) * 4 + word % 2 * 2 + half;
  }
};

template <void (*mma)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t)>
struct TensorCore : LaneOrder {
  static constexpr int in_flight = 8;  // vectors of the operand that are loaded before any is used

  // acc[..][tile][n] += (16 rows of weights) x (8 rows of the operand), over `chunks` chunks; with two chains, the
  // halves of a chunk are summed apart.
  // weights(c, i) is vector i of [gate tile, 2, 32] of chunk c; operand(c, n, i) is vector i of batch tile n.
  template <int chunks, int chains, int tiles, int batch, class Weights, class Operand>
  static FASTRNN_DEVICE void multiply(float (&acc)[chains][tiles][batch][4], int lane, Weights weights,
                                      Operand operand) {
    Vector b[chunks][batch];
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
#pragma unroll
      for (int n = 0; n < batch; ++n) b[c][n] = operand(c, n, lane);
    }
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
#pragma unroll
      for (int k = 0; k < tiles; ++k) {
        const Vector first = weights(c, (2 * k) * kChunkVectors + lane);
        const Vector second = weights(c, (2 * k + 1) * kChunkVectors + lane);
#pragma unroll
        for (int n = 0; n < batch; ++n) {
          const Vector& x = b[c][n];
          mma(acc[0][k][n], first.word, x.word[0], x.word[1]);
          mma(acc[chains - 1][k][n], second.word, x.word[2], x.word[3]);
        }
      }
    }
  }
};

struct Bf16 : TensorCore<mma_bf16> {
  struct Value {
    uint16_t bits;
  };
  using Operand = Value;
  static FASTRNN_DEVICE float widen(Value v) { return from_bits(uint32_t{v.bits} << 16); }
  static FASTRNN_DEVICE Value round(float v) { return {round_bf16(v)}; }
  static FASTRNN_DEVICE Operand operand(float v) { return round(v); }
};

struct F16 : TensorCore<mma_f16> {
  struct Value {
    uint16_t bits;
  };
  using Operand = Value;
  static FASTRNN_DEVICE float widen(Value v) { return widen_f16(v.bits); }
  static FASTRNN_DEVICE Value round(float v) { return {round_f16(v)}; }
  static FASTRNN_DEVICE Operand operand(float v) { return round(v); }
};

struct Tf32 : TensorCore<mma_tf32> {
  using Value = float;
  using Operand = float;
  static FASTRNN_DEVICE float widen(Value v) { return v; }
  static FASTRNN_DEVICE Value round(float v) { return v; }
  static FASTRNN_DEVICE Operand operand(float v) { return round_tf32(v); }
};

// True float32, by FFMA with the tensor cores' ownership of sums: the lanes of one quarter share their vectors.
struct F32 {
  using Value = float;
  using Operand = float;
  static constexpr int in_flight = 1;

  static FASTRNN_HD int place(int row, int quarter) { return quarter * 8 + row; }
  static FASTRNN_HD int weight_word(int half, int row, int quarter, int word) {
    return (half * kChunkVectors + place(row, quarter)) * 4 + word;
  }
  static FASTRNN_DEVICE float widen(Value v) { return v; }
  static FASTRNN_DEVICE Value round(float v) { return v; }
  static FASTRNN_DEVICE Operand operand(float v) { return v; }

  template <int chunks, int chains, int tiles, int batch, class Weights, class Operands>
  static FASTRNN_DEVICE void multiply(float (&acc)[chains][tiles][batch][4], int lane, Weights weights,
                                      Operands operand) {
    const int r = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int i = 0; i < 4 * chunks; ++i) {
      const int c = i / 4, quarter = i % 4;
      Vector b[batch][2];
#pragma unroll
      for (int n = 0; n < batch; ++n) {
        b[n][0] = operand(c, n, place(2 * q, quarter));
        b[n][1] = operand(c, n, place(2 * q + 1, quarter));
      }
#pragma unroll
      for (int k = 0; k < tiles; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Vector a = weights(c, (2 * k + half) * kChunkVectors + place(r, quarter));
#pragma unroll
          for (int n = 0; n < batch; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float &first = acc[0][k][n][2 * half], &second = acc[0][k][n][2 * half + 1];
              first = multiply_add(from_bits(a.word[e]), from_bits(b[n][0].word[e]), first);
              second = multiply_add(from_bits(a.word[e]), from_bits(b[n][1].word[e]), second);
            }
          }
        }
      }
    }
  }
};

}  // namespace fastrnn::cuda
