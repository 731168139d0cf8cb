// How many threads do what: a pure function of the sizes, so that equal calls give equal bits.
#pragma once

#include "kernels.h"

namespace fastrnn {

// Those that a call may have.
struct Threads {
  int count;
  bool always;  // all of them, however little they save
};

Plan plan_forward(const KernelTable& table, const CellInfo& cell, Dtype dtype, Threads threads,
                  const ForwardArgs& args);
Plan plan_backward(const KernelTable& table, const CellInfo& cell, Dtype dtype, Threads threads,
                   const BackwardArgs& args);

}  // namespace fastrnn
