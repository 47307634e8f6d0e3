#include "patterson_map.hpp"

#include <algorithm>

namespace xtalfast {
namespace {

template <class T>
void intensities(const HalfSpectra &s, const T *in, T *intensity, std::int64_t n_kept, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
  for (std::int64_t plane = 0; plane < s.n_maps * s.n[0]; ++plane) {
    const SpectrumMetric m = spectrum_metric(s, plane / s.n[0]);
    const auto scale = static_cast<T>(m.scale);
    for (std::int64_t y = 0; y < s.n[1]; ++y) {
      const SpectrumRow r = spectrum_row(s, m, plane % s.n[0], y);
      const std::int64_t end = std::min(r.end, n_kept), begin = std::min(r.begin, end);
      const T *from = in + 2 * (plane * s.n[1] + y) * s.n_l;
      T *to = intensity + (plane * s.n[1] + y) * n_kept;
      std::fill(to, to + begin, T(0));
      for (std::int64_t l = begin; l < end; ++l)
        to[l] = scale * (from[2 * l] * from[2 * l] + from[2 * l + 1] * from[2 * l + 1]);
      std::fill(to + end, to + n_kept, T(0));
    }
  }
}

template <class T> void mirror(const HalfMaps &m, const T *half, T *map, int n_threads) {
  const std::int64_t x_half = m.n[0] / 2 + 1, n_z = m.n[2];
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
  for (std::int64_t row = 0; row < m.n_maps * x_half * m.n[1]; ++row) {
    const std::int64_t y = row % m.n[1], x = row / m.n[1] % x_half, i = row / m.n[1] / x_half;
    const T *from = half + row * n_z;
    T *to = map + ((i * m.n[0] + x) * m.n[1] + y) * n_z;
    std::copy_n(from, n_z, to);
    if (x == 0 || 2 * x == m.n[0])
      continue; // these planes are their own mirror
    T *mirrored = map + ((i * m.n[0] + m.n[0] - x) * m.n[1] + (y == 0 ? 0 : m.n[1] - y)) * n_z;
    mirrored[0] = to[0];
    std::reverse_copy(to + 1, to + n_z, mirrored + 1);
  }
}

} // namespace

void spectrum_intensity(const HalfSpectra &spectra, const void *in, void *intensity, std::int64_t n_kept,
                        int n_threads) {
  if (spectra.wide)
    intensities(spectra, static_cast<const double *>(in), static_cast<double *>(intensity), n_kept, n_threads);
  else
    intensities(spectra, static_cast<const float *>(in), static_cast<float *>(intensity), n_kept, n_threads);
}

void mirror_map(const HalfMaps &maps, const void *half, void *map, int n_threads) {
  if (maps.wide)
    mirror(maps, static_cast<const double *>(half), static_cast<double *>(map), n_threads);
  else
    mirror(maps, static_cast<const float *>(half), static_cast<float *>(map), n_threads);
}

} // namespace xtalfast
