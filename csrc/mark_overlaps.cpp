#include "mark_overlaps.hpp"

#include <algorithm>
#include <cmath>

namespace xtalfast {
namespace {

bool is_absent(const std::int32_t *h, const Absences &a) {
  const std::int64_t d = a.denominator;
  for (std::int64_t i = 0; i < a.n_ops; ++i) {
    const std::int32_t *r = a.rotation + 9 * i, *t = a.translation + 3 * i;
    bool same = true;
    for (int k = 0; k < 3; ++k)
      same &= std::int64_t{h[0]} * r[k] + std::int64_t{h[1]} * r[3 + k] + std::int64_t{h[2]} * r[6 + k] == h[k] * d;
    if (same && (std::int64_t{h[0]} * t[0] + std::int64_t{h[1]} * t[1] + std::int64_t{h[2]} * t[2]) % d != 0)
      return true;
  }
  return false;
}

void mark_box(std::int64_t i, const OverlapBoxes &b, const OverlapGeometry &g, const Absences &a, std::uint8_t bit) {
  const std::int32_t *box = b.bbox + 6 * i, *own = b.hkl + 3 * i;
  std::uint8_t *mask = b.mask + b.offset[i];
  // Neighbouring voxels mostly belong to the same reflection: remember the last answer.
  std::int32_t last[3] = {own[0], own[1], own[2]};
  bool last_absent = true; // its own reflection never marks a voxel
  for (std::int32_t z = box[4]; z < box[5]; ++z) {
    const std::int64_t image = std::clamp<std::int64_t>(z - g.z_begin, 0, g.n_z - 1);
    const double *m = g.index_from_lab + 9 * image;
    double origin[3], fast[3], slow[3], start[3]; // of the panel and s0, in fractional indices x wavelength
    for (int k = 0; k < 3; ++k) {
      const auto apply = [&](const double *v) { return m[3 * k] * v[0] + m[3 * k + 1] * v[1] + m[3 * k + 2] * v[2]; };
      origin[k] = apply(g.panel);
      fast[k] = apply(g.panel + 3);
      slow[k] = apply(g.panel + 6);
      start[k] = b.centre[3 * i + k] - own[k] + apply(g.s0);
    }
    for (std::int32_t y = box[2]; y < box[3]; ++y) {
      const double v = y + 0.5 - b.shift[2 * i + 1];
      for (std::int32_t x = box[0]; x < box[1]; ++x, ++mask) {
        const double u = x + 0.5 - b.shift[2 * i];
        double square = 0;
        for (int k = 0; k < 3; ++k) {
          const double p = g.panel[k] + u * g.panel[3 + k] + v * g.panel[6 + k];
          square += p * p;
        }
        const double scale = 1 / (std::sqrt(square) * g.wavelength);
        std::int32_t nearest[3];
        for (int k = 0; k < 3; ++k)
          nearest[k] =
              static_cast<std::int32_t>(std::floor((origin[k] + u * fast[k] + v * slow[k]) * scale - start[k] + 0.5));
        if (nearest[0] != last[0] || nearest[1] != last[1] || nearest[2] != last[2]) {
          std::copy(nearest, nearest + 3, last);
          last_absent = std::equal(nearest, nearest + 3, own) || is_absent(nearest, a);
        }
        if (!last_absent)
          *mask |= bit;
      }
    }
  }
}

} // namespace

void mark_overlaps(const OverlapBoxes &boxes, const OverlapGeometry &geometry, const Absences &absences,
                   std::uint8_t bit, int n_threads) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(std::max(n_threads, 1))
  for (std::int64_t i = 0; i < boxes.n; ++i)
    mark_box(i, boxes, geometry, absences, bit);
}

} // namespace xtalfast
