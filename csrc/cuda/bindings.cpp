// The Python module fastrnn._cuda. Tensors arrive as addresses by name; fastrnn/backends/cuda.py, the only caller, owns
// and has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <vector>

#include "launch.h"

// The emulated build for the tests has another name.
#if !defined(FASTRNN_MODULE)
#define FASTRNN_MODULE _cuda
#endif

namespace py = pybind11;

namespace fastrnn::cuda {
namespace {

using Addresses = std::map<std::string, uintptr_t>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

int checked(int index, int count, const char* what) {
  require(index >= 0 && index < count, std::string(what) + " index " + std::to_string(index) + " is out of range");
  return index;
}

// Takes addresses out by name; what nobody took is a mistake.
class Taker {
 public:
  explicit Taker(const Addresses& addresses) : left_(addresses) {}
  template <class T>
  void optional(const char* name, T*& field) {
    const auto found = left_.find(name);
    if (found == left_.end()) return;
    field = reinterpret_cast<T*>(found->second);
    left_.erase(found);
  }
  template <class T>
  void required(const char* name, T*& field) {
    optional(name, field);
    require(field != nullptr, std::string(name) + " must be given");
  }
  void done() const { require(left_.empty(), left_.empty() ? "" : "unknown tensor " + left_.begin()->first); }

 private:
  Addresses left_;
};

struct Call {
  Request request;
  Plan plan;
  int cell;
};

Call make_call(int cell, int precision, int64_t T, int64_t B, int64_t H, int G, bool backward, const Limits& limits) {
  const CellInfo& info = cell_info(checked(cell, cell_count(), "cell"));
  const auto kind = static_cast<Precision>(checked(precision, kPrecisions, "precision"));
  Call call{{T, B, H, G, info, kind, backward}, {}, cell};
  const auto found = make_plan(call.request, limits);
  if (const auto* reason = std::get_if<std::string>(&found)) throw std::invalid_argument(*reason);
  call.plan = std::get<Plan>(found);
  return call;
}

void take_shared(Taker& take, const Call& call, ScanArgs& args) {
  take.optional("lengths", args.lengths);
  take.optional("offsets", args.offsets);
  take.optional("pass_steps", args.pass_steps);
  take.optional("reset", args.reset);
  take.optional("h0", args.h0);
  take.optional("c0", args.c0);
  take.optional("h_reset", args.h_reset);
  take.optional("c_reset", args.c_reset);
  take.required("y", args.y);
  take.optional("gates", args.gates);
  take.optional("cells", args.cells);
  take.optional("report", args.report);
  require(!args.lengths == !args.pass_steps, "lengths and pass_steps are given together");
  char* workspace = nullptr;
  take.required("workspace", workspace);
  args.streamed_weights = workspace;
  args.operand = workspace + call.plan.weight_bytes;
  args.slots = reinterpret_cast<float*>(workspace + call.plan.weight_bytes + call.plan.operand_bytes);
  take.required("flags", args.flags);
  args.status = args.flags + call.plan.flag_words;
}

void fill_shared(const Call& call, int64_t N, const std::vector<uintptr_t>& weights, const std::vector<bool>& reverse,
                 uint32_t poll_limit, ScanArgs& args) {
  const Request& r = call.request;
  require(reverse.size() == static_cast<size_t>(r.G), "one direction a group");
  require(weights.size() == 2 * reverse.size(), "each group has two weights: w_hh, b_hh");
  args.T = r.T;
  args.B = r.B;
  args.H = r.H;
  args.N = N;
  args.G = r.G;
  args.tiling = call.plan.tiling;
  args.poll_limit = poll_limit;
  for (size_t g = 0; g < reverse.size(); ++g) {
    require(weights[2 * g] != 0, "w_hh must be given");
    args.groups[g] = {reinterpret_cast<const void*>(weights[2 * g]), reinterpret_cast<const void*>(weights[2 * g + 1]),
                      reverse[g]};
  }
}

void forward(const Call& call, int64_t N, const std::vector<uintptr_t>& weights, const std::vector<bool>& reverse,
             const Addresses& addresses, uint32_t poll_limit, int device, uintptr_t stream) {
  require(!call.request.backward, "the plan is for the backward pass");
  ForwardArgs args{};
  fill_shared(call, N, weights, reverse, poll_limit, args);
  Taker take(addresses);
  take_shared(take, call, args);
  take.required("gates_x", args.gates_x);
  take.required("h_n", args.h_n);
  take.optional("c_n", args.c_n);
  take.optional("c", args.c);
  take.done();
  require(call.request.cell.states == 1 || args.c_n, "c_n must be given");
  require(call.request.cell.states == 1 || !args.gates == !args.cells, "gates and cells are saved together");
  const auto kernel = kernels(call.request.precision).forward[call.cell][static_cast<int>(call.plan.tier)];
  const py::gil_scoped_release release;
  launch(call.plan, kernel, args, device, reinterpret_cast<void*>(stream));
}

void backward(const Call& call, int64_t N, const std::vector<uintptr_t>& weights, const std::vector<bool>& reverse,
              const Addresses& addresses, uint32_t poll_limit, int device, uintptr_t stream) {
  require(call.request.backward, "the plan is for the forward pass");
  BackwardArgs args{};
  fill_shared(call, N, weights, reverse, poll_limit, args);
  Taker take(addresses);
  take_shared(take, call, args);
  take.optional("dy", args.dy);
  take.optional("dc", args.dc);
  take.optional("dh_n", args.dh_n);
  take.optional("dc_n", args.dc_n);
  take.required("dgates_x", args.dgates_x);
  take.optional("dgates_h", args.dgates_h);
  take.optional("dh0", args.dh0);
  take.optional("dc0", args.dc0);
  take.optional("dh_reset", args.dh_reset);
  take.optional("dc_reset", args.dc_reset);
  take.done();
  require(args.gates, "gates must be given");
  require(call.request.cell.states == 1 || args.cells, "cells must be given");
  require(call.request.cell.shared_dgates || args.dgates_h, "dgates_h must be given");
  args.initial = args.dh0 || args.dc0 || args.dh_reset || args.dc_reset;
  const auto kernel = kernels(call.request.precision).backward[call.cell][static_cast<int>(call.plan.tier)];
  const py::gil_scoped_release release;
  launch(call.plan, kernel, args, device, reinterpret_cast<void*>(stream));
}

py::dict cells() {
  py::dict out;
  for (int i = 0; i < cell_count(); ++i) {
    const CellInfo& c = cell_info(i);
    out[c.name] = py::make_tuple(i, c.gates, c.states, c.saved, c.shared_dgates);
  }
  return out;
}

}  // namespace
}  // namespace fastrnn::cuda

