// The elementwise functions a cell may call, by value type.
//
// A cell is written once, over `Math<V>`; each backend supplies Math for its own V (a scalar here, a SIMD vector
// in cpu/vec.h), so the same text is a CUDA thread's code, a vector's code and double in gradcheck.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

namespace fastrnn {

template <class V>
struct Math {
  static FASTRNN_HD V sigmoid(V x) { return V(1) / (V(1) + std::exp(-x)); }
  static FASTRNN_HD V tanh(V x) { return std::tanh(x); }
  static FASTRNN_HD V relu(V x) { return x < V(0) ? V(0) : x; }
  static FASTRNN_HD V step(V x) { return x > V(0) ? V(1) : V(0); }
};

}  // namespace fastrnn
