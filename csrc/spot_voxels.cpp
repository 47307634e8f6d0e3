// Box by box with the steps of xtalfast/integration/spot_voxels.py; directions in double precision, since a difference
// of a pixel is 1e-3 of the vectors it comes from.
#include "spot_voxels.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.hpp"

namespace xtalfast {
namespace {

constexpr float negligible = 1e-9f;

XTALFAST_INLINE void directions_of(const SpotBoxes &b, std::int64_t i, double offset, std::int64_t n_y,
                                   std::int64_t n_x, float *e1, float *e2) {
  const double *panel = b.panels + 9 * b.panel[i], *axes = b.axes + 6 * i;
  const double x0 = b.bbox[6 * i] + offset - b.shift[2 * i], y0 = b.bbox[6 * i + 2] + offset - b.shift[2 * i + 1];
  for (std::int64_t y = 0; y < n_y; ++y) {
    const double v = y0 + y;
    const double row[3] = {panel[0] + v * panel[6], panel[1] + v * panel[7], panel[2] + v * panel[8]};
    for (std::int64_t x = 0; x < n_x; ++x) {
      const double u = x0 + x;
      const double p = row[0] + u * panel[3], q = row[1] + u * panel[4], r = row[2] + u * panel[5];
      const double length = 1 / std::sqrt(p * p + q * q + r * r);
      e1[y * n_x + x] = static_cast<float>((p * axes[0] + q * axes[1] + r * axes[2]) * length);
      e2[y * n_x + x] = static_cast<float>((p * axes[3] + q * axes[4] + r * axes[5]) * length);
    }
  }
}

XTALFAST_CLONES void directions_row(const SpotBoxes &b, std::int64_t i, double offset, std::int64_t n_y,
                                    std::int64_t n_x, float *e1, float *e2) {
  directions_of(b, i, offset, n_y, n_x, e1, e2);
}

XTALFAST_CLONES void gaussian_row(const SpotBoxes &b, const WhitenedSpots &s, std::int64_t i, const float *e1,
                                  const float *e2, float *buffer, float *share) {
  const std::int64_t plane = b.n_y * b.n_x, length = padded<float>(plane);
  for (std::int64_t z = 0; z < b.n_z; ++z, share += plane) {
    const std::int64_t at = i * b.n_z + z;
    const float scale = s.scale[at];
    if (!(std::abs(scale) > negligible)) {
      std::fill_n(share, plane, 0.0f);
      continue;
    }
    const float *m = s.inverse + 3 * at, *c = s.centre + 2 * at, *steps = s.steps + 2 * s.n_sub * at;
    for (std::int64_t j = 0; j < length; j += Lanes<float>::count) {
      const Vector<float> a = load(e1 + j), d = load(e2 + j);
      const Vector<float> u = m[0] * a - c[0], v = m[1] * a + m[2] * d - c[1];
      Vector<float> total{};
      for (std::int64_t k = 0; k < s.n_sub; ++k) {
        const Vector<float> p = u + steps[2 * k], q = v + steps[2 * k + 1];
        total += vector_exp(-0.5f * (p * p + q * q));
      }
      store(buffer + j, total * (scale * 0.159154943f)); // 1 / (2 pi)
    }
    std::copy_n(buffer, plane, share);
  }
}

// The densities of a box's cells added up, [n_k, nodes, nodes].
XTALFAST_INLINE void own_density(const SpotDensity &d, std::int64_t i, float *own) {
  const std::int64_t size = d.n_k * d.nodes * d.nodes;
  std::fill_n(own, size, 0.0f);
  for (std::int64_t c = 0; c < d.cells; ++c) {
    const float weight = d.cell[i * d.cells + c];
    if (weight == 0)
      continue;
    const float *from = d.density + c * size;
    for (std::int64_t j = 0; j < size; ++j)
      own[j] += weight * from[j];
  }
}

// Four nodes about a point of the grid and their bilinear weights; false outside (the density is zero a node beyond).
struct Bilinear {
  std::int64_t at;
  float weight[4];
};

// Calls `visit(voxel, bilinear)` for each sub-pixel node of image z that lies on the grid.
template <class F>
XTALFAST_INLINE void visit_nodes(const SpotBoxes &b, const WhitenedSpots &s, const SpotDensity &d, std::int64_t at,
                                 const float *e1, const float *e2, F visit) {
  const float *m = s.inverse + 3 * at, *c = s.centre + 2 * at, *steps = s.steps + 2 * s.n_sub * at;
  const std::int64_t nodes = d.nodes, wide = nodes + 2; // a border of zeros
  const float per_node = (nodes - 1) / (2 * d.extent), last = static_cast<float>(nodes);
  float reach[2] = {d.extent + 1 / per_node, d.extent + 1 / per_node}; // of pixel centres with a node on the grid
  for (std::int64_t k = 0; k < 2; ++k) {
    float farthest = 0;
    for (std::int64_t n = 0; n < s.n_sub; ++n)
      farthest = std::max(farthest, std::abs(steps[2 * n + k]));
    reach[k] += farthest;
  }
  for (std::int64_t j = 0; j < b.n_y * b.n_x; ++j) {
    const float u = m[0] * e1[j] - c[0], v = m[1] * e1[j] + m[2] * e2[j] - c[1];
    if (std::abs(u) > reach[0] || std::abs(v) > reach[1])
      continue;
    for (std::int64_t k = 0; k < s.n_sub; ++k) {
      const float x = (u + steps[2 * k] + d.extent) * per_node, y = (v + steps[2 * k + 1] + d.extent) * per_node;
      if (!(x > -1 && y > -1 && x < last && y < last))
        continue;
      const std::int32_t p = static_cast<std::int32_t>(x + 1), q = static_cast<std::int32_t>(y + 1); // both above 0
      const float dx = x + 1 - p, dy = y + 1 - q;
      visit(j, Bilinear{q * wide + p, {(1 - dx) * (1 - dy), dx * (1 - dy), (1 - dx) * dy, dx * dy}});
    }
  }
}

// Density of one image, with a border of zeros [nodes + 2, nodes + 2]; false when it holds nothing.
XTALFAST_INLINE bool image_plane(const SpotDensity &d, const float *own, const float *tents, float *plane) {
  const std::int64_t nodes = d.nodes, wide = nodes + 2;
  std::fill_n(plane, wide * wide, 0.0f);
  bool any = false;
  for (std::int64_t k = 0; k < d.n_k; ++k) {
    if (tents[k] == 0)
      continue;
    any = true;
    for (std::int64_t y = 0; y < nodes; ++y)
      for (std::int64_t x = 0; x < nodes; ++x)
        plane[(y + 1) * wide + x + 1] += tents[k] * own[(k * nodes + y) * nodes + x];
  }
  return any;
}

XTALFAST_CLONES void density_row(const SpotBoxes &b, const WhitenedSpots &s, const SpotDensity &d, std::int64_t i,
                                 const float *e1, const float *e2, float *own, float *plane, float *share) {
  const std::int64_t size = b.n_y * b.n_x, wide = d.nodes + 2;
  own_density(d, i, own);
  for (std::int64_t z = 0; z < b.n_z; ++z, share += size) {
    const std::int64_t at = i * b.n_z + z;
    std::fill_n(share, size, 0.0f);
    if (!image_plane(d, own, d.images + at * d.n_k, plane))
      continue;
    visit_nodes(b, s, d, at, e1, e2, [&](std::int64_t j, const Bilinear &w) {
      const float *p = plane + w.at;
      share[j] += w.weight[0] * p[0] + w.weight[1] * p[1] + w.weight[2] * p[wide] + w.weight[3] * p[wide + 1];
    });
    for (std::int64_t j = 0; j < size; ++j)
      share[j] *= s.scale[at];
  }
}

XTALFAST_CLONES void backward_row(const SpotBoxes &b, const WhitenedSpots &s, const SpotDensity &d, std::int64_t i,
                                  const float *e1, const float *e2, const float *const factors[2], float *plane,
                                  double *const sums[2]) {
  const std::int64_t size = b.n_y * b.n_x, nodes = d.nodes, wide = nodes + 2;
  for (std::int64_t z = 0; z < b.n_z; ++z) {
    const std::int64_t at = i * b.n_z + z;
    const float *tents = d.images + at * d.n_k;
    if (!(std::abs(s.scale[at]) > 0) || std::all_of(tents, tents + d.n_k, [](float t) { return t == 0; }))
      continue;
    float *const planes[2] = {plane, plane + wide * wide};
    std::fill_n(plane, 2 * wide * wide, 0.0f);
    const float *const from[2] = {factors[0] + at * size, factors[1] + at * size};
    visit_nodes(b, s, d, at, e1, e2, [&](std::int64_t j, const Bilinear &w) {
      for (int m = 0; m < 2; ++m) {
        const float f = from[m][j];
        float *p = planes[m] + w.at;
        p[0] += w.weight[0] * f;
        p[1] += w.weight[1] * f;
        p[wide] += w.weight[2] * f;
        p[wide + 1] += w.weight[3] * f;
      }
    });
    for (int m = 0; m < 2; ++m)
      for (std::int64_t c = 0; c < d.cells; ++c) {
        const float weight = d.cell[i * d.cells + c] * s.scale[at];
        if (weight == 0)
          continue;
        for (std::int64_t k = 0; k < d.n_k; ++k) {
          if (tents[k] == 0)
            continue;
          double *to = sums[m] + (c * d.n_k + k) * nodes * nodes;
          const float share = weight * tents[k];
          for (std::int64_t y = 0; y < nodes; ++y)
            for (std::int64_t x = 0; x < nodes; ++x)
              to[y * nodes + x] += share * planes[m][(y + 1) * wide + x + 1];
        }
      }
  }
}

// epsilon1 and epsilon2 of one box, padded to whole vectors.
struct Directions {
  std::vector<float> e1, e2;
  explicit Directions(std::int64_t pixels) : e1(padded<float>(pixels)), e2(padded<float>(pixels)) {}
  void centres(const SpotBoxes &b, std::int64_t i) { directions_row(b, i, 0.5, b.n_y, b.n_x, e1.data(), e2.data()); }
};

} // namespace

void spot_directions(const SpotBoxes &b, float *epsilon, int n_threads) {
  const std::int64_t plane = b.n_y * b.n_x;
#pragma omp parallel num_threads(std::max(n_threads, 1))
  {
    Directions at(plane);
#pragma omp for schedule(dynamic, 64)
    for (std::int64_t i = 0; i < b.n; ++i) {
      at.centres(b, i);
      for (std::int64_t j = 0; j < plane; ++j) {
        epsilon[2 * (i * plane + j)] = at.e1[j];
        epsilon[2 * (i * plane + j) + 1] = at.e2[j];
      }
    }
  }
}

void spot_foreground(const SpotBoxes &b, double scale, const float *rotation, std::uint8_t *inside, int n_threads) {
  const std::int64_t n_y = b.n_y + 1, n_x = b.n_x + 1, plane = b.n_y * b.n_x;
#pragma omp parallel num_threads(std::max(n_threads, 1))
  {
    Directions corners(n_y * n_x);
    std::vector<float> near(plane);
#pragma omp for schedule(dynamic, 64)
    for (std::int64_t i = 0; i < b.n; ++i) {
      directions_row(b, i, 0.0, n_y, n_x, corners.e1.data(), corners.e2.data());
      for (std::int64_t j = 0; j < n_y * n_x; ++j)
        corners.e1[j] = corners.e1[j] * corners.e1[j] + corners.e2[j] * corners.e2[j];
      for (std::int64_t y = 0; y < b.n_y; ++y)
        for (std::int64_t x = 0; x < b.n_x; ++x) {
          const float *c = &corners.e1[y * n_x + x];
          near[y * b.n_x + x] =
              static_cast<float>(std::min(std::min(c[0], c[1]), std::min(c[n_x], c[n_x + 1])) * scale);
        }
      for (std::int64_t z = 0; z < b.n_z; ++z) {
        const float along = rotation[i * b.n_z + z];
        std::uint8_t *to = inside + (i * b.n_z + z) * plane;
        for (std::int64_t j = 0; j < plane; ++j)
          to[j] = near[j] + along <= 1;
      }
    }
  }
}

void gaussian_voxels(const SpotBoxes &b, const WhitenedSpots &s, float *share, int n_threads) {
  const std::int64_t plane = b.n_y * b.n_x;
#pragma omp parallel num_threads(std::max(n_threads, 1))
  {
    Directions at(plane);
    std::vector<float> buffer(padded<float>(plane));
#pragma omp for schedule(dynamic, 64)
    for (std::int64_t i = 0; i < b.n; ++i) {
      at.centres(b, i);
      gaussian_row(b, s, i, at.e1.data(), at.e2.data(), buffer.data(), share + i * b.n_z * plane);
    }
  }
}

void density_voxels(const SpotBoxes &b, const WhitenedSpots &s, const SpotDensity &d, float *share, int n_threads) {
  const std::int64_t plane = b.n_y * b.n_x;
#pragma omp parallel num_threads(std::max(n_threads, 1))
  {
    Directions at(plane);
    std::vector<float> own(d.n_k * d.nodes * d.nodes), image((d.nodes + 2) * (d.nodes + 2));
#pragma omp for schedule(dynamic, 64)
    for (std::int64_t i = 0; i < b.n; ++i) {
      at.centres(b, i);
      density_row(b, s, d, i, at.e1.data(), at.e2.data(), own.data(), image.data(), share + i * b.n_z * plane);
    }
  }
}

// Sums of a fixed number of parts, added in their order: the same bits with any number of threads.
void density_voxels_backward(const SpotBoxes &b, const WhitenedSpots &s, const SpotDensity &d,
                             const float *const factors[2], double *const sums[2], int n_threads) {
  constexpr int parts = 8;
  const std::int64_t size = d.cells * d.n_k * d.nodes * d.nodes;
  std::vector<double> partial(2 * parts * size);
#pragma omp parallel num_threads(std::max(n_threads, 1))
  {
    Directions at(b.n_y * b.n_x);
    std::vector<float> plane(2 * (d.nodes + 2) * (d.nodes + 2));
#pragma omp for schedule(dynamic, 1)
    for (int part = 0; part < parts; ++part) {
      double *const own[2] = {&partial[2 * part * size], &partial[(2 * part + 1) * size]};
      for (std::int64_t i = b.n * part / parts; i < b.n * (part + 1) / parts; ++i) {
        at.centres(b, i);
        backward_row(b, s, d, i, at.e1.data(), at.e2.data(), factors, plane.data(), own);
      }
    }
  }
  for (int part = 0; part < parts; ++part)
    for (int m = 0; m < 2; ++m)
      for (std::int64_t j = 0; j < size; ++j)
        sums[m][j] += partial[(2 * part + m) * size + j];
}

} // namespace xtalfast
