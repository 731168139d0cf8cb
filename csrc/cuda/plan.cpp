#include "plan.h"

#include <algorithm>
#include <limits>
#include <optional>

namespace fastrnn::cuda {
namespace {

// Microseconds, and bytes a microsecond and multiprocessor; estimates, to be replaced by benchmarks/handoff.cu's.
constexpr double kGridHandOff = 1.0, kClusterHandOff = 0.5, kSharedRate = 200e3, kL2Rate = 40e3;

Sizes sizes_of(const Request& r) {
  const int bytes = element_bytes(r.precision);
  return r.backward ? make_sizes(r.H, bytes, r.cell.gates, 1) : make_sizes(r.H, bytes, 1, r.cell.gates);
}

int64_t passes_of(const Request& r, const Tiling& t) { return ceil_div(r.B, int64_t{t.batch_tiles} * kTileRows); }

// Time of one step of everything; the passes of a replica hide each other's hand-off, but for the last.
double cost(const Request& r, const Limits& limits, const Plan& plan) {
  const Sizes sizes = sizes_of(r);
  const Tiling& t = plan.tiling;
  const bool grid = plan.tier == Tier::grid;
  const double chunk = static_cast<double>(t.unit_tiles * sizes.weight_vectors() * kVectorBytes);
  const double near = chunk * t.resident_chunks;
  const double far = chunk * static_cast<double>(sizes.chunks() - t.resident_chunks);
  const double operand = static_cast<double>(t.batch_tiles * sizes.operand_vectors() * kVectorBytes);
  const double pass = near / kSharedRate + far / kL2Rate + operand / (grid ? kL2Rate : kSharedRate);
  const int64_t launches = ceil_div(r.G, plan.groups);
  const int64_t clusters = int64_t{plan.groups} * t.replicas;
  const int64_t waves = grid ? 1 : ceil_div(clusters, std::max(1, limits.clusters_at_once(t.slices)));
  const double step =
      (grid ? kGridHandOff : kClusterHandOff) + static_cast<double>(ceil_div(passes_of(r, t), t.replicas)) * pass;
  return static_cast<double>(launches * waves) * step;
}

Plan sketch(Tier tier, int64_t slices, int unit_tiles, int batch_tiles) {
  Plan plan{};
  plan.tier = tier;
  plan.tiling.slices = static_cast<int>(slices);
  plan.tiling.unit_tiles = unit_tiles;
  plan.tiling.batch_tiles = batch_tiles;
  return plan;
}

int64_t slot_bytes(const Request& r, const Tiling& t) {
  if (passes_of(r, t) <= t.replicas) return 0;
  const int values = r.backward ? 2 * r.cell.states : r.cell.states;
  return r.G * passes_of(r, t) * t.batch_tiles * t.slices * t.unit_tiles * values * kTileUnits * kTileRows * 4;
}

// All blocks of a launch run at once, as they wait for each other; weights that do not fit come from L2.
std::optional<Plan> grid_plan(const Request& r, const Limits& limits, int unit_tiles, int batch_tiles) {
  const Sizes sizes = sizes_of(r);
  const int64_t slices = ceil_div(sizes.tiles(), unit_tiles);
  if (slices > limits.multiprocessors) return std::nullopt;
  Plan plan = sketch(Tier::grid, slices, unit_tiles, batch_tiles);
  Tiling& t = plan.tiling;
  const int64_t passes = passes_of(r, t);
  plan.groups = std::min(r.G, limits.multiprocessors / t.slices);
  t.replicas = static_cast<int>(std::min<int64_t>(passes, limits.multiprocessors / (plan.groups * t.slices)));
  const int64_t fixed = make_layout(sizes, t, 0).bytes;
  if (fixed > limits.shared_bytes) return std::nullopt;
  const int64_t chunk_bytes = unit_tiles * sizes.weight_vectors() * kVectorBytes;
  const int64_t room = (limits.shared_bytes - fixed) / chunk_bytes;
  const int64_t resident = std::min(sizes.chunks(), room / sizes.depth * sizes.depth);  // all depths of a unit's chunk
  t.resident_chunks = static_cast<int>(resident);
  plan.shared_bytes = make_layout(sizes, t, 0).bytes;
  plan.weight_bytes = plan.blocks(plan.groups) * (sizes.chunks() - resident) * chunk_bytes;
  const int64_t tiles = int64_t{r.G} * passes * batch_tiles;
  plan.operand_bytes = 2 * tiles * sizes.operand_vectors() * kVectorBytes;
  plan.slot_bytes = slot_bytes(r, t);
  plan.flag_words = tiles * sizes.tiles();
  return plan;
}

// Clusters wait for nobody but themselves, so that there may be more of them than run at once. All weights and all
// operands are in shared memory.
std::optional<Plan> cluster_plan(const Request& r, const Limits& limits, int unit_tiles, int batch_tiles) {
  const Sizes sizes = sizes_of(r);
  const int64_t slices = ceil_div(sizes.tiles(), unit_tiles);
  if (slices > limits.cluster) return std::nullopt;
  Plan plan = sketch(Tier::cluster, slices, unit_tiles, batch_tiles);
  plan.groups = r.G;
  Tiling& t = plan.tiling;
  t.resident_chunks = static_cast<int>(sizes.chunks());
  const int64_t passes = passes_of(r, t);
  const int64_t at_once = std::max(1, limits.clusters_at_once(t.slices) / r.G);
  for (const int64_t replicas : {std::min(passes, at_once), passes}) {
    if (replicas * r.G * slices > std::numeric_limits<int32_t>::max()) return std::nullopt;
    t.replicas = static_cast<int>(replicas);
    plan.shared_bytes = make_layout(sizes, t, ceil_div(passes, replicas) * batch_tiles).bytes;
    if (plan.shared_bytes > limits.shared_bytes) continue;
    plan.slot_bytes = slot_bytes(r, t);
    return plan;
  }
  return std::nullopt;
}

std::string beyond(const char* what, int64_t value, int64_t most) {
  return std::string(what) + " is " + std::to_string(value) + ", and the kernels take at most " + std::to_string(most);
}

}  // namespace

std::variant<Plan, std::string> make_plan(const Request& r, const Limits& limits) {
  if (limits.capability < 80) return "the kernels need compute capability 8.0 or later";
  if (r.T < 1 || r.B < 1 || r.H < 1 || r.G < 1) return "T, B, H and the number of groups must be positive";
  if (r.G > kMaxGroups) return beyond("the number of groups", r.G, kMaxGroups);
  // The kernels count steps and rows in 32 bits.
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (r.T > most) return beyond("T", r.T, most);
  if (r.B > most) return beyond("the batch size", r.B, most);
  const int64_t widest = int64_t{limits.multiprocessors} * kWarps * kTileUnits / kUnitPad * kUnitPad;
  if (r.H > widest) return beyond("the hidden size on this device", r.H, widest);
  std::optional<Plan> best;
  double least = std::numeric_limits<double>::infinity();
  for (int unit_tiles = 1; unit_tiles <= kWarps; unit_tiles *= 2) {
    for (int batch_tiles = 1; batch_tiles <= 4 && unit_tiles * batch_tiles <= kWarps; batch_tiles *= 2) {
      for (const auto& make : {cluster_plan, grid_plan}) {
        const std::optional<Plan> plan = make(r, limits, unit_tiles, batch_tiles);
        if (!plan) continue;
        const double time = cost(r, limits, *plan);
        if (time >= least) continue;
        least = time;
        best = plan;
      }
    }
  }
  if (!best) {
    return "a block's shared memory of " + std::to_string(limits.shared_bytes) + " bytes is too little for the kernels";
  }
  return *best;
}

}  // namespace fastrnn::cuda
