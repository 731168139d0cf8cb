#include "plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace fastrnn {
namespace {

// Rows of the input GEMM done at once, for each share of the units: enough to use each panel many times, few enough to
// leave the gates in L2.
constexpr int64_t kChunkRows = 64;
// Fewer rows than this over all timesteps do not pay for packing the weights.
constexpr int64_t kPackRows = 4;
// The costs were fitted to the times of 90 sizes, forward and backward, on two cores of an Emerald Rapids.
// What a core's own L2 surely holds; weights from beyond it take this many times as long to fetch.
constexpr double kNearBytes = 1e6, kFarFactor = 5;
// The part of a fetch that arithmetic does not hide.
constexpr double kUnhidden = 0.6;
// What threads that share the units of a row pay besides the lines that come from other cores: a barrier between steps,
// in lines fetched from L2, and a factor, for all wait for the one that loses its core.
constexpr double kBarrier = 750, kCoupling = 1.05;
constexpr double kLineBytes = 64;

struct Step {
  int64_t rows, panels, depth;
  int nv;
  double panel_bytes;
  double rows_to_fetch;  // fetching a panel from L2 takes as long as multiplying this many rows by it
  double line;           // fetching a cache line from L2, in vector multiply-adds as all costs
  double shared_line;    // fetching it from another core
  double row_bytes;      // of what the next step reads of each row
};

double step_cost(const Step& step, int row_parts, int unit_parts) {
  const double rows = static_cast<double>(ceil_div(step.rows, row_parts));
  const double panels = static_cast<double>(ceil_div(step.panels, unit_parts));
  const double far = std::max(0.0, 1 - kNearBytes / (panels * step.panel_bytes));
  const double fetch = step.rows_to_fetch * (1 + far * (kFarFactor - 1));
  const double work = panels * static_cast<double>(step.depth * step.nv) * (std::max(rows, fetch) + fetch * kUnhidden);
  if (unit_parts == 1) return work;
  const double lines = rows * step.row_bytes / kLineBytes * (unit_parts - 1) / unit_parts;
  return work * kCoupling + kBarrier * step.line + lines * step.shared_line;
}

Plan divide(const Step& step, int G, int threads) {
  Plan plan{};
  plan.threads = threads;
  plan.group_parts = std::gcd(threads, G);
  const int team = threads / plan.group_parts;
  double best = std::numeric_limits<double>::infinity();
  for (int unit_parts = 1; unit_parts <= team; ++unit_parts) {
    if (unit_parts > step.panels) break;
    const int row_parts = static_cast<int>(std::min<int64_t>(team / unit_parts, step.rows));
    const double cost = step_cost(step, row_parts, unit_parts);
    if (cost >= best) continue;
    best = cost;
    plan.row_parts = row_parts;
    plan.unit_parts = unit_parts;
  }
  return plan;
}

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

// `input_depth` is that of other weights which take turns with these in the cache.
Step make_step(const KernelTable& table, Dtype dtype, const Sequence& seq, int64_t H, int64_t depth,
               int64_t input_depth, int vectors, int nv) {
  const int lanes = table.lanes[static_cast<int>(dtype)];
  const double element = static_cast<double>(element_size(dtype));
  const int64_t panels = ceil_div(ceil_div(H, lanes), vectors);
  const double rows_to_fetch = table.rows_to_fetch[static_cast<int>(dtype)];
  const double vector_bytes = lanes * element;
  Step step{ceil_div(seq.N, seq.T), panels, depth, nv};
  step.panel_bytes = static_cast<double>((depth + input_depth) * nv) * vector_bytes;
  step.rows_to_fetch = rows_to_fetch;
  step.line = rows_to_fetch * kLineBytes / vector_bytes;
  step.shared_line = step.line * table.lines_to_share[static_cast<int>(dtype)];
  step.row_bytes = static_cast<double>(depth) * element;
  return step;
}

int proj_vectors(const KernelTable& table, Dtype dtype, int threads, const LayerArgs& args) {
  return panel_vectors(4, ceil_div(args.out(), table.lanes[static_cast<int>(dtype)]), threads, args.seq.B);
}

}  // namespace

Plan plan_forward(const KernelTable& table, const CellInfo& cell, Dtype dtype, int threads, const ForwardArgs& args) {
  const int64_t vectors = ceil_div(args.H, table.lanes[static_cast<int>(dtype)]);
  const int unit_vectors = panel_vectors(std::max(1, 4 / cell.gates), vectors, threads, args.seq.B);
  const Step step =
      make_step(table, dtype, args.seq, args.H, args.out(), args.I, unit_vectors, unit_vectors * cell.gates);
  Plan plan = divide(step, args.G, threads);
  plan.panel_vectors = unit_vectors;
  plan.proj_vectors = proj_vectors(table, dtype, threads, args);
  plan.chunk = std::max<int64_t>(1, kChunkRows * plan.unit_parts / ceil_div(args.seq.B, plan.row_parts));
  plan.pack = args.seq.N >= kPackRows;
  return plan;
}

Plan plan_backward(const KernelTable& table, const CellInfo& cell, Dtype dtype, int threads, const BackwardArgs& args) {
  const int64_t vectors = ceil_div(args.H, table.lanes[static_cast<int>(dtype)]);
  const int unit_vectors = panel_vectors(4, vectors, threads, args.seq.B);
  const Step step = make_step(table, dtype, args.seq, args.H, cell.gates * args.H, 0, unit_vectors, unit_vectors);
  Plan plan = divide(step, args.G, threads);
  plan.panel_vectors = unit_vectors;
  plan.proj_vectors = proj_vectors(table, dtype, threads, args);
  plan.chunk = 1;
  plan.pack = args.seq.T > 1 || args.dh0;
  return plan;
}

}  // namespace fastrnn
