// The loop over time that forward and backward share.
//
// Every row counts its own steps from where its scan starts, so that all rows start together and a row only ever ends:
// lengths, packing and the direction of time are a matter of which time a row's step m is (RowClock). In each step a
// block multiplies its weights by the operand that all blocks have published, the warps sharing out the sum; then each
// thread applies the cell to the values that it owns, the block publishes its part of the next operand, and what was
// found is stored. What a step reads is asked for at its top, without a branch on what it reads, so that the wait for
// the other blocks hides the wait for memory.
#pragma once

#include "exchange.h"
#include "precision.h"

namespace fastrnn::cuda {

// Times of a row with `length` steps. Scans that begin at the end of time are a backward group's forward pass, and a
// forward group's backward pass.
struct RowClock {
  bool from_end;
  FASTRNN_HD int64_t time(int64_t m, int64_t length) const { return from_end ? length - 1 - m : m; }
  // The same, or where m is past the row's end, a time that can be read.
  FASTRNN_HD int64_t readable_time(int64_t m, int64_t length) const {
    const int64_t last = length > 0 ? length - 1 : 0;
    return time(m < last ? m : last, last + 1);
  }
};

// A value of every step: a unit of a row. Where there is no such row or unit it has the place of one that there is, so
// that it can be read like all others, and a length of -1.
struct Element {
  int b, u, length;
  FASTRNN_DEVICE bool inside() const { return length >= 0; }
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

  FASTRNN_DEVICE Element element(int64_t b, int64_t u) const {
    const auto row = static_cast<int>(b < args.B ? b : args.B - 1);
    const auto unit = static_cast<int>(u < args.H ? u : args.H - 1);
    if (b >= args.B || u >= args.H) return {row, unit, -1};
    return {row, unit, static_cast<int>(args.lengths ? args.lengths[row] : args.T)};
  }
  // The row's place in [N] at time t.
  FASTRNN_DEVICE int64_t at(int64_t t, const Element& e) const {
    return (args.offsets ? args.offsets[t] : t * args.B) + e.b;
  }

  // Whether step t of the element's row starts from the reset states.
  FASTRNN_DEVICE bool fresh(int64_t t, const Element& e) const {
    if (!args.reset) return false;
    const int64_t edge = reverse ? t + 1 : t;
    return edge < e.length && args.reset[edge * args.B + e.b];
  }

  // Index into [G, B, H]; and, from a row's place in [N], into [N, G H] and, of plane 0, [G, N, planes, H].
  FASTRNN_DEVICE int64_t in_state(const Element& e) const { return (g * args.B + e.b) * args.H + e.u; }
  FASTRNN_DEVICE int64_t in_output(int64_t at, const Element& e) const { return (at * args.G + g) * args.H + e.u; }
  FASTRNN_DEVICE int64_t in_gates(int64_t at, const Element& e, int planes) const {
    return (g * args.N + at) * planes * args.H + e.u;
  }

  FASTRNN_DEVICE float state(const void* base, const Element& e) const {
    return P::widen(load_or_zero<Value>(base, in_state(e)));
  }
  FASTRNN_DEVICE void set_state(void* base, const Element& e, float value) const {
    if (base) static_cast<Value*>(base)[in_state(e)] = P::round(value);
  }
  FASTRNN_DEVICE void set_output(void* base, int64_t at, const Element& e, float value) const {
    if (base) static_cast<Value*>(base)[in_output(at, e)] = P::round(value);
  }
};

// Pass is Forward<Cell, P> or Backward<Cell, P>: what is done with each value of a step.
template <class Pass, class Exchange>
class Scan {
  using P = typename Pass::Precision;
  using Operand = typename P::Operand;
  static constexpr int kTiles = Pass::gate_tiles, kDepth = Pass::depth;
  static constexpr int kPerVector = kVectorBytes / sizeof(Operand), kChunkUnits = 4 * kPerVector;
  // Of a tile of 16 units and 8 rows: its values, and the vectors that it publishes, of a row and in all.
  static constexpr int kTileValues = kTileUnits * kTileRows;
  static constexpr int kRowVectors = kTileUnits / kPerVector, kTileVectors = kDepth * kTileRows * kRowVectors;
  // The most values that a thread owns: those of tiles 256 / 128 apart.
  static constexpr int kTilesAtOnce = kThreads / kTileValues, kMostValues = kWarps / kTilesAtOnce;

