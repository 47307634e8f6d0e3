// Cut shoeboxes out of a stack of images: counts narrowed to the type wanted, DIALS' Valid bit beside them.
#pragma once

#include <cstdint>

namespace xtalfast {

// Images [Z, Y, X] and where a pixel of them may be used.
struct ImageStack {
  const void *pixels;         // int32 or uint16, see `wide_pixels`
  const std::uint8_t *mask;   // 0: never valid; null: all pixels may be valid
  std::int64_t mask_stride;   // elements between the masks of two images: Y * X, or 0 when one mask serves all
  std::int64_t n_z, n_y, n_x; // size
  std::int32_t low, high;     // valid: low <= value < high
  bool wide_pixels;           // int32, else uint16
};

// Box i is bbox[6 i ..] = x0, x1, y0, y1, z0, z1 (end excluded) and is written z, y, x from offset[i] on. Voxels
// outside the stack, masked or out of range have mask 0 and count 0. A count beyond the type of the output is cut to
// its maximum; `peak` tells.
struct Boxes {
  const std::int32_t *bbox;
  const std::int64_t *offset;
  std::int64_t n;
  void *counts;            // int32 or uint16, see `wide_counts`
  std::uint8_t *mask;      // 1 valid, 0 not
  std::int32_t *peak;      // [n] largest valid value, 0 when there is none
  std::int32_t *overloads; // [n] unmasked pixels at or above `high`
  bool wide_counts;        // int32, else uint16
};

// On the processor, `n_threads` threads.
void extract_shoeboxes(const ImageStack &images, const Boxes &boxes, int n_threads);

#ifdef XTALFAST_WITH_CUDA
// On the device that owns the pointers; one block a box. Returns a cudaError_t (0: launched).
int extract_shoeboxes_cuda(const ImageStack &images, const Boxes &boxes, void *stream);
#endif

} // namespace xtalfast
