// How the blocks of a replica hand the operand of the next step to each other.
//
// Operand number o is read from buffer o % 2. A block publishes number o only after all its warps have read number
// o - 1, for which it has waited for every block to publish that; and each block had read number o - 2, whose buffer is
// written now, before it did so. So two buffers are enough, and no barrier is needed. tests/test_handoff.py explores
// these protocols and broken variants of them.
#pragma once

#include "args.h"
#include "device.h"

namespace fastrnn::cuda {

// Which part of the work this block has.
struct Place {
  int g, replica, slice;
};

// One pass of the batch: batch tiles from pass * batch_tiles on.
struct Portion {
  int pass;
  int own_tile;  // number of its first batch tile among those of the replica
  int count;     // of batch tiles that hold rows
};

// Gives up when `ready` stays false for `looks`, or when someone else has given up.
template <class Ready>
FASTRNN_DEVICE bool poll(const ScanArgs& args, uint32_t looks, Ready ready) {
  for (uint32_t i = 1; !ready(); ++i) {
    if (i % 1024 == 0 && load_acquire(args.status)) return false;
    if (i < looks) continue;
    store_release(args.status, 1);
    if (args.report) store_for_host(args.report, 1);
    return false;
  }
  return true;
}

// Through L2: operands in global memory, one flag for each (batch tile, unit tile) that counts what was published.
class GridExchange {
 public:
  static constexpr bool local = false;   // whether operands lie in shared memory
  static constexpr bool by_tile = true;  // a tile is sent by one warp, which can tell when all of it is there

  FASTRNN_DEVICE GridExchange(const ScanArgs& args, const Sizes& sizes, const Layout&, const Place& place)
      : args_(args),
        operand_vectors_(static_cast<int>(sizes.operand_vectors())),
        unit_tiles_(static_cast<int>(sizes.tiles())),
        batch_tiles_(static_cast<int>(args.passes() * args.tiling.batch_tiles)),
        g_(place.g) {}

  FASTRNN_DEVICE void begin() { block_barrier(); }
  FASTRNN_DEVICE void end() {}

  // Of the portion's first batch tile; the others follow.
  FASTRNN_DEVICE const Vector* operand(uint32_t o, const Portion& some) const { return buffer(o, some, 0); }
  static FASTRNN_DEVICE Vector load(const Vector* address) { return load_from_l2(address); }

  // For one warp: until unit tiles awaited(0..count) have published operand o of the portion's batch tiles.
  template <class Awaited>
  FASTRNN_DEVICE bool wait(uint32_t o, const Portion& some, int count, Awaited awaited) {
    const uint32_t number = o + 1;
    bool ok = true;
    for (int n = 0; n < some.count; ++n) {
      for (int i = thread_index() % 32; i < count && ok; i += 32) {
        const uint32_t* const f = flag(some, n, awaited(i));
        ok = poll(args_, args_.poll_limit, [&] { return load_acquire(f) >= number; });
      }
    }
    return ok;
  }

  // By the lanes of one warp: vector `index` of batch tile n; then, once for all of them, that the unit tile is there.
  FASTRNN_DEVICE void send(uint32_t o, const Portion& some, int n, int index, const Vector& value) {
    buffer(o, some, n)[index] = value;
  }
  FASTRNN_DEVICE void sent(uint32_t o, const Portion& some, int n, int unit_tile) {
    warp_barrier();
    if (thread_index() % 32 == 0) store_release(flag(some, n, unit_tile), o + 1);
  }

 private:
  FASTRNN_DEVICE int batch_tile(const Portion& some, int n) const { return some.pass * args_.tiling.batch_tiles + n; }
  FASTRNN_DEVICE Vector* buffer(uint32_t o, const Portion& some, int n) const {
    const int64_t index = int64_t{2 * g_ + static_cast<int>(o % 2)} * batch_tiles_ + batch_tile(some, n);
    return static_cast<Vector*>(args_.operand) + index * operand_vectors_;
  }
  FASTRNN_DEVICE uint32_t* flag(const Portion& some, int n, int unit_tile) const {
    return args_.flags + (int64_t{g_} * batch_tiles_ + batch_tile(some, n)) * unit_tiles_ + unit_tile;
  }

