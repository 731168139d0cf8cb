// The Python module fastrnn._C: which kernel runs, and on what memory. fastrnn/backends/cpu.py, the only caller,
// allocates all that the kernels write.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/launch.h"
#include "cpu/pages.h"
#include "cpu/plan.h"
#include "layer.h"

namespace py = pybind11;

template <>
struct pybind11::detail::type_caster<fastrnn::Tensor> {
  PYBIND11_TYPE_CASTER(fastrnn::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = fastrnn::Tensor(source);
    return true;
  }
};

namespace fastrnn {
namespace {

// For tests, whose sizes are small and whose sums shall be in the order of any number of threads.
std::atomic<bool> always_all_threads{false};

// What the process's quota pays for, if it has one.
std::atomic<int> most_cores{std::numeric_limits<int>::max()};

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
int64_t workspace_bytes(const Call& call, const Plan (&plans)[2], const Args& args) {
  const auto bytes = call.kernels.*Direction<Args>::bytes;
  const int64_t best = bytes(args, plans[0]);
  return plans[0].threads == 1 ? best : std::max(best, bytes(args, plans[1]));
}

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

// Of no more threads than cores, nor than the call may have. The affinity is asked for only where more than one thread
// pays, for that takes as long as a small call's checks.
template <class Args>
Plan make_plan(const Call& call, const Args& args) {
  const auto planned = [&](int threads, bool always) {
    return Direction<Args>::make_plan(call.table, call.cell, call.dtype, {threads, always}, args);
  };
  if (always_all_threads.load()) return planned(call.threads, true);
  const Plan plan = planned(std::min(call.threads, most_cores.load()), false);
  const int cores = plan.threads > 1 ? available_cores() : 1;
  return cores < plan.threads ? planned(cores, false) : plan;
}

// Runs the kernel and returns 0, or, where the workspace is too small, only returns how many bytes it takes.
template <class Args>
int64_t run(const Call& call, Args args, const Tensor& workspace) {
  using D = Direction<Args>;
  const Plan best = make_plan(call, args);
  const Plan alone = best.threads == 1 ? best : D::make_plan(call.table, call.cell, call.dtype, {1, false}, args);
  const Plan plans[] = {best, alone};
  const int64_t needed = workspace_bytes(call, plans, args);
  if (workspace.numel() < needed) return needed;
  args.workspace = workspace.data();
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
  for (const Plan& plan : plans) {
    if (launch(plan, call.threads, body, &context)) break;
  }
  return 0;
}

int64_t forward(const Tensor& workspace, int cell, int threads, const std::vector<bool>& reverse, int64_t batch,
                const Tensor& x, const Tensor& batch_sizes, const Tensor& h0, const Tensor& c0, const Tensors& weights,
                const Tensor& y, const Tensor& h_n, const Tensor& c_n, const Tensor& c, const Tensors& saved) {
  const Layer layer(cell, threads, reverse, batch, x, batch_sizes, h0, c0, weights);
  return run(layer.call(), forward_args(layer, y, h_n, c_n, c, saved), workspace);
}

int64_t backward(const Tensor& workspace, int cell, int threads, const std::vector<bool>& reverse, int64_t batch,
                 const Tensor& x, const Tensor& batch_sizes, const Tensor& h0, const Tensor& c0, const Tensors& weights,
                 const Tensor& y, const Tensors& saved, const Tensors& grads, const Tensors& dstates,
                 const Tensors& dweights, int64_t samples, const Tensor& sample_of_row) {
  const Layer layer(cell, threads, reverse, batch, x, batch_sizes, h0, c0, weights);
  const Backward pass(layer, y, saved, grads, dstates, dweights, samples, sample_of_row);
  return run(layer.call(), pass.args(), workspace);
}

// A forward pass over these very tensors, to be run any number of times.
class Prepared {
 public:
  Prepared(int cell, int threads, const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensors& weights,
           const Tensor& y, const Tensor& h_n, const Tensor& c_n)
      : outputs_{y, h_n, c_n},
        layer_(cell, threads, {false}, x.size(1), x, Tensor(), h0, c0, weights),
        args_(forward_args(layer_, y, h_n, c_n, Tensor(), {})) {}

  int64_t operator()(const Tensor& workspace) const { return run(layer_.call(), args_, workspace); }

 private:
  Tensors outputs_;
  Layer layer_;
  ForwardArgs args_;
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
    if (!launch(plan, threads, body, &context)) throw std::runtime_error("that many threads could not be had");
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
  find_table();
  m.attr("unit_pad") = kUnitPad;
  m.attr("max_groups") = kMaxGroups;
  m.def("cells", &cells, "name -> (index, gates, states, saved, shared_dgates)");
  m.def("isas", &supported_isas, "Instruction sets supported here, best first.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("use_isa", &use_isa, "Use this instruction set from now on, in the whole process.");
  m.def(
      "use_all_threads", [](bool always) { always_all_threads.store(always); },
      "Whether every call uses all threads from now on, in the whole process, however little that saves, and though "
      "there be fewer cores.");
  m.def("available_cores", &available_cores, "Cores by affinity; see fastrnn/cores.py.");
  m.def(
      "limit_cores", [](int most) { most_cores.store(std::max(1, most)); },
      "Use no more threads than this from now on, in the whole process.");
  m.def("fma_peak", &fma_peak, "Measured float32 multiply-add rate of that many threads together, GF/s.");
  m.def("reads_by_table", &reads_by_table, "Whether tensors are read through DLPack's table of functions.");
  m.def("read_by_table", &read_by_table, "Read them so from now on, or by their methods.");
  m.def("signature", &signature, "dtypes, devices and shapes of plain tensors as bytes; None if some are not plain.");
  m.def("forward", &forward, "0 when done, else the bytes of workspace that it takes.");
  m.def("backward", &backward, "0 when done, else the bytes of workspace that it takes.");
  py::class_<Prepared>(m, "Prepared", "A forward pass over tensors that it keeps alive.")
      .def(py::init<int, int, const Tensor&, const Tensor&, const Tensor&, const Tensors&, const Tensor&, const Tensor&,
                    const Tensor&>())
      .def("__call__", &Prepared::operator(), "0 when done, else the bytes of workspace that it takes.");
}
