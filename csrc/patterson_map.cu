#include "patterson_map.hpp"

#include <cuda_runtime.h>

namespace xtalfast {
namespace {

constexpr int threads = 128, warp = 32;

unsigned blocks_for(std::int64_t n_rows) { // one warp a row, then striding
  const std::int64_t wanted = (n_rows * warp + threads - 1) / threads;
  return static_cast<unsigned>(wanted < 65536 ? wanted : 65536);
}

inline __device__ std::int64_t first_row() {
  return (static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x) / warp;
}
inline __device__ std::int64_t row_step() { return static_cast<std::int64_t>(gridDim.x) * (threads / warp); }

template <class T, class Pair>
__global__ void __launch_bounds__(threads)
    spectrum_intensity_kernel(HalfSpectra s, const Pair *in, T *intensity, std::int64_t n_kept) {
  for (std::int64_t row = first_row(); row < s.n_rows(); row += row_step()) {
    const SpectrumMetric m = spectrum_metric(s, row / s.n[1] / s.n[0]);
    const SpectrumRow r = spectrum_row(s, m, row / s.n[1] % s.n[0], row % s.n[1]);
    for (std::int64_t l = threadIdx.x % warp; l < n_kept; l += warp) {
      T value = 0;
      if (l >= r.begin && l < r.end) {
        const Pair f = in[row * s.n_l + l];
        value = static_cast<T>(m.scale) * (f.x * f.x + f.y * f.y);
      }
      intensity[row * n_kept + l] = value;
    }
  }
}

// Rows of the whole map, each written once; those beyond the middle plane are read backwards.
template <class T> __global__ void __launch_bounds__(threads) mirror_map_kernel(HalfMaps m, const T *half, T *map) {
  const std::int64_t x_half = m.n[0] / 2 + 1, n_z = m.n[2];
  for (std::int64_t row = first_row(); row < m.n_maps * m.n[0] * m.n[1]; row += row_step()) {
    std::int64_t y = row % m.n[1], x = row / m.n[1] % m.n[0];
    const std::int64_t i = row / m.n[1] / m.n[0];
    const bool mirrored = x >= x_half;
    if (mirrored) {
      x = m.n[0] - x;
      y = y == 0 ? 0 : m.n[1] - y;
    }
    const T *from = half + ((i * x_half + x) * m.n[1] + y) * n_z;
    for (std::int64_t z = threadIdx.x % warp; z < n_z; z += warp)
      map[row * n_z + z] = from[mirrored && z > 0 ? n_z - z : z];
  }
}

} // namespace

int spectrum_intensity_cuda(const HalfSpectra &spectra, const void *in, void *intensity, std::int64_t n_kept,
                            void *stream) {
  if (spectra.n_rows() == 0)
    return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned blocks = blocks_for(spectra.n_rows());
  if (spectra.wide)
    spectrum_intensity_kernel<<<blocks, threads, 0, s>>>(spectra, static_cast<const double2 *>(in),
                                                         static_cast<double *>(intensity), n_kept);
  else
    spectrum_intensity_kernel<<<blocks, threads, 0, s>>>(spectra, static_cast<const float2 *>(in),
                                                         static_cast<float *>(intensity), n_kept);
  return cudaGetLastError();
}

int mirror_map_cuda(const HalfMaps &maps, const void *half, void *map, void *stream) {
  const std::int64_t n_rows = maps.n_maps * maps.n[0] * maps.n[1];
  if (n_rows == 0)
    return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned blocks = blocks_for(n_rows);
  if (maps.wide)
    mirror_map_kernel<<<blocks, threads, 0, s>>>(maps, static_cast<const double *>(half), static_cast<double *>(map));
  else
    mirror_map_kernel<<<blocks, threads, 0, s>>>(maps, static_cast<const float *>(half), static_cast<float *>(map));
  return cudaGetLastError();
}

} // namespace xtalfast
