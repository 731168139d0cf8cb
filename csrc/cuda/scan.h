// The loop over time that forward and backward share.
//
// Every row counts its own steps from where its scan starts, so that all rows start together and a row only ever ends:
// lengths, packing and the direction of time are a matter of which time a row's step m is (RowClock). In each step a
// block multiplies its weights by the operand that all blocks have published, the warps sharing out the sum, and a warp
// for each (16 units, 8 rows) applies the cell, publishes its part of the next operand, and then stores what it found.
#pragma once

#include "exchange.h"
#include "precision.h"

namespace fastrnn::cuda {

// Times of a row with `length` steps. Scans that begin at the end of time are a backward group's forward pass, and a
// forward group's backward pass.
struct RowClock {
  bool from_end;
  FASTRNN_HD int64_t time(int64_t m, int64_t length) const { return from_end ? length - 1 - m : m; }
};

// What a thread owns of a tile: units u and u + 8, rows b and b + 1, four values, number e at (unit(e), row(e)).
struct Corner {
  int64_t first_unit, first_row;
  FASTRNN_DEVICE int64_t unit(int e) const { return first_unit + 8 * (e / 2); }
  FASTRNN_DEVICE int64_t row(int e) const { return first_row + e % 2; }
};

template <class Value>
FASTRNN_DEVICE Value load_or_zero(const void* base, int64_t index) {
  return base ? static_cast<const Value*>(base)[index] : Value{};
}

// Rows of a group's arrays, and where resets cut them.
template <class P>
struct Rows {
  using Value = typename P::Value;
  const ScanArgs& args;
  int64_t g;
  bool reverse;

  FASTRNN_DEVICE int64_t length(int64_t b) const { return b >= args.B ? 0 : args.lengths ? args.lengths[b] : args.T; }
  FASTRNN_DEVICE int64_t at(int64_t t, int64_t b) const { return (args.offsets ? args.offsets[t] : t * args.B) + b; }
  FASTRNN_DEVICE int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }

  // Whether step t of row b starts from the reset states.
  FASTRNN_DEVICE bool fresh(int64_t t, int64_t b, int64_t length) const {
    if (!args.reset) return false;
    const int64_t edge = reverse ? t + 1 : t;
    return edge < length && args.reset[edge * args.B + b];
  }

  // Index into [G, B, H] and into [N, G H].
  FASTRNN_DEVICE int64_t in_state(int64_t b, int64_t u) const { return (g * args.B + b) * args.H + u; }
  FASTRNN_DEVICE int64_t in_output(int64_t t, int64_t b, int64_t u) const {
    return (at(t, b) * args.G + g) * args.H + u;
  }
  // Index into [G, N, planes, H], of plane 0.
  FASTRNN_DEVICE int64_t in_gates(int64_t t, int64_t b, int64_t u, int planes) const {
    return (g * args.N + at(t, b)) * planes * args.H + u;
  }

  FASTRNN_DEVICE float state(const void* base, int64_t b, int64_t u) const {
    return P::widen(load_or_zero<Value>(base, in_state(b, u)));
  }
  FASTRNN_DEVICE void set_state(void* base, int64_t b, int64_t u, float value) const {
    if (base) static_cast<Value*>(base)[in_state(b, u)] = P::round(value);
  }
  FASTRNN_DEVICE float output(const void* base, int64_t t, int64_t b, int64_t u) const {
    return P::widen(load_or_zero<Value>(base, in_output(t, b, u)));
  }
  FASTRNN_DEVICE void set_output(void* base, int64_t t, int64_t b, int64_t u, float value) const {
    if (base) static_cast<Value*>(base)[in_output(t, b, u)] = P::round(value);
  }
};

// Pass is Forward<Cell, P> or Backward<Cell, P>: the epilogue of a step.
template <class Pass, class Exchange>
class Scan {
  using P = typename Pass::Precision;
  using Operand = typename P::Operand;
  static constexpr int kTiles = Pass::gate_tiles, kDepth = Pass::depth;
  static constexpr int kPerVector = kVectorBytes / sizeof(Operand);