PYBIND11_MODULE(FASTRNN_MODULE, m) {
  using namespace fastrnn::cuda;
  m.doc() = "fastrnn's CUDA kernels; see fastrnn/backends/cuda.py.";
  m.attr("max_groups") = kMaxGroups;
  py::class_<Limits>(m, "Limits", py::module_local())
      .def(py::init<int, int, int64_t, int, std::array<int, kMostCluster + 1>>(), py::arg("capability"),
           py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("cluster"),
           py::arg("at_once") = std::array<int, kMostCluster + 1>{})
      .def_readonly("capability", &Limits::capability)
      .def_readonly("multiprocessors", &Limits::multiprocessors)
      .def_readonly("shared_bytes", &Limits::shared_bytes)
      .def_readonly("cluster", &Limits::cluster)
      .def_readonly("at_once", &Limits::at_once);
  py::class_<Call>(m, "Plan", py::module_local())
      .def_property_readonly("tier", [](const Call& c) { return c.plan.tier == Tier::grid ? "grid" : "cluster"; })
      .def_property_readonly("slices", [](const Call& c) { return c.plan.tiling.slices; })
      .def_property_readonly("replicas", [](const Call& c) { return c.plan.tiling.replicas; })
      .def_property_readonly("unit_tiles", [](const Call& c) { return c.plan.tiling.unit_tiles; })
      .def_property_readonly("batch_tiles", [](const Call& c) { return c.plan.tiling.batch_tiles; })
      .def_property_readonly("resident_chunks", [](const Call& c) { return c.plan.tiling.resident_chunks; })
      .def_property_readonly("streamed", [](const Call& c) { return c.plan.weight_bytes > 0; })
      .def_property_readonly("groups", [](const Call& c) { return c.plan.groups; })
      .def_property_readonly("threads", [](const Call&) { return kThreads; })
      .def_property_readonly("blocks", [](const Call& c) { return c.plan.blocks(c.plan.groups); })
      .def_property_readonly("shared_bytes", [](const Call& c) { return c.plan.shared_bytes; })
      .def_property_readonly("rows_a_pass", [](const Call& c) { return c.plan.tiling.batch_tiles * kTileRows; })
      .def_property_readonly(
          "workspace_bytes",
          [](const Call& c) { return c.plan.weight_bytes + c.plan.operand_bytes + c.plan.slot_bytes; })
      .def_property_readonly("flag_words", [](const Call& c) { return c.plan.flag_words + 1; });
  m.def("cells", &cells, "name -> (index, gates, states, saved, shared_dgates)");
  m.def("unavailable", &unavailable, "Why no device can be used here, or an empty string.");
  m.def("device_limits", &device_limits, "What plans for this device have to keep to.");
  m.def("plan", &make_call, "How the work is laid out; raises ValueError with the reason where it cannot be.");
  m.def("forward", &forward, "Launch the forward scan.");
  m.def("backward", &backward, "Launch the backward scan.");
}
