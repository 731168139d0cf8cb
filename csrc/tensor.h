// Torch's tensors as kernels see them, without libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "cpu/problem.h"

namespace fastrnn {

// A dense tensor on the CPU of up to four dimensions, which it keeps alive; or none.
class Tensor {
 public:
  static constexpr int kMaxDims = 4;

  Tensor() = default;
  // Reads the object through DLPack's table of C functions where torch has one (2.10), else by calling its methods.
  // Throws std::invalid_argument for tensors of more dimensions and for what is neither a tensor nor None.
  explicit Tensor(pybind11::handle object);

  explicit operator bool() const { return given_; }
  int dims() const { return dims_; }
  // As in torch, -1 is the last dimension.
  int64_t size(int dim) const { return sizes_[static_cast<size_t>(dim < 0 ? dims_ + dim : dim)]; }
  int64_t stride(int dim) const { return strides_[static_cast<size_t>(dim < 0 ? dims_ + dim : dim)]; }
  int64_t numel() const;
  // Whether there is no tensor, or a contiguous one of so many elements.
  bool fits(int64_t elements) const { return !given_ || (numel() == elements && is_contiguous()); }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  // Where the `index`-th of `parts` equal parts of a contiguous tensor begins.
  void* part(size_t index, size_t parts) const;
  // Throws std::invalid_argument where no kernel has the tensor's type.
  Dtype dtype() const;
  bool is_contiguous() const;
  // Itself, or a copy that is contiguous.
  Tensor contiguous() const;

 private:
  void read_table(pybind11::handle object);
  void read_methods(pybind11::handle object);

  pybind11::object object_;
  bool given_ = false;
  void* data_ = nullptr;
  int dims_ = 0;
  int dtype_ = -1;  // Dtype, or -1 for another
  std::array<int64_t, kMaxDims> sizes_{}, strides_{};
};

// The dtypes, devices and shapes of tensors (None for none among them) as bytes: equal where all of these are, and None
// unless all are dense and of torch's own two classes, with values that can be read where they lie. None too without
// the table.
pybind11::object signature(const pybind11::tuple& tensors);

// Looks for the table, once and before all else: importing torch may let other threads run.
void find_table();
// Whether tensors are read through the table. Setting it is for tests; true where torch has none throws
// std::invalid_argument.
bool reads_by_table();
void read_by_table(bool wanted);

}  // namespace fastrnn
