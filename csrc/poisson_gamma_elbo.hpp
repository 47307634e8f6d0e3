// -E_q log p(counts) of shoeboxes, the divergences of q from its priors, and all gradients, in one pass over the
// counts.
#pragma once

#include "shoebox.hpp"

namespace xtalfast {

enum class ProfileKind : int { values, logits, gaussian };

struct ElboArguments {
  Shoeboxes boxes;
  bool wide; // profile, background and their gradients are double, else float
  bool gradients;
  ProfileKind profile_kind;
  const void *profile;    // values or logits, like the counts
  const void *mean;       // Gaussian: [n, 3]
  const void *scale_tril; // Gaussian: [n, 3, 3]
  const void *grid;       // Gaussian: [pixels, 3], or one for each pixel of ragged rows
  const double *q;        // [4, n]: shape and rate of q(I), shape and rate of q(B)
  const double *prior;    // [4, n], in the same order
  int nodes;              // of the quadrature; 0 chooses by the shapes
  int samples;            // above 0: Monte Carlo with the draws below instead
  const double *draws_i;  // [n, samples]
  const double *draws_b;
  double *loss;         // [n] -E_q log p(counts)
  double *divergence;   // [2, n] KL of q(I) and q(B)
  void *grad_profile;   // like `profile`
  void *grad_mean;      // [n, 3]
  void *grad_scale;     // [n, 3, 3]
  double *grad_q;       // [4, n] of the loss (quadrature)
  double *grad_draws_i; // [n, samples] of the loss (Monte Carlo)
  double *grad_draws_b;
  double *grad_divergence; // [8, n]: d KL_i and d KL_b by shape, rate, prior shape, prior rate
};

void poisson_gamma_elbo(const ElboArguments &arguments);

} // namespace xtalfast
