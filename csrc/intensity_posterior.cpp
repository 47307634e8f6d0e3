// The stages of the Python reference that touch pixels, box by box; its names and tolerances.
#include "intensity_posterior.hpp"

namespace xtalfast {
namespace {

constexpr int lanes = 4;         // nodes taken in one sweep over the pixels
constexpr int most_steps = 80;   // of the search for the mode
constexpr double farthest = 36;  // |logit X| at which that search ends: 1 - X is still above 0 in double precision
constexpr double light = 1e-150; // third derivative of a tail that falls like a Gaussian

// sum y r, sum y r^2, sum y r^3 with r = d log(rate) / dX, and sum y log(rate).
struct ShareSums {
  double first, second, third, log_rate;
};

template <class T, bool at_mode> XTALFAST_INLINE ShareSums share_sums(const Row<T> &row, double share, T *ratios) {
  const Vector<T> tiny = splat(static_cast<T>(smallest_rate));
  const T x = static_cast<T>(share), rest = T(1) - x;
  Vector<T> first{}, second{}, third{}, log_rate{};
  for (std::int64_t j = 0; j < row.lit_length; j += Lanes<T>::count) {
    const Vector<T> u = load(&row.lit_profile[j]), v = load(&row.lit_background[j]), y = load(&row.lit_counts[j]);
    const Vector<T> rate = largest<T>(x * u + rest * v, tiny);
    const Vector<T> ratio = (u - v) / rate;
    const Vector<T> weighted = y * ratio;
    first += weighted;
    second += weighted * ratio;
    if (at_mode) {
      third += weighted * ratio * ratio;
      log_rate += y * vector_log(rate);
      store(ratios + j, ratio);
    }
  }
  return {sum<T>(first), sum<T>(second), sum<T>(third), sum<T>(log_rate)};
}

// Maximum over X of a log X + c log(1 - X) + sum y log(X u + (1 - X) v): Newton in logit X inside a bracket.
template <class T> XTALFAST_INLINE double most_likely_share(const Row<T> &row, double a, double c, double tolerance) {
  double x = a / (a + c), low = -farthest, high = farthest;
  for (int step = 0; step < most_steps; ++step) {
    const ShareSums sums = share_sums<T, false>(row, x, nullptr);
    const double slope = sums.first + a / x - c / (1 - x);
    const double curvature = sums.second + a / (x * x) + c / ((1 - x) * (1 - x));
    const double t = std::log(x / (1 - x));
    (slope > 0 ? low : high) = t;
    const double newton = t + slope / (curvature * x * (1 - x) - (1 - 2 * x) * slope);
    x = 1 / (1 + std::exp(-(newton > low && newton < high ? newton : 0.5 * (low + high))));
    if (std::abs(slope) <= tolerance * std::sqrt(curvature))
      break;
  }
  return x;
}

// Distance at which a log-density with these derivatives has fallen by `tail`, if its tail is that of a Gamma.
double heavy_tail(double slope, double curvature, double skew, double tail) {
  const double n = std::min(std::max(4 * curvature * curvature * curvature / (skew * skew), 1.0), 1e12);
  const double unit = std::sqrt(n / curvature), rise = std::max(-slope, 0.0) * unit;
  const double quadratic = n - 2 * rise, linear = 2 * tail + 2 * rise;
  if (quadratic <= 0)
    return 1.0;
  double d = unit * (linear + std::sqrt(linear * linear + 8 * tail * quadratic)) / (2 * quadratic);
  for (int i = 0; i < 6; ++i) {
    const double w = d / unit, fall = slope * d + n * (w - std::log1p(w));
    d -= (fall - tail) / (slope + n / unit * w / (1 + w));
  }
  return d;
}

double share_from_s(double s, double a, double c) {
  return a == 1 && c == 1 ? s : 1 / (1 + std::exp(std::log1p(-s) / c - std::log(s) / a));
}

double s_from_share(double x, double a, double c) {
  if ((a == 1 && c == 1) || x <= 0 || x >= 1)
    return x;
  double low = 0, high = 1;
  for (int i = 0; i < 60; ++i) {
    const double middle = 0.5 * (low + high);
    (share_from_s(middle, a, c) < x ? low : high) = middle;
  }
  return 0.5 * (low + high);
}

template <class T, int L>
XTALFAST_INLINE void sweep(const Row<T> &row, const T *ratios, const T *distance, double *log_rates) {
  const Vector<T> least = splat(static_cast<T>(1e-7));
  Vector<T> total[L] = {};
  for (std::int64_t j = 0; j < row.lit_length; j += Lanes<T>::count) {
    const Vector<T> y = load(&row.lit_counts[j]), ratio = load(ratios + j);
    for (int k = 0; k < L; ++k)
      total[k] += y * vector_log(largest<T>(T(1) + distance[k] * ratio, least));
  }
  for (int k = 0; k < L; ++k)
    log_rates[k] = sum<T>(total[k]);
}

template <class T> struct Scratch {
  Row<T> row;
  std::vector<T> ratios, distance;
  std::vector<double> log_rates;

  Scratch(std::int64_t longest, int nodes)
      : row(longest), ratios(row.counts.size()), distance(nodes + lanes), log_rates(nodes + lanes) {}
};

template <class T> XTALFAST_INLINE void one_box(const PosteriorArguments &s, std::int64_t box, Scratch<T> &w) {
  const std::int64_t n = s.boxes.n;
  Row<T> &row = w.row;
  load_row(s.boxes, box, row);
  std::copy_n(static_cast<const T *>(s.profile) + s.boxes.first(box), row.size, row.profile.data());
  add_up(row);
  gather_lit(row);
  const double a = s.prior[box], alpha = s.prior[n + box], c = s.prior[2 * n + box], beta = s.prior[3 * n + box];
  const double p_total = row.profile_sum + alpha, q_total = row.background_sum + beta;
  const T to_one = static_cast<T>(1 / (p_total > 0 ? p_total : 1)),
          to_zero = static_cast<T>(1 / (q_total > 0 ? q_total : 1));
  for (std::int64_t j = 0; j < row.lit_length; ++j) {
    row.lit_profile[j] *= to_one;
    row.lit_background[j] *= to_zero;
  }

  const double mode = most_likely_share(row, a, c, s.tolerance);
  const ShareSums at = share_sums<T, true>(row, mode, w.ratios.data());
  const double second = std::max(at.second, 1e-30);
  const double right = heavy_tail(-at.first, second, at.third > 0 ? at.third : light, s.tail);
  const double left = heavy_tail(at.first, second, at.third < 0 ? at.third : light, s.tail);
  const double a_low = std::min(a, 1.0), c_low = std::min(c, 1.0);
  const double s_low = s_from_share(std::max(mode - left, 0.0), a_low, c_low);
  const double s_high = s_from_share(std::min(mode + right, 1.0), a_low, c_low);
  for (int k = 0; k < s.nodes; ++k) {
    const double point = s_low + (s_high - s_low) * (0.5 + 0.5 * s.node[k]);
    const double inside = std::min(std::max(point, 1e-300), 1 - 0x1p-53);
    w.distance[k] = static_cast<T>(share_from_s(inside, a_low, c_low) - mode);
  }
  for (int k = 0; k < s.nodes; k += lanes)
    sweep<T, lanes>(row, w.ratios.data(), &w.distance[k], &w.log_rates[k]);
  std::copy_n(w.log_rates.data(), s.nodes, s.log_rates + box * s.nodes);

  const double factorials =
      LogFactorials::instance().of(row.lit_counts.data(), row.lit_length, whole_numbers(s.boxes.count_type));
  const double summary[7] = {p_total, q_total, row.photons, factorials, at.log_rate, s_low, s_high};
  for (int k = 0; k < 7; ++k)
    s.summary[k * n + box] = summary[k];
}

XTALFAST_CLONES void box_float(const PosteriorArguments &s, std::int64_t box, Scratch<float> &w) { one_box(s, box, w); }
XTALFAST_CLONES void box_double(const PosteriorArguments &s, std::int64_t box, Scratch<double> &w) {
  one_box(s, box, w);
}

} // namespace

void intensity_posterior(const PosteriorArguments &s) {
  const std::int64_t longest = s.boxes.longest();
  LogFactorials::instance(); // made before the threads start
#pragma omp parallel num_threads(s.boxes.threads)
  {
    if (s.wide) {
      Scratch<double> scratch(longest, s.nodes);
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        box_double(s, box, scratch);
    } else {
      Scratch<float> scratch(longest, s.nodes);
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        box_float(s, box, scratch);
    }
  }
}

} // namespace xtalfast