 public:
  FASTRNN_DEVICE explicit Scan(const typename Pass::Args& args)
      : args_(args),
        tiling_(args.tiling),
        sizes_(make_sizes(args.H, sizeof(Operand), kDepth, kTiles)),
        layout_(make_layout(sizes_, tiling_, Exchange::local ? local_tiles() : 0)),
        place_(find_place()),
        exchange_(args, sizes_, layout_, place_),
        pass_(args, place_.g),
        lane_(thread_index() % 32),
        unit_tiles_(static_cast<int>(sizes_.tiles())),
        passes_(static_cast<int>(args.passes())),
        share_(find_share()) {}

  FASTRNN_DEVICE void run() {
    fill_weights();
    fill_biases();
    if (thread_index() == 0) *failed() = 0;
    exchange_.begin();
    Owned mine;
    for (Portion some = first(); some.pass < passes_; next(some)) begin(some, mine);
    const uint32_t only = many() ? 0 : steps(place_.replica);
    for (uint32_t m = 0;; ++m) {
      bool live = false;
      for (Portion some = first(); some.pass < passes_; next(some)) {
        const uint32_t steps_of_pass = many() ? steps(some.pass) : only;
        if (m >= steps_of_pass) continue;
        live = true;
        if (step(m, some, m + 1 < steps_of_pass, mine)) continue;
        poison(mine);
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

  // ---- the passes of this replica

  FASTRNN_DEVICE uint32_t steps(int pass) const { return static_cast<uint32_t>(pass_.steps(pass)); }
  FASTRNN_DEVICE Portion first() const { return portion(place_.replica, 0); }
  FASTRNN_DEVICE void next(Portion& some) const {
    some = portion(some.pass + tiling_.replicas, some.own_tile + tiling_.batch_tiles);
  }
  FASTRNN_DEVICE Portion portion(int pass, int own_tile) const {
    const int64_t left = ceil_div(args_.B - pass * args_.pass_rows(), kTileRows);
    const int count = static_cast<int>(left < tiling_.batch_tiles ? left : tiling_.batch_tiles);
    return {pass, own_tile, count};
  }

  // ---- weights: [unit tile][chunk][gate tile, 2, 32] vectors, the first chunks in shared memory

  FASTRNN_DEVICE int unit_tile(int local) const { return place_.slice * tiling_.unit_tiles + local; }
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

  FASTRNN_DEVICE float* bias(int local, int unit) const {
    return reinterpret_cast<float*>(shared_memory() + layout_.bias) + (local * kTileUnits + unit) * kTiles;
  }

  FASTRNN_DEVICE void fill_biases() const {
    for (int i = thread_index(); i < tiling_.unit_tiles * kTileUnits; i += kThreads) {
      const int64_t unit = int64_t{place_.slice} * tiling_.unit_tiles * kTileUnits + i;
      for (int k = 0; k < kTiles; ++k) bias(0, i)[k] = unit < args_.H ? pass_.bias(unit, k) : 0.0f;
    }
  }

  FASTRNN_DEVICE void fill_weights() const {
    const int64_t per_chunk = sizes_.weight_vectors(), per_tile = sizes_.chunks() * per_chunk;
    for (int local = 0; local < tiling_.unit_tiles; ++local) {
      if (unit_tile(local) >= unit_tiles_) break;
      for (int64_t i = thread_index(); i < per_tile; i += kThreads) {
        const int64_t chunk = i / per_chunk;
        const int in_chunk = static_cast<int>(i % per_chunk), tile = in_chunk / (2 * kChunkVectors);
        const int half = in_chunk / kChunkVectors % 2, row = in_chunk / 4 % 8, quarter = in_chunk % 4;
        const int64_t unit = int64_t{unit_tile(local)} * kTileUnits + half * 8 + row;
        Vector* const base = chunk < tiling_.resident_chunks ? resident(local) : streamed(local);
        auto* const words = reinterpret_cast<uint32_t*>(base + chunk * per_chunk + tile * 2 * kChunkVectors);
        const Vector vector = weight_vector(unit, tile, chunk, quarter);
        for (int w = 0; w < 4; ++w) words[P::weight_word(half, row, quarter, w)] = vector.word[w];
      }
    }
  }

  FASTRNN_DEVICE Vector weight_vector(int64_t unit, int gate_tile, int64_t chunk, int quarter) const {
    const int64_t first = chunk / kDepth * kChunkUnits + quarter * kPerVector;
    alignas(16) Operand values[kPerVector];
    for (int i = 0; i < kPerVector; ++i) {
      const bool inside = unit < args_.H && first + i < args_.H;
      values[i] = inside ? pass_.weight(unit, gate_tile, first + i, static_cast<int>(chunk % kDepth)) : Operand{};
    }
    return *reinterpret_cast<const Vector*>(values);
  }

  // ---- the product

  // What a warp multiplies: every split-th chunk of the units, beginning with its own number, so that the warps share
  // what is streamed.
  struct Share {
    int local;        // the block's unit tile
    int split, part;  // of the warps that share it
    int near, count;  // chunks of the units: in shared memory, and in all
  };
  FASTRNN_DEVICE Share find_share() const {
    const int split = kWarps / tiling_.unit_tiles, local = warp() / split, part = warp() % split;
    if (unit_tile(local) >= unit_tiles_) return {local, split, part, 0, 0};
    const auto of = [&](int64_t chunks) { return static_cast<int>((chunks - part + split - 1) / split); };
    return {local, split, part, of(tiling_.resident_chunks / kDepth), of(sizes_.unit_chunks)};
  }

  FASTRNN_DEVICE float* partials() const { return reinterpret_cast<float*>(shared_memory() + layout_.partials); }
  // Of batch tile 0: the next ones follow.
  FASTRNN_DEVICE int partial(int warp, int tile) const {
    return (warp * kTiles + tile) * tiling_.batch_tiles * kTileValues;
  }
  FASTRNN_DEVICE volatile int* failed() const {
    return reinterpret_cast<volatile int*>(shared_memory() + layout_.failed);
  }

  // Chunks [begin, end) of this warp's share, several at a time where the registers allow: their operands take long to
  // load.
  template <int chains, int batch, class Weights>
  FASTRNN_DEVICE void add(float (&acc)[chains][kTiles][batch][4], const Vector* operands, int begin, int end,
                          Weights weights) const {
    constexpr int vectors = kTiles > 1 ? (batch > 1 ? 1 : P::in_flight / 2) : P::in_flight;
    constexpr int group = vectors > batch ? vectors / batch : 1;
    const int stride = static_cast<int>(sizes_.operand_vectors());
    int i = begin;
    const auto chunk = [&](int c) {
      return (share_.part + (i + c) / kDepth * share_.split) * kDepth + (i + c) % kDepth;
    };
    const auto weight = [&](int c, int v) { return weights(chunk(c), v); };
    const auto operand = [&](int c, int n, int v) {
      return Exchange::load(operands + n * stride + chunk(c) * kChunkVectors + v);
    };
#pragma unroll 1
    for (; i + group <= end; i += group) P::template multiply<group>(acc, lane_, weight, operand);
    if constexpr (group > 1) {
#pragma unroll 1
      for (; i < end; ++i) P::template multiply<1>(acc, lane_, weight, operand);
    }
  }

  template <int batch>
  FASTRNN_DEVICE void multiply(uint32_t o, const Portion& some) const {
    // A product is added to the one before it: with one tile only, two chains of them keep the tensor cores busier.
    constexpr int chains = kTiles * batch == 1 ? 2 : 1;
    constexpr int per_chunk = kTiles * 2 * kChunkVectors;
    float acc[chains][kTiles][batch][4] = {};
    const Vector* const operands = exchange_.operand(o, some);
    const Vector* const near = resident(share_.local);
    const Vector* const far = streamed(share_.local);
    add(acc, operands, 0, share_.near * kDepth, [&](int chunk, int v) { return near[chunk * per_chunk + v]; });
    add(acc, operands, share_.near * kDepth, share_.count * kDepth,
        [&](int chunk, int v) { return load_from_l2(far + int64_t{chunk} * per_chunk + v); });
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int n = 0; n < batch; ++n) {
        Vector sums;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums.word[e] = to_bits(chains == 1 ? acc[0][k][n][e] : acc[0][k][n][e] + acc[chains - 1][k][n][e]);
        }
        reinterpret_cast<Vector*>(partials() + partial(warp(), k) + n * kTileValues)[lane_] = sums;
      }
    }
  }

