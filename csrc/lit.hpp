// The pixels with counts, gathered: with few photons most pixels hold none and need no logarithm.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

// Copies counts, profile and background where counts > 0, in order; returns how many. The targets have room for the
// n pixels and one vector of the widest kind more.
std::int64_t gather_portable(const float *const from[3], std::int64_t n, float *const to[3]);
std::int64_t gather_portable(const double *const from[3], std::int64_t n, double *const to[3]);
std::int64_t gather_avx2(const float *const from[3], std::int64_t n, float *const to[3]);
std::int64_t gather_avx512(const float *const from[3], std::int64_t n, float *const to[3]);

template <Isa isa, class T>
XTALFAST_INLINE std::int64_t gather(const T *const from[3], std::int64_t n, T *const to[3]) {
#ifdef XTALFAST_X86
  if constexpr (sizeof(T) == sizeof(float) && isa == Isa::avx512)
    return gather_avx512(from, n, to);
  if constexpr (sizeof(T) == sizeof(float) && isa == Isa::avx2)
    return gather_avx2(from, n, to);
#endif
  return gather_portable(from, n, to);
}

// Fills the `lit_` arrays of a row.
template <Isa isa, class T> XTALFAST_INLINE void gather_lit(Row<T> &row) {
  const T *const from[3] = {row.counts.data(), row.profile.data(), row.background.data()};
  T *const to[3] = {row.lit_counts.data(), row.lit_profile.data(), row.lit_background.data()};
  row.n_lit = gather<isa>(from, row.size, to);
  row.lit_length = padded<T>(row.n_lit);
  for (std::int64_t k = row.n_lit; k < row.lit_length; ++k) {
    row.lit_counts[k] = row.lit_profile[k] = T(0);
    row.lit_background[k] = T(1);
  }
}

} // namespace xtalfast
