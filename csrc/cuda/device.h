// The few things of the hardware that the kernels name. Where no CUDA compiler reads this, an emulation of them that
// runs a grid's threads as fibers takes their place (tests/emulation/emulated_device.h), with the same kernels.
#pragma once

#include <cstdint>

namespace fastrnn::cuda {

struct alignas(16) Vector {
  uint32_t word[4];
};

// In shared memory; its phase ends with the last of the arrivals and bytes that it waits for.
using Barrier = uint64_t;

}  // namespace fastrnn::cuda

#if !defined(__CUDACC__)

#include "emulated_device.h"
#define FASTRNN_DEVICE inline

#else

#define FASTRNN_DEVICE __device__ __forceinline__

namespace fastrnn::cuda {

FASTRNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTRNN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FASTRNN_DEVICE void block_barrier() { __syncthreads(); }
FASTRNN_DEVICE void warp_barrier() { __syncwarp(); }
// The same value, of which the compiler does not know that.
FASTRNN_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
FASTRNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FASTRNN_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
FASTRNN_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTRNN_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
FASTRNN_DEVICE uint32_t to_bits(float value) { return __float_as_uint(value); }

FASTRNN_DEVICE uint16_t round_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FASTRNN_DEVICE uint16_t round_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FASTRNN_DEVICE float widen_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
FASTRNN_DEVICE float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// From L2, past L1: what other blocks wrote in this launch.
FASTRNN_DEVICE Vector load_from_l2(const Vector* address) {
  Vector v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(__cvta_generic_to_global(address)));
  return v;
}
FASTRNN_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}
FASTRNN_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}
FASTRNN_DEVICE void store_for_host(uint32_t* word, uint32_t value) {
  *static_cast<volatile uint32_t*>(word) = value;
  __threadfence_system();
}

// ---- clusters: sm_90 and later

FASTRNN_DEVICE uint32_t in_shared(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}
// The same place in the shared memory of the cluster's block number `rank`.
FASTRNN_DEVICE uint32_t in_block(const void* mine, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(in_shared(mine)), "r"(rank));
  return address;
}
FASTRNN_DEVICE void init_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(barrier)), "r"(arrivals) : "memory");
}
// That barriers have been initialised, for the cluster barrier that follows.
FASTRNN_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// The barrier's one arrival, and the bytes that its phase waits for besides.
FASTRNN_DEVICE void expect_bytes(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(barrier)), "r"(bytes)
               : "memory");
}
// Into another block's memory, some time before the phase of its barrier ends.
FASTRNN_DEVICE void store_to_block(Vector* mine, int rank, const Vector& v, Barrier* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   in_block(mine, rank)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(in_block(barrier, rank))
               : "memory");
}
// Whether the phase of that parity is over, and then the bytes that it waited for can be read.
FASTRNN_DEVICE bool phase_ended(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(ended)
      : "r"(in_shared(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}
FASTRNN_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// D += A B for one 16 x 8 tile; a: rows r and r + 8 by turns, then the same of the second half of k.
FASTRNN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTRNN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTRNN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastrnn::cuda

#endif
