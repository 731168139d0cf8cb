// SIMD vectors of the instruction set being compiled for, through the compiler's own vector types: one text for
// AVX-512, AVX2, SSE2 and NEON. Included only by kernels.cpp, once per instruction set, inside that set's own
// namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../cells/math.h"

namespace fastrnn {

struct bf16 {
  uint16_t bits;
};

namespace FASTRNN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Sums and cell states are kept in this type.
template <class T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<bf16> {
  using type = float;
};
template <class T>
using Acc = typename AccOf<T>::type;
template <class T>
using AccVec = Vec<Acc<T>>;

#define FASTRNN_INLINE inline __attribute__((always_inline))

template <class V, class T>
FASTRNN_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Subtracting zero, which the compiler drops, where adding it would cost an instruction (it changes -0).
template <class T>
FASTRNN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// The bf16 of 16 floats: half as many bytes, so vectors of half the size.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));

FASTRNN_INLINE Vec<float> widen(HalfVec h) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}

// Round to nearest even; a NaN stays a NaN.
FASTRNN_INLINE HalfVec narrow(Vec<float> v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfVec>(_mm512_cvtneps_pbh(v));
#else
  const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
#endif
}

FASTRNN_INLINE Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
FASTRNN_INLINE Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
FASTRNN_INLINE Vec<float> load(const bf16* p) { return widen(load_as<HalfVec>(p)); }

