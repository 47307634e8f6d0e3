// Compiles the file that includes this once for each instruction set, in namespaces avx512, avx2 and portable.
//
//     #define XTALFAST_FILE "my_kernel.cpp"
//     #include "each_isa.hpp"
//     namespace xtalfast::XTALFAST_ISA { ... }   // compiled three times, with the vectors of vectors.hpp
//     #ifdef XTALFAST_LAST                       // compiled once
//     void xtalfast::my_kernel(...) { XTALFAST_DISPATCH(my_kernel, arguments); }
//     #endif
//
// Every function must be compiled for its instruction set from the start: vectors of 64 bytes in a function for plain
// x86-64 are cut into pieces of 16 before the function is inlined, and `target_clones` come too late to undo that.
#ifndef XTALFAST_EACH_ISA
#define XTALFAST_EACH_ISA
// every header of the standard library that kernels use, for plain x86-64
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define XTALFAST_X86 1
#endif
#define XTALFAST_INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"               // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 on its own _mm512_reduce_add_ps

namespace xtalfast {

// While it lives, this thread takes results below the normal numbers for 0: the far tail of a profile is full of them,
// and one costs as much as a hundred others.
class FlushTinyToZero {
public:
#ifdef XTALFAST_X86
  FlushTinyToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushTinyToZero() { _mm_setcsr(before_); }

private:
  unsigned before_;
#endif
};

} // namespace xtalfast

#ifdef XTALFAST_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#define XTALFAST_ISA avx512
#define XTALFAST_VECTOR_BYTES 64
#include "vectors.hpp"
#include XTALFAST_FILE
#undef XTALFAST_ISA
#undef XTALFAST_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,lzcnt")
#define XTALFAST_ISA avx2
#define XTALFAST_VECTOR_BYTES 32
#include "vectors.hpp"
#include XTALFAST_FILE
#undef XTALFAST_ISA
#undef XTALFAST_VECTOR_BYTES
#pragma GCC pop_options

#define XTALFAST_DISPATCH(function, ...)                                                                               \
  switch (chosen_isa()) {                                                                                              \
  case Isa::avx512:                                                                                                    \
    return avx512::function(__VA_ARGS__);                                                                              \
  case Isa::avx2:                                                                                                      \
    return avx2::function(__VA_ARGS__);                                                                                \
  default:                                                                                                             \
    return portable::function(__VA_ARGS__);                                                                            \
  }
#else
#define XTALFAST_DISPATCH(function, ...) return portable::function(__VA_ARGS__)
#endif

#define XTALFAST_ISA portable
#define XTALFAST_VECTOR_BYTES 16
#define XTALFAST_LAST 1
#include "vectors.hpp"
#endif
