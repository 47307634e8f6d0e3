// The stages of the Python reference that touch pixels, box by box; its names and tolerances.
#include "intensity_posterior.hpp"

#include "lit.hpp"
#include "share.hpp"

namespace xtalfast {
namespace {

constexpr int lanes = 4;         // nodes taken in one sweep over the pixels
constexpr double light = 1e-150; // third derivative of a tail that falls like a Gaussian

// log(1 + z) on |z| <= 1/4 as z times a polynomial (Chebyshev interpolation): absolute error 5e-9, below what single
// precision makes of 1 + z.
constexpr double series[] = {0.99999998529465739, -0.49999998673954504, 0.33334085039404515, -0.25000677826881862,
                             0.19940384119028534, -0.1661291839743323,  0.15778746661961515, -0.13845545679459156};
constexpr int terms = 8;

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

// Pixels that are taken node by node, and sums over all others that serve every node.
template <class T> struct Scratch {
  Row<T> row;
  std::vector<T> ratios, far_counts, far_ratios, distance;
  std::vector<double> log_rates;

  Scratch(std::int64_t longest, int nodes)
      : row(longest), ratios(row.counts.size()), far_counts(row.counts.size()), far_ratios(row.counts.size()),
        distance(nodes + lanes), log_rates(nodes + lanes) {}
};

// Splits the lit pixels by |reach ratio|, reach being the farthest node. Where it is below 1/4, log(1 + distance ratio)
// is a polynomial for all nodes and moments[m] = sum y (reach ratio)^(m + 1) is all they need; the others are gathered.
// Returns how many those are.
XTALFAST_INLINE std::int64_t split(Scratch<float> &w, float reach, double *moments) {
  using V = Vector<float>;
  constexpr std::int64_t count = Lanes<float>::count, run = LongSum<float>::run * count;
  const Row<float> &row = w.row;
  const V none{};
  LongSum<float> sums[terms];
  std::int64_t far = 0;
  for (std::int64_t start = 0; start < row.lit_length; start += run) {
    const std::int64_t end = std::min(start + run, row.lit_length);
    for (std::int64_t j = start; j < end; j += count) {
      const V y = load(&row.lit_counts[j]);
      V z = reach * load(&w.ratios[j]);
      const V size = z > none ? z : -z;
      const auto outside = (size > 0.25f) & (y > none); // padding counts nothing
      std::int64_t words[4];
      std::memcpy(words, &outside, sizeof words);
      if ((words[0] | words[1]) | (words[2] | words[3]))
        for (int k = 0; k < count; ++k)
          if (outside[k]) {
            w.far_counts[far] = y[k];
            w.far_ratios[far++] = w.ratios[j + k];
          }
      // powers that would underflow count nothing, and would be slow
      z = outside || size < 0x1p-24f ? none : z;
      const V z2 = z * z, z4 = size < 0x1p-12f ? none : z2 * z2;
      V power[4] = {y * z, y * z2, y * z2 * z, y * z2 * z2};
      for (int m = 0; m < terms; m += 4)
        for (int k = 0; k < 4; ++k) {
          sums[m + k].part += power[k];
          power[k] *= z4;
        }
    }
    for (auto &one : sums)
      one.flush();
  }
  for (int m = 0; m < terms; ++m)
    moments[m] = sums[m].total();
  return far;
}

// In double precision every pixel is taken node by node.
XTALFAST_INLINE std::int64_t split(Scratch<double> &w, double, double *moments) {
  std::fill_n(moments, terms, 0.0);
  std::copy_n(w.row.lit_counts.data(), w.row.n_lit, w.far_counts.data());
  std::copy_n(w.ratios.data(), w.row.n_lit, w.far_ratios.data());
  return w.row.n_lit;
}

// sum y log(1 + distance ratio) over the gathered pixels, for L nodes.
template <class T, int L>
XTALFAST_INLINE void sweep(const Scratch<T> &w, std::int64_t length, const T *distance, double *log_rates) {
  const Vector<T> least = splat(static_cast<T>(1e-7));
  Vector<T> total[L] = {};
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count) {
    const Vector<T> y = load(&w.far_counts[j]), ratio = load(&w.far_ratios[j]);
    for (int k = 0; k < L; ++k)
      total[k] += y * vector_log(largest<T>(T(1) + distance[k] * ratio, least));
  }
  for (int k = 0; k < L; ++k)
    log_rates[k] = sum<T>(total[k]);
}

// sum y log(rate) at the nodes less that at the mode.
template <class T> XTALFAST_INLINE void rates_at_nodes(Scratch<T> &w, int nodes) {
  T reach = 0;
  for (int k = 0; k < nodes; ++k)
    reach = std::max(reach, std::abs(w.distance[k]));
  double moments[terms];
  const std::int64_t far = split(w, reach, moments), length = padded<T>(far);
  for (std::int64_t j = far; j < length; ++j)
    w.far_counts[j] = w.far_ratios[j] = T(0);
  for (int k = 0; k < nodes; k += lanes)
    sweep<T, lanes>(w, length, &w.distance[k], &w.log_rates[k]);
  for (int k = 0; k < nodes && far < w.row.n_lit; ++k) {
    const double step = double(w.distance[k]) / double(reach);
    double value = 0;
    for (int m = terms - 1; m >= 0; --m)
      value = (value + series[m] * moments[m]) * step;
    w.log_rates[k] += value;
  }
}

template <Isa isa, class T> XTALFAST_INLINE void one_box(const PosteriorArguments &s, std::int64_t box, Scratch<T> &w) {
  const std::int64_t n = s.boxes.n;
  Row<T> &row = w.row;
  load_row(s.boxes, box, row);
  std::copy_n(static_cast<const T *>(s.profile) + s.boxes.first(box), row.size, row.profile.data());
  add_up(row);
  gather_lit<isa>(row);
  const double a = s.prior[box], alpha = s.prior[n + box], c = s.prior[2 * n + box], beta = s.prior[3 * n + box];
  const double p_total = row.profile_sum + alpha, q_total = row.background_sum + beta;
  const double start = first_share(row, a, c, p_total, q_total);
  const T to_one = static_cast<T>(1 / (p_total > 0 ? p_total : 1)),
          to_zero = static_cast<T>(1 / (q_total > 0 ? q_total : 1));
  for (std::int64_t j = 0; j < row.lit_length; ++j) {
    row.lit_profile[j] *= to_one;
    row.lit_background[j] *= to_zero;
  }

  const T scale = static_cast<T>(q_total > 0 ? q_total : 1);
  const double mode = most_likely_share(row, a, c, start, s.tolerance).share;
  const ShareSums at = share_sums<T, true>(row, mode, scale, w.ratios.data());
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
  rates_at_nodes(w, s.nodes);
  std::copy_n(w.log_rates.data(), s.nodes, s.log_rates + box * s.nodes);

  const double factorials =
      LogFactorials::instance().of(row.lit_counts.data(), row.lit_length, whole_numbers(s.boxes.count_type));
  const double log_rate = at.log_rate - row.photons * std::log(static_cast<double>(scale));
  const double summary[7] = {p_total, q_total, row.photons, factorials, log_rate, s_low, s_high};
  for (int k = 0; k < 7; ++k)
    s.summary[k * n + box] = summary[k];
}

struct OneBox {
  template <Isa isa, class T>
  static XTALFAST_INLINE void run(const PosteriorArguments &s, const std::int64_t &box, Scratch<T> &w) {
    one_box<isa>(s, box, w);
  }
};

} // namespace

void intensity_posterior(const PosteriorArguments &s) {
  const std::int64_t longest = s.boxes.longest();
  const Isa isa = chosen_isa();
  LogFactorials::instance(); // made before the threads start
#pragma omp parallel num_threads(s.boxes.threads)
  {
    if (s.wide) {
      Scratch<double> scratch(longest, s.nodes);
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        run_with<OneBox>(isa, s, box, scratch);
    } else {
      Scratch<float> scratch(longest, s.nodes);
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        run_with<OneBox>(isa, s, box, scratch);
    }
  }
}

} // namespace xtalfast
