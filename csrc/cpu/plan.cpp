#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace fastrnn {
namespace {

// Rows of the input GEMM done at once, for each share of the units: enough to use each panel many times, few enough to
// leave the gates in L2; more where the weights of a step, which a core fetches in turn with the input's, do not fit.
constexpr int64_t kChunkRows = 64, kSplitChunkRows = 32, kFarChunkRows = 128;
constexpr double kFarBytes = 2e6;  // packed
// A thread packs so much for itself sooner than it would fetch it from where another one packed it.
constexpr double kOwnBytes = 2e6;
// Fewer rows than this over all timesteps do not pay for packing the weights.
constexpr int64_t kPackRows = 4;
// The costs were fitted to the times of some hundred sizes, forward and backward, on two cores of an Emerald Rapids.
// They are in multiply-adds of vectors.

// The part of a fetch that arithmetic does not hide.
constexpr double kUnhidden = 0.6;
// What threads that share the units of a row pay besides the lines that come from other cores: a barrier between steps,
// in lines fetched from L2, and a factor, for all wait for the one that loses its core.
constexpr double kBarrier = 750, kCoupling = 1.05;
constexpr double kLineBytes = 64;
// What threads must save in a call for each time that their number doubles: they are woken, and their caches are empty.
constexpr double kLaunch = 5e4;
// Besides the products: a vector of a row's units in one step, for each gate.
constexpr double kCell = 160;
// Storing a vector of the weights' gradients, which are in no cache yet.
constexpr double kStore = 20;
// From so many rows of a step on, chunks are so short that the input's weights push the others out of the cache.
constexpr double kTurnRows = 16;

// What one way to compute a product costs.
struct Product {
  double row;         // a row by a vector of a panel, for each step of depth
  bool tiles;         // rows are those of tiles
  int64_t depth_pad;  // what depth is rounded up to
  int64_t overhead;   // steps of depth that a row by a vector takes besides
  double split;       // taking a row apart, for each step of depth
  double bytes;       // of a weight, packed, against its own
  double near_bytes;  // what a core's own L2 surely holds
  double near, far;   // fetching a panel from L2 and from beyond it, against fetching its values from L2
  double shared;      // fetching lines that other cores wrote, against one after the other
};
constexpr Product kByValues = {1, false, 1, 0, 0, 1, 1e6, 1, 5, 1};
// See split.h. From kSplitLeast rows on over all timesteps, taking the weights apart can pay.
constexpr Product kByParts = {0.6, true, 32, 40, 1.5, 1.5, 1.5e6, 1.2, 7.5, 0.3};
constexpr int64_t kSplitLeast = 192;
// What parts promise they must promise by this much: shallow products do not keep it, and beside a busy neighbour on
// its core the tile unit takes up to three times as long.
constexpr double kSplitGain = 0.8;

// The rows that a product takes as long as: it is of tiles of 16, of which the last is as high as the rest where there
// is one block of two, but takes as long as 10 rows at least.
int64_t worked_rows(const Product& product, int64_t rows) {
  if (!product.tiles) return rows;
  if (rows > 32) return round_up(rows, 16);
  const int64_t whole = rows > 16 ? 16 : 0;
  return whole + std::max<int64_t>(rows - whole, 10);
}

// `rows` rows so deep by `vectors` vectors; fetching one from L2 takes as long as multiplying `rows_to_fetch` rows.
double product_cost(const Product& product, int64_t rows, int64_t depth, double vectors, double vector_bytes,
                    double rows_to_fetch) {
  const double steps = static_cast<double>(round_up(depth, product.depth_pad) + product.overhead);
  const double bytes = vectors * vector_bytes * product.bytes;
  const double far = bytes > product.near_bytes ? 1 - product.near_bytes / bytes : 0;
  const double fetch = rows_to_fetch * (product.near + far * (product.far - product.near));
  const double work =
      std::max(product.row * static_cast<double>(worked_rows(product, rows)), fetch) + fetch * kUnhidden;
  return vectors * steps * work + product.split * static_cast<double>(rows * depth);
}

// Rows of some of the steps: in a packed batch they differ.
constexpr int kSampledSteps = 8;
struct StepRows {
  int64_t of[kSampledSteps];
  int steps;

