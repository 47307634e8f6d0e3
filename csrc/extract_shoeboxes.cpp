#include "extract_shoeboxes.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define XTALFAST_AVX2 1
#include <immintrin.h>
#endif

// Two passes over each box. The first copies its rows into a contiguous buffer and does nothing else: the rows lie in
// pages of their own, so time goes into cache and TLB misses, and the fewer instructions there are between two of them
// the more are in flight at once (measured: 3 times faster than checking the pixels on the way). The second pass turns
// the buffer, now in the first-level cache, into counts and mask bits.
namespace xtalfast {
namespace {

struct Extremes {
  std::int32_t peak = 0;
  std::int32_t overloads = 0;
};

// n voxels of a box, all threshold work of it: `usable` null means all are.
template <class Count>
void classify_portable(const std::int32_t *values, const std::uint8_t *usable, std::int64_t n, std::int32_t low,
                       std::int32_t high, Count *counts, std::uint8_t *valid, Extremes &e) {
  constexpr std::int32_t largest = sizeof(Count) == 2 ? 65535 : 2147483647;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t value = values[i];
    const bool open = !usable || usable[i];
    const bool good = open && value >= low && value < high;
    const std::int32_t kept = good ? value : 0;
    e.peak = std::max(e.peak, kept);
    e.overloads += open && value >= high;
    counts[i] = static_cast<Count>(std::min(kept, largest));
    valid[i] = good;
  }
}

#ifdef XTALFAST_AVX2
#define XTALFAST_TARGET __attribute__((target("avx2")))

struct Avx2State {
  __m256i below_low, high, peak, overloads;
};

// Eight voxels: all ones where valid; `kept` is the value there and 0 elsewhere.
XTALFAST_TARGET inline __m256i check(const std::int32_t *values, const std::uint8_t *usable, Avx2State &s,
                                     __m256i &kept) {
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values));
  const __m256i below_high = _mm256_cmpgt_epi32(s.high, value);
  __m256i good = _mm256_and_si256(_mm256_cmpgt_epi32(value, s.below_low), below_high);
  __m256i overloaded = _mm256_xor_si256(below_high, _mm256_set1_epi32(-1));
  if (usable) {
    const __m256i flags = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(usable)));
    const __m256i closed = _mm256_cmpeq_epi32(flags, _mm256_setzero_si256());
    good = _mm256_andnot_si256(closed, good);
    overloaded = _mm256_andnot_si256(closed, overloaded);
  }
  kept = _mm256_and_si256(value, good);
  s.peak = _mm256_max_epi32(s.peak, kept);
  s.overloads = _mm256_sub_epi32(s.overloads, overloaded); // all ones is -1
  return good;
}

XTALFAST_TARGET inline void store(std::int32_t *to, __m256i a, __m256i b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), a);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 8), b);
}

XTALFAST_TARGET inline void store(std::uint16_t *to, __m256i a, __m256i b) { // saturates at 65535
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), packed);
}

template <class Count>
XTALFAST_TARGET void classify_avx2(const std::int32_t *values, const std::uint8_t *usable, std::int64_t n,
                                   std::int32_t low, std::int32_t high, Count *counts, std::uint8_t *valid,
                                   Extremes &e) {
  const __m256i zero = _mm256_setzero_si256();
  Avx2State s{_mm256_set1_epi32(low - 1), _mm256_set1_epi32(high), zero, zero};
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i kept0, kept1;
    const __m256i good0 = check(values + i, usable ? usable + i : nullptr, s, kept0);
    const __m256i good1 = check(values + i + 8, usable ? usable + i + 8 : nullptr, s, kept1);
    store(counts + i, kept0, kept1);
    const __m256i good = _mm256_permute4x64_epi64(_mm256_packs_epi32(good0, good1), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(good), _mm256_extracti128_si256(good, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(valid + i), _mm_and_si128(bytes, _mm_set1_epi8(1)));
  }
  alignas(32) std::int32_t peak[8], overloads[8];
  _mm256_store_si256(reinterpret_cast<__m256i *>(peak), s.peak);
  _mm256_store_si256(reinterpret_cast<__m256i *>(overloads), s.overloads);
  for (int lane = 0; lane < 8; ++lane) {
    e.peak = std::max(e.peak, peak[lane]);
    e.overloads += overloads[lane];
  }
  classify_portable(values + i, usable ? usable + i : nullptr, n - i, low, high, counts + i, valid + i, e);
}
#endif

template <class Count>
using Classify = void (*)(const std::int32_t *, const std::uint8_t *, std::int64_t, std::int32_t, std::int32_t, Count *,
                          std::uint8_t *, Extremes &);

