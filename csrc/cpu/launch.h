// Runs a plan's threads, on OpenMP's pool (which torch shares) or, in a forked child, on fresh threads.
#pragma once

#include "kernels.h"

namespace fastrnn {

// Calls body(context, plan, team, thread) for every thread of the plan. False, and nothing was called, when that many
// threads could not be had.
using TeamBody = void (*)(const void* context, const Plan& plan, const Team& team, int thread);
bool launch(const Plan& plan, TeamBody body, const void* context);

}  // namespace fastrnn
