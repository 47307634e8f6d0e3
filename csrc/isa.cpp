#include "isa.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace xtalfast {
namespace {

constexpr const char *names[] = {"portable", "avx2", "avx512"};

Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2)
    return Isa::avx2;
#endif
  return Isa::portable;
}

} // namespace

Isa chosen_isa() {
  static const Isa best = best_isa();
  const char *wanted = std::getenv("XTALFAST_SIMD");
  if (!wanted || !*wanted)
    return best;
  for (int k = 0; k < 3; ++k)
    if (!std::strcmp(wanted, names[k]))
      return std::min(best, static_cast<Isa>(k));
  throw std::invalid_argument("XTALFAST_SIMD must be portable, avx2 or avx512, got " + std::string(wanted));
}

const char *isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

} // namespace xtalfast
