// The Python module fastrnn._C, and the only file that knows pybind11: argument checks, dtype and cell switch. Tensors
// arrive as addresses, sizes and strides; fastrnn/backends/cpu.py, the only caller, owns and has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/launch.h"
#include "cpu/pages.h"
#include "cpu/plan.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// The sizes that every call begins with, and what follows from them.
struct Call {
  const KernelTable& table;
  const CellInfo& cell;
  const CellKernels& kernels;
  Dtype dtype;
  int threads;

  Call(int cell_index, int dtype_index, int thread_count)
      : table(fastrnn::kernels()),
        cell(table.info[checked(cell_index, table.cells, "cell")]),
        kernels(table.kernels[cell_index][checked(dtype_index, kDtypes, "dtype")]),
        dtype(static_cast<Dtype>(dtype_index)),
        threads(thread_count) {
    require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  }

 private:
  static int checked(int index, int count, const char* what) {
    require(index >= 0 && index < count, std::string(what) + " index " + std::to_string(index) + " is out of range");
    return index;
  }
};

// batch_sizes as the kernels want them: with the row at which each step begins.
struct Steps {
  Sequence seq;
  std::vector<int64_t> offsets;

  Steps(int64_t T, int64_t B, int64_t N, Address batch_sizes)
      : seq{T, B, N, pointer<const int64_t>(batch_sizes), nullptr} {
    require(T > 0 && B > 0 && N > 0, "T, B and N must be positive");
    if (!batch_sizes) {
      require(N == T * B, "N must be T * B for a dense batch");
      return;
    }
    offsets.resize(static_cast<size_t>(T));
    int64_t rows = 0, before = B;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t n = seq.batch_sizes[t];
      require(n > 0 && n <= before, "batch_sizes must be positive, at most B, and must not grow");
      offsets[static_cast<size_t>(t)] = rows;
      rows += before = n;
    }
    require(rows == N, "batch_sizes must add up to the rows given");
    seq.offsets = offsets.data();
  }
  Steps(const Steps&) = delete;
  Steps& operator=(const Steps&) = delete;
};

// `per_group` weights each: w_ih, w_hh, b_ih, b_hh, and w_hr with a projection.
std::vector<Group> make_groups(const std::vector<Address>& weights, const std::vector<bool>& reverse,
                               size_t per_group) {
  require(!reverse.empty() && reverse.size() <= kMaxGroups,
          "there may be 1 to " + std::to_string(kMaxGroups) + " groups");
  require(weights.size() == per_group * reverse.size(), "each group has " + std::to_string(per_group) + " weights");
  std::vector<Group> groups;
  for (size_t g = 0; g < reverse.size(); ++g) {
    const Address* const w = &weights[per_group * g];
    const Address w_hr = per_group > 4 ? w[4] : 0;
    require(w[0] && w[1] && (per_group == 4 || w_hr), "w_ih, w_hh and w_hr must be given");
    groups.push_back({pointer(w[0]), pointer(w[1]), pointer(w[2]), pointer(w[3]), pointer(w_hr), reverse[g]});
  }
  return groups;
}

std::vector<GroupGradients> make_gradients(const std::vector<Address>& addresses, size_t groups, size_t per_group) {
  require(addresses.size() == per_group * groups, "each weight has a gradient, or 0 in its place");
  std::vector<GroupGradients> gradients;
  for (size_t g = 0; g < groups; ++g) {
    const Address* const d = &addresses[per_group * g];
    gradients.push_back(
        {pointer(d[0]), pointer(d[1]), pointer(d[2]), pointer(d[3]), pointer(per_group > 4 ? d[4] : 0)});
  }
  return gradients;
}

template <class Args>
struct Direction;

template <>
struct Direction<ForwardArgs> {
  static constexpr auto make_plan = plan_forward;
  static constexpr auto bytes = &CellKernels::forward_bytes;
  static constexpr auto body = &CellKernels::forward;
};

template <>
struct Direction<BackwardArgs> {
  static constexpr auto make_plan = plan_backward;
  static constexpr auto bytes = &CellKernels::backward_bytes;
  static constexpr auto body = &CellKernels::backward;
};

