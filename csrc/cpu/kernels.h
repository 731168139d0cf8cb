// The kernels of one instruction set, as a table of plain functions: what dispatch.cpp chooses among.
#pragma once

#include "problem.h"
#include "team.h"

namespace fastrnn {

struct CellKernels {
  void (*forward)(const ForwardArgs&, const Plan&, const Team&, int thread);
  void (*backward)(const BackwardArgs&, const Plan&, const Team&, int thread);
  int64_t (*forward_bytes)(const ForwardArgs&, const Plan&);
  int64_t (*backward_bytes)(const BackwardArgs&, const Plan&);
};

inline constexpr int kMaxCells = 16;

struct CellInfo {
  const char* name;
  int gates, states, saved;
  bool shared_dgates;
};

struct KernelTable {
  const char* isa;
  int lanes[kDtypes];           // hidden units in a vector
  int rows_to_fetch[kDtypes];   // rows of arithmetic that hide the fetch of a panel from L2
  int lines_to_share[kDtypes];  // cache lines from L2 that take as long as one from another core
  bool splits[kDtypes];         // values can be multiplied by their parts (split.h)
  int cells;
  CellInfo info[kMaxCells];
  CellKernels kernels[kMaxCells][kDtypes];
  double (*fma_peak)(double seconds);  // GF/s of one thread in float32, measured
};

}  // namespace fastrnn
