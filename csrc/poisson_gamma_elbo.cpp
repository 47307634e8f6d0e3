#include "poisson_gamma_elbo.hpp"

#include <vector>

#include "special.hpp"

namespace xtalfast {
namespace {

constexpr int lanes = 4;        // nodes taken in one sweep over the pixels
constexpr int compact_from = 6; // nodes from which gathering the pixels with counts pays
constexpr int most_nodes = 96;  // of the automatic choice

// log X, log(1 - X) and weights of the quadrature over the share X ~ Beta(a, b); `share_nodes` of the Python reference.
struct ShareRule {
  std::vector<double> log_share, log_rest, weight;

  void build(double a, double b, int nodes) {
    log_share.resize(nodes);
    log_rest.resize(nodes);
    weight.resize(nodes);
    const double n = a + b, sd = std::sqrt(n / (a * b)), level = std::min(2.5 * std::sqrt(double(nodes)), 16.0);
    const double left = reach(a, b, sd, level), right = reach(b, a, sd, level);
    const double spacing = std::min(0.7 * sd, 0.8) * (nodes - 1) / 2;
    const double skew = (right - left) / (right + left);
    const double stretch = std::max(0.5 * (left + right) / spacing, 1.0 + 1e-9);
    double kappa = std::log(2 * stretch) + 1;
    for (int i = 0; i < 6; ++i) {
      const double t = skew * std::tanh(kappa);
      kappa = std::asinh(stretch * kappa * std::sqrt(1 - t * t));
    }
    kappa = std::max(kappa, 1e-3);
    const double eta = std::atanh(skew * std::tanh(kappa)), scale = right / std::sinh(kappa + eta);
    const double mode = std::log(a / b), step = 2.0 / (nodes - 1);
    const double ratio = std::exp(kappa * step);
    double up = std::exp(eta - kappa), total = 0, top = -INFINITY;
    for (int k = 0; k < nodes; ++k, up *= ratio) { // e^angle is a geometric series
      const double down = 1 / up, t = mode + scale * 0.5 * (up - down);
      const double e = std::exp(-std::abs(t)), soft = std::log1p(e);
      log_share[k] = std::min(t, 0.0) - soft;
      log_rest[k] = std::min(-t, 0.0) - soft;
      double measure = step * scale * kappa * 0.5 * (up + down);
      if (k == 0 || k == nodes - 1) { // half a cell, and the exponential tail beyond
        const double share = t > 0 ? 1 / (1 + e) : e / (1 + e);
        measure = 0.5 * measure + 1 / std::abs(a - n * share);
      }
      weight[k] = a * log_share[k] + b * log_rest[k] + std::log(measure);
      top = std::max(top, weight[k]);
    }
    for (double &w : weight)
      total += w = std::exp(w - top);
    for (double &w : weight)
      w /= total;
  }

private:
  static double reach(double slope, double other, double sd, double level) {
    const double n = slope + other;
    double d = sd * std::sqrt(2 * level) + level / slope + 1;
    for (int i = 0; i < 5; ++i) {
      const double decay = std::exp(-d) * slope;
      d -= (slope * d + n * std::log((other + decay) / n) - level) / (slope - n * decay / (other + decay));
    }
    return d;
  }
};

int nodes_needed(double shape_i, double shape_b) {
  const double smallest = std::min(shape_i, shape_b);
  return smallest >= 10 ? 24 : smallest >= 1 ? 40 : most_nodes;
}

// Sums over pixels of one node or draw: y log(rate); for draws also y p / rate and y b / rate.
template <class T> struct NodeSums {
  T log_rate, by_i, by_b;
};

// One sweep over the pixels for L nodes: adds weight_k I_k y / rate to the gradient of each pixel.
template <class T, int L, bool by_draw>
XTALFAST_INLINE void sweep(std::int64_t length, const T *counts, const T *p, const T *b, const T *i_k, const T *b_k,
                           const T *weighted_i, T *grad, NodeSums<T> *sums) {
  const Vector<T> tiny = splat(static_cast<T>(smallest_rate)), none{};
  Vector<T> log_rate[L] = {}, by_i[L] = {}, by_b[L] = {};
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count) {
    const Vector<T> y = load(counts + j), pj = load(p + j), bj = load(b + j);
    Vector<T> g = load(grad + j);
    for (int k = 0; k < L; ++k) {
      const Vector<T> rate = i_k[k] * pj + b_k[k] * bj;
      const Vector<T> safe = largest<T>(rate, tiny);
      const Vector<T> ratio = rate > tiny ? y / safe : none;
      log_rate[k] += y * vector_log(safe);
      g += weighted_i[k] * ratio;
      if (by_draw) {
        by_i[k] += ratio * pj;
        by_b[k] += ratio * bj;
      }
    }
    store(grad + j, g);
  }
  for (int k = 0; k < L; ++k)
    sums[k] = {sum<T>(log_rate[k]), sum<T>(by_i[k]), sum<T>(by_b[k])};
}

template <class T> struct Scratch {
  Row<T> row;
  std::vector<T> grad, lit_grad, offset;
  std::vector<T> i_k, b_k, weighted_i;
  std::vector<double> weight;
  std::vector<NodeSums<T>> sums;
  ShareRule rule;

  explicit Scratch(std::int64_t longest)
      : row(longest), grad(row.counts.size()), lit_grad(row.counts.size()), offset(3 * row.counts.size()) {}

  void resize_nodes(int count) {
    const int whole = count == 1 ? 1 : (count + lanes - 1) / lanes * lanes;
    i_k.assign(whole, T(1));
    b_k.assign(whole, T(1));
    weighted_i.assign(whole, T(0)); // padding weighs nothing
    weight.assign(count, 0.0);
    sums.resize(whole);
  }
};

// Softmax of the first `size` values, in place; the padding becomes 0.
template <class T> XTALFAST_INLINE void softmax(std::int64_t size, std::int64_t length, T *values) {
  std::fill(values + size, values + length, T(-INFINITY));
  Vector<T> tops = splat(T(-INFINITY));
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count)
    tops = largest<T>(tops, load(values + j));
  T top = tops[0];
  for (int k = 1; k < Lanes<T>::count; ++k)
    top = std::max(top, tops[k]);
  Vector<T> total{};
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count) {
    const Vector<T> e = vector_exp(load(values + j) - top);
    store(values + j, e);
    total += e;
  }
  const T scale = T(1) / sum<T>(total);
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count)
    store(values + j, load(values + j) * scale);
  std::fill(values + size, values + length, T(0));
}

