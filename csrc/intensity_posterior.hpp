// The share of the spot in the photons of a box: its most likely value and its posterior on quadrature nodes.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

struct PosteriorArguments {
  Shoeboxes boxes;
  bool wide;           // profile and background are double, else float
  const void *profile; // values, like the counts
  const double *prior; // [4, n]: shape and rate of I, shape and rate of B
  const double *node;  // Gauss-Legendre nodes on (-1, 1)
  int nodes;
  double tolerance; // of the mode, in units of its width
  double tail;      // fall of the log-density to the ends of the quadrature
  // [7, n]: P, Q, photons, sum of log y!, sum of y log(rate) at the mode, and the two ends of s
  double *summary;
  double *log_rates; // [n, nodes]: sum of y log(rate) less that at the mode
};

void intensity_posterior(const PosteriorArguments &arguments);

} // namespace xtalfast
