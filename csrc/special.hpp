// Special functions of the Gamma distribution, double precision.
#pragma once

#include <cmath>

namespace xtalfast {

// Stirling's remainder of log Gamma: lgamma(x) - (x - 1/2) log x + x - log(2 pi) / 2.
inline double binet(double x) {
  if (x <= 12)
    return std::lgamma(x) - (x - 0.5) * std::log(x) + x - 0.91893853320467274178;
  const double i = 1 / x, s = i * i;
  return i * (1.0 / 12 + s * (-1.0 / 360 + s * (1.0 / 1260 + s * (-1.0 / 1680 + s / 1188))));
}

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

// x - 1 - log x without cancellation at x = 1.
inline double excess_of_logarithm(double x) {
  const double d = x - 1;
  if (std::abs(d) >= 0.02)
    return d - std::log(x);
  double series = 0;
  for (int power = 9; power > 1; --power)
    series = d * series + (power % 2 == 0 ? 1.0 : -1.0) / power;
  return d * d * series;
}

struct GammaDivergence {
  double value;
  double d_shape, d_rate;             // with respect to q
  double d_prior_shape, d_prior_rate; // with respect to the prior
};

// KL(Gamma(k, r) || Gamma(a, b)); the form of the Python reference, a sum of terms that are never negative.
inline GammaDivergence gamma_divergence(double k, double r, double a, double b) {
  const double psi_k = digamma(k), psi_a = digamma(a);
  const double slope = psi_k - std::log(k) + 0.5 / k;
  const double value = a * excess_of_logarithm(k * b / (a * r)) + 0.5 * excess_of_logarithm(a / k) +
                       (binet(a) - binet(k) - (a - k) * slope);
  return {value, (k - a) * trigamma(k) + b / r - 1, a / r - k * b / (r * r), psi_a - psi_k + std::log(r / b),
          k / r - a / b};
}

} // namespace xtalfast
