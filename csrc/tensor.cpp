#include "tensor.h"

#include <iterator>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

const dlpack::Table* published = nullptr;
const dlpack::Table* in_use = nullptr;
py::handle tensor_class, parameter_class, is_neg;  // kept for ever, as torch keeps them

const dlpack::Table* published_table() {
  if (!py::hasattr(tensor_class, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
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

bool is_negated(py::handle tensor) {
  PyObject* answer = PyObject_CallMethodNoArgs(tensor.ptr(), is_neg.ptr());
  if (!answer) throw py::error_already_set();
  Py_DECREF(answer);  // True and False live on
  return answer == Py_True;
}

bool is_plain(py::handle object) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  return (type == reinterpret_cast<PyTypeObject*>(tensor_class.ptr()) ||
          type == reinterpret_cast<PyTypeObject*>(parameter_class.ptr())) &&
         !is_negated(object);
}

template <class T>
void append(std::string& bytes, const T* values, size_t number) {
  bytes.append(reinterpret_cast<const char*>(values), number * sizeof(T));
}

// False, and no error set, where a tensor of this class has no memory, as a transform's wrapper.
bool append_signature(std::string& bytes, py::handle object) {
  if (object.is_none()) {
    bytes.push_back('-');
    return true;
  }
  dlpack::DeviceTensor read;
  if (!is_plain(object)) return false;
  if (in_use->read(object.ptr(), &read)) {
    PyErr_Clear();
    return false;
  }
  const int32_t head[] = {read.dtype.code,  read.dtype.bits, read.dtype.lanes,
                          read.device_type, read.device_id,  read.ndim};
  bytes.push_back('+');
  append(bytes, head, std::size(head));
  append(bytes, read.shape, static_cast<size_t>(read.ndim));
  return true;
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

py::object signature(const py::tuple& tensors) {
  if (!in_use) return py::none();
  std::string bytes;
  for (const py::handle object : tensors) {
    if (!append_signature(bytes, object)) return py::none();
  }
  return py::bytes(bytes);
}

void find_table() {
  tensor_class = py::object(py::module_::import("torch").attr("Tensor")).release();
  parameter_class = py::object(py::module_::import("torch.nn").attr("Parameter")).release();
  is_neg = py::str("is_neg").release();
  in_use = published = published_table();
}

bool reads_by_table() { return in_use != nullptr; }

void read_by_table(bool wanted) {
  if (wanted && !published) throw std::invalid_argument("this torch publishes no table");
  in_use = wanted ? published : nullptr;
}

}  // namespace fastrnn
