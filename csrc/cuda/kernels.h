// The kernels, once for each precision (kernels.cu), as a table of their addresses.
#pragma once

#include "args.h"

namespace fastrnn::cuda {

struct CellInfo {
  const char* name;
  int gates, states, saved;
  bool shared_dgates;
};

inline constexpr int kTiers = 2, kMaxCells = 8;

template <class Args>
using Kernel = void (*)(Args);

// Of one precision.
struct KernelTable {
  Kernel<ForwardArgs> forward[kMaxCells][kTiers];
  Kernel<BackwardArgs> backward[kMaxCells][kTiers];
};

int cell_count();
const CellInfo& cell_info(int cell);

KernelTable kernels_F32();
KernelTable kernels_Tf32();
KernelTable kernels_Bf16();
KernelTable kernels_F16();
KernelTable kernels(Precision precision);

constexpr int element_bytes(Precision precision) {
  return precision == Precision::bf16 || precision == Precision::f16 ? 2 : 4;
}

}  // namespace fastrnn::cuda
