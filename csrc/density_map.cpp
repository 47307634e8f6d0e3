#include "density_map.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

// The kernels are compiled twice on x86: for AVX2, and for any processor. What they call is inlined into both.
#if defined(__GNUC__)
#define XTALFAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define XTALFAST_AVX2 __attribute__((target("avx2,fma")))
#endif
#else
#define XTALFAST_INLINE inline
#endif

namespace xtalfast {
namespace {

constexpr int block = 16; // elements that loops are padded to, so that they vectorise without a remainder

// 2^x for x <= 0 to 1e-7: the nearest integer into the exponent, a polynomial for the rest. Below 2^-126 it stays
// there.
inline float fast_exp2(float x) {
  x = x < -126.0f ? -126.0f : x;
  const float magic = 12582912.0f; // 1.5 x 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  float p = 1.32647e-3f; // least maximum relative error on [-1/2, 1/2] with p(0) = 1
  p = p * f + 9.67151e-3f;
  p = p * f + 5.550734e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
  std::int32_t n, bits;
  std::memcpy(&n, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += n << 23; // the magic's own bits are shifted out
  std::memcpy(&p, &bits, 4);
  return p;
}
inline double fast_exp2(double x) { return std::exp2(x); }

// An atom as a polynomial in r^2: one fused multiply-add a coefficient for eight voxels, where five exponentials take
// sixty instructions. By interpolation at N Chebyshev nodes of 0 <= r^2 <= r2_max. Sums of decaying exponentials have
// coefficients of alternating signs, so single precision loses nothing against the density at r = 0.
template <int N> class PolynomialFit {
public:
  PolynomialFit() {                         // coefficients = matrix x values at the nodes, x = 2 r^2 / r2_max - 1
    double chebyshev[N][N] = {{1}, {0, 1}}; // coefficients of T_k
    for (int k = 2; k < N; ++k)
      for (int i = 0; i < N; ++i)
        chebyshev[k][i] = (i > 0 ? 2 * chebyshev[k - 1][i - 1] : 0) - chebyshev[k - 2][i];
    for (int j = 0; j < N; ++j) {
      const double angle = pi * (j + 0.5) / N;
      node_[j] = std::cos(angle);
      for (int i = 0; i < N; ++i) {
        double sum = 0;
        for (int k = 0; k < N; ++k)
          sum += (k == 0 ? 1 : 2) * std::cos(k * angle) * chebyshev[k][i];
        matrix_[i][j] = sum / N;
      }
    }
  }

  void fit(const AtomShape<double> &shape, float *coefficient) const {
    double value[N];
    for (int j = 0; j < N; ++j)
      value[j] = atom_density(shape.weight, shape.decay, std::sqrt(0.5 * (node_[j] + 1) * shape.r2_max));
    for (int i = 0; i < N; ++i) {
      double sum = 0;
      for (int j = 0; j < N; ++j)
        sum += matrix_[i][j] * value[j];
      coefficient[i] = static_cast<float>(sum);
    }
  }

private:
  double node_[N], matrix_[N][N];
};

constexpr int low_order = 24, high_order = 28;
// Falls exp(-fall) of the fastest exponential over the atom up to which the fit is good to 1e-7 of that term.
constexpr double low_order_fall = 33, high_order_fall = 46;

// What a voxel needs of an atom.
template <class T> struct Profile {
  AtomShape<T> shape;
};
template <> struct Profile<float> {
  AtomShape<float> shape;
  float coefficient[high_order];
  float to_x; // x = to_x r^2 - 1
  int order;  // 0: too sharp for a polynomial
};

template <class T> Profile<T> make_profile(const double *form_factor, double b, double cutoff);
template <> Profile<double> make_profile(const double *form_factor, double b, double cutoff) {
  return {make_atom_shape<double>(form_factor, b, cutoff)};
}
template <> Profile<float> make_profile(const double *form_factor, double b, double cutoff) {
  static const PolynomialFit<low_order> low;
  static const PolynomialFit<high_order> high;
  const auto shape = make_atom_shape<double>(form_factor, b, cutoff);
  Profile<float> profile{};
  profile.shape.r2_max = static_cast<float>(shape.r2_max);
  double fall = 0;
  for (int m = 0; m < n_terms; ++m) {
    profile.shape.weight[m] = static_cast<float>(shape.weight[m]);
    profile.shape.decay[m] = static_cast<float>(shape.decay[m]);
    fall = std::max(fall, ln_2 * shape.decay[m] * shape.r2_max);
  }
  profile.order = fall <= low_order_fall ? low_order : fall <= high_order_fall ? high_order : 0;
  if (profile.order == low_order)
    low.fit(shape, profile.coefficient);
  else if (profile.order == high_order)
    high.fit(shape, profile.coefficient);
  profile.to_x = shape.r2_max > 0 ? static_cast<float>(2 / shape.r2_max) : 0.0f;
  return profile;
}

// occupancy x density at each r2, in place; n is a multiple of `block`.
template <class T> XTALFAST_INLINE void evaluate_terms(const AtomShape<T> shape, T occupancy, T *r2, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (int m = 0; m < n_terms; ++m)
      sum += shape.weight[m] * fast_exp2(-shape.decay[m] * r2[i]);
    r2[i] = occupancy * sum;
  }
}

template <int N>
XTALFAST_INLINE void evaluate_polynomial(const Profile<float> profile, float occupancy, float *r2, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = profile.to_x * r2[i] - 1.0f, x2 = x * x;
    float even = profile.coefficient[N - 2], odd = profile.coefficient[N - 1]; // two chains: half the latency
#pragma GCC unroll 16
    for (int k = N - 4; k >= 0; k -= 2) {
      even = even * x2 + profile.coefficient[k];
      odd = odd * x2 + profile.coefficient[k + 1];
    }
    r2[i] = occupancy * (odd * x + even);
  }
}

XTALFAST_INLINE void evaluate(const Profile<float> &profile, float occupancy, float *r2, std::int64_t n) {
  if (profile.order == low_order)
    evaluate_polynomial<low_order>(profile, occupancy, r2, n);
  else if (profile.order == high_order)
    evaluate_polynomial<high_order>(profile, occupancy, r2, n);
  else
    evaluate_terms(profile.shape, occupancy, r2, n);
}
XTALFAST_INLINE void evaluate(const Profile<double> &profile, double occupancy, double *r2, std::int64_t n) {
  evaluate_terms(profile.shape, occupancy, r2, n);
}

// Profiles of the last few pairs of element and B: the atoms of a model, and of its neighbours in a batch, share them.
template <class T> class ProfileCache {
public:
  const Profile<T> &get(const AtomMaps &maps, std::int64_t row, T b_iso) {
    const double b = static_cast<double>(b_iso) + maps.blur;
    for (const Entry &entry : entries_)
      if (entry.row == row && entry.b == b)
        return entry.profile;
    Entry &entry = entries_[next_];
    next_ = (next_ + 1) % size;
    entry = {row, b, make_profile<T>(maps.form_factors + 2 * n_terms * row, b, maps.cutoff)};
    return entry.profile;
  }

private:
  static constexpr int size = 8;
  struct Entry {
    std::int64_t row = -1;
    double b = 0;
    Profile<T> profile{};
  };
  Entry entries_[size];
  int next_ = 0;
};

// Without SSE4.1 std::floor is a call.
template <class T> inline std::int64_t floor_to_int(T x) {
  const auto i = static_cast<std::int64_t>(x);
  return i - (x < static_cast<T>(i));
}
template <class T> inline std::int64_t ceil_to_int(T x) {
  const auto i = static_cast<std::int64_t>(x);
  return i + (x > static_cast<T>(i));
}

template <class T> struct Row {
  std::int64_t start; // of the row of the grid, elements
  std::int64_t z;     // first point, within the cell
  std::int64_t count;
  T eta, zeta; // r^2 = zz (zeta + p)^2 + yy eta^2 + xx dx^2 at point p
};

// The rows of grid points of one plane x = const within an atom, one after the other.
template <class T> struct Plane {
  std::vector<Row<T>> rows;
  std::vector<T> values; // r^2 on return of `cut`
  std::int64_t n_rows = 0, used = 0;

  std::int64_t padded() const { return (used + block - 1) / block * block; }

  // Points of plane `i` (steps from the atom's base), all y and z, with r^2 <= r2_max.
  XTALFAST_INLINE void cut(const GridMetric<T> &m, const GridPosition<T> &at, T r2_max, std::int64_t i,
                           std::int64_t x) {
    n_rows = used = 0;
    const T dx = static_cast<T>(i) - at.rest[0];
    const T r2_plane = m.xx * dx * dx, left = r2_max - r2_plane;
    if (left < 0)
      return;
    const T yy = m.yy, zz = m.zz, per_z = 1 / zz, zy = m.zy;
    const T to_eta = m.yx * dx - at.rest[1], to_z = at.rest[2] - m.zx * dx + m.zy * at.rest[1];
    const T half_y = std::sqrt(left / yy);
    const std::int64_t j_begin = ceil_to_int(-to_eta - half_y), j_end = floor_to_int(half_y - to_eta) + 1;
    reserve(j_end - j_begin, static_cast<std::int64_t>(2 * std::sqrt(left * per_z)) + 2);
    Row<T> *row = rows.data();
    T *const first = values.data(), *r2 = first;
    for (std::int64_t j = j_begin; j < j_end; ++j) {
      const T eta = static_cast<T>(j) + to_eta, r2_axis = r2_plane + yy * eta * eta;
      if (r2_axis > r2_max)
        continue;
      const T z0 = to_z - zy * static_cast<T>(j), half_z = std::sqrt((r2_max - r2_axis) * per_z);
      const std::int64_t k = ceil_to_int(z0 - half_z), count = floor_to_int(z0 + half_z) - k + 1;
      if (count <= 0)
        continue;
      const T zeta = static_cast<T>(k) - z0;
      *row++ = {(x * m.n[1] + wrap(at.base[1] + j, m.n[1])) * m.n[2], wrap(at.base[2] + k, m.n[2]), count, eta, zeta};
      for (std::int64_t p = 0; p < count; p += 8) // writes past the row; the next row begins at its end
        for (int q = 0; q < 8; ++q) {
          const T dz = zeta + static_cast<T>(static_cast<int>(p) + q);
          r2[p + q] = r2_axis + zz * dz * dz;
        }
      r2 += count;
    }
    n_rows = row - rows.data();
    used = r2 - first;
    std::fill_n(r2, padded() - used, T(0));
  }

private:
  void reserve(std::int64_t most_rows, std::int64_t longest) {
    if (static_cast<std::int64_t>(rows.size()) < most_rows)
      rows.resize(2 * most_rows);
    const std::int64_t most = most_rows * longest + 2 * block;
    if (static_cast<std::int64_t>(values.size()) < most)
      values.resize(2 * most);
  }
};

// Calls f(first of the grid, first of the values, count) for each contiguous piece of the rows.
template <class T, class F> XTALFAST_INLINE void for_each_piece(const Plane<T> &plane, const GridMetric<T> &m, F f) {
  std::int64_t from = 0;
  for (std::int64_t r = 0; r < plane.n_rows; ++r) {
    const Row<T> &row = plane.rows[r];
    std::int64_t z = row.z, left = row.count;
    while (left > 0) {
      const std::int64_t count = std::min(left, m.n[2] - z);
      f(row.start + z, from, count);
      from += count;
      left -= count;
      z = 0;
    }
  }
}

template <class T> struct Workspace {
  Plane<T> plane;
  ProfileCache<T> profiles;
  std::vector<T> grad, by_b;
};

// Planes x_begin <= x < x_end of map `i`.
template <class T>
XTALFAST_INLINE void splat_slab(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end,
                                T *density, Workspace<T> &work) {
  const UnitCell cell = make_unit_cell(maps.cells + 6 * i);
  const GridMetric<T> m = make_grid_metric<T>(cell, maps.grid + 3 * i);
  T *map = density + maps.offset[i];
  std::fill(map + x_begin * m.n[1] * m.n[2], map + x_end * m.n[1] * m.n[2], T(0));
  for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom) {
    const T occupancy = static_cast<const T *>(maps.occupancy)[atom];
    const Profile<T> &profile = work.profiles.get(maps, maps.row[atom], static_cast<const T *>(maps.b_iso)[atom]);
    const auto at = make_grid_position(static_cast<const T *>(maps.coords) + 3 * atom, cell, maps.grid + 3 * i);
    const T r2_max = profile.shape.r2_max, half = std::sqrt(r2_max) * m.reach[0];
    const auto last = floor_to_int(at.rest[0] + half);
    Plane<T> &plane = work.plane;
    for (auto step = ceil_to_int(at.rest[0] - half); step <= last; ++step) {
      const std::int64_t x = wrap(at.base[0] + step, m.n[0]);
      if (x < x_begin || x >= x_end)
        continue;
      plane.cut(m, at, r2_max, step, x);
      evaluate(profile, occupancy, plane.values.data(), plane.padded());
      for_each_piece(plane, m, [&](std::int64_t to, std::int64_t from, std::int64_t count) {
        for (std::int64_t p = 0; p < count; ++p)
          map[to + p] += plane.values[from + p];
      });
    }
  }
}

