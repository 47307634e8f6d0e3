// The share X of the spot in the photons of a box: start, derivatives and maximum of its log-density, as in
// xtalfast/ops/_share.py.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

constexpr int most_steps = 80;  // of the search for the mode
constexpr double farthest = 36; // |logit X| at which that search ends: 1 - X is still above 0 in double precision

// Sums of short runs in the precision of the pixels, of the runs in double: many photons lose no digits.
template <class T> class LongSum {
public:
  static constexpr std::int64_t run = 16; // vectors
  Vector<T> part{};

  XTALFAST_INLINE void flush() {
    total_ += sum<T>(part);
    part = Vector<T>{};
  }
  double total() const { return total_; }

private:
  double total_ = 0;
};

// Unweighted least squares of the counts on profile and background, as a share, kept off the ends by as much as one
// photon says. Needs `add_up`.
template <class T>
XTALFAST_INLINE double first_share(const Row<T> &row, double a, double c, double p_total, double q_total) {
  const Vector<T> none{};
  Vector<T> pp{}, pb{}, bb{}, py{}, by{};
  for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count) {
    const auto on = load(&row.used[j]) != none;
    const Vector<T> p = on ? load(&row.profile[j]) : none, b = on ? load(&row.background[j]) : none;
    const Vector<T> y = load(&row.counts[j]);
    pp += p * p;
    pb += p * b;
    bb += b * b;
    py += p * y;
    by += b * y;
  }
  const double spp = sum<T>(pp), spb = sum<T>(pb), sbb = sum<T>(bb), spy = sum<T>(py), sby = sum<T>(by);
  const double spot = p_total * (sbb * spy - spb * sby), rest = q_total * (spp * sby - spb * spy);
  const double n = a + c + row.photons + 1;
  const double low = (a + 0.5) / n, high = 1 - (c + 0.5) / n;
  const double x = spot > 0 && rest > 0 ? spot / (spot + rest) : rest > 0 ? low : spot > 0 ? high : 0.5;
  return std::min(std::max(x, low), high);
}

// sum y r, sum y r^2, sum y r^3 with r = d log(rate) / dX, and sum y log(scale rate), over the pixels with counts,
// whose `lit_profile` and `lit_background` are the rates at X = 1 and X = 0. Where most pixels have a rate of about 1 /
// scale their logarithms are near 0, and so is what rounding makes of the same logarithm a thousand times.
struct ShareSums {
  double first, second, third, log_rate;
};

template <class T, bool at_mode>
XTALFAST_INLINE ShareSums share_sums(const Row<T> &row, double share, T scale, T *ratios) {
  const Vector<T> tiny = splat(static_cast<T>(smallest_rate));
  const T x = static_cast<T>(share), rest = static_cast<T>(1 - share);
  LongSum<T> first, second, third, log_rate;
  constexpr std::int64_t run = LongSum<T>::run * Lanes<T>::count;
  for (std::int64_t start = 0; start < row.lit_length; start += run) {
    const std::int64_t end = std::min(start + run, row.lit_length);
    for (std::int64_t j = start; j < end; j += Lanes<T>::count) {
      const Vector<T> u = load(&row.lit_profile[j]), v = load(&row.lit_background[j]), y = load(&row.lit_counts[j]);
      const Vector<T> rate = largest<T>(x * u + rest * v, tiny);
      const Vector<T> ratio = (u - v) / rate;
      const Vector<T> weighted = y * ratio;
      first.part += weighted;
      second.part += weighted * ratio;
      if (at_mode) {
        third.part += weighted * ratio * ratio;
        log_rate.part += y * vector_log(scale * rate);
        store(ratios + j, ratio);
      }
    }
    for (auto *one : {&first, &second, &third, &log_rate})
      one->flush();
  }
  return {first.total(), second.total(), third.total(), log_rate.total()};
}

struct ShareMaximum {
  double share;
  int steps;
  bool found;
};

// Maximum over X of a log X + c log(1 - X) + sum y log(X u + (1 - X) v): Newton in logit X inside a bracket. Where a
// and c are 0 it may lie at X = 0 or 1.
template <class T>
XTALFAST_INLINE ShareMaximum most_likely_share(const Row<T> &row, double a, double c, double start, double tolerance) {
  if (a == 0 && c == 0) {
    if (share_sums<T, false>(row, 0.0, T(1), nullptr).first <= 0)
      return {0.0, 0, true};
    if (share_sums<T, false>(row, 1.0, T(1), nullptr).first >= 0)
      return {1.0, 0, true};
  }
  double x = start, low = -farthest, high = farthest;
  for (int step = 1; step <= most_steps; ++step) {
    const ShareSums sums = share_sums<T, false>(row, x, T(1), nullptr);
    const double slope = sums.first + a / x - c / (1 - x);
    const double curvature = sums.second + a / (x * x) + c / ((1 - x) * (1 - x));
    const double t = std::log(x / (1 - x));
    (slope > 0 ? low : high) = t;
    const double newton = t + slope / (curvature * x * (1 - x) - (1 - 2 * x) * slope);
    x = 1 / (1 + std::exp(-(newton > low && newton < high ? newton : 0.5 * (low + high))));
    if (std::abs(slope) <= tolerance * std::sqrt(curvature))
      return {x, step, true};
  }
  return {x, most_steps, false};
}

} // namespace xtalfast
