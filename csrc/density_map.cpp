#include "density_map.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define XTALFAST_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define XTALFAST_CLONES
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

// Density at each r2, in place; n is a multiple of `block`.
template <class T>
inline __attribute__((always_inline)) void evaluate(const AtomShape<T> shape, T *r2, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (int m = 0; m < n_terms; ++m)
      sum += shape.weight[m] * fast_exp2(-shape.decay[m] * r2[i]);
    r2[i] = sum;
  }
}

XTALFAST_CLONES void evaluate_all(const AtomShape<float> &shape, float *r2, std::int64_t n) { evaluate(shape, r2, n); }
void evaluate_all(const AtomShape<double> &shape, double *r2, std::int64_t n) { evaluate(shape, r2, n); }

// Shape of the last atom that had this element and B: neighbours often share both.
template <class T> class ShapeCache {
public:
  const AtomShape<T> &get(const AtomMaps &maps, std::int64_t row, T b_iso) {
    const double b = static_cast<double>(b_iso) + maps.blur;
    for (const Entry &entry : entries_)
      if (entry.row == row && entry.b == b)
        return entry.shape;
    Entry &entry = entries_[next_];
    next_ = (next_ + 1) % size;
    entry = {row, b, make_atom_shape<T>(maps.form_factors + 2 * n_terms * row, b, maps.cutoff)};
    return entry.shape;
  }

private:
  static constexpr int size = 8;
  struct Entry {
    std::int64_t row = -1;
    double b = 0;
    AtomShape<T> shape{};
  };
  Entry entries_[size];
  int next_ = 0;
};

template <class T> struct Row {
  std::int64_t start; // of the row of the grid, elements
  std::int64_t z;     // first point, within the cell
  std::int64_t count;
  T eta, zeta; // r^2 = zz (zeta + p)^2 + yy eta^2 + xx dx^2 at point p
};

// The rows of grid points of one plane x = const within an atom, one after the other.
template <class T> struct Plane {
  std::vector<Row<T>> rows;
  std::vector<T> values; // r2 on return of `cut`

  // Points of plane `i` (steps from the atom's base), all y and z, with r^2 <= r2_max.
  void cut(const GridMetric<T> &m, const GridPosition<T> &at, T r2_max, std::int64_t i, std::int64_t x) {
    rows.clear();
    used = 0;
    const T dx = static_cast<T>(i) - at.rest[0];
    const T left = r2_max - m.xx * dx * dx;
    if (left < 0)
      return;
    const T y0 = at.rest[1] - m.yx * dx, half_y = std::sqrt(left / m.yy);
    const T per_z = 1 / m.zz;
    const auto j_end = static_cast<std::int64_t>(std::floor(y0 + half_y));
    for (auto j = static_cast<std::int64_t>(std::ceil(y0 - half_y)); j <= j_end; ++j) {
      const T dy = static_cast<T>(j) - at.rest[1], eta = dy + m.yx * dx;
      const T rest = left - m.yy * eta * eta;
      if (rest < 0)
        continue;
      const T z0 = at.rest[2] - m.zx * dx - m.zy * dy, half_z = std::sqrt(rest * per_z);
      const auto k = static_cast<std::int64_t>(std::ceil(z0 - half_z));
      const std::int64_t count = static_cast<std::int64_t>(std::floor(z0 + half_z)) - k + 1;
      if (count <= 0)
        continue;
      const std::int64_t y = wrap(at.base[1] + j, m.n[1]);
      const T zeta = static_cast<T>(k) - z0;
      rows.push_back({(x * m.n[1] + y) * m.n[2], wrap(at.base[2] + k, m.n[2]), count, eta, zeta});
      if (static_cast<std::int64_t>(values.size()) < used + count + 2 * block)
        values.resize(2 * (used + count + 2 * block));
      T *r2 = values.data() + used;
      const T base = r2_max - rest;
      for (std::int64_t p = 0; p < count; p += 8) // writes past the row; the next row begins at its end
        for (int q = 0; q < 8; ++q) {
          const T dz = zeta + static_cast<T>(p + q);
          r2[p + q] = base + m.zz * dz * dz;
        }
      used += count;
    }
    std::fill_n(values.begin() + used, padded() - used, T(0));
  }
  std::int64_t padded() const { return (used + block - 1) / block * block; }

  std::int64_t used = 0;
};