#ifdef XTALFAST_AVX2
XTALFAST_AVX2 void splat_avx2(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end,
                              float *density, Workspace<float> &work) {
  splat_slab(maps, i, x_begin, x_end, density, work);
}
const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif

void splat_best(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end, float *density,
                Workspace<float> &work) {
#ifdef XTALFAST_AVX2
  if (has_avx2)
    return splat_avx2(maps, i, x_begin, x_end, density, work);
#endif
  splat_slab(maps, i, x_begin, x_end, density, work);
}
void splat_best(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end, double *density,
                Workspace<double> &work) {
  splat_slab(maps, i, x_begin, x_end, density, work);
}

template <class T> void splat(const AtomMaps &maps, T *density, int n_threads) {
  if (maps.n_maps == 0)
    return;
  // Slabs of x for the threads that would have no map of their own; each voxel is summed by one thread, atoms in order.
  const std::int64_t slabs = maps.n_maps >= n_threads ? 1 : (n_threads + maps.n_maps - 1) / maps.n_maps;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    Workspace<T> work;
#pragma omp for schedule(dynamic)
    for (std::int64_t job = 0; job < maps.n_maps * slabs; ++job) {
      const std::int64_t i = job / slabs, slab = job % slabs, n = maps.grid[3 * i];
      splat_best(maps, i, n * slab / slabs, n * (slab + 1) / slabs, density, work);
    }
  }
}