// Enough for the plan and for the single thread that steps in when the plan's threads cannot be had.
template <class Args>
int64_t workspace_bytes(const Call& call, const Args& args) {
  using D = Direction<Args>;
  const auto bytes = call.kernels.*D::bytes;
  const Plan plan = D::make_plan(call.table, call.cell, call.dtype, call.threads, args);
  const Plan alone = D::make_plan(call.table, call.cell, call.dtype, 1, args);
  return std::max(bytes(args, plan), bytes(args, alone));
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
int64_t accumulate_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

void prepare_pages(const Call& call, const ForwardArgs& args, int64_t workspace) {
  const int64_t units = args.G * args.seq.N * round_up(args.H, kUnitPad);
  prefer_huge_pages(args.y, args.G * args.seq.N * args.out() * element_size(call.dtype));
  prefer_huge_pages(args.gates, units * call.cell.saved * accumulate_size(call.dtype));
  prefer_huge_pages(args.cells, units * accumulate_size(call.dtype));
  if (args.whole_h) prefer_huge_pages(args.whole_h, args.G * args.seq.N * args.H * element_size(call.dtype));
  prefer_huge_pages(args.workspace, workspace);
}

void prepare_pages(const Call& call, const BackwardArgs& args, int64_t workspace) {
  if (args.dx) prefer_huge_pages(args.dx, args.seq.N * args.I * element_size(call.dtype));
  prefer_huge_pages(args.workspace, workspace);
}

// Runs the kernel and returns 0, or, where `bytes` of workspace are too few, only returns how many it takes.
template <class Args>
int64_t run(const Call& call, const Args& args, int64_t bytes) {
  using D = Direction<Args>;
  const int64_t needed = workspace_bytes(call, args);
  if (bytes < needed || !args.workspace) return needed;
  struct Context {
    const Args& args;
    void (*body)(const Args&, const Plan&, const Team&, int);
  };
  const Context context{args, call.kernels.*D::body};
  const TeamBody body = [](const void* c, const Plan& plan, const Team& team, int thread) {
    const auto& [team_args, team_body] = *static_cast<const Context*>(c);
    team_body(team_args, plan, team, thread);
  };
  const py::gil_scoped_release release;
  prepare_pages(call, args, needed);
  for (int threads : {call.threads, 1}) {
    if (launch(D::make_plan(call.table, call.cell, call.dtype, threads, args), body, &context)) break;
  }
  return 0;
}

// One layer and its inputs, on which forward and backward may be called. Holds no memory of what it is given.
class Layer {
 public:
  Layer(int cell, int dtype, int threads, int64_t T, int64_t B, int64_t N, int64_t I, int64_t H, int64_t P,
        const std::vector<bool>& reverse, const std::vector<Address>& weights, Address batch_sizes, Address x,
        int64_t x_stride_t, int64_t x_stride_b, int64_t x_stride_g, Address h0, Address c0)
      : call_(cell, dtype, threads),
        steps_(T, B, N, batch_sizes),
        per_group_(P ? 5 : 4),
        groups_(make_groups(weights, reverse, per_group_)) {
    require(I > 0 && H > 0 && P >= 0, "I and H must be positive, P not negative");
    require(!P || has_c(), "a cell with a projection keeps its own state in c");
    require(x, "x must be given");
    args_.seq = steps_.seq;
    args_.I = I;
    args_.H = H;
    args_.P = P;
    args_.G = static_cast<int>(groups_.size());
    args_.groups = groups_.data();
    args_.x = pointer(x);
    args_.x_stride_t = x_stride_t;
    args_.x_stride_b = x_stride_b;
    args_.x_stride_g = x_stride_g;
    args_.h0 = pointer(h0);
    args_.c0 = pointer(c0);
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  int64_t forward(Address y, Address h_n, Address c_n, Address c, Address gates, Address cells, Address whole_h,
                  Address workspace, int64_t bytes) const {
    require(y && h_n, "y and h_n must be given");
    require(!has_c() || c_n, "c_n must be given");
    require(!has_c() || !gates == !cells, "gates and cells are saved together");
    require(!args_.P || !gates == !whole_h, "gates and whole_h are saved together");
    ForwardArgs args{args_};
    args.y = pointer(y);
    args.h_n = pointer(h_n);
    args.c_n = pointer(c_n);
    args.c = pointer(c);
    args.gates = pointer(gates);
    args.cells = pointer(cells);
    args.whole_h = pointer(whole_h);
    args.workspace = pointer(workspace);
    return run(call_, args, bytes);
  }

  int64_t backward(Address y, Address gates, Address cells, Address whole_h, Address dy, Address dh_n, Address dc_n,
                   Address dc, Address dx, Address dh0, Address dc0, const std::vector<Address>& dweights,
                   Address dgates_x, Address dgates_h, Address dprojection, Address workspace, int64_t bytes) const {
    require(y && gates, "y and gates must be given");
    require(!has_c() || cells, "cells must be given");
    require(!args_.P || whole_h, "whole_h must be given");
    const std::vector<GroupGradients> gradients = make_gradients(dweights, groups_.size(), per_group_);
    BackwardArgs args{args_};
    args.y = pointer(y);
    args.gates = pointer(gates);
    args.cells = pointer(cells);
    args.whole_h = pointer(whole_h);
    args.dy = pointer(dy);
    args.dh_n = pointer(dh_n);
    args.dc_n = pointer(dc_n);
    args.dc = pointer(dc);
    args.dx = pointer(dx);
    args.dh0 = pointer(dh0);
    args.dc0 = pointer(dc0);
    args.gradients = gradients.data();
    args.dgates_x = pointer(dgates_x);
    args.dgates_h = pointer(dgates_h);
    args.dprojection = pointer(dprojection);
    args.workspace = pointer(workspace);
    return run(call_, args, bytes);
  }

 private:
  bool has_c() const { return call_.cell.states > 1; }

  Call call_;
  Steps steps_;
  size_t per_group_;
  std::vector<Group> groups_;
  LayerArgs args_{};
};

double fma_peak(int threads, double seconds) {
  require(threads >= 1, "threads must be at least 1");
  struct Context {
    const KernelTable& table;
    double seconds;
    std::vector<double> rates;
  };
  Context context{kernels(), seconds, std::vector<double>(static_cast<size_t>(threads))};
  Plan plan{};
  plan.threads = threads;
  const TeamBody body = [](const void* c, const Plan&, const Team&, int thread) {
    auto& peak = *static_cast<Context*>(const_cast<void*>(c));
    peak.rates[static_cast<size_t>(thread)] = peak.table.fma_peak(peak.seconds);
  };
  {
    const py::gil_scoped_release release;
    if (!launch(plan, body, &context)) throw std::runtime_error("that many threads could not be had");
  }
  double total = 0;
  for (double rate : context.rates) total += rate;
  return total;
}

py::dict cells() {
  py::dict out;
  const KernelTable& table = kernels();
  for (int i = 0; i < table.cells; ++i) {
    const CellInfo& c = table.info[i];
    out[c.name] = py::make_tuple(i, c.gates, c.states, c.saved, c.shared_dgates);
  }
  return out;
}

}  // namespace
}  // namespace fastrnn

PYBIND11_MODULE(_C, m) {
  using namespace fastrnn;
  m.doc() = "fastrnn's CPU kernels; see fastrnn/backends/cpu.py.";
  m.attr("unit_pad") = kUnitPad;
  m.attr("max_groups") = kMaxGroups;
  m.def("cells", &cells, "name -> (index, gates, states, saved, shared_dgates)");
  m.def("isas", &supported_isas, "Instruction sets supported here, best first.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("use_isa", &use_isa, "Use this instruction set from now on, in the whole process.");
  m.def("fma_peak", &fma_peak, "Measured float32 multiply-add rate of that many threads together, GF/s.");
  py::class_<Layer>(m, "Layer", "A layer and its inputs, none of which it keeps alive.")
      .def(py::init<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const std::vector<bool>&,
                    const std::vector<Address>&, Address, Address, int64_t, int64_t, int64_t, Address, Address>())
      .def("forward", &Layer::forward, "0 when done, else the bytes of workspace that it takes.")
      .def("backward", &Layer::backward, "0 when done, else the bytes of workspace that it takes.");
}
