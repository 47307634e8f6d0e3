// Geometry of unit cells: a along x, b in the xy plane, as in PDB files.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define XTALFAST_HD __host__ __device__
#else
#define XTALFAST_HD
#endif

namespace xtalfast {

constexpr double pi = 3.14159265358979323846, ln_2 = 0.69314718055994531;

struct UnitCell {
  double orth[9]; // Cartesian = orth x fractional, row by row
  double frac[9]; // its inverse; the rows are a*, b*, c*
  double volume;  // A^3
};

// From a, b, c (A), alpha, beta, gamma (deg).
inline XTALFAST_HD UnitCell make_unit_cell(const double *cell) {
  double cosine[3]; // by the sine of what is missing to 90 degrees: cos 90 is 0, not 6e-17
  for (int i = 0; i < 3; ++i)
    cosine[i] = std::sin((90 - cell[3 + i]) * (pi / 180));
  const double sin_gamma = std::sin(cell[5] * (pi / 180));
  const double c_y = (cosine[0] - cosine[1] * cosine[2]) / sin_gamma;
  const double c_z = std::sqrt(1 - cosine[1] * cosine[1] - c_y * c_y);
  const double xx = cell[0], xy = cell[1] * cosine[2], xz = cell[2] * cosine[1], yy = cell[1] * sin_gamma,
               yz = cell[2] * c_y, zz = cell[2] * c_z;
  return {{xx, xy, xz, 0, yy, yz, 0, 0, zz},
          {1 / xx, -xy / (xx * yy), (xy * yz - xz * yy) / (xx * yy * zz), 0, 1 / yy, -yz / (yy * zz), 0, 0, 1 / zz},
          xx * yy * zz};
}

// Index of the first of n cells that cannot be one, or -1.
inline std::int64_t find_impossible_cell(const double *cells, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const UnitCell cell = make_unit_cell(cells + 6 * i);
    bool good = std::isfinite(cell.volume);
    for (int axis = 0; axis < 3; ++axis) // heights above 1e-3 A
      good = good && cells[6 * i + axis] > 0 && cell.orth[4 * axis] > 1e-3;
    if (!good)
      return i;
  }
  return -1;
}

} // namespace xtalfast