// Each term's change with B is (constant + linear x r2) x the term.
template <class T> struct ChangeWithB {
  T constant[n_terms], linear[n_terms];
};

// Turns the gradient at each point into gradient x density, its r2 into gradient x d density / d r2, and writes
// gradient x d density / d B.
template <class T>
XTALFAST_INLINE void differentiate(const AtomShape<T> shape, const ChangeWithB<T> change, T *__restrict r2,
                                   T *__restrict grad, T *__restrict by_b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    T value = 0, slope = 0, with_b = 0;
    for (int m = 0; m < n_terms; ++m) {
      const T term = shape.weight[m] * fast_exp2(-shape.decay[m] * r2[i]);
      value += term;
      slope -= T(ln_2) * shape.decay[m] * term;
      with_b += (change.constant[m] + change.linear[m] * r2[i]) * term;
    }
    r2[i] = grad[i] * slope;
    by_b[i] = grad[i] * with_b;
    grad[i] *= value;
  }
}

#ifdef XTALFAST_AVX2
XTALFAST_AVX2 void differentiate_avx2(const AtomShape<float> &shape, const ChangeWithB<float> &change, float *r2,
                                      float *grad, float *by_b, std::int64_t n) {
  differentiate(shape, change, r2, grad, by_b, n);
}
#endif