template <class Count> Classify<Count> best_classify() {
#ifdef XTALFAST_AVX2
  if (__builtin_cpu_supports("avx2"))
    return classify_avx2<Count>;
#endif
  return classify_portable<Count>;
}

// Copy `width` elements. The box of the integration paper is 21 wide: a constant size becomes five moves, no call.
template <class T, class U> inline void copy_row(const T *from, std::int64_t width, U *to) {
  if constexpr (sizeof(T) == sizeof(U)) {
    if (width == 21)
      std::memcpy(to, from, 21 * sizeof(T));
    else
      std::memcpy(to, from, width * sizeof(T));
  } else {
    std::copy(from, from + width, to);
  }
}

template <class Pixel, class Count> class Cutter {
public:
  Cutter(const ImageStack &images, const Boxes &boxes) : s(images), b(boxes) {}

  void cut(std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      cut_box(i);
  }

private:
  void cut_box(std::int64_t i) {
    const std::int32_t *box = b.bbox + 6 * i;
    const std::int64_t low[3] = {box[0], box[2], box[4]}, limit[3] = {s.n_x, s.n_y, s.n_z};
    std::int64_t n[3], first[3], last[3]; // x, y, z: size; voxels first <= k < last lie inside the stack
    for (int k = 0; k < 3; ++k) {
      n[k] = std::max<std::int64_t>(box[2 * k + 1] - low[k], 0);
      first[k] = std::max<std::int64_t>(-low[k], 0);
      last[k] = std::max(std::min(n[k], limit[k] - low[k]), first[k]);
    }
    const std::int64_t n_voxels = n[0] * n[1] * n[2];
    const bool whole = last[0] - first[0] == n[0] && last[1] - first[1] == n[1] && last[2] - first[2] == n[2];
    if (static_cast<std::int64_t>(values.size()) < n_voxels) {
      values.resize(n_voxels);
      usable.resize(n_voxels);
    }
    if (!whole)
      std::fill_n(values.begin(), n_voxels, -1); // negative: never valid
    if (!whole && s.mask)
      std::fill_n(usable.begin(), n_voxels, std::uint8_t{0});
    const std::int64_t width = last[0] - first[0];
    for (std::int64_t z = first[2]; z < last[2] && width > 0; ++z) {
      const std::int64_t corner = low[1] * s.n_x + low[0] + first[0];
      const Pixel *pixels = static_cast<const Pixel *>(s.pixels) + (low[2] + z) * s.n_y * s.n_x + corner;
      const std::uint8_t *mask = s.mask ? s.mask + (low[2] + z) * s.mask_stride + corner : nullptr;
      const std::int64_t out = z * n[0] * n[1] + first[0];
      for (std::int64_t y = first[1]; y < last[1]; ++y)
        copy_row(pixels + y * s.n_x, width, values.data() + out + y * n[0]);
      for (std::int64_t y = first[1]; mask && y < last[1]; ++y)
        copy_row(mask + y * s.n_x, width, usable.data() + out + y * n[0]);
    }
    Extremes extremes;
    classify(values.data(), s.mask ? usable.data() : nullptr, n_voxels, s.low, s.high,
             static_cast<Count *>(b.counts) + b.offset[i], b.mask + b.offset[i], extremes);
    b.peak[i] = extremes.peak;
    b.overloads[i] = extremes.overloads;
  }

  const ImageStack &s;
  const Boxes &b;
  const Classify<Count> classify = best_classify<Count>();
  std::vector<std::int32_t> values;
  std::vector<std::uint8_t> usable;
};

template <class Pixel, class Count> void cut_all(const ImageStack &images, const Boxes &boxes, int n_threads) {
  constexpr std::int64_t chunk = 64; // neighbours on the detector share cache lines: keep them on one thread
  const std::int64_t n_chunks = (boxes.n + chunk - 1) / chunk;
#pragma omp parallel num_threads(std::max(n_threads, 1))
  {
    Cutter<Pixel, Count> cutter(images, boxes);
#pragma omp for schedule(dynamic)
    for (std::int64_t k = 0; k < n_chunks; ++k)
      cutter.cut(k * chunk, std::min((k + 1) * chunk, boxes.n));
  }
}

} // namespace

void extract_shoeboxes(const ImageStack &images, const Boxes &boxes, int n_threads) {
  const auto cut = images.wide_pixels
                       ? boxes.wide_counts ? cut_all<std::int32_t, std::int32_t> : cut_all<std::int32_t, std::uint16_t>
                   : boxes.wide_counts ? cut_all<std::uint16_t, std::int32_t>
                                       : cut_all<std::uint16_t, std::uint16_t>;
  cut(images, boxes, n_threads);
}

} // namespace xtalfast
