// The passes of a dual-space iteration between its Fourier transforms, on pairs of real maps carried as the real and
// the imaginary part of one complex map: MKL transforms such a pair in a third of the time of two real maps.
#pragma once

#include <cstdint>

namespace xtalfast {

// Spectra of pairs [n_pairs, X, Y, Z], complex float, changed in place, and what is imposed on both members.
struct PairedSpectra {
  float *values;
  const float *target; // [X, Y, Z]: amplitude; negative: leave as it is. Equal at h and -h.
  std::int64_t n_pairs;
  std::int64_t n[3];
};

// Each member gets the modulus `target` and keeps its phases.
void impose_on_pairs(const PairedSpectra &spectra, int n_threads);

// HIO: maps = projected where protein and positive, else maps - beta x projected; n floats.
void hio_update(float *maps, const float *projected, const std::uint8_t *protein, float beta, std::int64_t n,
                int n_threads);

// Positive density in the protein, -flip x density outside; n floats, in place.
void flatten_pairs(float *maps, const std::uint8_t *protein, float flip, std::int64_t n, int n_threads);

// out = max(in, 0)^2; n floats.
void square_positive(const float *in, float *out, std::int64_t n, int n_threads);

// protein = density above the value that the fraction `solvent` [2 n_pairs] of the voxels lies below, judged by every
// `step`-th voxel; density and protein [n_pairs, n_voxels, 2].
void threshold_pairs(const float *density, const float *solvent, std::uint8_t *protein, std::int64_t n_pairs,
                     std::int64_t n_voxels, std::int64_t step, int n_threads);

} // namespace xtalfast