 public:
  FASTRNN_DEVICE explicit Scan(const typename Pass::Args& args)
      : args_(args),
        tiling_(args.tiling),
        sizes_(make_sizes(args.H, sizeof(Operand), kDepth, kTiles)),
        layout_(make_layout(sizes_, tiling_, Exchange::local ? local_tiles() : 0)),
        place_(find_place()),
        exchange_(args, sizes_, layout_, place_),
        pass_(args, place_.g),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32) {}

  FASTRNN_DEVICE void run() {
    fill_weights();
    if (thread_index() == 0) *failed() = 0;
    exchange_.begin();
    typename Pass::Slot slot{};
    for (int64_t p = place_.replica; p < args_.passes(); p += tiling_.replicas) begin(p, slot);
    for (int64_t m = 0;; ++m) {
      bool live = false;
      for (int64_t p = place_.replica; p < args_.passes(); p += tiling_.replicas) {
        const int64_t steps = pass_.steps(p);
        if (m >= steps) continue;
        live = true;
        if (step(m, p, m + 1 < steps, slot)) continue;
        poison();
        exchange_.end();
        return;
      }
      if (!live) break;
    }
    exchange_.end();
  }

 private:
  // Blocks of a replica are neighbours, so that a cluster is one replica.
  FASTRNN_DEVICE Place find_place() const {
    const int block = block_index(), per_group = tiling_.slices * tiling_.replicas;
    return {args_.first_group + block / per_group, block % per_group / tiling_.slices, block % tiling_.slices};
  }
  FASTRNN_DEVICE int64_t local_tiles() const {
    return ceil_div(args_.passes(), tiling_.replicas) * tiling_.batch_tiles;
  }

  // ---- weights: [unit tile][chunk][gate tile, half, 32] vectors, the first chunks in shared memory

  FASTRNN_DEVICE int64_t unit_tile(int local) const { return int64_t{place_.slice} * tiling_.unit_tiles + local; }
  FASTRNN_DEVICE Vector* resident(int local) const {
    return reinterpret_cast<Vector*>(shared_memory() + layout_.weights) +
           local * tiling_.resident_chunks * sizes_.weight_vectors();
  }
  // Chunk 0 would lie here; those that are resident have no memory here.
  FASTRNN_DEVICE Vector* streamed(int local) const {
    const int64_t kept = sizes_.chunks() - tiling_.resident_chunks;
    const int64_t index = (int64_t{block_index()} * tiling_.unit_tiles + local) * kept - tiling_.resident_chunks;
    return static_cast<Vector*>(args_.streamed_weights) + index * sizes_.weight_vectors();
  }

  FASTRNN_DEVICE void fill_weights() const {
    const int64_t per_chunk = sizes_.weight_vectors(), per_tile = sizes_.chunks() * per_chunk;
    for (int local = 0; local < tiling_.unit_tiles; ++local) {
      if (unit_tile(local) >= sizes_.tiles()) break;
      for (int64_t i = thread_index(); i < per_tile; i += kThreads) {
        const int64_t chunk = i / per_chunk;
        const int in_chunk = static_cast<int>(i % per_chunk);
        const int row = in_chunk / 4 % 8, quarter = in_chunk % 4, half = in_chunk / kChunkVectors;
        Vector* const base = chunk < tiling_.resident_chunks ? resident(local) : streamed(local);
        base[chunk * per_chunk + half * kChunkVectors + P::place(row, quarter)] =
            weight_vector(unit_tile(local) * kTileUnits + half % 2 * 8 + row, half / 2, chunk, quarter);
      }
    }
  }

  FASTRNN_DEVICE Vector weight_vector(int64_t unit, int gate_tile, int64_t chunk, int quarter) const {
    const int64_t first = chunk / kDepth * sizes_.chunk_units() + quarter * kPerVector;
    alignas(16) Operand values[kPerVector];
    for (int i = 0; i < kPerVector; ++i) {
      const bool inside = unit < args_.H && first + i < args_.H;
      values[i] = inside ? pass_.weight(unit, gate_tile, first + i, static_cast<int>(chunk % kDepth)) : Operand{};
    }
    return *reinterpret_cast<const Vector*>(values);
  }

  // ---- the product

  FASTRNN_DEVICE Vector* partials() const { return reinterpret_cast<Vector*>(shared_memory() + layout_.partials); }
  FASTRNN_DEVICE int64_t partial(int warp, int tile, int n) const {
    return ((int64_t{warp} * kTiles + tile) * tiling_.batch_tiles + n) * 32 + lane_;
  }
  FASTRNN_DEVICE volatile int* failed() const {
    return reinterpret_cast<volatile int*>(shared_memory() + layout_.failed);
  }

  // This warp's share of the sum, for `batch` batch tiles.
  template <int batch>
  FASTRNN_DEVICE void multiply(int64_t o, int64_t batch_tile, int local, int64_t first, int64_t end) const {
    constexpr int unroll = batch < 4 ? P::unroll : 1;  // more would not fit the registers
    float acc[kTiles][batch][4] = {};
    const Vector* const operands = exchange_.operand(o, batch_tile);
    const int stride = static_cast<int>(sizes_.operand_vectors());
    const int per_chunk = static_cast<int>(sizes_.weight_vectors());
    const int64_t kept = tiling_.resident_chunks;
    const int64_t middle = end < kept ? end : first < kept ? kept : first;
    const Vector* const near = resident(local);
    const Vector* const far = streamed(local);
#pragma unroll unroll
    for (int64_t c = first; c < middle; ++c) {
      P::multiply(
          acc, lane_, [&](int i) { return near[c * per_chunk + i]; },
          [&](int n, int i) {
            return Exchange::load(operands + n * stride + static_cast<int>(c) * kChunkVectors + i);
          });
    }
#pragma unroll 1
    for (int64_t c = middle; c < end; ++c) {
      P::multiply(
          acc, lane_, [&](int i) { return load_from_l2(far + c * per_chunk + i); },
          [&](int n, int i) {
            return Exchange::load(operands + n * stride + static_cast<int>(c) * kChunkVectors + i);
          });
    }
    block_barrier();  // the epilogues of the pass before have read their partial sums
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int n = 0; n < batch; ++n) {
        const float (&a)[4] = acc[k][n];
        partials()[partial(warp_, k, n)] = {{to_bits(a[0]), to_bits(a[1]), to_bits(a[2]), to_bits(a[3])}};
      }
    }
  }

  // All partial sums of a step are in shared memory when this returns; false if somebody's wait ran out.
  FASTRNN_DEVICE bool product(int64_t o, int64_t batch_tile, int count) {
    const int split = kWarps / tiling_.unit_tiles, local = warp_ / split, part = warp_ % split;
    const int64_t first = sizes_.unit_chunks * part / split, end = sizes_.unit_chunks * (part + 1) / split;
    const int64_t per_chunk = sizes_.chunk_units();
    const int64_t first_tile = first * per_chunk / kTileUnits, end_tile = ceil_div(end * per_chunk, kTileUnits);
    if (!exchange_.wait(o, batch_tile, count, first_tile, end_tile)) *failed() = 1;
    warp_barrier();
    const bool mine = unit_tile(local) < sizes_.tiles();
    const int64_t last = (mine ? end : first) * kDepth;
    switch (count) {
      case 1:
        multiply<1>(o, batch_tile, local, first * kDepth, last);
        break;
      case 2:
        multiply<2>(o, batch_tile, local, first * kDepth, last);
        break;
      default:
        multiply<4>(o, batch_tile, local, first * kDepth, last);
    }
    const bool ok = !*failed();  // set before the barrier in multiply(), and not again before the next
    block_barrier();
    return ok;
  }

  // The sums of this warp's tile, in a fixed order.
  FASTRNN_DEVICE void gather(int local, int n, float (&sums)[kTiles][4]) const {
    const int split = kWarps / tiling_.unit_tiles;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      for (int part = 0; part < split; ++part) {
        const Vector v = partials()[partial(local * split + part, k, n)];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[k][e] += from_bits(v.word[e]);
      }
    }
  }

  // ---- the epilogue

  // This warp's tile of pass p, if it has one.
  struct Tile {
    bool mine;
    int local, n;
    int64_t unit_tile, batch_tile;
    Corner corner;
  };
  FASTRNN_DEVICE Tile find_tile(int64_t p) const { return find_tile(p, lane_); }
  FASTRNN_DEVICE Tile find_tile(int64_t p, int lane) const {
    Tile tile;
    tile.local = warp_ / tiling_.batch_tiles;
    tile.n = warp_ % tiling_.batch_tiles;
    tile.unit_tile = unit_tile(tile.local);
    tile.batch_tile = p * tiling_.batch_tiles + tile.n;
    tile.corner = {tile.unit_tile * kTileUnits + lane / 4, tile.batch_tile * kTileRows + lane % 4 * 2};
    tile.mine = tile.local < tiling_.unit_tiles && tile.unit_tile < sizes_.tiles() && tile.n < batch_tiles(p);
    return tile;
  }
  // Batch tiles of pass p that hold rows.
  FASTRNN_DEVICE int batch_tiles(int64_t p) const {
    const int64_t left = ceil_div(args_.B - p * args_.pass_rows(), kTileRows);
    return static_cast<int>(left < tiling_.batch_tiles ? left : tiling_.batch_tiles);
  }

  FASTRNN_DEVICE void begin(int64_t p, typename Pass::Slot& slot) {
    const Tile tile = find_tile(p);
    if (!tile.mine) return;
    float next[kDepth][4] = {};
    pass_.begin(tile.corner, slot, next);
    keep(tile, slot);
    if (Pass::lag == 0 && pass_.steps(p) > 0) publish(0, tile, next);
  }

  FASTRNN_DEVICE bool step(int64_t m, int64_t p, bool more, typename Pass::Slot& slot) {
    typename Pass::Work work;
    if (const Tile tile = find_tile(p); tile.mine) pass_.load(m, tile.corner, work);
    if (m >= Pass::lag && !product(m - Pass::lag, p * tiling_.batch_tiles, batch_tiles(p))) return false;
    const Tile tile = find_tile(p, opaque(lane_));  // or addresses would fill registers during the product
    if (!tile.mine) return true;
    float sums[kTiles][4] = {}, next[kDepth][4] = {};
    if (m >= Pass::lag) gather(tile.local, tile.n, sums);
    recall(tile, slot);
    pass_.compute(m, tile.corner, slot, sums, work, next);
    if (more) publish(m + 1 - Pass::lag, tile, next);
    pass_.store(m, tile.corner, work);
    keep(tile, slot);
    return true;
  }

  // 16 units x 8 rows of every published value go through shared memory, to be sent as whole vectors.
  FASTRNN_DEVICE void publish(int64_t o, const Tile& tile, const float (&next)[kDepth][4]) {
    constexpr int vectors = kTileUnits / kPerVector;  // of a row
    Operand* const stage =
        reinterpret_cast<Operand*>(shared_memory() + layout_.stage) + warp_ * kDepth * kTileRows * kTileUnits;
    warp_barrier();  // the last sending is done
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = lane_ % 4 * 2 + e % 2, unit = lane_ / 4 + 8 * (e / 2);
        stage[(d * kTileRows + row) * kTileUnits + unit] = P::operand(next[d][e]);
      }
    }
    warp_barrier();
    const int64_t chunk = tile.unit_tile * kTileUnits / sizes_.chunk_units();
    const int first = static_cast<int>(tile.unit_tile * kTileUnits % sizes_.chunk_units()) / kPerVector;
    for (int i = lane_; i < kDepth * kTileRows * vectors; i += 32) {
      const int d = i / (kTileRows * vectors), row = i / vectors % kTileRows, v = i % vectors;
      const int64_t index = (chunk * kDepth + d) * kChunkVectors + P::place(row, first + v);
      exchange_.send(o, tile.batch_tile, index, reinterpret_cast<const Vector*>(stage)[i]);
    }
    exchange_.sent(o, tile.batch_tile, tile.unit_tile);
  }

  // A block with one pass keeps its slot in registers; with several, each has its own in memory.
  FASTRNN_DEVICE bool many() const { return args_.passes() > tiling_.replicas; }
  FASTRNN_DEVICE float* slot_memory(const Tile& tile) const {
    const int64_t batch_tiles = args_.passes() * tiling_.batch_tiles;
    const int64_t index = (place_.g * batch_tiles + tile.batch_tile) * sizes_.tiles() + tile.unit_tile;
    return args_.slots + index * Pass::slot_floats * 32 + lane_;
  }
  FASTRNN_DEVICE void keep(const Tile& tile, const typename Pass::Slot& slot) const {
    if (!many()) return;
    float* const memory = slot_memory(tile);
#pragma unroll
    for (int i = 0; i < Pass::slot_floats; ++i) memory[i * 32] = slot.value[i / 4][i % 4];
  }
  FASTRNN_DEVICE void recall(const Tile& tile, typename Pass::Slot& slot) const {
    if (!many()) return;
    const float* const memory = slot_memory(tile);
#pragma unroll
    for (int i = 0; i < Pass::slot_floats; ++i) slot.value[i / 4][i % 4] = memory[i * 32];
  }

  // A scan that gave up must not leave numbers that look like results.
  FASTRNN_DEVICE void poison() const {
    for (int64_t p = place_.replica; p < args_.passes(); p += tiling_.replicas) {
      const Tile tile = find_tile(p);
      if (tile.mine) pass_.poison(tile.corner);
    }
  }

  const typename Pass::Args& args_;
  const Tiling& tiling_;
  const Sizes sizes_;
  const Layout layout_;
  const Place place_;
  Exchange exchange_;
  const Pass pass_;
  const int warp_, lane_;
};

}  // namespace fastrnn::cuda
