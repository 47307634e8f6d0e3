#include "extract_shoeboxes.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define XTALFAST_DISPATCH 1
#endif

namespace xtalfast {
namespace {

#define XTALFAST_INLINE inline __attribute__((always_inline))

// A fixed number of pixels, without branches: what a compiler turns into a handful of vector instructions.
template <int lanes, bool masked, class Pixel, class Count>
XTALFAST_INLINE void cut_lanes(const Pixel *__restrict from, const std::uint8_t *__restrict usable, std::int32_t low,
                               std::int32_t high, Count *__restrict counts, std::uint8_t *__restrict valid,
                               std::int32_t *__restrict peak, std::int32_t *__restrict overloads) {
  constexpr std::int32_t largest = sizeof(Count) == 2 ? 65535 : 2147483647;
  for (int j = 0; j < lanes; ++j) {
    const std::int32_t value = from[j];
    const bool open = masked ? usable[j] != 0 : true;
    const bool good = open & (value >= low) & (value < high);
    const std::int32_t kept = good ? value : 0;
    peak[j] = std::max(peak[j], kept);
    overloads[j] |= open & (value >= high);
    counts[j] = static_cast<Count>(std::min(kept, largest));
    valid[j] = good;
  }
}

// Overloads of one row, counted exactly: only rows that have one come here.
template <class Pixel>
std::int32_t count_overloads(const Pixel *from, const std::uint8_t *usable, std::int64_t width, std::int32_t high) {
  std::int32_t n = 0;
  for (std::int64_t x = 0; x < width; ++x)
    n += (!usable || usable[x]) && static_cast<std::int32_t>(from[x]) >= high;
  return n;
}

template <bool masked, class Pixel, class Count>
XTALFAST_INLINE void cut_boxes(const ImageStack &s, const Boxes &b, std::int64_t begin, std::int64_t end) {
  constexpr int lanes = 16;
  const Pixel *pixels = static_cast<const Pixel *>(s.pixels);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int32_t *box = b.bbox + 6 * i;
    const std::int64_t x0 = box[0], y0 = box[2], z0 = box[4];
    const std::int64_t nx = std::max<std::int64_t>(box[1] - x0, 0), ny = std::max<std::int64_t>(box[3] - y0, 0),
                       nz = std::max<std::int64_t>(box[5] - z0, 0);
    const std::int64_t from = std::clamp<std::int64_t>(x0, 0, s.n_x),
                       to = std::clamp<std::int64_t>(x0 + nx, from, s.n_x);
    const std::int64_t left = std::min(from - x0, nx), width = left < nx ? to - from : 0;
    Count *counts = static_cast<Count *>(b.counts) + b.offset[i];
    std::uint8_t *valid = b.mask + b.offset[i];
    std::int32_t peak[lanes] = {}, n_overloads = 0;
    for (std::int64_t z = z0; z < z0 + nz; ++z) {
      for (std::int64_t y = y0; y < y0 + ny; ++y, counts += nx, valid += nx) {
        const bool inside = z >= 0 && z < s.n_z && y >= 0 && y < s.n_y && width > 0;
        if (!inside || width < nx) {
          std::memset(counts, 0, nx * sizeof(Count));
          std::memset(valid, 0, nx);
          if (!inside)
            continue;
        }
        const Pixel *row = pixels + (z * s.n_y + y) * s.n_x + from;
        const std::uint8_t *usable = masked ? s.mask + z * s.mask_stride + y * s.n_x + from : nullptr;
        Count *c = counts + left;
        std::uint8_t *v = valid + left;
        std::int32_t overloaded[lanes] = {};
        std::int64_t x = 0;
        for (; x + lanes <= width; x += lanes)
          cut_lanes<lanes, masked>(row + x, masked ? usable + x : nullptr, s.low, s.high, c + x, v + x, peak,
                                   overloaded);
        if (x < width && width >= lanes) { // the rest once more as a full vector, which overlaps the one before
          x = width - lanes;
          cut_lanes<lanes, masked>(row + x, masked ? usable + x : nullptr, s.low, s.high, c + x, v + x, peak,
                                   overloaded);
        } else {
          for (; x < width; ++x)
            cut_lanes<1, masked>(row + x, masked ? usable + x : nullptr, s.low, s.high, c + x, v + x, peak, overloaded);
        }
        std::int32_t any = 0;
        for (int j = 0; j < lanes; ++j)
          any |= overloaded[j];
        if (any)
          n_overloads += count_overloads(row, usable, width, s.high);
      }
    }
    b.peak[i] = *std::max_element(peak, peak + lanes);
    b.overloads[i] = n_overloads;
  }
}

XTALFAST_INLINE void cut_any(const ImageStack &s, const Boxes &b, std::int64_t begin, std::int64_t end) {
  const auto typed = [&](auto pixel, auto count) __attribute__((always_inline)) {
    using Pixel = decltype(pixel);
    using Count = decltype(count);
    if (s.mask)
      cut_boxes<true, Pixel, Count>(s, b, begin, end);
    else
      cut_boxes<false, Pixel, Count>(s, b, begin, end);
  };
  if (s.wide_pixels && b.wide_counts)
    typed(std::int32_t{}, std::int32_t{});
  else if (s.wide_pixels)
    typed(std::int32_t{}, std::uint16_t{});
  else if (b.wide_counts)
    typed(std::uint16_t{}, std::int32_t{});
  else
    typed(std::uint16_t{}, std::uint16_t{});
}

void cut_portable(const ImageStack &s, const Boxes &b, std::int64_t begin, std::int64_t end) {
  cut_any(s, b, begin, end);
}

#ifdef XTALFAST_DISPATCH
__attribute__((target("avx2"))) void cut_avx2(const ImageStack &s, const Boxes &b, std::int64_t begin,
                                              std::int64_t end) {
  cut_any(s, b, begin, end);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void cut_avx512(const ImageStack &s, const Boxes &b,
                                                                              std::int64_t begin, std::int64_t end) {
  cut_any(s, b, begin, end);
}
#endif

using Cut = void (*)(const ImageStack &, const Boxes &, std::int64_t, std::int64_t);

Cut best_cut() {
#ifdef XTALFAST_DISPATCH
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return cut_avx512;
  if (__builtin_cpu_supports("avx2"))
    return cut_avx2;
#endif
  return cut_portable;
}

} // namespace

void extract_shoeboxes(const ImageStack &images, const Boxes &boxes, int n_threads) {
  static const Cut cut = best_cut();
  constexpr std::int64_t chunk = 64; // neighbours on the detector share cache lines: keep them on one thread
  const std::int64_t n_chunks = (boxes.n + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic) num_threads(std::max(n_threads, 1))
  for (std::int64_t k = 0; k < n_chunks; ++k)
    cut(images, boxes, k * chunk, std::min((k + 1) * chunk, boxes.n));
}

} // namespace xtalfast
