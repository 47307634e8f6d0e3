#include "profile_fit.hpp"

#include "lit.hpp"
#include "share.hpp"

namespace xtalfast {
namespace {

// 1 - cosine^2 between profile and background below which rounding decides: as in the Python reference.
template <class T> constexpr double singular = sizeof(T) == sizeof(double) ? 1e-12 : 1e-6;

// Pearson's correlation of the counts and the rates I p + B b over the used pixels.
template <class T> XTALFAST_INLINE double correlation(const Row<T> &row, T i, T b) {
  const Vector<T> none{};
  Vector<T> used_sum{};
  for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count)
    used_sum += load(&row.used[j]);
  const T n = std::max(sum<T>(used_sum), T(1));
  const T mean_rate = (i * row.profile_sum + b * row.background_sum) / n, mean_counts = row.photons / n;
  Vector<T> cross{}, rate_2{}, counts_2{};
  for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count) {
    const auto on = load(&row.used[j]) != none;
    const Vector<T> rate = i * load(&row.profile[j]) + b * load(&row.background[j]) - mean_rate;
    const Vector<T> u = on ? rate : none, v = on ? load(&row.counts[j]) - mean_counts : none;
    cross += u * v;
    rate_2 += u * u;
    counts_2 += v * v;
  }
  const double norm = std::sqrt(double(sum<T>(rate_2)) * double(sum<T>(counts_2)));
  return norm > 0 ? sum<T>(cross) / norm : 0.0;
}

// Weighted normal equations.
struct Normal {
  double pp, pb, bb, py, by;

  double determinant() const { return pp * bb - pb * pb; }
  template <class T> bool solvable() const { return determinant() > singular<T> * pp * bb; }
};

template <class T> XTALFAST_INLINE Normal normal_equations(const Row<T> &row, T i_ref, T b_ref) {
  const Vector<T> none{}, tiny = splat(static_cast<T>(smallest_rate));
  LongSum<T> pp, pb, bb, py, by;
  constexpr std::int64_t run = LongSum<T>::run * Lanes<T>::count;
  for (std::int64_t start = 0; start < row.length; start += run) {
    const std::int64_t end = std::min(start + run, row.length);
    for (std::int64_t j = start; j < end; j += Lanes<T>::count) {
      const Vector<T> p = load(&row.profile[j]), b = load(&row.background[j]), y = load(&row.counts[j]);
      const auto on = load(&row.used[j]) != none;
      const Vector<T> weight = on ? T(1) / largest<T>(i_ref * p + b_ref * b, tiny) : none;
      const Vector<T> wp = weight * p, wb = weight * b;
      pp.part += wp * p;
      pb.part += wp * b;
      bb.part += wb * b;
      py.part += wp * y;
      by.part += wb * y;
    }
    for (auto *one : {&pp, &pb, &bb, &py, &by})
      one->flush();
  }
  return {pp.total(), pb.total(), bb.total(), py.total(), by.total()};
}

struct Fit {
  double i = 0, b = 0;
  Normal normal{};
  std::int64_t iterations = 1;
  bool solvable = false, converged = false;
};

template <class T> XTALFAST_INLINE Fit linear(const Row<T> &row, double i_ref, double b_ref) {
  Fit fit;
  const Normal n = fit.normal = normal_equations(row, static_cast<T>(i_ref), static_cast<T>(b_ref));
  fit.solvable = fit.converged = n.template solvable<T>();
  fit.i = (n.bb * n.py - n.pb * n.by) / n.determinant();
  fit.b = (n.pp * n.by - n.pb * n.py) / n.determinant();
  return fit;
}

// At the maximum over I, B >= 0 the rates sum to the counts, so that only the share of the spot is searched.
template <Isa isa, class T> XTALFAST_INLINE Fit most_likely(Row<T> &row, double tolerance, double least_background) {
  Fit fit;
  fit.solvable = normal_equations(row, T(1), T(1)).template solvable<T>();
  const double p_total = fit.solvable ? row.profile_sum : 1, b_total = fit.solvable ? row.background_sum : 1;
  gather_lit<isa>(row);
  const T to_one = static_cast<T>(1 / p_total), to_zero = static_cast<T>(1 / b_total);
  for (std::int64_t j = 0; j < row.lit_length; ++j) {
    row.lit_profile[j] *= to_one;
    row.lit_background[j] *= to_zero;
  }
  const ShareMaximum top = most_likely_share(row, 0.0, 0.0, first_share(row, 0.0, 0.0, p_total, b_total), tolerance);
  const double total = fit.solvable ? row.photons : 0;
  fit.i = total * top.share / p_total;
  fit.b = total * (1 - top.share) / b_total;
  fit.iterations = top.steps;
  fit.converged = top.found && fit.solvable;
  fit.normal = normal_equations(row, static_cast<T>(fit.i), static_cast<T>(std::max(fit.b, least_background)));
  fit.solvable = fit.normal.template solvable<T>();
  return fit;
}

struct OneBox {
  template <Isa isa, class T>
  static XTALFAST_INLINE void run(const ProfileFitArguments &s, const std::int64_t &box, Row<T> &row) {
    const std::int64_t n = s.boxes.n;
    load_row(s.boxes, box, row);
    std::copy_n(static_cast<const T *>(s.profile) + s.boxes.first(box), row.size, row.profile.data());
    add_up(row);
    const Fit fit =
        s.at ? linear(row, s.at[box], s.at[n + box]) : most_likely<isa>(row, s.tolerance, s.least_background);
    double out[6] = {s.at ? 0 : fit.i, INFINITY, s.at ? 0 : fit.b, INFINITY, 0, 0};
    if (fit.solvable) {
      const double inverse = 1 / fit.normal.determinant();
      const double found[] = {fit.i, fit.normal.bb * inverse, fit.b, fit.normal.pp * inverse, -fit.normal.pb * inverse};
      std::copy_n(found, 5, out);
    }
    if (fit.solvable || !s.at)
      out[5] = correlation(row, static_cast<T>(out[0]), static_cast<T>(out[2]));
    for (int k = 0; k < 6; ++k)
      s.fit[k * n + box] = out[k];
    s.iterations[box] = fit.iterations;
    s.converged[box] = fit.converged;
  }
};

} // namespace

void profile_fit(const ProfileFitArguments &s) {
  const std::int64_t longest = s.boxes.longest();
  const Isa isa = chosen_isa();
#pragma omp parallel num_threads(s.boxes.threads)
  {
    if (s.wide) {
      Row<double> row(longest);
#pragma omp for schedule(dynamic, 64)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        run_with<OneBox>(isa, s, box, row);
    } else {
      Row<float> row(longest);
#pragma omp for schedule(dynamic, 64)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        run_with<OneBox>(isa, s, box, row);
    }
  }
}

} // namespace xtalfast
