// The two passes of a Patterson map around its Fourier transforms: intensities of structure factors before, the half of
// the map that inversion gives after.
#pragma once

#include "structure_factors.hpp"

namespace xtalfast {

// intensity = scale x |in|^2 inside the sphere, 0 outside; real, [n_maps, X, Y, n_kept]: the first n_kept of l.
void spectrum_intensity(const HalfSpectra &spectra, const void *in, void *intensity, std::int64_t n_kept,
                        int n_threads);
int spectrum_intensity_cuda(const HalfSpectra &spectra, const void *in, void *intensity, std::int64_t n_kept,
                            void *stream);

// Planes x = 0 .. X / 2 of even maps, [n_maps, X / 2 + 1, Y, Z].
struct HalfMaps {
  std::int64_t n_maps;
  std::int64_t n[3]; // X, Y, Z of the whole map
  bool wide;
};

// map[x, y, z] = half[x, y, z], and map[-x, -y, -z] the same.
void mirror_map(const HalfMaps &maps, const void *half, void *map, int n_threads);
int mirror_map_cuda(const HalfMaps &maps, const void *half, void *map, void *stream);

} // namespace xtalfast
