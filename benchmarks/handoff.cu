// What it costs blocks to hand something to each other: the floor under every step of the CUDA scans.
//
//     nvcc -std=c++17 -O3 -Icsrc -arch=native benchmarks/handoff.cu -o build/handoff && build/handoff
//
// Prints the nanoseconds of a step, best of several launches, by the number of blocks, of
//   grid barrier     cooperative groups' barrier of the whole grid
//   flags in L2      512 bytes from each block to all others, as GridExchange sends them
//   cluster barrier  of the blocks of one cluster
//   shared memory    512 bytes from each block to all others of its cluster, as ClusterExchange sends them
//   asynchronously   the same by st.async, which tells the receiver's barrier itself how many bytes have come
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cuda/device.h"

using namespace fastrnn::cuda;

namespace {

constexpr int kThreads = 256, kSteps = 10000, kLaunches = 5, kMostBlocks = 1024, kLargestCluster = 16;
constexpr uint32_t kPollLimit = 1u << 24;

struct Memory {
  Vector data[2][kMostBlocks][32];
  uint32_t flags[kMostBlocks];
  uint32_t sum;  // of what was read, so that it is
  uint32_t gave_up;
};

template <class Ready>
__device__ void poll(Memory& memory, Ready ready) {
  for (uint32_t i = 0; !ready(); ++i) {
    if (i < kPollLimit && !(i % 1024 == 1023 && load_acquire(&memory.gave_up))) continue;
    store_release(&memory.gave_up, 1);
    return;
  }
}

__global__ void __launch_bounds__(kThreads, 1) grid_barrier(Memory*) {
  for (int step = 0; step < kSteps; ++step) cooperative_groups::this_grid().sync();
}

__global__ void __launch_bounds__(kThreads, 1) flags_in_l2(Memory* memory) {
  const int blocks = static_cast<int>(gridDim.x), lane = thread_index() % 32;
  uint32_t sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    if (thread_index() < 32) {
      const auto number = static_cast<uint32_t>(step) + 1;
      memory->data[step % 2][block_index()][lane] = {{number, number, number, number}};
      warp_barrier();
      if (lane == 0) store_release(&memory->flags[block_index()], number);
      for (int b = lane; b < blocks; b += 32) {
        poll(*memory, [&] { return load_acquire(&memory->flags[b]) >= number; });
      }
    }
    block_barrier();
    for (int i = thread_index(); i < 32 * blocks; i += kThreads) {
      sum += load_from_l2(&memory->data[step % 2][i / 32][i % 32]).word[0];
    }
    block_barrier();
  }
  atomicAdd(&memory->sum, sum);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__global__ void __launch_bounds__(kThreads, 1) barrier_of_cluster(Memory*) {
  for (int step = 0; step < kSteps; ++step) cluster_barrier();
}

__device__ void store_synchronously(Vector* mine, int rank, const Vector& v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(in_block(mine, rank)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
__device__ void arrive_at_block(Barrier* mine, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_block(mine, rank)) : "memory");
}

template <bool asynchronous>
__global__ void __launch_bounds__(kThreads, 1) through_shared_memory(Memory* memory) {
  __shared__ Vector data[2][kLargestCluster][32];
  __shared__ Barrier barriers[2];
  const int blocks = static_cast<int>(gridDim.x), lane = thread_index() % 32;
  if (thread_index() == 0) {
    for (Barrier& b : barriers) init_barrier(&b, asynchronous ? 1 : static_cast<uint32_t>(blocks));
    publish_barriers();
  }
  cluster_barrier();
  uint32_t sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    if (thread_index() < 32) {
      const auto number = static_cast<uint32_t>(step) + 1;
      const Vector value{{number, number, number, number}};
      Vector* const mine = &data[step % 2][block_index()][lane];
      Barrier* const barrier = &barriers[step % 2];
      if (asynchronous && lane == 0) expect_bytes(barrier, static_cast<uint32_t>(blocks * 32 * sizeof(Vector)));
      for (int i = 0; i < blocks; ++i) {
        const int rank = (block_index() + i) % blocks;
        asynchronous ? store_to_block(mine, rank, value, barrier) : store_synchronously(mine, rank, value);
      }
      warp_barrier();
      if (!asynchronous && lane < blocks) arrive_at_block(barrier, lane);
      if (lane == 0) poll(*memory, [&] { return phase_ended(barrier, static_cast<uint32_t>(step / 2 % 2)); });
    }
    block_barrier();
    for (int i = thread_index(); i < 32 * blocks; i += kThreads) sum += data[step % 2][i / 32][i % 32].word[0];
    block_barrier();
  }
  atomicAdd(&memory->sum, sum);
  cluster_barrier();
}

#else
__global__ void barrier_of_cluster(Memory*) {}
template <bool asynchronous>
__global__ void through_shared_memory(Memory*) {}
#endif

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "handoff: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

using Kernel = void (*)(Memory*);

// Nanoseconds a step; below 0 where the device does not take such a launch.
double time_of(Kernel kernel, int blocks, bool cluster, bool reads, Memory* memory) {
  cudaLaunchAttribute attribute{};
  if (cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    const auto address = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = -1;
  for (int i = 0; i < kLaunches; ++i) {
    check(cudaMemset(memory, 0, sizeof(Memory)));
    check(cudaEventRecord(begin));
    if (cudaLaunchKernelEx(&config, kernel, memory) != cudaSuccess) {
      cudaGetLastError();
      break;
    }
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    best = best < 0 ? ms : std::min(best, ms);
  }
  uint32_t sum = 0;
  check(cudaMemcpy(&sum, &memory->sum, sizeof sum, cudaMemcpyDeviceToHost));
  const auto vectors = static_cast<uint32_t>(32 * blocks * blocks);  // of all blocks in a step
  if (best >= 0 && reads && sum != vectors * (kSteps / 2 * (kSteps + 1u))) {
    std::fprintf(stderr, "handoff: %d blocks read what was not sent, or gave up waiting\n", blocks);
    std::exit(1);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return best * 1e6 / kSteps;
}

void print(const char* name, Kernel kernel, bool cluster, bool reads, int most, Memory* memory) {
  std::printf("%-16s", name);
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const double ns = time_of(kernel, blocks, cluster, reads, memory);
    if (ns >= 0) std::printf("%6d:%7.0f", blocks, ns);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  int clusters = 0;
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, 0));
  Memory* memory = nullptr;
  check(cudaMalloc(&memory, sizeof(Memory)));
  std::printf("%s, %d multiprocessors; ns a step, by blocks\n", device.name, device.multiProcessorCount);
  const int most = std::min(device.multiProcessorCount, kMostBlocks);
  print("grid barrier", grid_barrier, false, false, most, memory);
  print("flags in L2", flags_in_l2, false, true, most, memory);
  if (clusters) {
    print("cluster barrier", barrier_of_cluster, true, false, kLargestCluster, memory);
    print("shared memory", through_shared_memory<false>, true, true, kLargestCluster, memory);
    print("asynchronously", through_shared_memory<true>, true, true, kLargestCluster, memory);
  }
  check(cudaFree(memory));
  return 0;
}
