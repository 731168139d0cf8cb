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
// What a core's own L2 surely holds; weights from beyond it take this many times as long to fetch.
constexpr double kNearBytes = 1.2e6, kFarFactor = 3;
// The part of a fetch that arithmetic does not hide.
constexpr double kUnhidden = 0.33;
// A barrier between steps, in vector multiply-adds, and what it must save besides: threads that wait for each other all
// wait for the one that loses its core.
constexpr double kBarrier = 1000, kCoupling = 1.05;

struct Step {
  int64_t B, panels, depth;
  int nv;
  double panel_bytes;
  double rows_to_fetch;  // fetching a panel from L2 takes as long as multiplying this many rows by it
};

double step_cost(const Step& step, int row_parts, int unit_parts) {
  const double rows = static_cast<double>(ceil_div(step.B, row_parts));
  const double panels = static_cast<double>(ceil_div(step.panels, unit_parts));
  const double fetch = step.rows_to_fetch * (panels * step.panel_bytes <= kNearBytes ? 1 : kFarFactor);
  const double work = panels * static_cast<double>(step.depth * step.nv) * (std::max(rows, fetch) + fetch * kUnhidden);
  return unit_parts > 1 ? work * kCoupling + kBarrier : work;
}

Plan divide(const Step& step, int G, int threads) {
  Plan plan{};
  plan.threads = threads;
  plan.group_parts = std::gcd(threads, G);
  const int team = threads / plan.group_parts;
  double best = std::numeric_limits<double>::infinity();
  for (int unit_parts = 1; unit_parts <= team; ++unit_parts) {
    if (unit_parts > step.panels) break;
    const int row_parts = static_cast<int>(std::min<int64_t>(team / unit_parts, step.B));
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
Step make_step(const KernelTable& table, Dtype dtype, int64_t B, int64_t H, int64_t depth, int64_t input_depth,
               int vectors, int nv) {
  const int lanes = table.lanes[static_cast<int>(dtype)];
  const double element = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  const int64_t panels = ceil_div(ceil_div(H, lanes), vectors);
  const double rows_to_fetch = table.rows_to_fetch[static_cast<int>(dtype)];
  return {B, panels, depth, nv, static_cast<double>((depth + input_depth) * nv * lanes) * element, rows_to_fetch};
}

int proj_vectors(const KernelTable& table, Dtype dtype, int threads, const LayerArgs& args) {
  return panel_vectors(4, ceil_div(args.out(), table.lanes[static_cast<int>(dtype)]), threads, args.seq.B);
}

}  // namespace

Plan plan_forward(const KernelTable& table, const CellInfo& cell, Dtype dtype, int threads, const ForwardArgs& args) {
  const int64_t vectors = ceil_div(args.H, table.lanes[static_cast<int>(dtype)]);
  const int unit_vectors = panel_vectors(std::max(1, 4 / cell.gates), vectors, threads, args.seq.B);
  const Step step =
      make_step(table, dtype, args.seq.B, args.H, args.out(), args.I, unit_vectors, unit_vectors * cell.gates);
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
  const Step step = make_step(table, dtype, args.seq.B, args.H, cell.gates * args.H, 0, unit_vectors, unit_vectors);
  Plan plan = divide(step, args.G, threads);
  plan.panel_vectors = unit_vectors;
  plan.proj_vectors = proj_vectors(table, dtype, threads, args);
  plan.chunk = 1;
  plan.pack = args.seq.T > 1 || args.dh0;
  return plan;
}

}  // namespace fastrnn
