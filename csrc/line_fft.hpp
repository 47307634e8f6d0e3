// Fourier transforms of many lines of one length at once: one line a lane of a vector, so that nothing is shuffled.
// Lengths whose prime factors are at most 19, which is every length that a grid of a map has.
#pragma once

#include <vector>

#include "simd.hpp"

namespace xtalfast {

// The passes of a transform of n points (Stockham's: in order without a reordering), with their roots of unity.
template <class T> struct LinePlan {
  struct Pass {
    int radix;
    std::int64_t inner, outer;   // n = outer x radix x inner
    std::vector<T> twiddle;      // exp(-2 pi i u j outer / n) of u = 1 .. radix - 1, j < inner: real, imaginary
    std::vector<T> cosine, sine; // of 2 pi u v / radix, u and v = 1 .. radix / 2, for an odd radix
  };
  std::int64_t n;
  std::vector<Pass> passes;

  static const LinePlan &of(std::int64_t n); // made once
};

bool has_line_plan(std::int64_t n);

// n points of Lanes<T>::count lines: point j of lane w at [j x count + w]. Two pairs of arrays, as the passes go to and
// fro between them.
template <class T> struct LineBuffer {
  T *re, *im, *spare_re, *spare_im;
};

// sum_j x_j exp(-+ 2 pi i j k / n); the result is in (re, im).
void transform_lines(const LinePlan<float> &plan, LineBuffer<float> &lines, bool inverse);
void transform_lines(const LinePlan<double> &plan, LineBuffer<double> &lines, bool inverse);

} // namespace xtalfast
