// CBF x-CBF_BYTE_OFFSET: pixels as differences to the pixel before, 1 byte each, with escapes to 2, 4 and 8 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xtalfast {

enum class ByteOffsetStatus : int {
  ok = 0,
  truncated = 1, // the stream ends before the last pixel
  trailing = 2,  // bytes are left after the last pixel
  overflow = 3,  // a pixel does not fit in int32
};

enum class ByteOffsetIsa : int { scalar = 0, avx2 = 1 };

struct ByteOffsetResult {
  ByteOffsetStatus status;
  std::size_t pixels; // decoded before the stream ended or went wrong
  std::size_t bytes;  // used by those pixels
};

// The fastest variant that this processor runs.
ByteOffsetIsa byte_offset_best_isa();

// Decodes exactly n pixels from exactly size bytes; reads no byte outside [data, data + size).
ByteOffsetResult byte_offset_decode(const std::uint8_t *data, std::size_t size, std::int32_t *out, std::size_t n,
                                    ByteOffsetIsa isa);

// Bytes that byte_offset_encode writes for these pixels.
std::size_t byte_offset_encoded_size(const std::int32_t *pixels, std::size_t n);

// Encodes n pixels, each in the shortest form.
void byte_offset_encode(const std::int32_t *pixels, std::size_t n, std::uint8_t *out);

} // namespace xtalfast
