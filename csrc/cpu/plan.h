// How many threads do what: a pure function of the sizes, so that equal calls give equal bits.
#pragma once

#include "kernels.h"

namespace fastrnn {

Plan plan_forward(const KernelTable& table, const CellInfo& cell, Dtype dtype, int threads, const ForwardArgs& args);
Plan plan_backward(const KernelTable& table, const CellInfo& cell, Dtype dtype, int threads, const BackwardArgs& args);

}  // namespace fastrnn
