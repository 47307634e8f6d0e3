#include "dual_space.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.hpp"

namespace xtalfast {
namespace {

// Below this the reciprocal of a modulus is not taken: the member has no phase to keep.
constexpr float kTiny = 1e-30f;

// Rows l = 0 .. Z - 1 at (h, k) and (-h, -k). With Z(h) = F1 + i F2 and C(h) = conj Z(-h): F1 = (Z + C) / 2,
// i F2 = (Z - C) / 2, so that scaling F1 by s1 and F2 by s2 is Z' = a Z + c C and C' = a C + c Z with
// a = (s1 + s2) / 2, c = (s1 - s2) / 2. `mirrored` holds the second row with l reversed.
XTALFAST_CLONES void impose_rows(float *row, float *mirrored, const float *target, std::int64_t n) {
  for (std::int64_t l = 0; l < n; ++l) {
    const float zr = row[2 * l], zi = row[2 * l + 1], cr = mirrored[2 * l], ci = -mirrored[2 * l + 1];
    const float pr = zr + cr, pi = zi + ci, mr = zr - cr, mi = zi - ci;
    const float t = target[l];
    const float s1 = 1.0f / std::sqrt(std::max(pr * pr + pi * pi, kTiny));
    const float s2 = 1.0f / std::sqrt(std::max(mr * mr + mi * mi, kTiny));
    const float a = t < 0 ? 1.0f : t * (s1 + s2), c = t < 0 ? 0.0f : t * (s1 - s2);
    row[2 * l] = a * zr + c * cr;
    row[2 * l + 1] = a * zi + c * ci;
    mirrored[2 * l] = a * cr + c * zr;
    mirrored[2 * l + 1] = -(a * ci + c * zi);
  }
}

// out[l] = in[-l], complex.
XTALFAST_CLONES void reverse_row(const float *in, float *out, std::int64_t n) {
  out[0] = in[0];
  out[1] = in[1];
  const float *last = in + 2 * n;
  for (std::int64_t l = 1; l < n; ++l)
    std::memcpy(out + 2 * l, last - 2 * l, 8);
}

XTALFAST_CLONES void hio_range(float *maps, const float *projected, const std::uint8_t *protein, float beta,
                               std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float p = projected[i], out = maps[i] - beta * p;
    maps[i] = (protein[i] != 0) & (p > 0) ? p : out;
  }
}

XTALFAST_CLONES void flatten_range(float *maps, const std::uint8_t *protein, float flip, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    maps[i] = protein[i] != 0 ? std::max(maps[i], 0.0f) : -flip * maps[i];
}

XTALFAST_CLONES void square_range(const float *in, float *out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float p = std::max(in[i], 0.0f);
    out[i] = p * p;
  }
}

XTALFAST_CLONES void above_range(const float *density, const float *threshold, std::uint8_t *protein, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    protein[2 * i] = density[2 * i] > threshold[0];
    protein[2 * i + 1] = density[2 * i + 1] > threshold[1];
  }
}

// Calls f(begin, end) on pieces of 0 .. n.
template <class F> void in_pieces(std::int64_t n, int n_threads, F f) {
  constexpr std::int64_t piece = 1 << 15;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
  for (std::int64_t begin = 0; begin < n; begin += piece)
    f(begin, std::min(begin + piece, n));
}

} // namespace

void impose_on_pairs(const PairedSpectra &s, int n_threads) {
  const std::int64_t X = s.n[0], Y = s.n[1], Z = s.n[2];
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    std::vector<float> reversed(2 * Z);
#pragma omp for schedule(static)
    for (std::int64_t job = 0; job < s.n_pairs * (X / 2 + 1); ++job) {
      const std::int64_t x = job % (X / 2 + 1), mirror_x = x == 0 ? 0 : X - x;
      float *map = s.values + job / (X / 2 + 1) * X * Y * Z * 2;
      for (std::int64_t y = 0; y < Y; ++y) {
        const std::int64_t mirror_y = y == 0 ? 0 : Y - y;
        if (x == mirror_x && y > mirror_y)
          continue; // done as the mirror of an earlier row
        float *row = map + (x * Y + y) * Z * 2, *mirrored = map + (mirror_x * Y + mirror_y) * Z * 2;
        reverse_row(mirrored, reversed.data(), Z);
        impose_rows(row, reversed.data(), s.target + (x * Y + y) * Z, Z);
        if (row != mirrored)
          reverse_row(reversed.data(), mirrored, Z);
      }
    }
  }
}

void hio_update(float *maps, const float *projected, const std::uint8_t *protein, float beta, std::int64_t n,
                int n_threads) {
  in_pieces(n, n_threads, [=](std::int64_t begin, std::int64_t end) {
    hio_range(maps + begin, projected + begin, protein + begin, beta, end - begin);
  });
}

void flatten_pairs(float *maps, const std::uint8_t *protein, float flip, std::int64_t n, int n_threads) {
  in_pieces(n, n_threads, [=](std::int64_t begin, std::int64_t end) {
    flatten_range(maps + begin, protein + begin, flip, end - begin);
  });
}

void square_positive(const float *in, float *out, std::int64_t n, int n_threads) {
  in_pieces(n, n_threads,
            [=](std::int64_t begin, std::int64_t end) { square_range(in + begin, out + begin, end - begin); });
}

void threshold_pairs(const float *density, const float *solvent, std::uint8_t *protein, std::int64_t n_pairs,
                     std::int64_t n_voxels, std::int64_t step, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
  for (std::int64_t pair = 0; pair < n_pairs; ++pair) {
    const float *map = density + pair * n_voxels * 2;
    float threshold[2];
    for (int member = 0; member < 2; ++member) {
      std::vector<float> sample;
      sample.reserve(n_voxels / step + 1);
      for (std::int64_t i = 0; i < n_voxels; i += step)
        sample.push_back(map[2 * i + member]);
      const auto size = static_cast<std::int64_t>(sample.size());
      const auto rank = std::clamp<std::int64_t>(
          static_cast<std::int64_t>(solvent[2 * pair + member] * static_cast<float>(size)), 1, size);
      std::nth_element(sample.begin(), sample.begin() + (rank - 1), sample.end());
      threshold[member] = sample[rank - 1];
    }
    above_range(map, threshold, protein + pair * n_voxels * 2, n_voxels);
  }
}

} // namespace xtalfast