// z = L^-1 (x - mean) into the three planes of `z`, and -|z|^2 / 2 into `logits`.
template <class T>
XTALFAST_INLINE void whiten(std::int64_t n, std::int64_t length, const T *mean, const T *l, const T *grid, T *z,
                            T *logits) {
  const T d0 = T(1) / l[0], d1 = T(1) / l[4], d2 = T(1) / l[8];
  T *z0 = z, *z1 = z + length, *z2 = z + 2 * length;
  for (std::int64_t j = 0; j < n; ++j) {
    const T a = (grid[3 * j] - mean[0]) * d0;
    const T b = (grid[3 * j + 1] - mean[1] - l[3] * a) * d1;
    const T c = (grid[3 * j + 2] - mean[2] - l[6] * a - l[7] * b) * d2;
    z0[j] = a, z1[j] = b, z2[j] = c;
    logits[j] = T(-0.5) * (a * a + b * b + c * c);
  }
  for (T *plane : {z0, z1, z2})
    std::fill(plane + n, plane + length, T(0));
}

// Gradients by mean and L from those by the logits: d logit / d mean = L^-T z and d logit / d L = L^-T z z^T.
template <class T>
XTALFAST_INLINE void gaussian_gradients(std::int64_t length, const T *l, const T *z, const T *by_logit, T *by_mean,
                                        T *by_scale) {
  Vector<T> v[3] = {}, m[3][3] = {};
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count) {
    const Vector<T> g = load(by_logit + j);
    const Vector<T> at[3] = {load(z + j), load(z + length + j), load(z + 2 * length + j)};
    for (int a = 0; a < 3; ++a) {
      const Vector<T> weighted = g * at[a];
      v[a] += weighted;
      for (int b = 0; b <= a; ++b)
        m[a][b] += weighted * at[b];
    }
  }
  T columns[4][3]; // right-hand sides: sum g z, and the columns of sum g z z^T
  for (int a = 0; a < 3; ++a) {
    columns[0][a] = sum<T>(v[a]);
    for (int b = 0; b < 3; ++b)
      columns[1 + b][a] = sum<T>(b <= a ? m[a][b] : m[b][a]);
  }
  for (auto &x : columns) { // back substitution with L^T
    x[2] = x[2] / l[8];
    x[1] = (x[1] - l[7] * x[2]) / l[4];
    x[0] = (x[0] - l[3] * x[1] - l[6] * x[2]) / l[0];
  }
  for (int a = 0; a < 3; ++a) {
    by_mean[a] = columns[0][a];
    for (int b = 0; b < 3; ++b)
      by_scale[3 * a + b] = b <= a ? columns[1 + b][a] : T(0);
  }
}

