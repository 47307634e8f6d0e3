// Fourier transforms between real maps and their half spectra on the processor, one map a thread. They leave out what
// the sphere of resolution leaves empty: most lines of a map sampled at a third of d_min carry zeros before the last
// transform, or would be thrown away after the first. Sizes: see `can_transform`.
#pragma once

#include "structure_factors.hpp"

namespace xtalfast {

// Whether maps of sizes X, Y, Z are taken: prime factors up to 19 and Z even; Patterson maps need an even Y too.
bool can_transform(const std::int64_t *n);

// out = the transform of each map, filtered as by filter_spectrum: scale x sum_x map exp(+2 pi i h.x) x exp(blur / (4
// d^2)) inside the sphere, 0 outside. `maps` is T [n_maps, X, Y, n_z], T float or double as `spectra.wide` says.
void maps_to_spectra(const HalfSpectra &spectra, std::int64_t n_z, double blur, const void *maps, void *out,
                     int n_threads);

// maps = scale x sum_h spectrum exp(-2 pi i h.x) over the full spectrum; `spectra` limits nothing.
void spectra_to_maps(const HalfSpectra &spectra, std::int64_t n_z, const void *in, void *maps, int n_threads);

// patterson = sum_h intensity cos(2 pi h.u) over the full spectrum, from real intensities [n_maps, X, Y, n_l], which
// are 0 beyond n_l: half of the map, and its mirror image.
struct Intensities {
  std::int64_t n_maps, n[3], n_l; // X, Y, Z of the maps
  bool wide;
};
void intensities_to_pattersons(const Intensities &spectra, const void *in, void *maps, int n_threads);

} // namespace xtalfast
