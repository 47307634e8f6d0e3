#include "structure_factors.hpp"

#include <cuda_runtime.h>

namespace xtalfast {
namespace {

constexpr int threads = 128, warp = 32;

// One warp a row of l, so that its resolution is worked out once for 32 consecutive entries.
template <class T, class Pair>
__global__ void __launch_bounds__(threads)
    filter_spectrum_kernel(HalfSpectra s, double blur, const Pair *in, Pair *out) {
  const std::int64_t n_l = s.n_l, step = static_cast<std::int64_t>(gridDim.x) * (threads / warp);
  for (std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x) / warp; row < s.n_rows();
       row += step) {
    const SpectrumMetric m = spectrum_metric(s, row / s.n[1] / s.n[0]);
    const SpectrumRow r = spectrum_row(s, m, row / s.n[1] % s.n[0], row % s.n[1]);
    for (std::int64_t l = threadIdx.x % warp; l < n_l; l += warp) {
      Pair value{0, 0};
      if (l >= r.begin && l < r.end) {
        const auto index = static_cast<double>(l);
        const double s2 = r.constant + index * (r.linear + index * r.square);
        const auto f = static_cast<T>(blur == 0 ? m.scale : m.scale * exp(0.25 * blur * s2));
        value.x = f * in[row * n_l + l].x;
        value.y = -f * in[row * n_l + l].y;
      }
      out[row * n_l + l] = value;
    }
  }
}

} // namespace

int filter_spectrum_cuda(const HalfSpectra &spectra, double blur, const void *in, void *out, void *stream) {
  const std::int64_t wanted = (spectra.n_rows() * warp + threads - 1) / threads;
  if (wanted == 0)
    return cudaSuccess;
  const auto blocks = static_cast<unsigned>(wanted < 65536 ? wanted : 65536);
  const auto s = static_cast<cudaStream_t>(stream);
  if (spectra.wide)
    filter_spectrum_kernel<double>
        <<<blocks, threads, 0, s>>>(spectra, blur, static_cast<const double2 *>(in), static_cast<double2 *>(out));
  else
    filter_spectrum_kernel<float>
        <<<blocks, threads, 0, s>>>(spectra, blur, static_cast<const float2 *>(in), static_cast<float2 *>(out));
  return cudaGetLastError();
}

} // namespace xtalfast