template <class T> XTALFAST_INLINE void one_box(const ElboArguments &s, std::int64_t box, Scratch<T> &w) {
  const Shoeboxes &boxes = s.boxes;
  const std::int64_t n_boxes = boxes.n, first = boxes.first(box);
  Row<T> &row = w.row;
  load_row(boxes, box, row);
  const std::int64_t n = row.size;
  T *profile = row.profile.data();
  if (s.profile_kind == ProfileKind::gaussian) {
    const T *grid = static_cast<const T *>(s.grid) + (boxes.ptr ? 3 * first : 0);
    whiten(n, row.length, static_cast<const T *>(s.mean) + 3 * box, static_cast<const T *>(s.scale_tril) + 9 * box,
           grid, w.offset.data(), profile);
  } else {
    std::copy_n(static_cast<const T *>(s.profile) + first, n, profile);
  }
  if (s.profile_kind != ProfileKind::values)
    softmax(n, row.length, profile);
  add_up(row);
  const double profile_sum = row.profile_sum, background_sum = row.background_sum;

  // nodes (I_k, B_k, weight_k)
  const double k_i = s.q[box], r_i = s.q[n_boxes + box], k_b = s.q[2 * n_boxes + box], r_b = s.q[3 * n_boxes + box];
  const bool monte_carlo = s.samples > 0;
  const int count = monte_carlo ? s.samples : s.nodes > 0 ? s.nodes : nodes_needed(k_i, k_b);
  w.resize_nodes(count);
  double mean_i = k_i / r_i, mean_b = k_b / r_b;
  if (monte_carlo) {
    mean_i = mean_b = 0;
    for (int k = 0; k < count; ++k) {
      w.i_k[k] = static_cast<T>(s.draws_i[box * count + k]);
      w.b_k[k] = static_cast<T>(s.draws_b[box * count + k]);
      w.weight[k] = 1.0 / count;
      w.weighted_i[k] = static_cast<T>(w.weight[k] * w.i_k[k]);
      mean_i += w.weight[k] * s.draws_i[box * count + k];
      mean_b += w.weight[k] * s.draws_b[box * count + k];
    }
  } else {
    w.rule.build(k_i, k_b, count);
    const double scale = std::exp(digamma(k_i + k_b)); // of the sum r_i I + r_b B, independent of the share
    for (int k = 0; k < count; ++k) {
      w.weight[k] = w.rule.weight[k];
      w.i_k[k] = static_cast<T>(scale * std::exp(w.rule.log_share[k]) / r_i);
      w.b_k[k] = static_cast<T>(scale * std::exp(w.rule.log_rest[k]) / r_b);
      w.weighted_i[k] = static_cast<T>(w.weight[k] * w.i_k[k]);
    }
  }

  // sweeps over the pixels: all, or those with counts where that saves more than gathering them costs
  const bool compact = count >= compact_from;
  if (compact)
    gather_lit(row);
  const std::int64_t length = compact ? row.lit_length : row.length;
  const T *counts = compact ? row.lit_counts.data() : row.counts.data();
  const T *p = compact ? row.lit_profile.data() : profile;
  const T *b = compact ? row.lit_background.data() : row.background.data();
  T *grad = compact ? w.lit_grad.data() : w.grad.data();
  std::fill_n(grad, length, T(0));
  if (count == 1)
    sweep<T, 1, true>(length, counts, p, b, w.i_k.data(), w.b_k.data(), w.weighted_i.data(), grad, w.sums.data());
  else if (monte_carlo)
    for (int k = 0; k < count; k += lanes)
      sweep<T, lanes, true>(length, counts, p, b, &w.i_k[k], &w.b_k[k], &w.weighted_i[k], grad, &w.sums[k]);
  else
    for (int k = 0; k < count; k += lanes)
      sweep<T, lanes, false>(length, counts, p, b, &w.i_k[k], &w.b_k[k], &w.weighted_i[k], grad, &w.sums[k]);

  const double factorials = LogFactorials::instance().of(counts, length, whole_numbers(boxes.count_type));
  double log_rates = 0;
  for (int k = 0; k < count; ++k)
    log_rates += w.weight[k] * w.sums[k].log_rate;
  s.loss[box] = mean_i * profile_sum + mean_b * background_sum + factorials - log_rates;
  const GammaDivergence kl_i = gamma_divergence(k_i, r_i, s.prior[box], s.prior[n_boxes + box]);
  const GammaDivergence kl_b = gamma_divergence(k_b, r_b, s.prior[2 * n_boxes + box], s.prior[3 * n_boxes + box]);
  s.divergence[box] = kl_i.value;
  s.divergence[n_boxes + box] = kl_b.value;
  if (!s.gradients)
    return;

  const double by_kl[8] = {kl_i.d_shape, kl_i.d_rate, kl_i.d_prior_shape, kl_i.d_prior_rate,
                           kl_b.d_shape, kl_b.d_rate, kl_b.d_prior_shape, kl_b.d_prior_rate};
  for (int k = 0; k < 8; ++k)
    s.grad_divergence[k * n_boxes + box] = by_kl[k];
  if (monte_carlo) {
    for (int k = 0; k < count; ++k) {
      s.grad_draws_i[box * count + k] = w.weight[k] * (profile_sum - w.sums[k].by_i);
      s.grad_draws_b[box * count + k] = w.weight[k] * (background_sum - w.sums[k].by_b);
    }
  } else {
    Vector<T> by_profile{};
    for (std::int64_t j = 0; j < length; j += Lanes<T>::count)
      by_profile += load(grad + j) * load(p + j);
    // the spot's share of the expected photons, and the background's: together the photons
    const double total_i = sum<T>(by_profile), total_b = row.photons - total_i;
    double mean_share = 0, mean_rest = 0, by_share = 0, by_rest = 0;
    for (int k = 0; k < count; ++k) {
      mean_share += w.weight[k] * w.rule.log_share[k];
      mean_rest += w.weight[k] * w.rule.log_rest[k];
    }
    for (int k = 0; k < count; ++k) {
      const double centred = w.weight[k] * (w.sums[k].log_rate - log_rates);
      by_share += centred * (w.rule.log_share[k] - mean_share);
      by_rest += centred * (w.rule.log_rest[k] - mean_rest);
    }
    const double by_sum = trigamma(k_i + k_b) * row.photons;
    s.grad_q[box] = profile_sum / r_i - by_share - by_sum;
    s.grad_q[n_boxes + box] = (total_i - mean_i * profile_sum) / r_i;
    s.grad_q[2 * n_boxes + box] = background_sum / r_b - by_rest - by_sum;
    s.grad_q[3 * n_boxes + box] = (total_b - mean_b * background_sum) / r_b;
  }

  // gradient by the profile values
  T *by_pixel = w.grad.data();
  const T mean = static_cast<T>(mean_i);
  for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count)
    store(by_pixel + j, load(&row.used[j]) * mean - (compact ? Vector<T>{} : load(grad + j)));
  for (std::int64_t k = 0; compact && k < row.n_lit; ++k)
    by_pixel[row.lit_index[k]] -= grad[k];
  if (s.profile_kind != ProfileKind::values) { // through the softmax
    Vector<T> centres{};
    for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count)
      centres += load(profile + j) * load(by_pixel + j);
    const T centre = sum<T>(centres);
    for (std::int64_t j = 0; j < row.length; j += Lanes<T>::count)
      store(by_pixel + j, load(profile + j) * (load(by_pixel + j) - centre));
  }
  if (s.profile_kind == ProfileKind::gaussian)
    gaussian_gradients(row.length, static_cast<const T *>(s.scale_tril) + 9 * box, w.offset.data(), by_pixel,
                       static_cast<T *>(s.grad_mean) + 3 * box, static_cast<T *>(s.grad_scale) + 9 * box);
  else
    std::copy_n(by_pixel, n, static_cast<T *>(s.grad_profile) + first);
}

XTALFAST_CLONES void box_float(const ElboArguments &s, std::int64_t box, Scratch<float> &w) { one_box(s, box, w); }
XTALFAST_CLONES void box_double(const ElboArguments &s, std::int64_t box, Scratch<double> &w) { one_box(s, box, w); }

} // namespace

void poisson_gamma_elbo(const ElboArguments &s) {
  const std::int64_t longest = s.boxes.longest();
  LogFactorials::instance(); // made before the threads start
#pragma omp parallel num_threads(s.boxes.threads)
  {
    if (s.wide) {
      Scratch<double> scratch(longest);
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        box_double(s, box, scratch);
    } else {
      Scratch<float> scratch(longest);
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t box = 0; box < s.boxes.n; ++box)
        box_float(s, box, scratch);
    }
  }
}

} // namespace xtalfast
