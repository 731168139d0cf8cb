#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace fastrnn::cuda::emulated {
namespace {

constexpr size_t kStack = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread, block;
};

// Whoever comes last sends all on; the others sleep.
struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
};

struct Product {
  float* d[32];
  uint32_t a[32][4], b[32][2];
};

struct Warp {
  Barrier barrier;
  Product product;
};

struct Block {
  std::unique_ptr<char[]> memory;
  char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Grid {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;
  std::vector<Fiber*> ready;
  ucontext_t scheduler;
  Fiber* current;
  int cluster;
  int unfinished;
  const std::function<void()>* body;
};

Grid* grid = nullptr;

void sleep() { swapcontext(&grid->current->context, &grid->scheduler); }

// True for the one that came last.
bool arrive(Barrier& barrier, void (*last)() = nullptr) {
  if (static_cast<int>(barrier.waiting.size()) + 1 < barrier.expected) {
    barrier.waiting.push_back(grid->current);
    sleep();
    return false;
  }
  if (last) last();
  grid->ready.insert(grid->ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  return true;
}

Block& here() { return grid->blocks[static_cast<size_t>(grid->current->block)]; }
Warp& warp() { return here().warps[static_cast<size_t>(grid->current->thread / 32)]; }

void enter() {
  (*grid->body)();
  --grid->unfinished;
  sleep();
}

// Row and column of a fragment's values: PTX ISA, mma.m16n8k16 (16-bit) and mma.m16n8k8 (tf32).
void multiply(Kind kind) {
  const Product& p = warp().product;
  const bool wide = kind == Kind::tf32;
  const int per_word = wide ? 1 : 2, half = 4 * per_word;
  float a[16][16] = {}, b[16][8] = {};
  const auto value = [&](uint32_t word, int i) {
    if (wide) return from_bits(word);
    const uint32_t bits = word >> (16 * i) & 0xffffu;
    return kind == Kind::bf16 ? from_bits(bits << 16) : widen_f16(static_cast<uint16_t>(bits));
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < per_word; ++i) {
      const int k = lane % 4 * per_word + i, r = lane / 4;
      for (int j = 0; j < 4; ++j) a[r + 8 * (j % 2)][k + half * (j / 2)] = value(p.a[lane][j], i);
      for (int j = 0; j < 2; ++j) b[k + half * j][r] = value(p.b[lane][j], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
      float sum = p.d[lane][e];
      for (int k = 0; k < 2 * half; ++k) sum += a[row][k] * b[k][column];
      p.d[lane][e] = sum;
    }
  }
}

}  // namespace

int thread() { return grid->current->thread; }
int block() { return grid->current->block; }

char* shared_memory_of(int cluster_rank) {
  if (cluster_rank < 0) return here().shared;
  const int first = block() / grid->cluster * grid->cluster;
  return grid->blocks[static_cast<size_t>(first + cluster_rank)].shared;
}

void yield() {
  grid->ready.push_back(grid->current);
  sleep();
}

void barrier_of_block() { arrive(here().barrier); }
void barrier_of_warp() { arrive(warp().barrier); }
void barrier_of_cluster() { arrive(grid->clusters[static_cast<size_t>(block() / grid->cluster)]); }

void mma(Kind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product& p = warp().product;
  const int lane = thread() % 32;
  p.d[lane] = d;
  std::memcpy(p.a[lane], a, sizeof a);
  std::memcpy(p.b[lane], b, sizeof b);
  switch (kind) {
    case Kind::bf16:
      arrive(warp().barrier, [] { multiply(Kind::bf16); });
      break;
    case Kind::f16:
      arrive(warp().barrier, [] { multiply(Kind::f16); });
      break;
    case Kind::tf32:
      arrive(warp().barrier, [] { multiply(Kind::tf32); });
      break;
  }
}

bool run(int blocks, int threads, int cluster, int64_t shared_bytes, uint64_t seed, const std::function<void()>& body) {
  Grid state;
  grid = &state;
  state.cluster = cluster;
  state.body = &body;
  state.unfinished = blocks * threads;
  state.fibers.resize(static_cast<size_t>(blocks * threads));
  state.clusters.resize(static_cast<size_t>(blocks / cluster));
  for (Barrier& b : state.clusters) b.expected = cluster * threads;
  for (int i = 0; i < blocks; ++i) {
    Block block;
    block.memory = std::make_unique<char[]>(static_cast<size_t>(shared_bytes) + 128);
    block.shared = block.memory.get();
    while (reinterpret_cast<uintptr_t>(block.shared) % 128) ++block.shared;
    std::memset(block.shared, 0xff, static_cast<size_t>(shared_bytes));  // NaN, whoever reads it unwritten
    block.barrier.expected = threads;
    block.warps.resize(static_cast<size_t>(threads / 32));
    for (Warp& w : block.warps) w.barrier.expected = 32;
    state.blocks.push_back(std::move(block));
  }
  for (int i = 0; i < blocks * threads; ++i) {
    Fiber& fiber = state.fibers[static_cast<size_t>(i)];
    fiber.thread = i % threads;
    fiber.block = i / threads;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
    state.ready.push_back(&fiber);
  }
  std::mt19937_64 random(seed);
  while (!state.ready.empty()) {
    std::swap(state.ready[random() % state.ready.size()], state.ready.back());
    state.current = state.ready.back();
    state.ready.pop_back();
    swapcontext(&state.scheduler, &state.current->context);
  }
  grid = nullptr;
  return state.unfinished == 0;
}

}  // namespace fastrnn::cuda::emulated
