// Fits of intensity and background to shoeboxes: linear with weights at a reference, or the maximum of the likelihood.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

struct ProfileFitArguments {
  Shoeboxes boxes;
  bool wide;                // profile and background are double, else float
  const void *profile;      // values, like the counts
  const double *at;         // [2, n]: I and B of the weights, not negative; null for the maximum of the likelihood
  double tolerance;         // of that maximum, in units of its width
  double least_background;  // in the weights at that maximum
  double *fit;              // [6, n]: I, var I, B, var B, cov(I, B), correlation
  std::int64_t *iterations; // [n]
  std::uint8_t *converged;  // [n]
};

void profile_fit(const ProfileFitArguments &arguments);

} // namespace xtalfast
