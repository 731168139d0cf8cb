// Compiled once per instruction set, with FASTRNN_ISA naming it and the compiler flags enabling it.
#include "kernels.h"

#include <chrono>

#include "backward.h"
#include "forward.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

template <class Cell, class T>
constexpr CellKernels kernels_of() {
  return {forward<Cell, T>, backward<Cell, T>, forward_bytes<Cell, T>, backward_bytes<Cell, T>};
}

template <class Cell>
void add_cell(KernelTable& table) {
  const int i = table.cells++;
  table.info[i] = {Cell::name, Cell::gates, Cell::states, Cell::saved, Cell::shared_dgates};
  table.kernels[i][static_cast<int>(Dtype::f32)] = kernels_of<Cell, float>();
  table.kernels[i][static_cast<int>(Dtype::f64)] = kernels_of<Cell, double>();
  table.kernels[i][static_cast<int>(Dtype::bf16)] = kernels_of<Cell, bf16>();
}

template <class... Cells>
void add_cells(KernelTable& table, CellList<Cells...>) {
  (add_cell<Cells>(table), ...);
}

double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int chains = 12, rounds = 20000;
  Vec<float> acc[chains];
  for (int i = 0; i < chains; ++i) acc[i] = broadcast(0.001f * static_cast<float>(i));
  const Vec<float> a = broadcast(0.999f), b = broadcast(0.001f);
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (Clock::now() < end) {
    const auto start = Clock::now();
    for (int n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
      for (int i = 0; i < chains; ++i) acc[i] = acc[i] * a + b;
    }
    const double spent = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = 2.0 * rounds * chains * kLanes<float> / spent / 1e9;
    best = rate > best ? rate : best;
  }
  Vec<float> sum = acc[0];
  for (int i = 1; i < chains; ++i) sum += acc[i];
  volatile float sink = sum[0];
  (void)sink;
  return best;
}

}  // namespace

KernelTable make_table() {
  KernelTable table{};
#define FASTRNN_STRING(x) #x
#define FASTRNN_NAME(x) FASTRNN_STRING(x)
  table.isa = FASTRNN_NAME(FASTRNN_ISA);
  table.lanes[static_cast<int>(Dtype::f32)] = table.lanes[static_cast<int>(Dtype::bf16)] = kLanes<float>;
  table.lanes[static_cast<int>(Dtype::f64)] = kLanes<double>;
  for (int& rows : table.rows_to_fetch) rows = 4;
  for (int& lines : table.lines_to_share) lines = 75;
  if (kTiles) {  // whose loads are of 16 lines at once
    table.rows_to_fetch[static_cast<int>(Dtype::bf16)] = 26;
    table.lines_to_share[static_cast<int>(Dtype::bf16)] = 38;
    table.splits[static_cast<int>(Dtype::f32)] = true;
  }
  add_cells(table, AllCells{});
  table.fma_peak = fma_peak;
  return table;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
