#include "byte_offset.hpp"

#include <algorithm>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__)
#define XTALFAST_AVX2 1
#include <immintrin.h>
#endif

namespace xtalfast {
namespace {

constexpr std::uint8_t escape8 = 0x80;
constexpr std::int64_t int32_min = std::numeric_limits<std::int32_t>::min();
constexpr std::int64_t int32_max = std::numeric_limits<std::int32_t>::max();

// Little-endian integer of sizeof(T) bytes, on any host.
template <class T> T load_le(const std::uint8_t *p) {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i)
    bits |= std::uint64_t{p[i]} << (8 * i);
  return static_cast<T>(bits);
}

template <class T> std::uint8_t *store_le(std::uint8_t *p, T value) {
  const auto bits = static_cast<std::uint64_t>(value);
  for (std::size_t i = 0; i < sizeof(T); ++i)
    *p++ = static_cast<std::uint8_t>(bits >> (8 * i));
  return p;
}

struct Stream {
  const std::uint8_t *p;
  const std::uint8_t *end;
  std::int64_t value = 0; // of the pixel before; always within int32

  std::size_t left() const { return static_cast<std::size_t>(end - p); }
};

// One pixel of any width. On failure the stream stays at the start of that pixel.
inline ByteOffsetStatus decode_one(Stream &s) {
  if (s.left() < 1)
    return ByteOffsetStatus::truncated;
  std::int64_t delta = static_cast<std::int8_t>(*s.p);
  std::size_t used = 1;
  if (*s.p == escape8) {
    if (s.left() < 3)
      return ByteOffsetStatus::truncated;
    delta = load_le<std::int16_t>(s.p + 1);
    used = 3;
    if (delta == std::numeric_limits<std::int16_t>::min()) {
      if (s.left() < 7)
        return ByteOffsetStatus::truncated;
      delta = load_le<std::int32_t>(s.p + 3);
      used = 7;
      if (delta == int32_min) {
        if (s.left() < 15)
          return ByteOffsetStatus::truncated;
        delta = load_le<std::int64_t>(s.p + 7);
        used = 15;
      }
    }
  }
  // Both bounds are exact in int64: value is within int32, so neither difference can wrap.
  if (delta > int32_max - s.value || delta < int32_min - s.value)
    return ByteOffsetStatus::overflow;
  s.value += delta;
  s.p += used;
  return ByteOffsetStatus::ok;
}

// Pixels from here on that one-byte differences cannot carry out of int32, so that runs of them need no range check.
std::size_t safe_run(const Stream &s, std::size_t n) {
  const auto reach = static_cast<std::size_t>((int32_max - std::max(s.value, -s.value - 1)) / 128);
  return std::min({n, reach, s.left()});
}

ByteOffsetStatus decode_scalar(Stream &s, std::int32_t *out, std::size_t n, std::size_t &i) {
  while (i < n) {
    auto value = static_cast<std::int32_t>(s.value);
    for (const std::size_t limit = i + safe_run(s, n - i); i < limit && *s.p != escape8; ++i)
      out[i] = value += static_cast<std::int8_t>(*s.p++);
    s.value = value;
    if (i == n)
      break;
    const ByteOffsetStatus status = decode_one(s);
    if (status != ByteOffsetStatus::ok)
      return status;
    out[i++] = static_cast<std::int32_t>(s.value);
  }
  return ByteOffsetStatus::ok;
}

#ifdef XTALFAST_AVX2

constexpr std::size_t block = 32; // pixels of one AVX2 step

// Running sums of 8 differences in each half: at most 8 * 128 in size, so 16 bits hold them.
__attribute__((target("avx2"))) inline __m256i prefix_sums_of_8(__m128i differences) {
  __m256i x = _mm256_cvtepi8_epi16(differences);
  x = _mm256_add_epi16(x, _mm256_slli_si256(x, 2));
  x = _mm256_add_epi16(x, _mm256_slli_si256(x, 4));
  return _mm256_add_epi16(x, _mm256_slli_si256(x, 8));
}

// Adds the pixel before to 8 running sums, writes 8 pixels, returns the last of them in all places. The sum of the
// group is broadcast before the addition, so that only one addition per 8 pixels waits for the group before.
__attribute__((target("avx2"))) inline __m256i write_8(std::int32_t *out, __m128i sums, __m256i before) {
  const __m256i wide = _mm256_cvtepi16_epi32(sums);
  const __m256i total = _mm256_permutevar8x32_epi32(wide, _mm256_set1_epi32(7));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_add_epi32(wide, before));
  return _mm256_add_epi32(total, before);
}

