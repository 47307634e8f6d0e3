// -E_q log p(counts) of shoeboxes plus the weighted divergences of q from its priors, and all gradients, in one pass
// over the counts.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

enum class ProfileKind : int { values, logits, gaussian };

// Rows of `gammas` and of its gradient: shape and rate of q(I), of q(B), of the priors of I and of B; kappa of I and B.
constexpr int n_gammas = 10;

struct ElboArguments {
  Shoeboxes boxes;
  bool wide; // profile, background and their gradients are double, else float
  bool gradients;
  ProfileKind profile_kind;
  const void *profile;    // values or logits, like the counts
  const void *mean;       // Gaussian: [n, 3]
  const void *scale_tril; // Gaussian: [n, 3, 3]
  const void *grid;       // Gaussian: [pixels, 3], or one for each pixel of ragged rows
  const double *gammas;   // [10, n]
  int nodes;              // of the quadrature; 0 chooses by shapes and photons
  int samples;            // above 0: Monte Carlo with the draws below instead
  const double *draws;    // [2, n, samples] of Gamma(shape, 1), for I and B
  const double *slopes;   // their derivatives by the shape
  double *loss;           // [n]
  void *grad_profile;     // like `profile`
  void *grad_mean;        // [n, 3]
  void *grad_scale;       // [n, 3, 3]
  double *grad_gammas;    // [10, n]
};

void poisson_gamma_elbo(const ElboArguments &arguments);

} // namespace xtalfast
