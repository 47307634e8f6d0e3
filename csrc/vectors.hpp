// Vectors of one instruction set, in the namespace XTALFAST_ISA; included by each_isa.hpp once for each.
//
// Arithmetic is that of the compiler's vector types; intrinsics are used where one instruction does what those need
// several for. A pointer is read and written without regard to alignment.
namespace xtalfast {
namespace XTALFAST_ISA {

template <class T> struct Lanes;
template <> struct Lanes<float> {
  static constexpr std::int64_t count = XTALFAST_VECTOR_BYTES / 4;
  typedef float Vector __attribute__((vector_size(XTALFAST_VECTOR_BYTES)));
  typedef std::int32_t Integers __attribute__((vector_size(XTALFAST_VECTOR_BYTES)));
};
template <> struct Lanes<double> {
  static constexpr std::int64_t count = XTALFAST_VECTOR_BYTES / 8;
  typedef double Vector __attribute__((vector_size(XTALFAST_VECTOR_BYTES)));
  typedef std::int64_t Integers __attribute__((vector_size(XTALFAST_VECTOR_BYTES)));
};
typedef std::uint64_t Unsigned __attribute__((vector_size(XTALFAST_VECTOR_BYTES)));
template <class T> using Vector = typename Lanes<T>::Vector;
template <class T> using Integers = typename Lanes<T>::Integers;

template <class T> XTALFAST_INLINE Vector<T> load(const T *p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T> XTALFAST_INLINE void store(T *p, Vector<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> XTALFAST_INLINE Vector<T> splat(T x) { return Vector<T>{} + x; }

// The first n values, 0 beyond them.
template <class T> XTALFAST_INLINE Vector<T> load_first(const T *p, std::int64_t n) {
  if (n >= Lanes<T>::count)
    return load(p);
  T values[Lanes<T>::count] = {};
  for (std::int64_t k = 0; k < n; ++k)
    values[k] = p[k];
  return load(values);
}
template <class T> XTALFAST_INLINE void store_first(T *p, Vector<T> v, std::int64_t n) {
  if (n >= Lanes<T>::count)
    return store(p, v);
  T values[Lanes<T>::count];
  store(values, v);
  for (std::int64_t k = 0; k < n; ++k)
    p[k] = values[k];
}

// To an aligned address, past the caches.
template <class T> XTALFAST_INLINE void stream(T *p, Vector<T> v) {
#if XTALFAST_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i *>(p), (__m512i)v);
#elif XTALFAST_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i *>(p), (__m256i)v);
#else
  store(p, v);
#endif
}

// The larger of two; the second where one is not a number.
XTALFAST_INLINE Vector<float> largest(Vector<float> a, Vector<float> b) {
#if XTALFAST_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif XTALFAST_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
XTALFAST_INLINE Vector<double> largest(Vector<double> a, Vector<double> b) { return a > b ? a : b; }

template <class T> XTALFAST_INLINE T sum(Vector<T> v) {
  T part[Lanes<T>::count];
  store(part, v);
  for (std::int64_t half = Lanes<T>::count / 2; half > 0; half /= 2)
    for (std::int64_t k = 0; k < half; ++k)
      part[k] += part[k + half];
  return part[0];
}
#if XTALFAST_VECTOR_BYTES == 64
template <> XTALFAST_INLINE float sum<float>(Vector<float> v) { return _mm512_reduce_add_ps((__m512)v); }
template <> XTALFAST_INLINE double sum<double>(Vector<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#endif

template <class T> XTALFAST_INLINE T top(Vector<T> v) {
  T part[Lanes<T>::count];
  store(part, v);
  return *std::max_element(part, part + Lanes<T>::count);
}

// 1 / x for normal x, to 1 ulp.
XTALFAST_INLINE Vector<float> reciprocal(Vector<float> x) {
#if XTALFAST_VECTOR_BYTES == 64
  const Vector<float> y = (Vector<float>)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}
XTALFAST_INLINE Vector<double> reciprocal(Vector<double> x) { return 1.0 / x; }

// Positive normal numbers as 2^exponent x mantissa. Products of mantissas and sums of exponents make one logarithm of
// several numbers.
template <class T> struct Split {
  Integers<T> exponent;
  Vector<T> mantissa; // in [sqrt(1/2), sqrt(2))
};

#if XTALFAST_VECTOR_BYTES == 64
template <> struct Split<float> {
  Vector<float> exponent;
  Vector<float> mantissa; // in [1, 2)
};
XTALFAST_INLINE Split<float> split(Vector<float> x) {
  return {(Vector<float>)_mm512_getexp_ps((__m512)x),
          (Vector<float>)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
}
#else
XTALFAST_INLINE Split<float> split(Vector<float> x) {
  const Integers<float> i = (Integers<float>)x, e = (i - 0x3f3504f3) >> 23;
  return {e, (Vector<float>)(i - (e << 23))};
}
#endif
XTALFAST_INLINE Split<double> split(Vector<double> x) {
  const Integers<double> i = (Integers<double>)x;
#if XTALFAST_VECTOR_BYTES == 64
  const Integers<double> e = (i - 0x3fe6a09e667f3bcd) >> 52;
#else // no arithmetic shift of 64-bit integers before AVX-512
  const Integers<double> shifted = i - 0x3fe6a09e667f3bcd + (1023LL << 52);
  const Integers<double> e = (Integers<double>)((Unsigned)shifted >> 52) - 1023;
#endif
  return {e, (Vector<double>)(i - (e << 52))};
}

// log(2^exponent x mantissa), to 1 ulp of the larger of 1 and the result.
#if XTALFAST_VECTOR_BYTES == 64
// 1 / c and log c at the middles c of 16 intervals of [1, 2): what is left to a polynomial is within 1/32 of 1.
alignas(64) constexpr float mantissa_inverse[16] = {
    0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
    0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f, 0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f};
alignas(64) constexpr float mantissa_logarithm[16] = {
    0.030771628f, 0.0896121562f, 0.145181984f, 0.19782573f,  0.247836202f, 0.295464218f, 0.340926558f, 0.384411722f,
    0.426084429f, 0.466089696f,  0.504556f,    0.541597307f, 0.577315331f, 0.611801565f, 0.645138025f, 0.677398741f};

XTALFAST_INLINE Vector<float> logarithm(Split<float> x) {
  const __m512i interval = _mm512_srli_epi32((__m512i)x.mantissa, 19); // the permutations read its four low bits
  const auto inverse = (Vector<float>)_mm512_permutexvar_ps(interval, _mm512_load_ps(mantissa_inverse));
  const auto middle = (Vector<float>)_mm512_permutexvar_ps(interval, _mm512_load_ps(mantissa_logarithm));
  const Vector<float> r = x.mantissa * inverse - 1.0f;
  const Vector<float> q = (-0.25f * r + 0.333333343f) * r - 0.5f;
  return (r * r * q + r) + (x.exponent * 0.693147182f + middle);
}
#else
XTALFAST_INLINE Vector<float> logarithm(Split<float> x) {
  const Vector<float> n = __builtin_convertvector(x.exponent, Vector<float>), f = x.mantissa - 1.0f;
  Vector<float> q = 0.0714975389f * f - 0.115712007f;
  q = q * f + 0.116615111f;
  q = q * f - 0.124110507f;
  q = q * f + 0.142499365f;
  q = q * f - 0.166684802f;
  q = q * f + 0.200007075f;
  q = q * f - 0.24999989f;
  q = q * f + 0.333333312f;
  const Vector<float> f2 = f * f;
  return (f + (q * f * f2 - 0.5f * f2 + n * -2.12194440e-4f)) + n * 0.693359375f;
}
#endif

// The same with the series in s = f / (2 + f) of fdlibm's log.
XTALFAST_INLINE Vector<double> logarithm(Split<double> x) {
  const Integers<double> magic = (Integers<double>)splat(6755399441055744.0);
  const Vector<double> n = (Vector<double>)(magic + x.exponent) - 6755399441055744.0;
  const Vector<double> f = x.mantissa - 1.0, s = f / (2.0 + f), z = s * s;
  Vector<double> r = 1.479819860511658591e-01 * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  const Vector<double> half = 0.5 * f * f;
  return n * 6.93147180369123816490e-01 - ((half - (s * (half + r * z) + n * 1.90821492927058770002e-10)) - f);
}

template <class V> XTALFAST_INLINE V logarithm(V positive_normal) { return logarithm(split(positive_normal)); }

// exp of numbers that are not above 88, to 1 ulp; below -87 it gives about 1e-38 instead of less.
#if XTALFAST_VECTOR_BYTES == 64
alignas(64) constexpr float sixteenth_power[16] = {
    1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};

XTALFAST_INLINE Vector<float> exponential(Vector<float> x) {   // 2^(n / 16) e^r
  x = largest(splat(-87.0f), x);                               // in this order NaN stays
  const Vector<float> shifted = x * 23.0831207f + 12582912.0f; // its low bits are the integer n
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = (x - n * 0.0433349609f) - n * -1.32621527e-05f;
  const auto power = (Vector<float>)_mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(sixteenth_power));
  const Vector<float> tail = (0.166666672f * r + 0.5f) * (r * r) + r;
  return (Vector<float>)_mm512_scalef_ps((__m512)(power * tail + power), (__m512)(n * 0.0625f));
}
#else
XTALFAST_INLINE Vector<float> exponential(Vector<float> x) {
  x = largest(splat(-87.0f), x);                               // in this order NaN stays
  const Vector<float> shifted = x * 1.44269504f + 12582912.0f; // its low bits are the integer
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> q = 0.00139336525f * r + 0.00836318154f;
  q = q * r + 0.0416664649f;
  q = q * r + 0.16666577f;
  q = q * r + 0.5f;
  const Vector<float> y = 1.0f + (r + r * r * q);
  return (Vector<float>)((Integers<float>)y + ((Integers<float>)shifted << 23));
}
#endif

// The same between -708 and 709.
XTALFAST_INLINE Vector<double> exponential(Vector<double> x) {
  x = largest(splat(-708.0), x);
  const Vector<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Vector<double> n = shifted - 6755399441055744.0;
  const Vector<double> r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  constexpr double factorial[] = {6227020800., 479001600., 39916800., 3628800., 362880., 40320., 5040.,
                                  720.,        120.,       24.,       6.,       2.,      1.,     1.};
  Vector<double> y = splat(1 / factorial[0]);
  for (int k = 1; k < 14; ++k)
    y = y * r + 1 / factorial[k];
  return (Vector<double>)((Integers<double>)y + ((Integers<double>)shifted << 52));
}

// n counts of any type as T, 0 beyond them.
template <class T, class C> XTALFAST_INLINE Vector<T> load_counts(const C *p, std::int64_t n) {
  T values[Lanes<T>::count] = {};
  const std::int64_t most = std::min(n, Lanes<T>::count);
  for (std::int64_t k = 0; k < most; ++k)
    values[k] = static_cast<T>(p[k]);
  return load(values);
}
#if XTALFAST_VECTOR_BYTES == 64
template <> XTALFAST_INLINE Vector<float> load_counts<float, std::uint16_t>(const std::uint16_t *p, std::int64_t n) {
  const __mmask32 inside = n >= 16 ? 0xffff : (1u << n) - 1;
  const __m256i raw = _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(inside, p));
  return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(raw));
}
template <> XTALFAST_INLINE Vector<float> load_counts<float, std::int32_t>(const std::int32_t *p, std::int64_t n) {
  const __mmask16 inside = n >= 16 ? 0xffff : (1u << n) - 1;
  return (Vector<float>)_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(inside, p));
}
template <> XTALFAST_INLINE Vector<float> load_counts<float, float>(const float *p, std::int64_t n) {
  const __mmask16 inside = n >= 16 ? 0xffff : (1u << n) - 1;
  return (Vector<float>)_mm512_maskz_loadu_ps(inside, p);
}
template <> XTALFAST_INLINE Vector<float> load_counts<float, std::uint8_t>(const std::uint8_t *p, std::int64_t n) {
  const __mmask16 inside = n >= 16 ? 0xffff : (1u << n) - 1;
  return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, p)));
}
#elif XTALFAST_VECTOR_BYTES == 32
template <> XTALFAST_INLINE Vector<float> load_counts<float, std::uint16_t>(const std::uint16_t *p, std::int64_t n) {
  std::uint16_t first[8] = {};
  if (n < 8)
    std::memcpy(first, p, 2 * n);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(n < 8 ? first : p));
  return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(raw));
}
#endif

} // namespace XTALFAST_ISA
} // namespace xtalfast
