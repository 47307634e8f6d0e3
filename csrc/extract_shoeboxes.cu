#include "extract_shoeboxes.hpp"

#include <cuda_runtime.h>

namespace xtalfast {
namespace {

constexpr int threads = 128;

// One block a box: consecutive threads take consecutive pixels of a row, so that reads are as coalesced as a box of
// 21 pixels allows and writes fully. Grid-stride over boxes, because a grid has at most 2^31 - 1 blocks.
template <class Pixel, class Count>
__global__ void __launch_bounds__(threads) extract_shoeboxes_kernel(ImageStack s, Boxes b) {
  constexpr int largest = sizeof(Count) == 2 ? 65535 : 2147483647;
  const Pixel *__restrict__ pixels = static_cast<const Pixel *>(s.pixels);
  Count *__restrict__ counts = static_cast<Count *>(b.counts);
  __shared__ int peak, overloads;
  for (std::int64_t i = blockIdx.x; i < b.n; i += gridDim.x) {
    if (threadIdx.x == 0)
      peak = overloads = 0;
    __syncthreads();
    const std::int32_t *box = b.bbox + 6 * i;
    const std::int64_t x0 = box[0], y0 = box[2], z0 = box[4];
    const std::int64_t nx = max(box[1] - box[0], 0), ny = max(box[3] - box[2], 0), nz = max(box[5] - box[4], 0);
    int my_peak = 0, my_overloads = 0;
    for (std::int64_t voxel = threadIdx.x; voxel < nx * ny * nz; voxel += threads) {
      const std::int64_t row = voxel / nx, x = x0 + voxel % nx, y = y0 + row % ny, z = z0 + row / ny;
      int kept = 0;
      bool good = false;
      if (x >= 0 && x < s.n_x && y >= 0 && y < s.n_y && z >= 0 && z < s.n_z) {
        const bool open = !s.mask || s.mask[z * s.mask_stride + y * s.n_x + x];
        const int value = pixels[(z * s.n_y + y) * s.n_x + x];
        good = open && value >= s.low && value < s.high;
        kept = good ? value : 0;
        my_overloads += open && value >= s.high;
      }
      my_peak = max(my_peak, kept);
      counts[b.offset[i] + voxel] = static_cast<Count>(min(kept, largest));
      b.mask[b.offset[i] + voxel] = good;
    }
    atomicMax(&peak, my_peak); // integers: the result does not depend on the order
    atomicAdd(&overloads, my_overloads);
    __syncthreads();
    if (threadIdx.x == 0) {
      b.peak[i] = peak;
      b.overloads[i] = overloads;
    }
    __syncthreads();
  }
}

} // namespace

int extract_shoeboxes_cuda(const ImageStack &images, const Boxes &boxes, void *stream) {
  if (boxes.n == 0)
    return cudaSuccess;
  const auto launch = [&](auto kernel) {
    const auto blocks = static_cast<unsigned>(boxes.n < 65536 ? boxes.n : 65536);
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(images, boxes);
  };
  if (images.wide_pixels && boxes.wide_counts)
    launch(extract_shoeboxes_kernel<std::int32_t, std::int32_t>);
  else if (images.wide_pixels)
    launch(extract_shoeboxes_kernel<std::int32_t, std::uint16_t>);
  else if (boxes.wide_counts)
    launch(extract_shoeboxes_kernel<std::uint16_t, std::int32_t>);
  else
    launch(extract_shoeboxes_kernel<std::uint16_t, std::uint16_t>);
  return cudaGetLastError();
}

} // namespace xtalfast