  // All partial sums of a step are in shared memory when this returns; false if somebody's wait ran out. Those of the
  // step before have been read: a barrier has followed.
  FASTRNN_DEVICE bool product(uint32_t o, const Portion& some) {
    constexpr int tiles = kChunkUnits / kTileUnits;  // that publish a chunk
    const auto awaited = [&](int i) { return (share_.part + i / tiles * share_.split) * tiles + i % tiles; };
    if (!exchange_.wait(o, some, share_.count * tiles, awaited)) *failed() = 1;
    warp_barrier();
    switch (some.count) {
      case 1:
        multiply<1>(o, some);
        break;
      case 2:
        multiply<2>(o, some);
        break;
      default:
        multiply<4>(o, some);
    }
    block_barrier();
    return !*failed();  // set before this barrier, and not again before the next
  }

  // ---- the values: thread i owns word i % 128 of every second tile, in the order of the tensor cores' sums, which is
  // that of memory (precision.h)

  struct Owned {
    Element element[kMostValues];
    typename Pass::Slot slot[kMostValues];
  };

  // Opaque, or what follows from them would fill registers during the product.
  FASTRNN_DEVICE int warp() const { return opaque(thread_index()) / 32; }
  FASTRNN_DEVICE int word() const { return opaque(thread_index()) % kTileValues; }
  FASTRNN_DEVICE int unit_in_tile() const { return word() / 16 + 8 * (word() / 2 % 2); }
  FASTRNN_DEVICE int row_in_tile() const { return word() / 4 % 4 * 2 + word() % 2; }
  // Tile number local * batch_tiles + n of the block holds unit tile `local` of batch tile n; batch_tiles is a power
  // of two.
  FASTRNN_DEVICE int tiles() const { return tiling_.unit_tiles * tiling_.batch_tiles; }
  FASTRNN_DEVICE int local_of(int tile) const { return tile >> (tiling_.batch_tiles / 2); }
  FASTRNN_DEVICE int batch_of(int tile) const { return tile & (tiling_.batch_tiles - 1); }

