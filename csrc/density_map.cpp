#include "density_map.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "simd.hpp"

#define XTALFAST_INLINED __attribute__((always_inline)) // of a lambda

namespace xtalfast {
namespace {

constexpr int block = 16; // elements that loops are padded to, so that they vectorise without a remainder

// Sixteen voxels: one vector of AVX-512, two of AVX2.
typedef float Wide __attribute__((vector_size(64)));
typedef std::int32_t WideInt __attribute__((vector_size(64)));
constexpr int wide = 16;

// 2^x for x <= 0 to 1e-7: the nearest integer into the exponent, a polynomial for the rest. Below 2^-126 it stays
// there. V is float or Wide, I the integer of its size.
template <class V, class I> XTALFAST_INLINE V fast_exp2(V x) {
  x = x < -126.0f ? V{} - 126.0f : x;
  const float magic = 12582912.0f; // 1.5 x 2^23: adding it leaves the nearest integer in the low bits
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  V p = f * 1.32647e-3f + 9.67151e-3f; // least maximum relative error on [-1/2, 1/2] with p(0) = 1
  p = p * f + 5.550734e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
  I n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << 23; // the magic's own bits are shifted out
  std::memcpy(&p, &bits, sizeof bits);
  return p;
}
XTALFAST_INLINE float fast_exp2(float x) { return fast_exp2<float, std::uint32_t>(x); }
XTALFAST_INLINE double fast_exp2(double x) { return std::exp2(x); }

// An atom as a polynomial in r^2: one fused multiply-add a coefficient for sixteen voxels, where five exponentials take
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

// Density of an atom at each r2.
XTALFAST_INLINE Wide evaluate_terms(const Profile<float> &profile, Wide r2) {
  Wide sum{};
  for (int m = 0; m < n_terms; ++m)
    sum += profile.shape.weight[m] * fast_exp2<Wide, WideInt>(-profile.shape.decay[m] * r2);
  return sum;
}
template <int N> XTALFAST_INLINE Wide evaluate_polynomial(const Profile<float> &profile, Wide r2) {
  const Wide x = profile.to_x * r2 - 1.0f, x2 = x * x;
  Wide even = Wide{} + profile.coefficient[N - 2], odd = Wide{} + profile.coefficient[N - 1]; // half the latency of one
#pragma GCC unroll 16
  for (int k = N - 4; k >= 0; k -= 2) {
    even = even * x2 + profile.coefficient[k];
    odd = odd * x2 + profile.coefficient[k + 1];
  }
  return odd * x + even;
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

// The rows of one plane x = const within an atom: what `Plane` holds, for rows that are not cut in pieces.
struct RowSet {
  std::vector<float> r2_axis, zeta;
  std::vector<std::int32_t> z, count;

  void reserve(std::int64_t n) {
    if (static_cast<std::int64_t>(z.size()) >= n)
      return;
    for (auto *values : {&r2_axis, &zeta})
      values->resize(2 * n);
    for (auto *values : {&z, &count})
      values->resize(2 * n);
  }
};

template <class T> struct Workspace {
  Plane<T> plane;
  RowSet rows;
  ProfileCache<T> profiles;
  std::vector<T> grad, by_b, slab;
};

// Adds one atom to planes x_begin <= x < x_end, rows of `length` each: the first Z of its points, then room for what
// goes through the face of the cell and for whole vectors.
template <class Density>
XTALFAST_INLINE void add_atom(const GridMetric<float> &m, const GridPosition<float> &at, float r2_max,
                              std::int64_t x_begin, std::int64_t x_end, std::int64_t length, Workspace<float> &work,
                              Density density) {
  const float yy = m.yy, zz = m.zz, zy = m.zy, per_z = 1 / zz;
  const float half_x = std::sqrt(r2_max) * m.reach[0];
  const auto last = floor_to_int(at.rest[0] + half_x);
  Wide lane;
  for (int p = 0; p < wide; ++p)
    lane[p] = static_cast<float>(p);
  for (auto step = ceil_to_int(at.rest[0] - half_x); step <= last; ++step) {
    const std::int64_t x = wrap(at.base[0] + step, m.n[0]);
    const float dx = static_cast<float>(step) - at.rest[0], r2_plane = m.xx * dx * dx, left = r2_max - r2_plane;
    if (x < x_begin || x >= x_end || left < 0)
      continue;
    const float to_eta = m.yx * dx - at.rest[1], to_z = at.rest[2] - m.zx * dx + m.zy * at.rest[1];
    const float half_y = std::sqrt(left / yy);
    const auto first_y = static_cast<std::int32_t>(ceil_to_int(-to_eta - half_y));
    const auto n_rows = static_cast<std::int32_t>(floor_to_int(half_y - to_eta)) + 1 - first_y;
    if (n_rows <= 0)
      continue;
    work.rows.reserve(n_rows);
    float *r2_axis = work.rows.r2_axis.data(), *zeta = work.rows.zeta.data();
    std::int32_t *first_z = work.rows.z.data(), *count = work.rows.count.data();
    for (std::int32_t r = 0; r < n_rows; ++r) {
      const auto j = static_cast<float>(first_y + r);
      const float eta = j + to_eta, z0 = to_z - zy * j, r2 = r2_plane + yy * eta * eta, rest = (r2_max - r2) * per_z;
      const float half_z = std::sqrt(rest > 0 ? rest : 0.0f), low = z0 - half_z, high = z0 + half_z;
      auto begin = static_cast<std::int32_t>(low), end = static_cast<std::int32_t>(high);
      begin += static_cast<float>(begin) < low;
      end -= static_cast<float>(end) > high;
      r2_axis[r] = r2;
      zeta[r] = static_cast<float>(begin) - z0;
      first_z[r] = begin;
      count[r] = rest < 0 ? 0 : end - begin + 1;
    }
    float *plane = work.slab.data() + (x - x_begin) * m.n[1] * length;
    for (std::int32_t r = 0; r < n_rows; ++r) {
      float *row = plane + wrap(at.base[1] + first_y + r, m.n[1]) * length + wrap(at.base[2] + first_z[r], m.n[2]);
      for (std::int32_t p = 0; p < count[r]; p += wide) {
        const Wide dz = lane + (zeta[r] + static_cast<float>(p)), r2 = zz * dz * dz + r2_axis[r];
        Wide sum;
        std::memcpy(&sum, row + p, sizeof sum);
        sum += r2 <= r2_max ? density(r2) : Wide{};
        std::memcpy(row + p, &sum, sizeof sum);
      }
    }
  }
}

// Planes x_begin <= x < x_end of map `i`.
XTALFAST_INLINE void splat_slab(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end,
                                float *density, Workspace<float> &work) {
  const UnitCell cell = make_unit_cell(maps.cells + 6 * i);
  const GridMetric<float> m = make_grid_metric<float>(cell, maps.grid + 3 * i);
  const auto profile_of = [&](std::int64_t atom) -> const Profile<float> & {
    return work.profiles.get(maps, maps.row[atom], static_cast<const float *>(maps.b_iso)[atom]);
  };
  float largest = 0;
  for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom)
    largest = std::max(largest, profile_of(atom).shape.r2_max);
  const auto beyond = static_cast<std::int64_t>(2 * std::sqrt(largest / m.zz)) + 2; // points of the longest row
  const std::int64_t n_rows = (x_end - x_begin) * m.n[1], n_z = m.n[2], length = n_z + beyond + wide;
  work.slab.assign(n_rows * length, 0.0f);
  for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom) {
    const float occupancy = static_cast<const float *>(maps.occupancy)[atom];
    const Profile<float> &profile = profile_of(atom);
    const auto at = make_grid_position(static_cast<const float *>(maps.coords) + 3 * atom, cell, maps.grid + 3 * i);
    // Inlined, or they would be compiled for the least processor only.
    const auto add = [&](auto density) XTALFAST_INLINED {
      add_atom(m, at, profile.shape.r2_max, x_begin, x_end, length, work, density);
    };
    if (profile.order == low_order)
      add([&](Wide r2) XTALFAST_INLINED { return occupancy * evaluate_polynomial<low_order>(profile, r2); });
    else if (profile.order == high_order)
      add([&](Wide r2) XTALFAST_INLINED { return occupancy * evaluate_polynomial<high_order>(profile, r2); });
    else
      add([&](Wide r2) XTALFAST_INLINED { return occupancy * evaluate_terms(profile, r2); });
  }
  float *to = density + maps.offset[i] + x_begin * m.n[1] * n_z;
  for (std::int64_t row = 0; row < n_rows; ++row, to += n_z) {
    const float *from = work.slab.data() + row * length;
    std::copy_n(from, n_z, to);
    for (std::int64_t start = n_z; start < n_z + beyond; start += n_z) // through the face, more than once in tiny cells
      for (std::int64_t z = 0, end = std::min(n_z, n_z + beyond - start); z < end; ++z)
        to[z] += from[start + z];
  }
}

XTALFAST_INLINE void splat_slab(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end,
                                double *density, Workspace<double> &work) {
  const UnitCell cell = make_unit_cell(maps.cells + 6 * i);
  const auto m = make_grid_metric<double>(cell, maps.grid + 3 * i);
  double *map = density + maps.offset[i];
  std::fill(map + x_begin * m.n[1] * m.n[2], map + x_end * m.n[1] * m.n[2], 0.0);
  for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom) {
    const double occupancy = static_cast<const double *>(maps.occupancy)[atom];
    const AtomShape<double> &shape =
        work.profiles.get(maps, maps.row[atom], static_cast<const double *>(maps.b_iso)[atom]).shape;
    const auto at = make_grid_position(static_cast<const double *>(maps.coords) + 3 * atom, cell, maps.grid + 3 * i);
    const double half = std::sqrt(shape.r2_max) * m.reach[0];
    const auto last = floor_to_int(at.rest[0] + half);
    Plane<double> &plane = work.plane;
    for (auto step = ceil_to_int(at.rest[0] - half); step <= last; ++step) {
      const std::int64_t x = wrap(at.base[0] + step, m.n[0]);
      if (x < x_begin || x >= x_end)
        continue;
      plane.cut(m, at, shape.r2_max, step, x);
      for (std::int64_t p = 0; p < plane.used; ++p) {
        double sum = 0;
        for (int k = 0; k < n_terms; ++k)
          sum += shape.weight[k] * fast_exp2(-shape.decay[k] * plane.values[p]);
        plane.values[p] = occupancy * sum;
      }
      for_each_piece(plane, m, [&](std::int64_t to, std::int64_t from, std::int64_t count) {
        for (std::int64_t p = 0; p < count; ++p)
          map[to + p] += plane.values[from + p];
      });
    }
  }
}

XTALFAST_CLONES void splat_one(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end,
                               float *density, Workspace<float> &work) {
  splat_slab(maps, i, x_begin, x_end, density, work);
}
void splat_one(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end, double *density,
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
      splat_one(maps, i, n * slab / slabs, n * (slab + 1) / slabs, density, work);
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

XTALFAST_CLONES void differentiate_all(const AtomShape<float> &shape, const ChangeWithB<float> &change, float *r2,
                                       float *grad, float *by_b, std::int64_t n) {
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
