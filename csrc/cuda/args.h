// What a scan kernel is asked to do: plain data, shared by host and device.
#pragma once

#include <cstdint>

#include "../cells/math.h"

namespace fastrnn::cuda {

// Enough for two directions and for ensembles; kernel parameters hold the groups' addresses.
inline constexpr int kMaxGroups = 32;
inline constexpr int kWarps = 8, kThreads = 32 * kWarps;
// One tensor-core tile: a warp multiplies 16 units of every gate by 8 batch rows.
inline constexpr int kTileUnits = 16, kTileRows = 8;
// Units are padded to whole chunks of every precision's operand (see precision.h).
inline constexpr int kUnitPad = 32;
inline constexpr int kVectorBytes = 16, kChunkVectors = 32;

FASTRNN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTRNN_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

enum class Precision : int { f32 = 0, tf32 = 1, bf16 = 2, f16 = 3 };
inline constexpr int kPrecisions = 4;
enum class Tier : int { grid = 0, cluster = 1 };

// How the work is laid out over blocks; plan.h chooses it.
//
// A replica is a set of `slices` blocks that together hold W_hh of one group and run some of its batch. A block owns
// unit_tiles * 16 hidden units. The batch is cut into passes of batch_tiles * 8 rows, dealt out to the replicas in
// turn; a block takes its passes one after the other within each step.
struct Tiling {
  int slices, replicas;
  int unit_tiles;       // 1, 2, 4 or 8: kWarps / unit_tiles warps split the sum over the operand
  int batch_tiles;      // 1, 2 or 4; unit_tiles * batch_tiles <= kWarps: a thread owns four values at most
  int resident_chunks;  // of each unit tile's weights in shared memory; the rest comes from L2
};

// Sizes that follow from H, the cell, the precision and the direction of the scan.
struct Sizes {
  int64_t units;        // H rounded up to kUnitPad
  int64_t unit_chunks;  // chunks of the operand that one value a unit takes
  int depth;            // values a unit publishes each step: 1 forward (h), gates backward (dgates)
  int gate_tiles;       // accumulator tiles a unit tile: gates forward, 1 backward
  int element_bytes;    // of the operand

  FASTRNN_HD int64_t chunks() const { return unit_chunks * depth; }
  FASTRNN_HD int64_t tiles() const { return units / kTileUnits; }
  FASTRNN_HD int64_t chunk_units() const { return units / unit_chunks; }
  // Vectors of one unit tile's weights in one chunk, and of one batch tile's whole operand.
  FASTRNN_HD int64_t weight_vectors() const { return int64_t{gate_tiles} * 2 * kChunkVectors; }
  FASTRNN_HD int64_t operand_vectors() const { return chunks() * kChunkVectors; }
};

// A chunk is four vectors of every row: 64 bytes.
FASTRNN_HD Sizes make_sizes(int64_t H, int element_bytes, int depth, int gate_tiles) {
  const int64_t units = round_up(H, kUnitPad);
  return {units, units * element_bytes / 64, depth, gate_tiles, element_bytes};
}

// Shared memory of a block, in bytes from its start.
struct Layout {
  int64_t weights, partials, bias, stage, operand, barriers, failed, bytes;
};

// `local_tiles` batch tiles keep their operand in shared memory, twice: the cluster tier; 0 for the grid tier.
FASTRNN_HD Layout make_layout(const Sizes& sizes, const Tiling& tiling, int64_t local_tiles) {
  Layout layout{};
  int64_t end = 0;
  layout.weights = end;
  end += tiling.unit_tiles * tiling.resident_chunks * sizes.weight_vectors() * kVectorBytes;
  layout.partials = end;
  end += int64_t{kWarps} * sizes.gate_tiles * tiling.batch_tiles * 32 * kVectorBytes;
  layout.bias = end;
  end += int64_t{tiling.unit_tiles} * kTileUnits * sizes.gate_tiles * 4;
  layout.stage = end;
  end += int64_t{kWarps} * sizes.depth * kTileRows * kTileUnits * sizes.element_bytes;
  layout.operand = end;
  end += 2 * local_tiles * sizes.operand_vectors() * kVectorBytes;
  layout.barriers = end;
  end += 2 * local_tiles * 8;
  layout.failed = end;
  layout.bytes = round_up(end + 4, 16);
  return layout;
}

struct Group {
  const void *w_hh, *b_hh;  // [gates H, H], [gates H] or null
  bool reverse;
};

// Row (t, b) of every [N, ..] array is offsets[t] + b, or t * B + b without offsets; row b has lengths[b] steps.
struct ScanArgs {
  int64_t T, B, H, N;
  int G, first_group;
  Tiling tiling;
  Group groups[kMaxGroups];
  const int64_t* lengths;      // [B], or null: T
  const int64_t* offsets;      // [T], or null
  const int64_t* pass_steps;   // [passes] the most steps of any of its rows, or null: T
  const unsigned char* reset;  // [T, B], or null
  const void *h0, *c0;         // [G, B, H], or null: zeros
  const void *h_reset, *c_reset;
  void* y;                 // [N, G H]; backward reads it
  void* gates;             // [G, N, saved, H], or null: not saved
  float* cells;            // [G, N, H], likewise, for cells with c
  void* streamed_weights;  // of each block what is not resident
  void* operand;           // [G, 2, batch tiles, operand vectors]: the grid tier
  uint32_t* flags;         // [G, batch tiles, unit tiles], zeros: the grid tier
  float* slots;            // the epilogue's state between steps, where a block has several passes
  uint32_t* status;        // device memory, zero; not zero once a wait ran out
  uint32_t* report;        // the same for the host to read, or null
  uint32_t poll_limit;     // how often a wait looks at global memory before it gives up, below 2^28

  FASTRNN_HD int64_t pass_rows() const { return int64_t{tiling.batch_tiles} * kTileRows; }
  FASTRNN_HD int64_t passes() const { return ceil_div(B, pass_rows()); }
};

struct ForwardArgs : ScanArgs {
  const void* gates_x;  // [G, N, gates, H]: x W_ih^T + b_ih
  void* c;              // [N, G H], or null
  void *h_n, *c_n;      // [G, B, H]
};

struct BackwardArgs : ScanArgs {
  const void *dy, *dc;        // [N, G H], or null: zeros
  const void *dh_n, *dc_n;    // [G, B, H], or null: zeros
  void *dgates_x, *dgates_h;  // [G, N, gates, H]; dgates_h is null where both are the same
  void *dh0, *dc0;            // [G, B, H], or null
  void *dh_reset, *dc_reset;
  bool initial;  // whether any of the four is wanted
};

}  // namespace fastrnn::cuda
