// Runs a plan's threads, on OpenMP's pool (which torch shares) or on fresh threads.
#pragma once

#include "kernels.h"

namespace fastrnn {

// The cores that the calling thread may run on: those of its affinity at this moment, or, where OpenMP binds threads to
// places, those of all places.
int available_cores();

// Calls body(context, plan, team, thread) for every thread of the plan. False, and nothing was called, when that many
// threads could not be had. `pool` is how many threads torch's own parallel regions have.
using TeamBody = void (*)(const void* context, const Plan& plan, const Team& team, int thread);
bool launch(const Plan& plan, int pool, TeamBody body, const void* context);

}  // namespace fastrnn