// Calls f(first of the grid, first of the values, count) for each contiguous piece of the rows.
template <class T, class F> void for_each_piece(const Plane<T> &plane, const GridMetric<T> &m, F f) {
  std::int64_t from = 0;
  for (const Row<T> &row : plane.rows) {
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

// Planes x_begin <= x < x_end of map `i`.
template <class T>
void splat_slab(const AtomMaps &maps, std::int64_t i, std::int64_t x_begin, std::int64_t x_end, T *density,
                Plane<T> &plane, ShapeCache<T> &shapes) {
  const double *frac = maps.frac + 9 * i;
  const GridMetric<T> m = make_grid_metric<T>(maps.orth + 9 * i, frac, maps.grid + 3 * i);
  T *map = density + maps.offset[i];
  std::fill(map + x_begin * m.n[1] * m.n[2], map + x_end * m.n[1] * m.n[2], T(0));
  for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom) {
    const T occupancy = static_cast<const T *>(maps.occupancy)[atom];
    AtomShape<T> shape = shapes.get(maps, maps.row[atom], static_cast<const T *>(maps.b_iso)[atom]);
    for (T &weight : shape.weight)
      weight *= occupancy;
    const auto at = make_grid_position(static_cast<const T *>(maps.coords) + 3 * atom, frac, maps.grid + 3 * i);
    const T half = std::sqrt(shape.r2_max) * m.reach[0];
    const auto last = static_cast<std::int64_t>(std::floor(at.rest[0] + half));
    for (auto step = static_cast<std::int64_t>(std::ceil(at.rest[0] - half)); step <= last; ++step) {
      const std::int64_t x = wrap(at.base[0] + step, m.n[0]);
      if (x < x_begin || x >= x_end)
        continue;
      plane.cut(m, at, shape.r2_max, step, x);
      evaluate_all(shape, plane.values.data(), plane.padded());
      for_each_piece(plane, m, [&](std::int64_t to, std::int64_t from, std::int64_t count) {
        for (std::int64_t p = 0; p < count; ++p)
          map[to + p] += plane.values[from + p];
      });
    }
  }
}

template <class T> void splat(const AtomMaps &maps, T *density, int n_threads) {
  // Slabs of x for the threads that would have no map of their own; each voxel is summed by one thread, atoms in order.
  const std::int64_t slabs = maps.n_maps >= n_threads ? 1 : (n_threads + maps.n_maps - 1) / maps.n_maps;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    Plane<T> plane;
    ShapeCache<T> shapes;
#pragma omp for schedule(dynamic)
    for (std::int64_t job = 0; job < maps.n_maps * slabs; ++job) {
      const std::int64_t i = job / slabs, slab = job % slabs, n = maps.grid[3 * i];
      splat_slab(maps, i, n * slab / slabs, n * (slab + 1) / slabs, density, plane, shapes);
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
inline __attribute__((always_inline)) void differentiate(const AtomShape<T> shape, const ChangeWithB<T> change,
                                                         T *__restrict r2, T *__restrict grad, T *__restrict by_b,
                                                         std::int64_t n) {
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

template <class T> struct Workspace {
  Plane<T> plane;
  ShapeCache<T> shapes;
  std::vector<T> grad, by_b;
};

template <class T>
void differentiate_atom(const AtomMaps &maps, const AtomGradients &out, std::int64_t i, std::int64_t atom,
                        const GridMetric<T> &m, Workspace<T> &work) {
  const T *map = static_cast<const T *>(out.grad) + maps.offset[i];
  const T b_iso = static_cast<const T *>(maps.b_iso)[atom];
  const AtomShape<T> &shape = work.shapes.get(maps, maps.row[atom], b_iso);
  ChangeWithB<T> change;
  for (int k = 0; k < n_terms; ++k) {
    const double width = maps.form_factors[2 * n_terms * maps.row[atom] + n_terms + k] + b_iso + maps.blur;
    change.constant[k] = static_cast<T>(-1.5 / width);
    change.linear[k] = static_cast<T>(4 * pi * pi / (width * width));
  }
  const T *xyz = static_cast<const T *>(maps.coords) + 3 * atom;
  const auto at = make_grid_position(xyz, maps.frac + 9 * i, maps.grid + 3 * i);
  Plane<T> &plane = work.plane;
  double total = 0, total_b = 0, by_step[3] = {0, 0, 0}; // the last: gradient by the grid point less the atom
  const T half = std::sqrt(shape.r2_max) * m.reach[0];
  const auto last = static_cast<std::int64_t>(std::floor(at.rest[0] + half));
  for (auto step = static_cast<std::int64_t>(std::ceil(at.rest[0] - half)); step <= last; ++step) {
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
    for (const Row<T> &row : plane.rows) {
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
      const GridMetric<T> m = make_grid_metric<T>(maps.orth + 9 * i, maps.frac + 9 * i, maps.grid + 3 * i);
#pragma omp for schedule(dynamic, 8) nowait
      for (std::int64_t atom = maps.ptr[i]; atom < maps.ptr[i + 1]; ++atom)
        differentiate_atom(maps, out, i, atom, m, work);
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
