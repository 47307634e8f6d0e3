// Divergences of Gamma distributions, as many at once as a vector holds, double precision; included after vectors.hpp.
namespace xtalfast {
namespace XTALFAST_ISA {
namespace {

// Stirling's remainder mu(x) = lgamma(x) - (x - 1/2) log x + x - log(2 pi) / 2, digamma(x), trigamma(x) and log(x):
// recurrence up to x > 12, then the asymptotic series.
struct GammaFunctions {
  Vector<double> remainder, digamma, trigamma, log;
};

XTALFAST_INLINE GammaFunctions gamma_functions(Vector<double> x) {
  const Vector<double> none{}, one = splat(1.0);
  Vector<double> far = x, product = one, shift{}, shift2{};
  double lanes[Lanes<double>::count];
  store(lanes, x);
  if (!(*std::min_element(lanes, lanes + Lanes<double>::count) > 12))
    for (int i = 0; i < 13; ++i) {
      const auto near = far <= 12.0;
      const Vector<double> inverse = near ? 1.0 / far : none;
      shift += inverse;
      shift2 += inverse * inverse;
      product *= near ? far : one;
      far += near ? one : none;
    }
  const Vector<double> log_x = logarithm(x), log_far = logarithm(far), i = 1.0 / far, s = i * i;
  const Vector<double> tail =
      i * (1.0 / 12 + s * (-1.0 / 360 + s * (1.0 / 1260 + s * (-1.0 / 1680 + s * (1.0 / 1188)))));
  const Vector<double> psi_tail = s * (1.0 / 12 + s * (-1.0 / 120 + s * (1.0 / 252 + s * (-1.0 / 240 + s / 132.0))));
  const Vector<double> trigamma_tail =
      i * s * (1.0 / 6 + s * (-1.0 / 30 + s * (1.0 / 42 + s * (-1.0 / 30 + s * (5.0 / 66)))));
  const Vector<double> near = tail + (far - 0.5) * log_far - (x - 0.5) * log_x - (far - x) - logarithm(product);
  return {far > x ? near : tail, log_far - 0.5 * i - psi_tail - shift, shift2 + i + 0.5 * s + trigamma_tail, log_x};
}

// x - 1 - log x without cancellation at x = 1.
XTALFAST_INLINE Vector<double> excess_of_logarithm(Vector<double> x) {
  const Vector<double> d = x - 1.0;
  Vector<double> series{};
  for (int power = 9; power > 1; --power)
    series = d * series + (power % 2 == 0 ? 1.0 : -1.0) / power;
  const Vector<double> size = d > 0.0 ? d : -d;
  return size < 0.02 ? d * d * series : d - logarithm(x);
}

struct GammaDivergence {
  Vector<double> value;
  Vector<double> d_shape, d_rate;             // with respect to q
  Vector<double> d_prior_shape, d_prior_rate; // with respect to the prior
};

// KL(Gamma(k, r) || Gamma(a, b)); the form of the Python reference, a sum of terms that are never negative.
XTALFAST_INLINE GammaDivergence gamma_divergence(Vector<double> k, Vector<double> r, Vector<double> a,
                                                 Vector<double> b) {
  const GammaFunctions of_k = gamma_functions(k), of_a = gamma_functions(a);
  const Vector<double> slope = of_k.digamma - of_k.log + 0.5 / k;
  const Vector<double> value = a * excess_of_logarithm(k * b / (a * r)) + 0.5 * excess_of_logarithm(a / k) +
                               (of_a.remainder - of_k.remainder - (a - k) * slope);
  return {value, (k - a) * of_k.trigamma + b / r - 1.0, a / r - k * b / (r * r),
          of_a.digamma - of_k.digamma + logarithm(r / b), k / r - a / b};
}

// Sum of log y!: of whole counts below `limit` by vectors, of others one by one at the end.
template <class T, bool whole> struct FactorialSum {
#if XTALFAST_VECTOR_BYTES >= 32
  static constexpr int limit = sizeof(T) == 4 ? LogFactorials::small_size : 0;
#else
  static constexpr int limit = 0;
#endif
  Vector<T> small{};
  unsigned others = limit == 0;

  XTALFAST_INLINE void add(Vector<T> y, const LogFactorials &table) {
#if XTALFAST_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      const __m512i i = _mm512_cvttps_epi32((__m512)y);
      __mmask16 below = _mm512_cmplt_epu32_mask(i, _mm512_set1_epi32(limit));
      if (!whole)
        below &= _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(i), (__m512)y, _CMP_EQ_OQ);
      const __m512 low = _mm512_loadu_ps(table.small()), high = _mm512_loadu_ps(table.small() + 16);
      small += (Vector<T>)_mm512_maskz_permutex2var_ps(below, low, i, high);
      others |= static_cast<__mmask16>(~below);
    }
#elif XTALFAST_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) {
      const __m256i i = _mm256_cvttps_epi32((__m256)y), low = _mm256_and_si256(i, _mm256_set1_epi32(limit - 1));
      __m256 below = (__m256)_mm256_cmpeq_epi32(i, low);
      if (!whole)
        below = _mm256_and_ps(below, _mm256_cmp_ps(_mm256_cvtepi32_ps(i), (__m256)y, _CMP_EQ_OQ));
      small += (Vector<T>)_mm256_and_ps(below, _mm256_i32gather_ps(table.small(), low, 4));
      others |= _mm256_movemask_ps(below) ^ 0xff;
    }
#else
    (void)y, (void)table;
#endif
  }

  double total(const T *counts, std::int64_t n, const LogFactorials &table) const {
    double total = sum<T>(small);
    for (std::int64_t j = 0; others && j < n; ++j) {
      const T y = counts[j];
      if (y != T(0) && y != T(1) && !(y > 0 && y < limit && y == std::floor(y)))
        total += table.of(y);
    }
    return total;
  }
};

} // namespace
} // namespace XTALFAST_ISA
} // namespace xtalfast
