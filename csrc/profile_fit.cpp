#include "profile_fit.hpp"

namespace xtalfast {
namespace {

constexpr double singular = 1e-12; // 1 - cosine^2 between profile and background: as in the Python reference

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

template <class T> XTALFAST_INLINE void one_box(const ProfileFitArguments &s, std::int64_t box, Row<T> &row) {
  const std::int64_t n = s.boxes.n;
  load_row(s.boxes, box, row);
  std::copy_n(static_cast<const T *>(s.profile) + s.boxes.first(box), row.size, row.profile.data());
  add_up(row);
  const T i_ref = static_cast<T>(s.at[box]), b_ref = static_cast<T>(s.at[n + box]);
  const Vector<T> none{}, tiny = splat(static_cast<T>(smallest_rate));
  Vector<T> pp{}, pb{}, bb{}, py{}, by{};
  for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count) {
    const Vector<T> p = load(&row.profile[j]), b = load(&row.background[j]), y = load(&row.counts[j]);
    const auto on = load(&row.used[j]) != none;
    const Vector<T> weight = on ? T(1) / largest<T>(i_ref * p + b_ref * b, tiny) : none;
    const Vector<T> wp = weight * p, wb = weight * b;
    pp += wp * p;
    pb += wp * b;
    bb += wb * b;
    py += wp * y;
    by += wb * y;
  }
  const double a = sum<T>(pp), c = sum<T>(pb), d = sum<T>(bb), e = sum<T>(py), f = sum<T>(by);
  const double determinant = a * d - c * c;
  const bool solvable = determinant > singular * a * d;
  double out[6] = {0, INFINITY, 0, INFINITY, 0, 0};
  if (solvable) {
    out[0] = (d * e - c * f) / determinant;
    out[1] = d / determinant;
    out[2] = (a * f - c * e) / determinant;
    out[3] = a / determinant;
    out[4] = -c / determinant;
    out[5] = correlation(row, static_cast<T>(out[0]), static_cast<T>(out[2]));
  }
  for (int k = 0; k < 6; ++k)
    s.fit[k * n + box] = out[k];
  s.solvable[box] = solvable;
}

XTALFAST_CLONES void box_float(const ProfileFitArguments &s, std::int64_t box, Row<float> &row) {
  one_box(s, box, row);
}
XTALFAST_CLONES void box_double(const ProfileFitArguments &s, std::int64_t box, Row<double> &row) {
  one_box(s, box, row);
}

} // namespace

void profile_fit(const ProfileFitArguments &s) {
  const std::int64_t longest = s.boxes.longest();
#pragma omp parallel num_threads(s.boxes.threads)
  {
    if (s.wide) {
      Row<double> row(longest);
#pragma omp for schedule(dynamic, 64)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        box_double(s, box, row);
    } else {
      Row<float> row(longest);
#pragma omp for schedule(dynamic, 64)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        box_float(s, box, row);
    }
  }
}

} // namespace xtalfast
