// Runs the kernels in the emulated device; FASTRNN_EMULATION_SEED draws another order of threads.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/launch.h"

namespace fastrnn::cuda {
namespace {

template <class Args>
void launch_all(const Plan& plan, Kernel<Args> kernel, Args& args) {
  const char* const text = std::getenv("FASTRNN_EMULATION_SEED");
  const uint64_t seed = text ? std::strtoull(text, nullptr, 10) : 0;
  for (args.first_group = 0; args.first_group < args.G; args.first_group += plan.groups) {
    const int groups = std::min(plan.groups, args.G - args.first_group);
    const int cluster = plan.tier == Tier::cluster ? plan.tiling.slices : 1;
    const bool done =
        emulated::run(plan.blocks(groups), kThreads, cluster, plan.shared_bytes, seed, [&] { kernel(args); });
    if (!done) throw std::runtime_error("the emulated grid is deadlocked");
  }
}

}  // namespace

std::string unavailable() { return ""; }
Limits device_limits(int) { return {90, 12, 232448, 8, {}}; }

void launch(const Plan& plan, const Kernel<ForwardArgs>& kernel, ForwardArgs args, int, void*) {
  launch_all(plan, kernel, args);
}
void launch(const Plan& plan, const Kernel<BackwardArgs>& kernel, BackwardArgs args, int, void*) {
  launch_all(plan, kernel, args);
}

}  // namespace fastrnn::cuda
