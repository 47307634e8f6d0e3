// The shares of modelled spots in the voxels of their shoeboxes.
#pragma once

#include <cstdint>

namespace xtalfast {

// Where the pixels of n boxes of one size look, as seen from the predicted direction of each reflection.
struct SpotBoxes {
  std::int64_t n, n_z, n_y, n_x;
  const std::int32_t *bbox;  // [n, 6]
  const double *shift;       // [n, 2] px, from where a ray enters the panel to where it is recorded
  const double *panels;      // [K, 9] origin, fast * pixel size, slow * pixel size; mm
  const std::int32_t *panel; // [n] row of `panels`
  const double *axes;        // [n, 6] e1 and e2
};

// Gaussian of each spot, image by image, in units of its own standard deviation.
struct WhitenedSpots {
  const float *inverse; // [n, n_z, 3] lower triangle (00, 10, 11) of the inverse Cholesky factor, 1/rad
  const float *centre;  // [n, n_z, 2]
  const float *steps;   // [n, n_z, n_sub, 2] from the pixel centre to the sub-pixel nodes
  std::int64_t n_sub;
  const float *scale; // [n, n_z] share of the image x area of a pixel / n_sub
};

// Density on a grid in those units: row i uses the sum over c of cell[i, c] * density[c].
struct SpotDensity {
  const float *density; // [cells, n_k, nodes, nodes]
  const float *cell;    // [n, cells]
  const float *images;  // [n, n_z, n_k] share of each tent along the rotation in each image
  std::int64_t cells, n_k, nodes;
  float extent; // half width of the grid
};

// epsilon1, epsilon2 [n, n_y, n_x, 2] (rad) at the pixel centres.
void spot_directions(const SpotBoxes &boxes, float *epsilon, int n_threads);

// Voxels [n, n_z, n_y, n_x] whose nearest corner has (eps1^2 + eps2^2) scale + rotation[n, n_z] <= 1.
void spot_foreground(const SpotBoxes &boxes, double scale, const float *rotation, std::uint8_t *inside, int n_threads);

// Share of each spot in its voxels, [n, n_z, n_y, n_x]; `scale` of images whose share is below 1e-9 gives zeros.
void gaussian_voxels(const SpotBoxes &boxes, const WhitenedSpots &spots, float *share, int n_threads);
void density_voxels(const SpotBoxes &boxes, const WhitenedSpots &spots, const SpotDensity &density, float *share,
                    int n_threads);

// Transpose of density_voxels: adds sum over voxels of factor[m][voxel] * d share / d density to sums[m], m < 2.
void density_voxels_backward(const SpotBoxes &boxes, const WhitenedSpots &spots, const SpotDensity &density,
                             const float *const factors[2], double *const sums[2], int n_threads);

} // namespace xtalfast
