// Half spectra of real maps [n_maps, X, Y, Z]: entry [h, k, l] of each, l = 0 .. Z / 2, limited to a sphere of
// resolution. The definitions, in plain torch, are xtalfast/ops/structure_factors.py and patterson_map.py.
#pragma once

#include "unit_cell.hpp"

namespace xtalfast {

struct HalfSpectra {
  const double *cells; // [n_maps, 6] a, b, c (A), alpha, beta, gamma (deg)
  std::int64_t n_maps;
  std::int64_t n[2];     // X, Y
  std::int64_t n_l;      // Z / 2 + 1
  double inverse_d2_max; // 1/A^2; entries beyond are 0
  double scale;          // of the result, times the volume of the cell to the power volume_power: -1, 0 or 1
  int volume_power;
  bool f000; // keep entry [0, 0, 0]
  bool wide; // complex<double>, else complex<float>

  XTALFAST_HD std::int64_t n_rows() const { return n_maps * n[0] * n[1]; }
};

// 1/d^2 = hh h^2 + kk k^2 + ll l^2 + hk h k + hl h l + kl k l.
struct SpectrumMetric {
  double hh, kk, ll, hk, hl, kl;
  double scale; // of the result, with its power of the volume
};

inline XTALFAST_HD SpectrumMetric spectrum_metric(const HalfSpectra &s, std::int64_t i) {
  const UnitCell cell = make_unit_cell(s.cells + 6 * i);
  const double *f = cell.frac; // a*, b*, c*; upper triangular
  const double power = s.volume_power > 0 ? cell.volume : s.volume_power < 0 ? 1 / cell.volume : 1;
  return {f[0] * f[0] + f[1] * f[1] + f[2] * f[2],
          f[4] * f[4] + f[5] * f[5],
          f[8] * f[8],
          2 * (f[1] * f[4] + f[2] * f[5]),
          2 * f[2] * f[8],
          2 * f[5] * f[8],
          s.scale * power};
}

// 1/d^2 = constant + l (linear + l square) along one row of l, and the l that are kept: begin <= l < end.
struct SpectrumRow {
  double constant, linear, square;
  std::int64_t begin, end;
};

inline XTALFAST_HD SpectrumRow spectrum_row(const HalfSpectra &s, const SpectrumMetric &m, std::int64_t x,
                                            std::int64_t y) {
  // The smaller of two aliases, as torch.fft.fftfreq has it.
  const auto h = static_cast<double>(2 * x < s.n[0] ? x : x - s.n[0]);
  const auto k = static_cast<double>(2 * y < s.n[1] ? y : y - s.n[1]);
  SpectrumRow r{h * (m.hh * h + m.hk * k) + m.kk * k * k, m.hl * h + m.kl * k, m.ll, 0, s.n_l};
  if (std::isfinite(s.inverse_d2_max)) {
    const double middle = -0.5 * r.linear / r.square;
    const double left = middle * middle - (r.constant - s.inverse_d2_max) / r.square;
    const double half = left < 0 ? 0 : std::sqrt(left), last = middle + half;
    if (left < 0 || last < 0) {
      r.end = 0;
    } else {
      r.begin = middle > half ? static_cast<std::int64_t>(std::ceil(middle - half)) : 0;
      r.end = last < static_cast<double>(s.n_l) ? static_cast<std::int64_t>(last) + 1 : s.n_l;
    }
  }
  if (x == 0 && y == 0 && !s.f000 && r.begin == 0)
    r.begin = 1;
  if (r.begin >= r.end)
    r.begin = r.end = 0;
  return r;
}

// out = scale x conj(in) x exp(blur / (4 d^2)) inside, 0 outside. `in` and `out` are interleaved, of the type that
// `wide` says, and may be one.
void filter_spectrum(const HalfSpectra &spectra, double blur, const void *in, void *out, int n_threads);
int filter_spectrum_cuda(const HalfSpectra &spectra, double blur, const void *in, void *out, void *stream);

} // namespace xtalfast