  // what(j, tile) for every value j that this thread owns.
  template <class What>
  FASTRNN_DEVICE void each(What what) const {
#pragma unroll
    for (int j = 0; j < kMostValues; ++j) {
      const int tile = opaque(thread_index()) / kTileValues + j * kTilesAtOnce;
      if (tile < tiles()) what(j, tile);
    }
  }

  FASTRNN_DEVICE void find(const Portion& some, Owned& mine) const {
    each([&](int j, int tile) {
      const int64_t row = (int64_t{some.pass} * tiling_.batch_tiles + batch_of(tile)) * kTileRows + row_in_tile();
      mine.element[j] = pass_.element(row, unit_tile(local_of(tile)) * int64_t{kTileUnits} + unit_in_tile());
    });
  }

  // The sums of all warps that shared the tile, in a fixed order, and the bias.
  FASTRNN_DEVICE void gather(int tile, float (&sums)[kTiles]) const {
    const int split = share_.split;
    const float* const from = partials() + batch_of(tile) * kTileValues + word();
    float parts[kTiles][kWarps];
#pragma unroll
    for (int s = 0; s < kWarps; ++s) {
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        parts[k][s] = s < split ? from[partial(local_of(tile) * split + s, k)] : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const float (&p)[kWarps] = parts[k];
      const float sum = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
      sums[k] = sum + bias(local_of(tile), unit_in_tile())[k];
    }
  }

  FASTRNN_DEVICE void begin(const Portion& some, Owned& mine) {
    find(some, mine);
    each([&](int j, int tile) {
      float next[kDepth] = {};
      pass_.begin(mine.element[j], mine.slot[j], next);
      stage(tile, next);
    });
    keep(some, mine);
    block_barrier();
    if (Pass::lag == 0 && steps(some.pass) > 0) publish(0, some);
    block_barrier();
  }

