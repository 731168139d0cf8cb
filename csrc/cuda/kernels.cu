// Compiled once for each precision: FASTRNN_PRECISION is Bf16, F16, Tf32 or F32.
#include "backward.h"
#include "forward.h"
#include "kernels.h"

#if defined(__CUDACC__)
#define FASTRNN_KERNEL __global__ void __launch_bounds__(fastrnn::cuda::kThreads, 1)
#define FASTRNN_PARAMETER const __grid_constant__
#else
#define FASTRNN_KERNEL void
#define FASTRNN_PARAMETER const
#endif

namespace fastrnn::cuda {

template <class Pass, class Exchange>
FASTRNN_KERNEL scan(FASTRNN_PARAMETER typename Pass::Args args) {
  Scan<Pass, Exchange>(args).run();
}

namespace {

template <class... Cells>
KernelTable make_table(CellList<Cells...>) {
  using P = FASTRNN_PRECISION;
  KernelTable table{};
  int i = 0;
  ((table.forward[i][static_cast<int>(Tier::grid)] = scan<Forward<Cells, P>, GridExchange>,
    table.backward[i][static_cast<int>(Tier::grid)] = scan<Backward<Cells, P>, GridExchange>, ++i),
   ...);
  return table;
}

}  // namespace

#define FASTRNN_JOIN(a, b) a##b
#define FASTRNN_TABLE(precision) FASTRNN_JOIN(kernels_, precision)
KernelTable FASTRNN_TABLE(FASTRNN_PRECISION)() { return make_table(AllCells{}); }

}  // namespace fastrnn::cuda
