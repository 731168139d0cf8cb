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

// Gives up when `ready` stays false for too long, or when someone else has given up.
template <class Ready>
FASTRNN_DEVICE bool poll(const ScanArgs& args, Ready ready) {
  for (uint32_t i = 1; !ready(); ++i) {
    if (i % 1024 == 0 && load_acquire(args.status)) return false;
    if (i < args.poll_limit) continue;
    store_release(args.status, 1);
    if (args.report) store_for_host(args.report, 1);
    return false;
  }
  return true;
}

// Through L2: operands in global memory, one flag for each (batch tile, unit tile) that counts what was published.
class GridExchange {
 public:
  static constexpr bool local = false;  // whether operands lie in shared memory

  FASTRNN_DEVICE GridExchange(const ScanArgs& args, const Sizes& sizes, const Layout&, const Place& place)
      : args_(args),
        operand_vectors_(sizes.operand_vectors()),
        unit_tiles_(sizes.tiles()),
        g_(place.g),
        batch_tiles_(args.passes() * args.tiling.batch_tiles) {}

  FASTRNN_DEVICE void begin() { block_barrier(); }
  FASTRNN_DEVICE void end() {}

  FASTRNN_DEVICE const Vector* operand(int64_t o, int64_t batch_tile) const { return buffer(o, batch_tile); }
  static FASTRNN_DEVICE Vector load(const Vector* address) { return load_from_l2(address); }

  // For one warp: until unit tiles [first, end) have published operand o of `count` batch tiles.
  FASTRNN_DEVICE bool wait(int64_t o, int64_t batch_tile, int count, int64_t first, int64_t end) {
    const int64_t units = end - first;
    bool ok = true;
    for (int64_t i = thread_index() % 32; i < count * units && ok; i += 32) {
      const uint32_t* const f = flag(batch_tile + i / units, first + i % units);
      const uint32_t published = static_cast<uint32_t>(o) + 1;
      ok = poll(args_, [&] { return load_acquire(f) >= published; });
    }
    return ok;
  }

  // By the lanes of one warp: vector `index` of operand o; then, once for all of them, that it is there.
  FASTRNN_DEVICE void send(int64_t o, int64_t batch_tile, int64_t index, const Vector& value) {
    buffer(o, batch_tile)[index] = value;
  }
  FASTRNN_DEVICE void sent(int64_t o, int64_t batch_tile, int64_t unit_tile) {
    warp_barrier();
    if (thread_index() % 32 == 0) store_release(flag(batch_tile, unit_tile), static_cast<uint32_t>(o) + 1);
  }

 private:
  FASTRNN_DEVICE Vector* buffer(int64_t o, int64_t batch_tile) const {
    const int64_t index = (g_ * 2 + o % 2) * batch_tiles_ + batch_tile;
    return static_cast<Vector*>(args_.operand) + index * operand_vectors_;
  }
  FASTRNN_DEVICE uint32_t* flag(int64_t batch_tile, int64_t unit_tile) const {
    return args_.flags + (g_ * batch_tiles_ + batch_tile) * unit_tiles_ + unit_tile;
  }

  const ScanArgs& args_;
  int64_t operand_vectors_, unit_tiles_, g_, batch_tiles_;
};

// Through the shared memory of a cluster, which is one replica: each block has the operands of all its batch tiles, and
// for each of their buffers a barrier whose phase ends when every unit tile has come. Operand number o is the buffer's
// phase o / 2; a barrier tells only a phase from the next, and no block can be two behind.
class ClusterExchange {
 public:
  static constexpr bool local = true;

  FASTRNN_DEVICE ClusterExchange(const ScanArgs& args, const Sizes& sizes, const Layout& layout, const Place& place)
      : args_(args),
        operand_vectors_(sizes.operand_vectors()),
        unit_tiles_(static_cast<uint32_t>(sizes.tiles())),
        slice_(place.slice),
        batch_tiles_(static_cast<int>((layout.failed - layout.barriers) / (2 * sizeof(Barrier)))),
        operands_(reinterpret_cast<Vector*>(shared_memory() + layout.operand)),
        barriers_(reinterpret_cast<Barrier*>(shared_memory() + layout.barriers)) {}

  FASTRNN_DEVICE void begin() {
    if (thread_index() == 0) {
      for (int i = 0; i < 2 * batch_tiles_; ++i) init_barrier(barriers_ + i, unit_tiles_);
      publish_barriers();
    }
    cluster_barrier();
  }
  // Nobody leaves while others may still write to its memory.
  FASTRNN_DEVICE void end() { cluster_barrier(); }

  FASTRNN_DEVICE const Vector* operand(int64_t o, int64_t batch_tile) const { return buffer(o, batch_tile); }
  static FASTRNN_DEVICE Vector load(const Vector* address) { return *address; }

  // For one warp: until operand o of `count` batch tiles is complete, of which it will read but a part.
  FASTRNN_DEVICE bool wait(int64_t o, int64_t batch_tile, int count, int64_t, int64_t) {
    bool ok = true;
    for (int n = thread_index() % 32; n < count && ok; n += 32) {
      Barrier* const b = barrier(o, batch_tile + n);
      ok = poll(args_, [&] { return phase_ended(b, static_cast<uint32_t>(o / 2 % 2)); });
    }
    return ok;
  }

  FASTRNN_DEVICE void send(int64_t o, int64_t batch_tile, int64_t index, const Vector& value) {
    Vector* const mine = buffer(o, batch_tile) + index;
    int rank = slice_;  // each block begins with itself, so that they do not all write to the same one
    for (int i = 0; i < args_.tiling.slices; ++i) {
      store_to_block(mine, rank, value);
      rank = rank + 1 < args_.tiling.slices ? rank + 1 : 0;
    }
  }
  FASTRNN_DEVICE void sent(int64_t o, int64_t batch_tile, int64_t) {
    warp_barrier();
    const int rank = thread_index() % 32;
    if (rank < args_.tiling.slices) arrive_at_block(barrier(o, batch_tile), rank);
  }

 private:
  // Of all batch tiles of this replica's passes.
  FASTRNN_DEVICE int index(int64_t o, int64_t batch_tile) const {
    const auto tile = static_cast<uint32_t>(batch_tile), a_pass = static_cast<uint32_t>(args_.tiling.batch_tiles);
    const uint32_t pass = tile / a_pass / static_cast<uint32_t>(args_.tiling.replicas);
    return static_cast<int>(o % 2) * batch_tiles_ + static_cast<int>(pass * a_pass + tile % a_pass);
  }
  FASTRNN_DEVICE Vector* buffer(int64_t o, int64_t batch_tile) const {
    return operands_ + index(o, batch_tile) * operand_vectors_;
  }
  FASTRNN_DEVICE Barrier* barrier(int64_t o, int64_t batch_tile) const { return barriers_ + index(o, batch_tile); }

  const ScanArgs& args_;
  int64_t operand_vectors_;
  uint32_t unit_tiles_;
  int slice_, batch_tiles_;
  Vector* operands_;
  Barrier* barriers_;
};

}  // namespace fastrnn::cuda
