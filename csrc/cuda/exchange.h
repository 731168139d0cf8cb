// How the blocks of a replica hand the operand of the next step to each other.
//
// Operand number o is read from buffer o % 2. A block publishes number o only after all its warps have read number
// o - 1, for which it has waited for every block to publish that; and each block had read number o - 2, whose buffer is
// written now, before it did so. So two buffers are enough, and no barrier is needed. tests/test_handoff.py explores
// this protocol and broken variants of it.
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

}  // namespace fastrnn::cuda
