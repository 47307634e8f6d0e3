// Loops over pixels with explicit vectors of 32 bytes, compiled once for each instruction set and chosen at run time.
// Reductions stay in registers, which `omp simd` does not ensure. Arrays are padded to whole vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define XTALFAST_X86 1
#define XTALFAST_AVX2 __attribute__((target("arch=x86-64-v3")))
#define XTALFAST_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define XTALFAST_AVX2
#define XTALFAST_AVX512
#endif
#if defined(XTALFAST_X86) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#define XTALFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define XTALFAST_CLONES
#endif
#define XTALFAST_INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi" // vectors are passed between inlined functions only

namespace xtalfast {

template <class Body, class... A> XTALFAST_AVX512 void run_avx512(A &...a) { Body::template run<Isa::avx512>(a...); }
template <class Body, class... A> XTALFAST_AVX2 void run_avx2(A &...a) { Body::template run<Isa::avx2>(a...); }

// Body::run<isa>(arguments), an always inlined function template, as compiled for that instruction set.
template <class Body, class... A> void run_with(Isa isa, A &...a) {
  switch (isa) {
#ifdef XTALFAST_X86
  case Isa::avx512:
    return run_avx512<Body>(a...);
  case Isa::avx2:
    return run_avx2<Body>(a...);
#endif
  default:
    return Body::template run<Isa::portable>(a...);
  }
}

template <class T> struct Lanes;
template <> struct Lanes<float> {
  static constexpr std::int64_t count = 8;
  typedef float Vector __attribute__((vector_size(32)));
  typedef std::int32_t Mask __attribute__((vector_size(32)));
};
template <> struct Lanes<double> {
  static constexpr std::int64_t count = 4;
  typedef double Vector __attribute__((vector_size(32)));
  typedef std::int64_t Mask __attribute__((vector_size(32)));
};
template <class T> using Vector = typename Lanes<T>::Vector;

// Length of an array of n values that is read in whole vectors.
template <class T> constexpr std::int64_t padded(std::int64_t n) {
  return (n + Lanes<T>::count - 1) / Lanes<T>::count * Lanes<T>::count;
}

template <class T> XTALFAST_INLINE Vector<T> load(const T *p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T> XTALFAST_INLINE void store(T *p, Vector<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> XTALFAST_INLINE Vector<T> splat(T x) { return Vector<T>{} + x; }
template <class T> XTALFAST_INLINE Vector<T> largest(Vector<T> a, Vector<T> b) { return a > b ? a : b; }
template <class T> XTALFAST_INLINE T sum(Vector<T> v) {
  T total = 0;
  for (int k = 0; k < Lanes<T>::count; ++k)
    total += v[k];
  return total;
}

// log of positive normal floats, to 1 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), then a minimax polynomial.
XTALFAST_INLINE Vector<float> vector_log(Vector<float> x) {
  using Mask = Lanes<float>::Mask;
  const Mask i = reinterpret_cast<Mask>(x);
  const Mask e = (i - 0x3f3504f3) >> 23;
  const Vector<float> f = reinterpret_cast<Vector<float>>(i - (e << 23)) - 1.0f;
  Vector<float> q = 0.0714975389f * f - 0.115712007f;
  q = q * f + 0.116615111f;
  q = q * f - 0.124110507f;
  q = q * f + 0.142499365f;
  q = q * f - 0.166684802f;
  q = q * f + 0.200007075f;
  q = q * f - 0.24999989f;
  q = q * f + 0.333333312f;
  const Vector<float> n = __builtin_convertvector(e, Vector<float>), f2 = f * f;
  return (f + (q * f * f2 - 0.5f * f2 + n * -2.12194440e-4f)) + n * 0.693359375f;
}

XTALFAST_INLINE Vector<double> vector_log(Vector<double> x) {
  for (int k = 0; k < Lanes<double>::count; ++k)
    x[k] = std::log(x[k]);
  return x;
}

// exp of floats that are not above 88, to 1 ulp; below -87 it gives about 1e-38 instead of less.
XTALFAST_INLINE Vector<float> vector_exp(Vector<float> x) {
  using Mask = Lanes<float>::Mask;
  x = largest<float>(x, splat(-87.0f));
  const Vector<float> n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // rounded to an integer
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> q = 0.00139336525f * r + 0.00836318154f;
  q = q * r + 0.0416664649f;
  q = q * r + 0.16666577f;
  q = q * r + 0.5f;
  const Vector<float> y = 1.0f + (r + r * r * q);
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Mask>(y) + (__builtin_convertvector(n, Mask) << 23));
}

XTALFAST_INLINE Vector<double> vector_exp(Vector<double> x) {
  for (int k = 0; k < Lanes<double>::count; ++k)
    x[k] = std::exp(x[k]);
  return x;
}

} // namespace xtalfast