// Blocks of 32 one-byte differences; a block with an escape keeps the pixels before it, then takes it by decode_one.
__attribute__((target("avx2"))) ByteOffsetStatus decode_avx2(Stream &s, std::int32_t *out, std::size_t n,
                                                             std::size_t &i) {
  const __m256i escapes = _mm256_set1_epi8(static_cast<char>(escape8));
  while (i < n) {
    const std::size_t limit = i + safe_run(s, n - i);
    __m256i before = _mm256_set1_epi32(static_cast<std::int32_t>(s.value));
    const std::size_t start = i;
    while (i + block <= limit) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(s.p));
      const auto found = static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, escapes)));
      const __m256i first = prefix_sums_of_8(_mm256_castsi256_si128(bytes));
      const __m256i second = prefix_sums_of_8(_mm256_extracti128_si256(bytes, 1));
      before = write_8(out + i, _mm256_castsi256_si128(first), before);
      before = write_8(out + i + 8, _mm256_extracti128_si256(first, 1), before);
      before = write_8(out + i + 16, _mm256_castsi256_si128(second), before);
      before = write_8(out + i + 24, _mm256_extracti128_si256(second, 1), before);
      const std::size_t good = found ? static_cast<std::size_t>(__builtin_ctz(found)) : block;
      s.p += good;
      i += good;
      if (found)
        break;
    }
    if (i > start)
      s.value = out[i - 1];
    if (i == n)
      break;
    const ByteOffsetStatus status = decode_one(s);
    if (status != ByteOffsetStatus::ok)
      return status;
    out[i++] = static_cast<std::int32_t>(s.value);
  }
  return ByteOffsetStatus::ok;
}

#endif // XTALFAST_AVX2

// Bytes of one difference of two int32 in its shortest form; the smallest value of each width is the escape.
inline int width(std::int64_t delta) {
  if (delta >= -127 && delta <= 127)
    return 1;
  if (delta >= -32767 && delta <= 32767)
    return 3;
  if (delta > int32_min && delta <= int32_max)
    return 7;
  return 15;
}

} // namespace

ByteOffsetIsa byte_offset_best_isa() {
#ifdef XTALFAST_AVX2
  if (__builtin_cpu_supports("avx2"))
    return ByteOffsetIsa::avx2;
#endif
  return ByteOffsetIsa::scalar;
}

ByteOffsetResult byte_offset_decode(const std::uint8_t *data, std::size_t size, std::int32_t *out, std::size_t n,
                                    ByteOffsetIsa isa) {
  Stream s{data, data + size};
  std::size_t i = 0;
  ByteOffsetStatus status;
#ifdef XTALFAST_AVX2
  if (isa == ByteOffsetIsa::avx2)
    status = decode_avx2(s, out, n, i);
  else
#else
  (void)isa;
#endif
    status = decode_scalar(s, out, n, i);
  if (status == ByteOffsetStatus::ok && s.left() > 0)
    status = ByteOffsetStatus::trailing;
  return {status, i, static_cast<std::size_t>(s.p - data)};
}

std::size_t byte_offset_encoded_size(const std::int32_t *pixels, std::size_t n) {
  std::size_t size = 0;
  std::int64_t before = 0;
  for (std::size_t i = 0; i < n; ++i) {
    size += static_cast<std::size_t>(width(pixels[i] - before));
    before = pixels[i];
  }
  return size;
}

void byte_offset_encode(const std::int32_t *pixels, std::size_t n, std::uint8_t *out) {
  std::int64_t before = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t delta = pixels[i] - before;
    before = pixels[i];
    const int bytes = width(delta);
    if (bytes == 1) {
      out = store_le(out, static_cast<std::int8_t>(delta));
      continue;
    }
    *out++ = escape8;
    if (bytes == 3) {
      out = store_le(out, static_cast<std::int16_t>(delta));
      continue;
    }
    out = store_le(out, std::numeric_limits<std::int16_t>::min());
    if (bytes == 7) {
      out = store_le(out, static_cast<std::int32_t>(delta));
      continue;
    }
    out = store_le(out, std::numeric_limits<std::int32_t>::min());
    out = store_le(out, delta);
  }
}

} // namespace xtalfast
