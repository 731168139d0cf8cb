// The part of DLPack's binary interface, version 1, that reading a tensor takes; its declarations are those of
// https://github.com/dmlc/dlpack, include/dlpack/dlpack.h. Torch has published the table since 2.10 as
// torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace fastrnn::dlpack {

inline constexpr uint32_t kMajor = 1;
inline constexpr const char* kCapsule = "dlpack_exchange_api";

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};
inline constexpr uint8_t kFloat = 2, kBfloat = 4;

struct DeviceTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  Type dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};
inline constexpr int32_t kCpu = 1;

struct Table {
  uint32_t major, minor;
  Table* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  // 0, or -1 with a Python error set. What `out` points to lives as long as the object is unchanged.
  int (*read)(void* object, DeviceTensor* out);
  void* current_stream;
};

}  // namespace fastrnn::dlpack