  explicit StepRows(const Sequence& seq) : steps(seq.batch_sizes && seq.T > 1 ? kSampledSteps : 1) {
    for (int i = 0; i < steps; ++i) of[i] = seq.active((2 * i + 1) * seq.T / (2 * steps));
  }
};

struct Step {
  Product product;
  StepRows rows_of;
  int64_t rows, panels, depth;  // rows on average
  int unit_vectors, nv;
  double vector_bytes;   // of a vector of weights, for the whole depth
  double input_bytes;    // of one of the other weights, which take turns with these in the cache
  double rows_to_fetch;  // fetching a panel from L2 takes as long as multiplying this many rows by it
  double line;           // fetching a cache line from L2, in vector multiply-adds as all costs
  double shared_line;    // fetching it from another core
  double row_bytes;      // of what the next step reads of each row
};

double step_cost(const Step& step, int64_t step_rows, int row_parts, int unit_parts) {
  const int64_t rows = ceil_div(step_rows, row_parts);
  const double vectors = static_cast<double>(ceil_div(step.panels, unit_parts) * step.nv);
  const double kept = step.vector_bytes + step.input_bytes * std::min(1.0, static_cast<double>(rows) / kTurnRows);
  const double work = product_cost(step.product, rows, step.depth, vectors, kept, step.rows_to_fetch);
  if (unit_parts == 1) return work;
  const double lines = static_cast<double>(rows) * step.row_bytes / kLineBytes * (unit_parts - 1) / unit_parts;
  return work * kCoupling + kBarrier * step.line + lines * step.shared_line * step.product.shared;
}

double step_cost(const Step& step, int row_parts, int unit_parts) {
  double sum = 0;
  for (int i = 0; i < step.rows_of.steps; ++i) sum += step_cost(step, step.rows_of.of[i], row_parts, unit_parts);
  return sum / step.rows_of.steps;
}

// A plan, and what a step of it costs.
struct Division {
  Plan plan;
  double cost;
};

// The cheapest way to share out a step, one of each group, among parts of the threads that have the same number of
// groups.
Division divide(const Step& step, int G, int threads) {
  Division best{{}, std::numeric_limits<double>::infinity()};
  for (int group_parts = std::gcd(threads, G); group_parts >= 1; --group_parts) {
    if (threads % group_parts || G % group_parts) continue;
    const int team = threads / group_parts;
    for (int unit_parts = 1; unit_parts <= std::min<int64_t>(team, step.panels); ++unit_parts) {
      const int row_parts = static_cast<int>(std::min<int64_t>(team / unit_parts, step.rows));
      const double cost = step_cost(step, row_parts, unit_parts) * (G / group_parts);
      if (cost >= best.cost) continue;
      Plan plan{};
      plan.threads = threads;
      plan.group_parts = group_parts;
      plan.row_parts = row_parts;
      plan.unit_parts = unit_parts;
      plan.panel_vectors = step.unit_vectors;
      best = {plan, cost};
    }
  }
  return best;
}

// The division among all threads, if they save enough to be woken against one that does all alone. `others` is what the
// call takes besides the products of its steps; all threads share it, or only those that scan.
template <class Divide>
Division divide_if_it_pays(const Divide& division, Threads threads, int64_t T, double others, bool all_share) {
  const Division shared = division(threads.count);
  if (threads.count == 1 || threads.always) return shared;
  const Division alone = division(1);
  const Plan& plan = shared.plan;
  const int parts = all_share ? threads.count : plan.group_parts * plan.row_parts * plan.unit_parts;
  const double saved = (alone.cost - shared.cost) * static_cast<double>(T) + others - others / parts;
  return saved > kLaunch * std::log2(threads.count) ? shared : alone;
}

double cell_cost(const CellInfo& cell, const LayerArgs& args, int64_t vectors) {
  return kCell * static_cast<double>(args.G * cell.gates * args.seq.N * vectors);
}

// Threads to a group where groups are shared out as far as they can be.
int members(int threads, int G) { return threads / std::gcd(threads, G); }

// Wide panels keep more accumulators busy; narrower ones waste fewer lanes and can be shared out.
int panel_vectors(int most, int64_t vectors, int threads, int64_t B) {
  int best = most;
  while (best > 1) {
    const int half = best / 2;
    const bool wasteful = round_up(vectors, half) < round_up(vectors, best);
    const bool too_few = ceil_div(vectors, best) < threads && B < 2 * threads;
    if (!wasteful && !too_few) break;
    best = half;
  }
  return best;
}

Step make_step(const KernelTable& table, Dtype dtype, const Sequence& seq, int64_t H, int64_t depth,
               int64_t input_depth, int vectors, int nv, const Product& product) {
  const int lanes = table.lanes[static_cast<int>(dtype)];
  const double element = static_cast<double>(element_size(dtype));
  const int64_t panels = ceil_div(ceil_div(H, lanes), vectors);
  const double rows_to_fetch = table.rows_to_fetch[static_cast<int>(dtype)];
  const double vector_bytes = lanes * element;
  Step step{product, StepRows(seq), ceil_div(seq.N, seq.T), panels, depth, vectors, nv};
  step.vector_bytes = static_cast<double>(depth) * vector_bytes;
  step.input_bytes = static_cast<double>(input_depth) * vector_bytes;
  step.rows_to_fetch = rows_to_fetch;
  step.line = rows_to_fetch * kLineBytes / vector_bytes;
  step.shared_line = step.line * table.lines_to_share[static_cast<int>(dtype)];
  step.row_bytes = static_cast<double>(depth) * element;
  return step;
}

// Whether rows so deep take much less time to multiply by parts, fetching the weights aside.
bool pays_to_split(int64_t rows, int64_t depth, int64_t vectors) {
  const auto cost = [&](const Product& p) { return product_cost(p, rows, depth, static_cast<double>(vectors), 0, 0); };
  return cost(kByParts) < kSplitGain * cost(kByValues);
}

// Whether row parts pack weights of so many bytes each for itself.
bool pays_to_own(const Plan& plan, int64_t weights) {
  return plan.row_parts > 1 && static_cast<double>(weights / plan.unit_parts) <= kOwnBytes;
}

// `weights` are the bytes of a thread's.
int64_t chunk_rows(int64_t weights, bool split) {
  if (static_cast<double>(weights) * (split ? kByParts : kByValues).bytes > kFarBytes) return kFarChunkRows;
  return split ? kSplitChunkRows : kChunkRows;
}

int proj_vectors(const KernelTable& table, Dtype dtype, int threads, const LayerArgs& args) {
  return panel_vectors(kMaxVectors, ceil_div(args.out(), table.lanes[static_cast<int>(dtype)]), threads, args.seq.B);
}

}  // namespace

