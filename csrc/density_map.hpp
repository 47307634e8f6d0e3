// Electron density of atoms on the grids of their unit cells, and its gradients. The definition, in plain torch, is
// xtalfast/ops/density_map.py.
#pragma once

#include "unit_cell.hpp"

namespace xtalfast {

// Atoms ptr[i] to ptr[i + 1] belong to map i, which is written from voxel offset[i] on, Z fastest. `T`s are float or
// double, see `wide`.
struct AtomMaps {
  const void *coords;         // T [n_atoms, 3], A
  const std::int64_t *row;    // [n_atoms] row of `form_factors`: the atomic number
  const void *b_iso;          // T [n_atoms], A^2
  const void *occupancy;      // T [n_atoms]
  const double *form_factors; // [n_rows, 10]: a1 .. a4, c, b1 .. b4, 0
  const std::int64_t *ptr;    // [n_maps + 1]
  const double *cells;        // [n_maps, 6] a, b, c (A), alpha, beta, gamma (deg)
  const std::int64_t *grid;   // [n_maps, 3]
  const std::int64_t *offset; // [n_maps + 1]
  std::int64_t n_maps, n_atoms;
  double cutoff; // e/A^3: an atom ends where its density at full occupancy falls to this
  double blur;   // A^2, added to every B
  bool wide;     // double, else float
};

// Gradients of sum(grad * density), each like its argument; written for every atom.
struct AtomGradients {
  const void *grad; // T, like the density
  void *coords, *b_iso, *occupancy;
};

// On the processor, `n_threads` threads; the bits do not depend on their number.
void density_map(const AtomMaps &maps, void *density, int n_threads);
void density_map_backward(const AtomMaps &maps, const AtomGradients &out, int n_threads);

// Bricks of density_brick^3 voxels (fewer at the far sides of a cell): map i holds ptr[i] to ptr[i + 1] of the n.
struct DensityBricks {
  const std::int64_t *ptr; // [n_maps + 1]
  std::int64_t n;
  void *workspace; // density_map_workspace(maps) bytes
};
constexpr int density_brick = 8;
std::int64_t density_map_workspace(const AtomMaps &maps);

// On the device that owns the pointers, without atomics. Return a cudaError_t (0: launched).
int density_map_cuda(const AtomMaps &maps, const DensityBricks &bricks, void *density, void *stream);
int density_map_backward_cuda(const AtomMaps &maps, const AtomGradients &out, void *stream);

// What both implementations share: the shape of an atom and of the grid it stands on.

constexpr int n_terms = 5;

// rho(r) = sum_m weight_m exp2(-decay_m r^2), e/A^3.
template <class T> struct AtomShape {
  T weight[n_terms], decay[n_terms];
  T r2_max; // A^2
};

inline XTALFAST_HD double atom_density(const double *weight, const double *decay, double r) {
  double sum = 0;
  for (int m = 0; m < n_terms; ++m)
    sum += weight[m] * exp2(-decay[m] * r * r);
  return sum;
}

// Where the density falls to `cutoff`, by interpolation between two radii half an angstrom apart. The first guess,
// which sets the two radii, is gemmi's, so that atoms end where its atoms end.
inline XTALFAST_HD double cutoff_radius(const double *weight, const double *decay, double b, double cutoff) {
  double inner = (8.5 + 0.075 * b) / (2.4 + 0.0045 * b), outer = inner;
  double at_inner = atom_density(weight, decay, inner), at_outer = at_inner;
  while (at_inner < cutoff) {
    outer = inner;
    at_outer = at_inner;
    inner -= 0.5;
    if (inner <= 0)
      return 0;
    at_inner = atom_density(weight, decay, inner);
  }
  while (at_outer >= cutoff) {
    inner = outer;
    at_inner = at_outer;
    outer += 0.5;
    at_outer = atom_density(weight, decay, outer);
  }
  return inner + (outer - inner) * (at_inner - cutoff) / (at_inner - at_outer);
}

// A scattering factor sum_m a_m exp(-b_m s^2 / 4) at displacement B is, in real space, sum_m a_m (4 pi / (b_m + B))^1.5
// exp(-4 pi^2 r^2 / (b_m + B)).
template <class T> inline XTALFAST_HD AtomShape<T> make_atom_shape(const double *form_factor, double b, double cutoff) {
  double weight[n_terms], decay[n_terms];
  AtomShape<T> shape;
  for (int m = 0; m < n_terms; ++m) {
    const double t = 4 * pi / (form_factor[n_terms + m] + b);
    weight[m] = form_factor[m] * t * std::sqrt(t);
    decay[m] = pi * t / ln_2;
    shape.weight[m] = static_cast<T>(weight[m]);
    shape.decay[m] = static_cast<T>(decay[m]);
  }
  const double radius = cutoff_radius(weight, decay, b, cutoff);
  shape.r2_max = static_cast<T>(radius * radius);
  return shape;
}

// For a step (i, j, k) of grid points: r^2 = zz (k + zx i + zy j)^2 + yy (j + yx i)^2 + xx i^2 (Cholesky), so that the
// rows and the columns within a distance are intervals, without cancellation.
template <class T> struct GridMetric {
  T xx, yy, zz, yx, zx, zy;
  T reach[3];   // grid steps per angstrom perpendicular to the other two axes
  T to_grid[9]; // grid = to_grid x Cartesian
  std::int64_t n[3];
};

template <class T> inline XTALFAST_HD GridMetric<T> make_grid_metric(const UnitCell &cell, const std::int64_t *grid) {
  double g[3][3];
  GridMetric<T> m;
  for (int i = 0; i < 3; ++i) {
    m.n[i] = grid[i];
    double norm2 = 0;
    for (int j = 0; j < 3; ++j) {
      g[i][j] = 0;
      for (int x = 0; x < 3; ++x)
        g[i][j] += cell.orth[3 * x + i] * cell.orth[3 * x + j];
      g[i][j] /= static_cast<double>(grid[i]) * static_cast<double>(grid[j]);
      const double to_grid = cell.frac[3 * i + j] * static_cast<double>(grid[i]);
      m.to_grid[3 * i + j] = static_cast<T>(to_grid);
      norm2 += to_grid * to_grid;
    }
    m.reach[i] = static_cast<T>(std::sqrt(norm2));
  }
  const double zx = g[0][2] / g[2][2], zy = g[1][2] / g[2][2];
  const double yy = g[1][1] - g[1][2] * zy, xy = g[0][1] - g[0][2] * zy, yx = xy / yy;
  m.zz = static_cast<T>(g[2][2]);
  m.zx = static_cast<T>(zx);
  m.zy = static_cast<T>(zy);
  m.yy = static_cast<T>(yy);
  m.yx = static_cast<T>(yx);
  m.xx = static_cast<T>(g[0][0] - g[0][2] * zx - xy * yx);
  return m;
}

// Position in grid steps, split so that single precision loses nothing far from the origin.
template <class T> struct GridPosition {
  std::int64_t base[3]; // within the cell
  T rest[3];            // 0 <= rest < 1 (or 1, by rounding)
};

template <class T>
inline XTALFAST_HD GridPosition<T> make_grid_position(const T *xyz, const UnitCell &cell, const std::int64_t *grid) {
  const double *frac = cell.frac;
  GridPosition<T> p;
  for (int i = 0; i < 3; ++i) {
    double f = frac[3 * i] * static_cast<double>(xyz[0]) + frac[3 * i + 1] * static_cast<double>(xyz[1]) +
               frac[3 * i + 2] * static_cast<double>(xyz[2]);
    f = (f - std::floor(f)) * static_cast<double>(grid[i]);
    const double base = std::floor(f);
    p.base[i] = static_cast<std::int64_t>(base);
    p.rest[i] = static_cast<T>(f - base);
  }
  return p;
}

inline XTALFAST_HD std::int64_t wrap(std::int64_t i, std::int64_t n) {
  if (i >= 0 && i < n) // nearly always, and a division is slow
    return i;
  const std::int64_t r = i % n;
  return r < 0 ? r + n : r;
}

} // namespace xtalfast
