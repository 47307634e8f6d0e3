// Special functions of the Gamma distribution, double precision.
#pragma once

#include <cmath>

namespace xtalfast {

// psi(x) - log(x) + 1/(2 x), the derivative of binet: recurrence up to x > 12, then the asymptotic series.
inline double digamma(double x) {
  double shift = 0;
  for (; x <= 12; x += 1)
    shift -= 1 / x;
  const double s = 1 / (x * x);
  const double series = s * (1.0 / 12 + s * (-1.0 / 120 + s * (1.0 / 252 + s * (-1.0 / 240 + s / 132))));
  return shift + std::log(x) - 0.5 / x - series;
}

inline double trigamma(double x) {
  double shift = 0;
  for (; x <= 12; x += 1)
    shift += 1 / (x * x);
  const double i = 1 / x, s = i * i;
  return shift + i + 0.5 * s + i * s * (1.0 / 6 + s * (-1.0 / 30 + s * (1.0 / 42 + s * (-1.0 / 30 + s * 5 / 66))));
}

} // namespace xtalfast