  FASTRNN_DEVICE bool step(uint32_t m, const Portion& some, bool more, Owned& mine) {
    typename Pass::Work work[kMostValues];
    if (many()) recall(some, mine);
    each([&](int j, int) { pass_.load(m, mine.element[j], work[j]); });
    const bool multiplied = m >= Pass::lag;
    if (!multiplied) block_barrier();  // what the pass before has staged is sent
    if (multiplied && !product(m - Pass::lag, some)) return false;
    each([&](int j, int tile) {
      float sums[kTiles] = {}, next[kDepth];
      if (multiplied) gather(tile, sums);
      pass_.compute(m, mine.element[j], mine.slot[j], sums, work[j], next);
      stage(tile, next);
    });
    block_barrier();  // all is staged, and all partial sums have been read
    if (more) publish(m + 1 - Pass::lag, some);
    each([&](int j, int) { pass_.store(m, mine.element[j], work[j]); });
    if (many()) keep(some, mine);
    return true;
  }

  // ---- publishing: what threads have staged is sent as whole vectors

  FASTRNN_DEVICE void stage(int tile, const float (&next)[kDepth]) const {
    Operand* const to = reinterpret_cast<Operand*>(shared_memory() + layout_.stage) + tile * kDepth * kTileValues +
                        row_in_tile() * kTileUnits + unit_in_tile();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) to[d * kTileValues] = P::operand(next[d]);
  }

  FASTRNN_DEVICE void publish(uint32_t o, const Portion& some) {
    const Vector* const staged = reinterpret_cast<const Vector*>(shared_memory() + layout_.stage);
    const int begin = Exchange::by_tile ? warp() : 0, end = Exchange::by_tile ? begin + 1 : tiles();
    for (int v = begin * kTileVectors + lane_; v < end * kTileVectors; v += 32) {
      const int tile = v / kTileVectors, d = v / (kTileRows * kRowVectors) % kDepth;
      if (!published(tile, some)) continue;
      const int unit = unit_tile(local_of(tile)) * kTileUnits, row = v / kRowVectors % kTileRows;
      const int place = P::place(row, unit % kChunkUnits / kPerVector + v % kRowVectors);
      const int index = (unit / kChunkUnits * kDepth + d) * kChunkVectors + place;
      exchange_.send(o, some, batch_of(tile), index, staged[v]);
    }
    const int last = end - 1;
    if (Exchange::by_tile && published(last, some)) exchange_.sent(o, some, batch_of(last), unit_tile(local_of(last)));
  }
  FASTRNN_DEVICE bool published(int tile, const Portion& some) const {
    return tile < tiles() && batch_of(tile) < some.count && unit_tile(local_of(tile)) < unit_tiles_;
  }

  // ---- a block with one pass keeps what it owns in registers; with several, the slots of each are in memory

  FASTRNN_DEVICE bool many() const { return passes_ > tiling_.replicas; }
  FASTRNN_DEVICE float* slot_memory(const Portion& some, int tile) const {
    const int64_t batch_tile = (int64_t{place_.g} * passes_ + some.pass) * tiling_.batch_tiles + batch_of(tile);
    const int64_t index = batch_tile * tiling_.slices * tiling_.unit_tiles + unit_tile(local_of(tile));
    return args_.slots + index * Pass::slot_floats * kTileValues + word();
  }
  FASTRNN_DEVICE void keep(const Portion& some, const Owned& mine) const {
    if (!many()) return;
    each([&](int j, int tile) {
      float* const memory = slot_memory(some, tile);
#pragma unroll
      for (int i = 0; i < Pass::slot_floats; ++i) memory[i * kTileValues] = mine.slot[j].value[i];
    });
  }
  FASTRNN_DEVICE void recall(const Portion& some, Owned& mine) const {
    find(some, mine);
    each([&](int j, int tile) {
      const float* const memory = slot_memory(some, tile);
#pragma unroll
      for (int i = 0; i < Pass::slot_floats; ++i) mine.slot[j].value[i] = memory[i * kTileValues];
    });
  }

  // A scan that gave up must not leave numbers that look like results.
  FASTRNN_DEVICE void poison(Owned& mine) const {
    for (Portion some = first(); some.pass < passes_; next(some)) {
      find(some, mine);
      each([&](int j, int) { pass_.poison(mine.element[j]); });
    }
  }

  const typename Pass::Args& args_;
  const Tiling& tiling_;
  const Sizes sizes_;
  const Layout layout_;
  const Place place_;
  Exchange exchange_;
  const Pass pass_;
  const int lane_, unit_tiles_, passes_;
  const Share share_;
};

}  // namespace fastrnn::cuda
