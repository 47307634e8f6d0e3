// Which voxels of a shoebox belong to another reflection: those whose nearest lattice point is not its own.
#pragma once

#include <cstdint>

namespace xtalfast {

// Reflections of one panel of one experiment. Box i (bbox as everywhere) has its mask bytes from offset[i] on.
struct OverlapBoxes {
  const std::int32_t *bbox;
  const std::int64_t *offset;
  const std::int32_t *hkl; // [n, 3]
  const double *centre;    // [n, 3] fractional index at the predicted position
  const double *shift;     // [n, 2] px, from where a ray enters the panel to where it is recorded
  std::int64_t n;
  std::uint8_t *mask;
};

struct OverlapGeometry {
  const double *index_from_lab; // [n_z, 3, 3] (rotation of image z times A)^-1, at the middle of the image
  std::int64_t z_begin, n_z;    // first image of `index_from_lab`
  const double *panel;          // [9] origin, fast * pixel size, slow * pixel size; mm
  const double *s0;             // [3] 1/A
  double wavelength;            // A
};

// The operations that can extinguish a reflection: h = h R and h.t not an integer.
struct Absences {
  const std::int32_t *rotation;    // [n_ops, 9], row vector times matrix
  const std::int32_t *translation; // [n_ops, 3]
  std::int64_t n_ops;
  std::int32_t denominator; // of rotation and translation
};

void mark_overlaps(const OverlapBoxes &boxes, const OverlapGeometry &geometry, const Absences &absences,
                   std::uint8_t bit, int n_threads);

} // namespace xtalfast