void differentiate_all(const AtomShape<float> &shape, const ChangeWithB<float> &change, float *r2, float *grad,
                       float *by_b, std::int64_t n) {
#ifdef XTALFAST_AVX2
  if (has_avx2)
    return differentiate_avx2(shape, change, r2, grad, by_b, n);
#endif
  differentiate(shape, change, r2, grad, by_b, n);
}
void differentiate_all(const AtomShape<double> &shape, const ChangeWithB<double> &change, double *r2, double *grad,
                       double *by_b, std::int64_t n) {
  differentiate(shape, change, r2, grad, by_b, n);
}

template <class T>
void differentiate_atom(const AtomMaps &maps, const AtomGradients &out, std::int64_t i, std::int64_t atom,
                        const UnitCell &cell, const GridMetric<T> &m, Workspace<T> &work) {
  const T *map = static_cast<const T *>(out.grad) + maps.offset[i];
  const T b_iso = static_cast<const T *>(maps.b_iso)[atom];
  const AtomShape<T> &shape = work.profiles.get(maps, maps.row[atom], b_iso).shape;
  ChangeWithB<T> change;
  for (int k = 0; k < n_terms; ++k) {
    const double width = maps.form_factors[2 * n_terms * maps.row[atom] + n_terms + k] + b_iso + maps.blur;
    change.constant[k] = static_cast<T>(-1.5 / width);
    change.linear[k] = static_cast<T>(4 * pi * pi / (width * width));
  }
  const T *xyz = static_cast<const T *>(maps.coords) + 3 * atom;
  const auto at = make_grid_position(xyz, cell, maps.grid + 3 * i);
  Plane<T> &plane = work.plane;
  double total = 0, total_b = 0, by_step[3] = {0, 0, 0}; // the last: gradient by the grid point less the atom
  const T half = std::sqrt(shape.r2_max) * m.reach[0];
  const auto last = floor_to_int(at.rest[0] + half);
  for (auto step = ceil_to_int(at.rest[0] - half); step <= last; ++step) {
    plane.cut(m, at, shape.r2_max, step, wrap(at.base[0] + step, m.n[0]));
    const std::int64_t n = plane.padded();
    if (static_cast<std::int64_t>(work.grad.size()) < n) {
      work.grad.resize(2 * n);
      work.by_b.resize(2 * n);
    }
    for_each_piece(plane, m, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
      std::copy_n(map + from, count, work.grad.data() + to);
    });
    std::fill(work.grad.begin() + plane.used, work.grad.begin() + n, T(0));
    differentiate_all(shape, change, plane.values.data(), work.grad.data(), work.by_b.data(), n);
    for (std::int64_t p = 0; p < plane.used; ++p) {
      total += work.grad[p];
      total_b += work.by_b[p];
    }
    const T *slope = plane.values.data();
    for (std::int64_t r = 0; r < plane.n_rows; ++r) {
      const Row<T> &row = plane.rows[r];
      double sum = 0, moment = 0;
      for (std::int64_t p = 0; p < row.count; ++p) {
        sum += slope[p];
        moment += slope[p] * (row.zeta + static_cast<T>(p));
      }
      slope += row.count;
      const double z = 2 * m.zz * moment, y = 2 * m.yy * row.eta * sum;
      by_step[2] += z;
      by_step[1] += y + m.zy * z;
      by_step[0] += 2 * m.xx * (static_cast<T>(step) - at.rest[0]) * sum + m.yx * y + m.zx * z;
    }
  }
  const double occupancy = static_cast<const T *>(maps.occupancy)[atom];
  static_cast<T *>(out.occupancy)[atom] = static_cast<T>(total);
  static_cast<T *>(out.b_iso)[atom] = static_cast<T>(occupancy * total_b);
  for (int x = 0; x < 3; ++x) {
    double sum = 0;
    for (int axis = 0; axis < 3; ++axis)
      sum -= m.to_grid[3 * axis + x] * by_step[axis];
    static_cast<T *>(out.coords)[3 * atom + x] = static_cast<T>(occupancy * sum);
  }
}

template <class T> void differentiate_maps(const AtomMaps &maps, const AtomGradients &out, int n_threads) {
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    Workspace<T> work;
    for (std::int64_t i = 0; i < maps.n_maps; ++i) {
      const UnitCell cell = make_unit_cell(maps.cells + 6 * i);
      const GridMetric<T> m = make_grid_metric<T>(cell, maps.grid + 3 * i);
#pragma omp for schedule(dynamic, 8) nowait
      for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom)
        differentiate_atom(maps, out, i, atom, cell, m, work);
    }
  }
}

} // namespace

void density_map(const AtomMaps &maps, void *density, int n_threads) {
  if (maps.wide)
    splat(maps, static_cast<double *>(density), n_threads);
  else
    splat(maps, static_cast<float *>(density), n_threads);
}

void density_map_backward(const AtomMaps &maps, const AtomGradients &out, int n_threads) {
  if (maps.wide)
    differentiate_maps<double>(maps, out, n_threads);
  else
    differentiate_maps<float>(maps, out, n_threads);
}

} // namespace xtalfast
