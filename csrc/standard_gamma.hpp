// Counter-based draws of Gamma(shape, 1); `standard_gamma_reference` of xtalfast/ops/_random.py.
#pragma once

#include <cstdint>

namespace xtalfast {

struct GammaDraws {
  const double *shape; // [streams, rows]
  std::int64_t streams, rows, samples;
  std::int64_t first; // number of the first row
  std::uint64_t seed;
  double *draws; // [streams, rows, samples]
  int threads;
};

void standard_gamma(const GammaDraws &arguments);

} // namespace xtalfast