Plan plan_forward(const KernelTable& table, const CellInfo& cell, Dtype dtype, Threads threads,
                  const ForwardArgs& args) {
  const int lanes = table.lanes[static_cast<int>(dtype)];
  const int64_t vectors = ceil_div(args.H, lanes);
  const int most = std::max(1, kMaxVectors / cell.gates);
  const bool splits = table.splits[static_cast<int>(dtype)] && args.seq.N >= kSplitLeast;
  const auto divided = [&](const Product& product, int most_vectors, int team) {
    const int unit_vectors = panel_vectors(most_vectors, vectors, members(team, args.G), args.seq.B);
    const Step step =
        make_step(table, dtype, args.seq, args.H, args.out(), args.I, unit_vectors, unit_vectors * cell.gates, product);
    Division found = divide(step, args.G, team);
    found.plan.split_state = product.tiles;
    return found;
  };
  const auto division = [&](int team) {
    const Division by_values = divided(kByValues, most, team);
    // Of a whole block of rows: what fewer lose is in the cost of a step.
    if (!splits || !pays_to_split(32, args.out(), cell.gates * vectors)) return by_values;
    // Tiles are multiplied in pairs.
    const Division by_parts = divided(kByParts, most * cell.gates % 2 ? 2 * most : most, team);
    return by_parts.cost < by_values.cost ? by_parts : by_values;
  };
  const double inputs = args.G * product_cost(kByValues, args.seq.N, args.I, static_cast<double>(cell.gates * vectors),
                                              static_cast<double>(args.I * lanes * element_size(dtype)),
                                              table.rows_to_fetch[static_cast<int>(dtype)]);
  const double others = inputs + cell_cost(cell, args, vectors);
  Plan plan = divide_if_it_pays(division, threads, args.seq.T, others, false).plan;
  const int64_t rows = ceil_div(args.seq.B, plan.row_parts);
  plan.proj_vectors = proj_vectors(table, dtype, plan.threads, args);
  const int64_t weights = cell.gates * args.H * (args.out() + args.I) * element_size(dtype);
  plan.chunk = std::max<int64_t>(1, chunk_rows(weights / plan.unit_parts, plan.split_state) * plan.unit_parts / rows);
  plan.pack = args.seq.N >= kPackRows;
  plan.own_panels = pays_to_own(plan, weights);
  plan.in_turn = plan.pack && args.seq.T == 1 && plan.row_parts == 1;
  // Products of values have no panels so wide.
  const bool wide = plan.panel_vectors * cell.gates > kMaxVectors;
  const int64_t at_once = rows * std::min(plan.chunk, args.seq.T);
  plan.split_input = splits && (wide || pays_to_split(at_once, args.I, cell.gates * vectors));
  return plan;
}

Plan plan_backward(const KernelTable& table, const CellInfo& cell, Dtype dtype, Threads threads,
                   const BackwardArgs& args) {
  const int lanes = table.lanes[static_cast<int>(dtype)];
  const int64_t vectors = ceil_div(args.H, lanes);
  const auto division = [&](int team) {
    const int unit_vectors = panel_vectors(kMaxVectors, vectors, members(team, args.G), args.seq.B);
    return divide(
        make_step(table, dtype, args.seq, args.H, cell.gates * args.H, 0, unit_vectors, unit_vectors, kByValues),
        args.G, team);
  };
  const int64_t inputs = ceil_div(args.I, lanes), columns = inputs + ceil_div(args.out(), lanes);
  const double a_row = static_cast<double>(args.seq.N * (inputs + columns)) + kStore * static_cast<double>(columns);
  const double products = static_cast<double>(args.G * cell.gates * args.H) * a_row;
  const double others = products + cell_cost(cell, args, vectors);
  Plan plan = divide_if_it_pays(division, threads, args.seq.T, others, true).plan;
  plan.proj_vectors = proj_vectors(table, dtype, plan.threads, args);
  plan.chunk = 1;
  plan.pack = args.seq.T > 1 || args.dh0;
  const int64_t weights = cell.gates * args.H * args.out() * element_size(dtype);
  plan.own_panels = pays_to_own(plan, weights);
  return plan;
}

}  // namespace fastrnn
