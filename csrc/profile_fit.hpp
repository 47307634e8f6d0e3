// Linear fits of intensity and background to shoeboxes, with weights at a reference.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

struct ProfileFitArguments {
  Shoeboxes boxes;
  bool wide;              // profile and background are double, else float
  const void *profile;    // values, like the counts
  const double *at;       // [2, n]: I and B of the weights, not negative
  double *fit;            // [6, n]: I, var I, B, var B, cov(I, B), correlation
  std::uint8_t *solvable; // [n]
};

void profile_fit(const ProfileFitArguments &arguments);

} // namespace xtalfast
