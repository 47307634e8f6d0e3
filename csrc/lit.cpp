#include "lit.hpp"

#ifdef XTALFAST_X86
#include <immintrin.h>
#endif

#include <array>

namespace xtalfast {
namespace {

template <class T>
std::int64_t gather_from(const T *const from[3], std::int64_t j, std::int64_t n, std::int64_t kept, T *const to[3]) {
  for (; j < n; ++j) { // no branch: the outcome of a photon count cannot be predicted
    for (int k = 0; k < 3; ++k)
      to[k][kept] = from[k][j];
    kept += from[0][j] > 0;
  }
  return kept;
}

} // namespace

std::int64_t gather_portable(const float *const from[3], std::int64_t n, float *const to[3]) {
  return gather_from(from, 0, n, 0, to);
}
std::int64_t gather_portable(const double *const from[3], std::int64_t n, double *const to[3]) {
  return gather_from(from, 0, n, 0, to);
}

#ifdef XTALFAST_X86
namespace {

// For each set of lanes the lanes in it, lowest first.
constexpr auto make_lanes() {
  std::array<std::array<std::uint8_t, 8>, 256> lanes{};
  for (int set = 0; set < 256; ++set)
    for (int lane = 0, kept = 0; lane < 8; ++lane)
      if (set >> lane & 1)
        lanes[set][kept++] = static_cast<std::uint8_t>(lane);
  return lanes;
}
constexpr auto lanes_of_set = make_lanes();

} // namespace

XTALFAST_AVX2 std::int64_t gather_avx2(const float *const from[3], std::int64_t n, float *const to[3]) {
  std::int64_t kept = 0, j = 0;
  for (; j + 8 <= n; j += 8) {
    const int set = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(from[0] + j), _mm256_setzero_ps(), _CMP_GT_OQ));
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(lanes_of_set[set].data())));
    for (int k = 0; k < 3; ++k)
      _mm256_storeu_ps(to[k] + kept, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from[k] + j), lanes));
    kept += _mm_popcnt_u32(set);
  }
  return gather_from(from, j, n, kept, to);
}

XTALFAST_AVX512 std::int64_t gather_avx512(const float *const from[3], std::int64_t n, float *const to[3]) {
  std::int64_t kept = 0, j = 0;
  for (; j + 16 <= n; j += 16) {
    const __mmask16 set = _mm512_cmp_ps_mask(_mm512_loadu_ps(from[0] + j), _mm512_setzero_ps(), _CMP_GT_OQ);
    for (int k = 0; k < 3; ++k) // compressed in a register: a compressing store is slow on some processors
      _mm512_storeu_ps(to[k] + kept, _mm512_maskz_compress_ps(set, _mm512_loadu_ps(from[k] + j)));
    kept += _mm_popcnt_u32(set);
  }
  return gather_from(from, j, n, kept, to);
}
#endif

} // namespace xtalfast
