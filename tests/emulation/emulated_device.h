// The primitives of csrc/cuda/device.h for a host compiler: every thread of a grid is a fiber, all of them take turns
// on one thread of the host in an order drawn from a seed. What it cannot show is what only hardware does: weak memory
// ordering, and speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace fastrnn::cuda {

namespace emulated {

// Runs body() once for each thread of `blocks` blocks of `threads`; false if they deadlocked.
bool run(int blocks, int threads, int cluster, int64_t shared_bytes, uint64_t seed, const std::function<void()>& body);

void yield();
char* shared_memory_of(int cluster_rank);  // -1: the caller's own
int thread();
int block();
void barrier_of_block();
void barrier_of_warp();
void barrier_of_cluster();

// One matrix product by a warp, from fragments laid out as the PTX ISA says; the last lane to come computes it.
enum class Kind { bf16, f16, tf32 };
void mma(Kind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace emulated

inline int thread_index() { return emulated::thread(); }
inline int block_index() { return emulated::block(); }
inline void block_barrier() { emulated::barrier_of_block(); }
inline void warp_barrier() { emulated::barrier_of_warp(); }
inline int opaque(int value) { return value; }
inline char* shared_memory() { return emulated::shared_memory_of(-1); }

inline float divide(float a, float b) { return a / b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// To nearest, ties to even: drops the low `drop` bits.
inline uint32_t round_bits(uint32_t bits, int drop) {
  const uint32_t half = (1u << (drop - 1)) - 1, odd = bits >> drop & 1;
  return bits + half + odd;
}
inline uint16_t round_bf16(float value) {
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>(round_bits(to_bits(value), 16) >> 16);
}
inline float round_tf32(float value) {  // ties away from zero
  return value != value ? value : from_bits((to_bits(value) + 0x1000u) & ~0x1fffu);
}
inline uint16_t round_f16(float value) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000u;
  const float size = std::fabs(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (size < 6.103515625e-5f) {  // subnormal: multiples of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 16777216.0f)));
  }
  return static_cast<uint16_t>(sign | ((round_bits(to_bits(size), 13) - (112u << 23)) >> 13));
}
inline float widen_f16(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
  float size = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  if (exponent == 31) size = from_bits(0x7f800000u | mantissa << 13);
  if (exponent > 0 && exponent < 31) size = from_bits((exponent + 112) << 23 | mantissa << 13);
  return bits & 0x8000u ? -size : size;
}

inline Vector load_from_l2(const Vector* address) { return *address; }
inline uint32_t load_acquire(const uint32_t* flag) {
  emulated::yield();
  return *flag;
}
inline void store_release(uint32_t* flag, uint32_t value) {
  emulated::yield();
  *flag = value;
}
inline void store_for_host(uint32_t* word, uint32_t value) { *word = value; }

// A barrier's 64 bits: those still missing in this phase, of its one arrival and of bytes, which may come before it is
// told how many there are; and the phase's parity.
struct BarrierBits {
  int32_t bytes;
  uint16_t arrivals, parity;
};
static_assert(sizeof(BarrierBits) == sizeof(Barrier));

template <class Change>
void change(void* barrier, Change change) {
  BarrierBits bits;
  std::memcpy(&bits, barrier, sizeof bits);
  change(bits);
  if (bits.arrivals == 0 && bits.bytes == 0) bits = {0, 1, static_cast<uint16_t>(bits.parity ^ 1)};
  std::memcpy(barrier, &bits, sizeof bits);
}

inline void* in_block(void* mine, int rank) {
  return emulated::shared_memory_of(rank) + (static_cast<char*>(mine) - shared_memory());
}
inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  const BarrierBits bits{0, static_cast<uint16_t>(arrivals), 0};
  std::memcpy(barrier, &bits, sizeof bits);
}
inline void publish_barriers() {}
inline void expect_bytes(Barrier* barrier, uint32_t bytes) {
  emulated::yield();
  change(barrier, [&](BarrierBits& bits) {
    if (bits.arrivals == 0) std::abort();  // told twice in a phase
    bits.arrivals = 0;
    bits.bytes += static_cast<int32_t>(bytes);
  });
}
inline void store_to_block(Vector* mine, int rank, const Vector& v, Barrier* barrier) {
  emulated::yield();
  *static_cast<Vector*>(in_block(mine, rank)) = v;
  change(in_block(barrier, rank), [](BarrierBits& bits) { bits.bytes -= static_cast<int32_t>(sizeof(Vector)); });
}
inline bool phase_ended(Barrier* barrier, uint32_t parity) {
  emulated::yield();
  BarrierBits bits;
  std::memcpy(&bits, barrier, sizeof bits);
  return bits.parity != parity;
}
inline void cluster_barrier() { emulated::barrier_of_cluster(); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::Kind::bf16, d, a, {b0, b1});
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::Kind::f16, d, a, {b0, b1});
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::Kind::tf32, d, a, {b0, b1});
}

}  // namespace fastrnn::cuda
