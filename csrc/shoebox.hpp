// Shoeboxes as the intensity kernels read them: one row of pixels at a time, any type of counts and mask.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.hpp"

namespace xtalfast {

enum class CountType : int { uint8, uint16, int32, float32, float64 };
enum class MaskType : int { none, boolean, bits8, bits32 };

// Photon rates below this are taken for it, so that p = 0 with y > 0 stays finite.
constexpr double smallest_rate = 1e-25;

struct Shoeboxes {
  const void *counts;
  CountType count_type;
  const void *mask;
  MaskType mask_type;
  const std::int64_t *ptr; // offsets of ragged rows, or null for rows of `pixels`
  std::int64_t n;
  std::int64_t pixels;
  const void *background; // shape of the background, in the precision of the profile; null is flat
  bool background_rows;   // one row a box, else one row for all
  int threads;

  std::int64_t first(std::int64_t row) const { return ptr ? ptr[row] : row * pixels; }
  std::int64_t size(std::int64_t row) const { return ptr ? ptr[row + 1] - ptr[row] : pixels; }
  std::int64_t longest() const {
    std::int64_t most = 0;
    for (std::int64_t row = 0; ptr && row < n; ++row)
      most = std::max(most, size(row));
    return ptr ? most : pixels;
  }
};

// The pixels of one box. Padding counts nothing and is not used; its profile is 0, its background 1.
template <class T> struct Row {
  std::int64_t size = 0;   // pixels
  std::int64_t length = 0; // of the arrays, whole vectors
  std::vector<T> counts;   // 0 where not used
  std::vector<T> used;     // 1 or 0
  std::vector<T> profile, background;
  // the pixels with counts alone, in the same order
  std::int64_t n_lit = 0, lit_length = 0;
  std::vector<T> lit_counts, lit_profile, lit_background;
  // sums over the used pixels
  T profile_sum = 0, background_sum = 0, photons = 0;

  explicit Row(std::int64_t longest) {
    const std::int64_t n = padded<T>(longest) + Lanes<T>::count;
    for (auto *values : {&counts, &used, &profile, &background, &lit_counts, &lit_profile, &lit_background})
      values->resize(n);
  }
};

template <class T, class C> XTALFAST_INLINE void convert(const C *from, std::int64_t n, T *to) {
  for (std::int64_t j = 0; j < n; ++j)
    to[j] = static_cast<T>(from[j]);
}

template <class T, class M> XTALFAST_INLINE void convert_bits(const M *mask, std::int64_t n, T *used) {
  constexpr int valid = 1, overlapped = 32;
  for (std::int64_t j = 0; j < n; ++j)
    used[j] = static_cast<T>((mask[j] & (valid | overlapped)) == valid);
}

// Counts, mask and background of box `index`; then `profile` is to be filled and `add_up` to be called.
template <class T> XTALFAST_INLINE void load_row(const Shoeboxes &boxes, std::int64_t index, Row<T> &row) {
  const std::int64_t first = boxes.first(index), n = boxes.size(index);
  row.size = n;
  row.length = padded<T>(n);
  T *counts = row.counts.data(), *used = row.used.data();
  switch (boxes.count_type) {
  case CountType::uint8:
    convert(static_cast<const std::uint8_t *>(boxes.counts) + first, n, counts);
    break;
  case CountType::uint16:
    convert(static_cast<const std::uint16_t *>(boxes.counts) + first, n, counts);
    break;
  case CountType::int32:
    convert(static_cast<const std::int32_t *>(boxes.counts) + first, n, counts);
    break;
  case CountType::float32:
    convert(static_cast<const float *>(boxes.counts) + first, n, counts);
    break;
  case CountType::float64:
    convert(static_cast<const double *>(boxes.counts) + first, n, counts);
    break;
  }
  switch (boxes.mask_type) {
  case MaskType::none:
    std::fill_n(used, n, T(1));
    break;
  case MaskType::boolean:
    convert(static_cast<const std::uint8_t *>(boxes.mask) + first, n, used);
    break;
  case MaskType::bits8:
    convert_bits(static_cast<const std::uint8_t *>(boxes.mask) + first, n, used);
    break;
  case MaskType::bits32:
    convert_bits(static_cast<const std::int32_t *>(boxes.mask) + first, n, used);
    break;
  }
  if (boxes.background)
    std::copy_n(static_cast<const T *>(boxes.background) + (boxes.background_rows ? first : 0), n,
                row.background.data());
  else
    std::fill_n(row.background.data(), n, T(1));
  for (std::int64_t j = n; j < row.length; ++j) {
    counts[j] = used[j] = row.profile[j] = T(0);
    row.background[j] = T(1);
  }
}

template <class T> XTALFAST_INLINE void add_up(Row<T> &row) {
  const Vector<T> none{};
  Vector<T> profile_sum{}, background_sum{}, photons{};
  for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count) {
    const auto on = load(&row.used[j]) != none;
    const Vector<T> counts = on ? load(&row.counts[j]) : none; // no product: a masked pixel may hold NaN
    store(&row.counts[j], counts);
    photons += counts;
    profile_sum += on ? load(&row.profile[j]) : none;
    background_sum += on ? load(&row.background[j]) : none;
  }
  row.profile_sum = sum<T>(profile_sum);
  row.background_sum = sum<T>(background_sum);
  row.photons = sum<T>(photons);
}

// Sum of log y! over a row; small whole numbers from a table.
class LogFactorials {
public:
  static constexpr int size = 4096, small_size = 32;

  LogFactorials() : table_(size) {
    for (int y = 0; y < size; ++y)
      table_[y] = std::lgamma(y + 1.0);
    std::copy_n(table_.data(), small_size, small_);
  }

  // log y! of one count, and of the first counts as a table in single precision.
  double of(double y) const {
    return y >= 0 && y < size && y == std::floor(y) ? table_[static_cast<int>(y)] : std::lgamma(y + 1);
  }
  const float *small() const { return small_; }

  template <class T> XTALFAST_INLINE double of(const T *counts, std::int64_t length, bool whole) const {
    Vector<T> most{};
    for (std::int64_t j = 0; j < length; j += Lanes<T>::count)
      most = largest<T>(most, load(counts + j));
    T top = 0;
    for (int k = 0; k < Lanes<T>::count; ++k)
      top = std::max(top, most[k]);
    if (top <= (whole ? T(1) : T(0))) // often all pixels hold 0 or 1, whose factorial is 1
      return 0.0;
    double total[4] = {}; // four chains of additions at a time
    if (whole && top < size) {
      for (std::int64_t j = 0; j < length; j += 4)
        for (int k = 0; k < 4; ++k)
          total[k] += table_[static_cast<int>(counts[j + k])];
    } else {
      for (std::int64_t j = 0; j < length; ++j)
        total[j % 4] += whole && counts[j] < size ? table_[static_cast<int>(counts[j])]
                                                  : std::lgamma(static_cast<double>(counts[j]) + 1);
    }
    return (total[0] + total[1]) + (total[2] + total[3]);
  }

  static const LogFactorials &instance() {
    static const LogFactorials table;
    return table;
  }

private:
  std::vector<double> table_;
  float small_[small_size];
};

inline bool whole_numbers(CountType type) { return type != CountType::float32 && type != CountType::float64; }

} // namespace xtalfast