  const ScanArgs& args_;
  int operand_vectors_, unit_tiles_, batch_tiles_, g_;
};

// Through the shared memory of a cluster, which is one replica: each block has the operands of all its batch tiles, and
// for each of their buffers a barrier whose phase ends when every byte has come. Vectors are stored asynchronously, and
// tell the barrier themselves: a sender neither waits nor fences. Operand number o is the buffer's phase o / 2; a
// barrier tells only a phase from the next, and no block can be two behind. A phase waits for its bytes only once it is
// told how many there are, which a block does before it publishes what the others need to send any of them.
class ClusterExchange {
 public:
  static constexpr bool local = true;
  static constexpr bool by_tile = false;

  FASTRNN_DEVICE ClusterExchange(const ScanArgs& args, const Sizes& sizes, const Layout& layout, const Place& place)
      : args_(args),
        slices_(args.tiling.slices),
        slice_(place.slice),
        operand_vectors_(static_cast<int>(sizes.operand_vectors())),
        batch_tiles_(static_cast<int>((layout.failed - layout.barriers) / (2 * sizeof(Barrier)))),
        operands_(reinterpret_cast<Vector*>(shared_memory() + layout.operand)),
        barriers_(reinterpret_cast<Barrier*>(shared_memory() + layout.barriers)) {}

  FASTRNN_DEVICE void begin() {
    if (thread_index() == 0) {
      for (int i = 0; i < 2 * batch_tiles_; ++i) {
        init_barrier(barriers_ + i, 1);
        expect(barriers_ + i);
      }
      publish_barriers();
    }
    cluster_barrier();
  }
  // Nobody leaves while others may still write to its memory.
  FASTRNN_DEVICE void end() { cluster_barrier(); }

  FASTRNN_DEVICE const Vector* operand(uint32_t o, const Portion& some) const {
    return operands_ + index(o, some, 0) * operand_vectors_;
  }
  static FASTRNN_DEVICE Vector load(const Vector* address) { return *address; }

  // For one warp: until operand o of the portion's batch tiles is complete, of which it will read but a part.
  template <class Awaited>
  FASTRNN_DEVICE bool wait(uint32_t o, const Portion& some, int, Awaited) {
    const int n = thread_index() % 32;
    if (n >= some.count) return true;
    Barrier* const b = barriers_ + index(o, some, n);
    const uint32_t looks = 16 * args_.poll_limit;  // at a block's own memory, which takes so much less
    if (!poll(args_, looks, [&] { return phase_ended(b, o / 2 % 2); })) return false;
    if (thread_index() == n) expect(b);  // for number o + 2; this thread is in warp 0
    return true;
  }

  // By all warps, which share the cluster's blocks: each lane has a vector.
  FASTRNN_DEVICE void send(uint32_t o, const Portion& some, int n, int at, const Vector& value) {
    const Vector mine = value;  // not to be read again for each block
    const int i = index(o, some, n);
    for (int k = thread_index() / 32; k < slices_; k += kWarps) {
      // Each block begins with itself, so that they do not all write to the same one.
      const int rank = slice_ + k < slices_ ? slice_ + k : slice_ + k - slices_;
      store_to_block(operands_ + i * operand_vectors_ + at, rank, mine, barriers_ + i);
    }
  }
  FASTRNN_DEVICE void sent(uint32_t, const Portion&, int, int) {}

 private:
  FASTRNN_DEVICE void expect(Barrier* barrier) const {
    expect_bytes(barrier, static_cast<uint32_t>(operand_vectors_) * kVectorBytes);
  }
  // Of all batch tiles of this replica's passes.
  FASTRNN_DEVICE int index(uint32_t o, const Portion& some, int n) const {
    return static_cast<int>(o % 2) * batch_tiles_ + some.own_tile + n;
  }

  const ScanArgs& args_;
  int slices_, slice_, operand_vectors_, batch_tiles_;
  Vector* operands_;
  Barrier* barriers_;
};

}  // namespace fastrnn::cuda
