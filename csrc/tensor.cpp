#include "tensor.h"

#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

const dlpack::Table* published = nullptr;
const dlpack::Table* in_use = nullptr;

const dlpack::Table* published_table() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<const dlpack::Table*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (!table) throw py::error_already_set();
  while (table && table->major > dlpack::kMajor) table = table->previous;
  return table && table->major == dlpack::kMajor && table->read ? table : nullptr;
}

int dtype_of(dlpack::Type type) {
  if (type.lanes != 1) return -1;
  if (type.code == dlpack::kBfloat) return type.bits == 16 ? static_cast<int>(Dtype::bf16) : -1;
  if (type.code != dlpack::kFloat) return -1;
  return static_cast<int>(type.bits == 64 ? Dtype::f64 : type.bits == 32 ? Dtype::f32 : static_cast<Dtype>(-1));
}

int dtype_of(py::handle type) {
  const std::string name = py::str(type);
  if (name == "torch.float32") return static_cast<int>(Dtype::f32);
  if (name == "torch.float64") return static_cast<int>(Dtype::f64);
  return name == "torch.bfloat16" ? static_cast<int>(Dtype::bf16) : -1;
}

void check_dims(int64_t dims) {
  if (dims > Tensor::kMaxDims) throw std::invalid_argument("a tensor has " + std::to_string(dims) + " dimensions");
}

}  // namespace

Tensor::Tensor(py::handle object) {
  if (object.is_none()) return;
  given_ = true;
  object_ = py::reinterpret_borrow<py::object>(object);
  if (in_use) {
    read_table(object);
  } else {
    read_methods(object);
  }
}

void Tensor::read_table(py::handle object) {
  dlpack::DeviceTensor read;
  if (in_use->read(object.ptr(), &read)) throw py::error_already_set();
  if (read.device_type != dlpack::kCpu) throw std::invalid_argument("a tensor is not on the CPU");
  check_dims(read.ndim);
  data_ = static_cast<char*>(read.data) + read.byte_offset;
  dims_ = read.ndim;
  dtype_ = dtype_of(read.dtype);
  int64_t step = 1;
  for (int k = dims_ - 1; k >= 0; --k) {
    const auto at = static_cast<size_t>(k);
    sizes_[at] = read.shape[k];
    strides_[at] = read.strides ? read.strides[k] : step;
    step *= read.shape[k];
  }
}

void Tensor::read_methods(py::handle object) {
  const py::tuple sizes = object.attr("shape"), strides = object.attr("stride")();
  check_dims(static_cast<int64_t>(sizes.size()));
  data_ = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  dims_ = static_cast<int>(sizes.size());
  dtype_ = dtype_of(object.attr("dtype"));
  for (size_t k = 0; k < sizes.size(); ++k) {
    sizes_[k] = sizes[k].cast<int64_t>();
    strides_[k] = strides[k].cast<int64_t>();
  }
}

int64_t Tensor::numel() const {
  int64_t number = 1;
  for (int k = 0; k < dims_; ++k) number *= size(k);
  return number;
}

Dtype Tensor::dtype() const {
  if (dtype_ < 0) throw std::invalid_argument("no kernel has the dtype of the input");
  return static_cast<Dtype>(dtype_);
}

void* Tensor::part(size_t index, size_t parts) const {
  if (!given_) return nullptr;
  const size_t bytes = static_cast<size_t>(numel()) / parts * static_cast<size_t>(element_size(dtype()));
  return static_cast<char*>(data_) + index * bytes;
}

bool Tensor::is_contiguous() const {
  int64_t step = 1;
  for (int k = dims_ - 1; k >= 0; --k) {
    if (size(k) != 1 && stride(k) != step) return numel() == 0;
    step *= size(k);
  }
  return true;
}

Tensor Tensor::contiguous() const {
  if (!given_ || is_contiguous()) return *this;
  return Tensor(object_.attr("contiguous")());
}

void find_table() { in_use = published = published_table(); }

bool reads_by_table() { return in_use != nullptr; }

void read_by_table(bool wanted) {
  if (wanted && !published) throw std::invalid_argument("this torch publishes no table");
  in_use = wanted ? published : nullptr;
}

}  // namespace fastrnn
