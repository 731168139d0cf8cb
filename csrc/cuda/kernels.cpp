#include "kernels.h"

#include "../cells/cells.h"

namespace fastrnn::cuda {
namespace {

template <class... Cells>
struct Infos {
  static constexpr CellInfo list[] = {
      {Cells::name, Cells::gates, Cells::states, Cells::saved, Cells::shared_dgates}...};
  static_assert(sizeof...(Cells) <= kMaxCells);
};
template <class... Cells>
Infos<Cells...> infos_of(CellList<Cells...>);
using AllInfos = decltype(infos_of(AllCells{}));

}  // namespace

int cell_count() { return static_cast<int>(sizeof(AllInfos::list) / sizeof(CellInfo)); }
const CellInfo& cell_info(int cell) { return AllInfos::list[cell]; }

KernelTable kernels(Precision precision) {
  switch (precision) {
    case Precision::f32:
      return kernels_F32();
    case Precision::tf32:
      return kernels_Tf32();
    case Precision::bf16:
      return kernels_Bf16();
    case Precision::f16:
      return kernels_F16();
  }
  return {};
}

}  // namespace fastrnn::cuda
