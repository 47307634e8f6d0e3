#include "structure_factors.hpp"

#include <algorithm>

namespace xtalfast {
namespace {

template <class T> void filter(const HalfSpectra &s, double blur, const T *in, T *out, int n_threads) {
  const std::int64_t n_l = s.n_l;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
  for (std::int64_t plane = 0; plane < s.n_maps * s.n[0]; ++plane) {
    const SpectrumMetric m = spectrum_metric(s, plane / s.n[0]);
    const auto factor = static_cast<T>(m.scale);
    for (std::int64_t y = 0; y < s.n[1]; ++y) {
      const SpectrumRow r = spectrum_row(s, m, plane % s.n[0], y);
      const T *from = in + 2 * (plane * s.n[1] + y) * n_l;
      T *to = out + 2 * (plane * s.n[1] + y) * n_l;
      std::fill(to, to + 2 * r.begin, T(0));
      for (std::int64_t l = r.begin; l < r.end; ++l) {
        to[2 * l] = factor * from[2 * l];
        to[2 * l + 1] = -factor * from[2 * l + 1];
      }
      std::fill(to + 2 * r.end, to + 2 * n_l, T(0));
      if (blur == 0)
        continue;
      for (std::int64_t l = r.begin; l < r.end; ++l) {
        const auto index = static_cast<double>(l);
        const double s2 = r.constant + index * (r.linear + index * r.square);
        const auto sharpening = static_cast<T>(std::exp(0.25 * blur * s2));
        to[2 * l] *= sharpening;
        to[2 * l + 1] *= sharpening;
      }
    }
  }
}

} // namespace

void filter_spectrum(const HalfSpectra &spectra, double blur, const void *in, void *out, int n_threads) {
  if (spectra.wide)
    filter(spectra, blur, static_cast<const double *>(in), static_cast<double *>(out), n_threads);
  else
    filter(spectra, blur, static_cast<const float *>(in), static_cast<float *>(out), n_threads);
}

} // namespace xtalfast
