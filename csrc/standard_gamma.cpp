#include "standard_gamma.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace xtalfast {
namespace {

constexpr int attempts = 16;

struct Words {
  std::uint32_t word[4];
};

Words philox(Words c, std::uint64_t seed) {
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c.word[0], b = 0xCD9E8D57ull * c.word[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.word[1] ^ key[0], static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.word[3] ^ key[1], static_cast<std::uint32_t>(a)}};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return c;
}

double one_draw(double shape, std::uint32_t stream, std::uint64_t row, std::uint32_t draw, std::uint64_t seed) {
  const bool low = shape < 1; // Gamma(a) = Gamma(a + 1) U^(1/a)
  const double d = (low ? shape + 1 : shape) - 1.0 / 3, c = 1 / std::sqrt(9 * d);
  double value = d, boost = 1;
  for (std::uint32_t attempt = 0; attempt < attempts; ++attempt) {
    const Words words = philox(
        {{draw, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), attempt + (stream << 16)}},
        seed);
    double u[4];
    for (int k = 0; k < 4; ++k)
      u[k] = (words.word[k] + 0.5) * 0x1p-32;
    if (attempt == 0 && low)
      boost = std::exp(std::log(u[3]) / shape);
    const double x = std::sqrt(-2 * std::log(u[0])) * std::cos(2 * 3.14159265358979323846 * u[1]);
    const double root = 1 + c * x, v = root * root * root;
    // the first condition implies the second, and spares most draws two logarithms
    if (v > 0 && (u[2] < 1 - 0.0331 * x * x * x * x || std::log(u[2]) < 0.5 * x * x + d - d * v + d * std::log(v))) {
      value = d * v;
      break;
    }
  }
  return std::max(value * boost, std::numeric_limits<double>::min());
}

} // namespace

void standard_gamma(const GammaDraws &s) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (std::int64_t row = 0; row < s.rows; ++row)
    for (std::int64_t stream = 0; stream < s.streams; ++stream)
      for (std::int64_t k = 0; k < s.samples; ++k)
        s.draws[(stream * s.rows + row) * s.samples + k] =
            one_draw(s.shape[stream * s.rows + row], static_cast<std::uint32_t>(stream), s.first + row,
                     static_cast<std::uint32_t>(k), s.seed);
}

} // namespace xtalfast
