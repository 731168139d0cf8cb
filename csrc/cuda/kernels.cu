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

// Whether what is compiled for has clusters; plans for other devices have none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kClusters = false;
#else
inline constexpr bool kClusters = true;
#endif

template <class Pass, class Exchange>
FASTRNN_KERNEL scan(FASTRNN_PARAMETER typename Pass::Args args) {
  if constexpr (kClusters || !Exchange::local) Scan<Pass, Exchange>(args).run();
}

namespace {

template <class... Cells>
KernelTable make_table(CellList<Cells...>) {
  using P = FASTRNN_PRECISION;
  KernelTable table{};
  int i = 0;
  constexpr int grid = static_cast<int>(Tier::grid), cluster = static_cast<int>(Tier::cluster);
  ((table.forward[i][grid] = scan<Forward<Cells, P>, GridExchange>,
    table.forward[i][cluster] = scan<Forward<Cells, P>, ClusterExchange>,
    table.backward[i][grid] = scan<Backward<Cells, P>, GridExchange>,
    table.backward[i][cluster] = scan<Backward<Cells, P>, ClusterExchange>, ++i),
   ...);
  return table;
}

}  // namespace

#define FASTRNN_JOIN(a, b) a##b
#define FASTRNN_TABLE(precision) FASTRNN_JOIN(kernels_, precision)
KernelTable FASTRNN_TABLE(FASTRNN_PRECISION)() { return make_table(AllCells{}); }

}  // namespace fastrnn::cuda