FASTRNN_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
FASTRNN_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
FASTRNN_INLINE void store(bf16* p, Vec<float> v) {
  const HalfVec h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n lanes only, for rows of the user's tensors, which are not padded. Missing lanes load as zero.
template <class T>
FASTRNN_INLINE AccVec<T> load_first(const T* p, int64_t n) {
  if (n >= kLanes<Acc<T>>) return load(p);
  T lanes[kLanes<Acc<T>>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

template <class T>
FASTRNN_INLINE void store_first(T* p, AccVec<T> v, int64_t n) {
  if (n >= kLanes<Acc<T>>) return store(p, v);
  T lanes[kLanes<Acc<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// v with zeros in place of all but its first n lanes. Lanes past the last unit must be zero wherever a product reads
// them: an infinite operand times the zeros in the weights' padding makes NaN there, which would reach every unit.
template <class S>
FASTRNN_INLINE Vec<S> keep_first(Vec<S> v, int64_t n) {
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  if (n >= kLanes<S>) return v;
  Vec<Int> lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  return lane < static_cast<Int>(n) ? v : Vec<S>{};
}

template <class T>
struct Exp;

// Cody-Waite: x = n ln2 + r, |r| <= ln2 / 2; expm1(r) = r + r^2 q(r), q fitted (Lawson's weighted minimax) to relative
// error 1.3e-8 and 1.8e-17. `magic` rounds to an integer by addition and leaves it in the low bits. e^-max is hardly
// larger than the smallest normal number.
template <>
struct Exp<float> {
  using Int = int32_t;
  static constexpr float max = 87.3365f, tanh_max = 10.0f, magic = 12582912.0f;
  static constexpr float log2e = 1.44269504f, ln2_hi = 0.693145752f, ln2_lo = 1.42860677e-6f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float q[] = {0.4999999815f, 0.1666654361f, 0.04166720007f, 0.008366521376f, 0.001388250696f};
};

template <>
struct Exp<double> {
  using Int = int64_t;
  static constexpr double max = 708.3964, tanh_max = 20.0, magic = 6755399441055744.0;
  static constexpr double log2e = 1.4426950408889634074, ln2_hi = 0.69314718036912381649,
                          ln2_lo = 1.9082149292705877e-10;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double q[] = {0.5000000000000005186,   0.1666666666666658959,   0.04166666666657670182,
                                 0.008333333333389336218, 0.001388888893157814561, 0.0001984126971950016528,
                                 2.48015052606600504e-5,  2.755740708526562666e-6, 2.762604237069703964e-7,
                                 2.505392374056579458e-8};
};

// e^x = scale * (1 + p), kept apart because expm1 needs them so.
template <class S>
struct ExpParts {
  Vec<S> scale, p;
};

template <class S>
FASTRNN_INLINE ExpParts<S> exp_parts(Vec<S> x) {
  using E = Exp<S>;
  using IntVec = Vec<typename E::Int>;
  constexpr int terms = sizeof(E::q) / sizeof(S);
  const Vec<S> shifted = x * E::log2e + E::magic;
  const Vec<S> n = shifted - E::magic;
  const Vec<S> r = (x - n * E::ln2_hi) - n * E::ln2_lo;
  Vec<S> q = broadcast<S>(E::q[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) q = q * r + E::q[i];
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) + E::bias) << E::mantissa;
  return {reinterpret_cast<Vec<S>>(exponent), q * (r * r) + r};
}

// One division's worth, to about one ulp: for float on AVX-512 an estimate and a Newton step cost a third of vdivps.
template <class S>
FASTRNN_INLINE Vec<S> reciprocal(Vec<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    const Vec<S> y = _mm512_maskz_rcp14_ps(0xffff, x);
    return y + y * (1 - x * y);
  }
#endif
  return 1 / x;
}

// Bounds that let NaN through: a comparison with NaN is false, and vminps then returns its second operand.
template <class S>
FASTRNN_INLINE Vec<S> at_most(Vec<S> x, S limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_maskz_min_ps(0xffff, broadcast(limit), x);
#endif
  return x > limit ? broadcast(limit) : x;
}

template <class S>
FASTRNN_INLINE Vec<S> at_least(Vec<S> x, S limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_maskz_max_ps(0xffff, broadcast(limit), x);
#endif
  return x < limit ? broadcast(limit) : x;
}

template <class S>
struct VecMath {
  using V = Vec<S>;
  // Exactly zero, rather than the smallest normal number, below -max, where e^-x would overflow: what a shut gate keeps
  // of a huge input would show in the gradients.
  static FASTRNN_INLINE V sigmoid(V x) {
    const ExpParts<S> e = exp_parts<S>(at_least<S>(-x, -Exp<S>::max));
    const V y = reciprocal<S>(1 + (e.scale + e.scale * e.p));
    return x < -Exp<S>::max ? V{} : y;
  }
  // With m = e^2|x| - 1, m / (m + 2) keeps relative accuracy near 0, and 1 - 2 / (m + 2) that of 1 - |tanh x| near 1,
  // which the derivative lives on.
  static FASTRNN_INLINE V tanh(V x) {
    using Bits = Vec<typename Exp<S>::Int>;
    const Bits sign = reinterpret_cast<Bits>(x) & reinterpret_cast<Bits>(broadcast<S>(S(-0.0)));
    const V size = reinterpret_cast<V>(reinterpret_cast<Bits>(x) ^ sign);
    const ExpParts<S> e = exp_parts<S>(2 * at_most<S>(size, Exp<S>::tanh_max));
    const V m = e.scale * e.p + (e.scale - 1);
    const V q = reciprocal<S>(m + 2);
    const V t = size > S(0.55) ? 1 - 2 * q : m * q;
    return reinterpret_cast<V>(reinterpret_cast<Bits>(t) ^ sign);
  }
  static FASTRNN_INLINE V relu(V x) { return x < 0 ? V{} : x; }
  static FASTRNN_INLINE V step(V x) { return x > 0 ? broadcast<S>(1) : V{}; }
};

}  // namespace FASTRNN_ISA

template <>
struct Math<FASTRNN_ISA::Vec<float>> : FASTRNN_ISA::VecMath<float> {};
template <>
struct Math<FASTRNN_ISA::Vec<double>> : FASTRNN_ISA::VecMath<double> {};

}  // namespace fastrnn
