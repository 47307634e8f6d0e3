#include "poisson_gamma_elbo.hpp"

#include "special.hpp"

#define XTALFAST_FILE "poisson_gamma_elbo.cpp"
#include "each_isa.hpp"
#include "gamma_functions.hpp"

namespace xtalfast {
namespace XTALFAST_ISA {
namespace {

constexpr int lanes = 4;          // nodes or draws taken in one sweep over the pixels
constexpr int compact_from = 4;   // draws from which gathering the pixels with counts pays
constexpr int most_nodes = 96;    // of the automatic choice
constexpr double tail_level = 16; // the grid of the quadrature ends where the density has fallen by exp(-16)
constexpr std::size_t cache_bytes = 16 << 20; // arrays larger than this are written past the caches

inline int bytes_of(CountType type) {
  constexpr int bytes[] = {1, 2, 4, 4, 8};
  return bytes[static_cast<int>(type)];
}

// log X, log(1 - X), X, 1 - X and weights of the quadrature over the share X ~ Beta(a, b); `share_nodes` of the Python
// reference.
struct ShareRule {
  std::vector<double> t, measure, log_share, log_rest, share, rest, weight;

  void build(double a, double b, int nodes) {
    constexpr std::int64_t count = Lanes<double>::count;
    const std::int64_t length = (nodes + count - 1) / count * count;
    for (auto *values : {&t, &measure, &log_share, &log_rest, &share, &rest, &weight})
      values->resize(length);
    const double n = a + b, sd = std::sqrt(n / (a * b));
    const double level = std::min(2.5 * std::sqrt(double(nodes)), tail_level);
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
    double up = std::exp(eta - kappa);
    for (std::int64_t k = 0; k < length; ++k) { // e^angle is a geometric series
      const double down = 1 / up;
      t[k] = mode + scale * 0.5 * (up - down);
      measure[k] = step * scale * kappa * 0.5 * (up + down);
      up = k < nodes - 1 ? up * ratio : 1;
    }
    const Vector<double> none{};
    for (std::int64_t k = 0; k < length; k += count) {
      const Vector<double> x = load(&t[k]), e = exponential(x > none ? -x : x), soft = logarithm(1.0 + e);
      const Vector<double> inverse = 1.0 / (1.0 + e);
      store(&share[k], x > none ? inverse : e * inverse);
      store(&rest[k], x > none ? e * inverse : inverse);
      store(&log_share[k], (x > none ? none : x) - soft);
      store(&log_rest[k], (x > none ? -x : none) - soft);
    }
    for (int k : {0, nodes - 1}) // half a cell, and the exponential tail beyond
      measure[k] = 0.5 * measure[k] + 1 / std::abs(a - n * share[k]);
    double most = -INFINITY, total = 0;
    for (std::int64_t k = 0; k < length; k += count)
      store(&weight[k], a * load(&log_share[k]) + b * load(&log_rest[k]) + logarithm(load(&measure[k])));
    for (int k = 0; k < nodes; ++k)
      most = std::max(most, weight[k]);
    for (std::int64_t k = 0; k < length; k += count)
      store(&weight[k], exponential(load(&weight[k]) - most));
    for (int k = 0; k < nodes; ++k)
      total += weight[k];
    for (int k = 0; k < nodes; ++k)
      weight[k] /= total;
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

// `nodes_needed` of the Python reference.
inline int nodes_needed(double shape_i, double shape_b, double photons) {
  const double smallest = std::min(shape_i, shape_b);
  if (!(smallest >= 1))
    return most_nodes;
  const double root = std::log(std::max(600 * photons * (1 + 2 / smallest) / smallest, 1.0)) / 2.5;
  return std::min(std::max(static_cast<int>(std::ceil(root * root / 4)) * 4, 12), 40);
}

// Sums over pixels of one node or draw: y log(rate); for draws also y e / rate and y b / rate.
template <class T> struct NodeSums {
  T log_rate, by_i, by_b;
};

// One box as the sweeps read it, and what they leave. Padding has no counts, a profile of 0 and a background of 1.
template <class T> struct Scratch {
  std::int64_t n = 0, length = 0; // pixels, and the length in whole vectors
  // all pixels: counts (0 where not used), 1 or 0 as used, profile but for the factor `scale`, background
  std::vector<T> counts, used, profile, background, grad;
  T scale = 1;
  // fetched into cache while this box is computed: the next one, and where the gradient goes
  const char *next_counts = nullptr, *next_profile = nullptr, *out = nullptr;
  int count_bytes = 0;
  bool past_cache = false; // gradients of the batch are too many to be kept in cache
  // the pixels with counts alone
  std::int64_t n_lit = 0, lit_length = 0;
  std::vector<T> lit_counts, lit_profile, lit_background, lit_grad;
  std::vector<T> grid, offset; // three planes each: pixel coordinates, and L^-1 (x - mean)
  double photons = 0, profile_sum = 0, background_sum = 0, factorials = 0;

  std::vector<T> i_k, b_k, weighted_i;
  std::vector<double> weight;
  std::vector<NodeSums<T>> sums;
  ShareRule rule;

  Scratch(std::int64_t longest, bool gaussian) {
    const std::int64_t size = padded(longest) + Lanes<T>::count;
    for (auto *values :
         {&counts, &used, &profile, &background, &grad, &lit_counts, &lit_profile, &lit_background, &lit_grad})
      values->assign(size, T(0));
    if (gaussian)
      for (auto *planes : {&grid, &offset})
        planes->assign(3 * size, T(0));
  }

  static std::int64_t padded(std::int64_t n) { return (n + Lanes<T>::count - 1) / Lanes<T>::count * Lanes<T>::count; }

  void resize_nodes(int count) {
    const int whole = (count + lanes - 1) / lanes * lanes;
    i_k.assign(whole, T(1));
    b_k.assign(whole, T(1));
    weighted_i.assign(whole, T(0)); // padding weighs nothing
    weight.assign(whole, 0.0);
    sums.resize(whole);
  }
};

// Counts as T into `w.counts`, their sum and the sum of log y!.
template <class T, bool masked, class C> XTALFAST_INLINE void take_counts(const C *from, Scratch<T> &w) {
  const LogFactorials &table = LogFactorials::instance();
  const Vector<T> none{};
  const std::int64_t n = w.n, length = w.length;
  T *counts = w.counts.data();
  const T *used = w.used.data();
  FactorialSum<T, std::numeric_limits<C>::is_integer> factorials;
  Vector<T> photons{};
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count) {
    Vector<T> y = load_counts<T>(from + j, n - j);
    if (masked) // no product: a masked pixel may hold NaN
      y = load(used + j) != none ? y : none;
    store(counts + j, y);
    photons += y;
    factorials.add(y, table);
  }
  w.photons = sum<T>(photons);
  w.factorials = factorials.total(counts, n, table);
}

template <class T, bool masked>
XTALFAST_INLINE void take_counts(const Shoeboxes &boxes, std::int64_t first, Scratch<T> &w) {
  switch (boxes.count_type) {
  case CountType::uint8:
    return take_counts<T, masked>(static_cast<const std::uint8_t *>(boxes.counts) + first, w);
  case CountType::uint16:
    return take_counts<T, masked>(static_cast<const std::uint16_t *>(boxes.counts) + first, w);
  case CountType::int32:
    return take_counts<T, masked>(static_cast<const std::int32_t *>(boxes.counts) + first, w);
  case CountType::float32:
    return take_counts<T, masked>(static_cast<const float *>(boxes.counts) + first, w);
  case CountType::float64:
    return take_counts<T, masked>(static_cast<const double *>(boxes.counts) + first, w);
  }
}

template <class T, class M> XTALFAST_INLINE void take_bits(const M *mask, std::int64_t n, T *used) {
  constexpr int valid = 1, overlapped = 32;
  for (std::int64_t j = 0; j < n; ++j)
    used[j] = static_cast<T>((mask[j] & (valid | overlapped)) == valid);
}

template <class T> XTALFAST_INLINE void take_mask(const Shoeboxes &boxes, std::int64_t first, Scratch<T> &w) {
  T *used = w.used.data();
  std::fill(used + w.n, used + w.length, T(0));
  const auto *bytes = static_cast<const std::uint8_t *>(boxes.mask) + first;
  if (boxes.mask_type == MaskType::bits32)
    return take_bits(static_cast<const std::int32_t *>(boxes.mask) + first, w.n, used);
  if (boxes.mask_type == MaskType::bits8)
    return take_bits(bytes, w.n, used);
  for (std::int64_t j = 0; j < w.n; ++j)
    used[j] = static_cast<T>(bytes[j]);
}

// Softmax of the logits [n] into `w.profile`, but for the factor `w.scale`.
template <class T> XTALFAST_INLINE void take_softmax(const T *logits, Scratch<T> &w) {
  constexpr std::int64_t count = Lanes<T>::count;
  const std::int64_t n = w.n, whole = n / count * count;
  T *profile = w.profile.data();
  constexpr int chains = 4; // a maximum takes four cycles
  Vector<T> tops[chains];
  for (auto &one : tops)
    one = splat(T(-INFINITY));
  std::int64_t j = 0;
  for (; j + chains * count <= whole; j += chains * count)
    for (int k = 0; k < chains; ++k)
      tops[k] = largest(load(logits + j + k * count), tops[k]);
  for (; j < whole; j += count)
    tops[0] = largest(load(logits + j), tops[0]);
  T most = top<T>(largest(largest(tops[0], tops[1]), largest(tops[2], tops[3])));
  for (; j < n; ++j)
    most = std::max(most, logits[j]);
  Vector<T> total{};
  for (j = 0; j < whole; j += count) {
    __builtin_prefetch(w.next_counts + j * w.count_bytes);
    const Vector<T> e = exponential(load(logits + j) - most);
    store(profile + j, e);
    total += e;
  }
  if (whole < n) {
    T rest[count], e[count];
    std::fill_n(rest, count, T(-INFINITY));
    std::copy_n(logits + whole, n - whole, rest);
    store(e, exponential(load(rest) - most));
    std::fill(e + (n - whole), e + count, T(0));
    store(profile + whole, load(e));
    total += load(e);
  }
  w.scale = n > 0 ? T(1) / sum<T>(total) : T(1);
}

// The coordinates [n, 3] as planes.
template <class T> XTALFAST_INLINE void take_grid(const T *grid, std::int64_t n, std::int64_t stride, T *planes) {
  for (std::int64_t j = 0; j < n; ++j)
    for (int a = 0; a < 3; ++a)
      planes[a * stride + j] = grid[3 * j + a];
}

// z = L^-1 (x - mean) into the three planes of `w.offset`, and -|z|^2 / 2 into `logits`.
template <class T> XTALFAST_INLINE void whiten(const T *mean, const T *l, Scratch<T> &w, T *logits) {
  const std::int64_t stride = w.counts.size();
  const T d0 = T(1) / l[0], d1 = T(1) / l[4], d2 = T(1) / l[8], l10 = l[3], l20 = l[6], l21 = l[7];
  const T *x = w.grid.data();
  T *z = w.offset.data();
  for (std::int64_t j = 0; j < w.length; j += Lanes<T>::count) {
    const Vector<T> a = (load(x + j) - mean[0]) * d0;
    const Vector<T> b = (load(x + stride + j) - mean[1] - l10 * a) * d1;
    const Vector<T> c = (load(x + 2 * stride + j) - mean[2] - l20 * a - l21 * b) * d2;
    store(z + j, a);
    store(z + stride + j, b);
    store(z + 2 * stride + j, c);
    store(logits + j, T(-0.5) * (a * a + b * b + c * c));
  }
}

// Sums of profile and background over the used pixels.
template <class T, bool masked, bool flat> XTALFAST_INLINE void add_up(Scratch<T> &w, bool normalised) {
  const Vector<T> none{};
  if (!masked && flat) {
    w.background_sum = static_cast<double>(w.n);
    w.profile_sum = w.n > 0;
    if (normalised)
      return;
    Vector<T> total{};
    for (std::int64_t j = 0; j < w.length; j += Lanes<T>::count)
      total += load(&w.profile[j]);
    w.profile_sum = double(w.scale) * sum<T>(total);
    return;
  }
  Vector<T> profile{}, background{};
  for (std::int64_t j = 0; j < w.length; j += Lanes<T>::count) {
    const auto on = (masked ? load(&w.used[j]) : splat(T(1))) != none;
    const Vector<T> b = flat ? splat(T(1)) : load(&w.background[j]);
    profile += on ? load(&w.profile[j]) : none;
    background += on ? b : none;
    if (!flat) // what lies under a mask is not read, and may be anything
      store(&w.background[j], on ? b : splat(T(1)));
  }
  w.profile_sum = double(w.scale) * sum<T>(profile);
  w.background_sum = sum<T>(background);
  if (!masked && !flat)
    w.background_sum -= static_cast<double>(w.length - w.n); // of the padding
}

// One sweep over the pixels for L nodes: the sums of each, and weight_k I_k y / rate_k onto the gradient of each pixel.
// `positive` says that every rate is above the smallest, as under a flat background it mostly is without a look at
// each. Draws have equal weights and their logarithms are wanted in sum only, so that L share one: into the first of
// `sums`.
template <class T, int L, bool by_draw, bool flat, bool positive>
XTALFAST_INLINE void sweep(std::int64_t length, const T *counts, const T *p, const T *b, T scale, const T *i_k,
                           const T *b_k, const T *weighted_i, bool first, T *grad, NodeSums<T> *sums, const char *next,
                           const char *out) {
  const Vector<T> tiny = splat(static_cast<T>(smallest_rate)), none{};
  Vector<T> log_rate[L] = {}, by_i[L] = {}, by_b[L] = {}, i[L], bg[L], w[L];
  for (int k = 0; k < L; ++k) {
    i[k] = splat(i_k[k] * scale);
    bg[k] = splat(b_k[k]);
    w[k] = splat(weighted_i[k]);
  }
  for (std::int64_t j = 0; j < length; j += Lanes<T>::count) {
    __builtin_prefetch(next + j * sizeof(T));
    __builtin_prefetch(out + j * sizeof(T), 1);
    const Vector<T> y = load(counts + j), pj = load(p + j), bj = flat ? splat(T(1)) : load(b + j);
    Vector<T> g = first ? none : load(grad + j);
    Split<T> product{{}, splat(T(1))};
    for (int k = 0; k < L; ++k) {
      const Vector<T> rate = flat ? i[k] * pj + bg[k] : i[k] * pj + bg[k] * bj;
      const Vector<T> safe = positive ? rate : largest(rate, tiny);
      const Vector<T> inverse = y * reciprocal(safe);
      const Vector<T> ratio = positive || rate > tiny ? inverse : none;
      g += w[k] * ratio;
      if (by_draw) {
        const Split<T> parts = split(safe);
        product.exponent += parts.exponent;
        product.mantissa *= parts.mantissa;
        by_i[k] += ratio * pj;
        by_b[k] += flat ? ratio : ratio * bj;
      } else {
        log_rate[k] += y * logarithm(safe);
      }
    }
    if (by_draw) {
      Split<T> whole = L == 1 ? product : split(product.mantissa);
      if (L > 1)
        whole.exponent += product.exponent;
      log_rate[0] += y * logarithm(whole);
    }
    store(grad + j, g);
  }
  for (int k = 0; k < L; ++k)
    sums[k] = {sum<T>(log_rate[k]), scale * sum<T>(by_i[k]), sum<T>(by_b[k])};
}

template <class T, bool by_draw, bool flat, bool positive>
XTALFAST_INLINE void sweeps(std::int64_t length, const T *counts, const T *p, const T *b, int count, Scratch<T> &w,
                            T *grad) {
  int k = 0;
  for (; k + lanes <= (by_draw ? count : count + lanes - 1); k += lanes)
    sweep<T, lanes, by_draw, flat, positive>(length, counts, p, b, w.scale, &w.i_k[k], &w.b_k[k], &w.weighted_i[k],
                                             k == 0, grad, &w.sums[k], w.next_profile, w.out);
  for (; k < count; ++k)
    sweep<T, 1, by_draw, flat, positive>(length, counts, p, b, w.scale, &w.i_k[k], &w.b_k[k], &w.weighted_i[k], k == 0,
                                         grad, &w.sums[k], w.next_profile, w.out);
}

// Gathers the pixels with counts.
template <class T, bool flat> XTALFAST_INLINE void gather_lit(Scratch<T> &w) {
  std::int64_t kept = 0;
#if XTALFAST_VECTOR_BYTES == 64
  if (sizeof(T) == 4) {
    const auto *y = reinterpret_cast<const float *>(w.counts.data());
    const auto *p = reinterpret_cast<const float *>(w.profile.data());
    const auto *b = reinterpret_cast<const float *>(w.background.data());
    auto *to_y = reinterpret_cast<float *>(w.lit_counts.data());
    auto *to_p = reinterpret_cast<float *>(w.lit_profile.data());
    auto *to_b = reinterpret_cast<float *>(w.lit_background.data());
    for (std::int64_t j = 0; j < w.length; j += 16) {
      const __m512 counts = _mm512_loadu_ps(y + j);
      const __mmask16 lit = _mm512_cmp_ps_mask(counts, _mm512_setzero_ps(), _CMP_GT_OQ);
      _mm512_storeu_ps(to_y + kept, _mm512_maskz_compress_ps(lit, counts));
      _mm512_storeu_ps(to_p + kept, _mm512_maskz_compress_ps(lit, _mm512_loadu_ps(p + j)));
      if (!flat)
        _mm512_storeu_ps(to_b + kept, _mm512_maskz_compress_ps(lit, _mm512_loadu_ps(b + j)));
      kept += __builtin_popcount(lit);
    }
  } else
#endif
    for (std::int64_t j = 0; j < w.n; ++j) { // no branch: the outcome of a photon count cannot be predicted
      w.lit_counts[kept] = w.counts[j];
      w.lit_profile[kept] = w.profile[j];
      if (!flat)
        w.lit_background[kept] = w.background[j];
      kept += w.counts[j] > 0;
    }
  w.n_lit = kept;
  w.lit_length = Scratch<T>::padded(kept);
  for (std::int64_t k = kept; k < w.lit_length; ++k) {
    w.lit_counts[k] = w.lit_profile[k] = T(0);
    w.lit_background[k] = T(1);
  }
}

// The gradients of the gathered pixels back to their places in `w.grad`, 0 elsewhere.
template <class T> XTALFAST_INLINE void spread_lit(Scratch<T> &w) {
  std::int64_t taken = 0;
#if XTALFAST_VECTOR_BYTES == 64
  if (sizeof(T) == 4) {
    const auto *y = reinterpret_cast<const float *>(w.counts.data());
    const auto *from = reinterpret_cast<const float *>(w.lit_grad.data());
    auto *to = reinterpret_cast<float *>(w.grad.data());
    for (std::int64_t j = 0; j < w.length; j += 16) {
      const __mmask16 lit = _mm512_cmp_ps_mask(_mm512_loadu_ps(y + j), _mm512_setzero_ps(), _CMP_GT_OQ);
      _mm512_storeu_ps(to + j, _mm512_maskz_expand_ps(lit, _mm512_loadu_ps(from + taken)));
      taken += __builtin_popcount(lit);
    }
    return;
  }
#endif
  for (std::int64_t j = 0; j < w.length; ++j) {
    const bool lit = w.counts[j] > 0;
    w.grad[j] = lit ? w.lit_grad[taken] : T(0);
    taken += lit;
  }
}

// Gradients by mean and L from those by the logits: d logit / d mean = L^-T z and d logit / d L = L^-T z z^T.
template <class T>
XTALFAST_INLINE void gaussian_gradients(const Scratch<T> &w, const T *l, const T *by_logit, T *by_mean, T *by_scale) {
  const std::int64_t stride = w.counts.size();
  const T *z = w.offset.data();
  Vector<T> v[3] = {}, m[3][3] = {};
  for (std::int64_t j = 0; j < w.length; j += Lanes<T>::count) {
    const Vector<T> g = load(by_logit + j);
    const Vector<T> at[3] = {load(z + j), load(z + stride + j), load(z + 2 * stride + j)};
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

// Gradient by the values, or through the softmax (`centre` is sum p g), of the profile: `out` [n] need not be aligned.
template <class T, bool masked, bool softmax>
XTALFAST_INLINE void profile_gradient(const Scratch<T> &w, T mean_i, T centre, bool past_cache, T *out) {
  const T *used = w.used.data(), *grad = w.grad.data(), *profile = w.profile.data();
  const Vector<T> on = splat(mean_i), none{}, scale = splat(w.scale);
  const auto at = [&](std::int64_t j) __attribute__((always_inline)) {
    const Vector<T> g = (masked ? (load(used + j) != none ? on : none) : on) - load(grad + j);
    return softmax ? scale * load(profile + j) * (g - centre) : g;
  };
  constexpr std::int64_t count = Lanes<T>::count;
  const std::int64_t n = w.n;
  // whole vectors where they are aligned in `out`
  const std::int64_t bytes = -reinterpret_cast<std::intptr_t>(out) & (sizeof(Vector<T>) - 1);
  std::int64_t j = std::min(bytes / static_cast<std::int64_t>(sizeof(T)), n);
  store_first(out, at(0), j);
  if (past_cache)
    for (; j + count <= n; j += count)
      stream(out + j, at(j));
  else
    for (; j + count <= n; j += count)
      store(out + j, at(j));
  if (j < n)
    store_first(out + j, at(j), n - j);
}

template <class T, bool masked, bool flat>
XTALFAST_INLINE void one_box(const ElboArguments &s, std::int64_t box, Scratch<T> &w) {
  const Shoeboxes &boxes = s.boxes;
  const std::int64_t n_boxes = boxes.n, first = boxes.first(box);
  w.n = boxes.size(box);
  w.length = Scratch<T>::padded(w.n);
  w.next_counts = static_cast<const char *>(boxes.counts) + (first + w.n) * w.count_bytes;
  w.next_profile = s.profile_kind == ProfileKind::gaussian
                       ? reinterpret_cast<const char *>(w.profile.data())
                       : static_cast<const char *>(s.profile) + (first + w.n) * sizeof(T);
  w.out = s.profile_kind == ProfileKind::gaussian || w.past_cache || !s.gradients
              ? reinterpret_cast<const char *>(w.grad.data())
              : static_cast<const char *>(s.grad_profile) + first * sizeof(T);
  if (masked)
    take_mask(boxes, first, w);
  take_counts<T, masked>(boxes, first, w);
  if (!flat) {
    std::copy_n(static_cast<const T *>(boxes.background) + (boxes.background_rows ? first : 0), w.n,
                w.background.data());
    std::fill(w.background.data() + w.n, w.background.data() + w.length, T(1));
  }
  const bool gaussian = s.profile_kind == ProfileKind::gaussian;
  const T *l = gaussian ? static_cast<const T *>(s.scale_tril) + 9 * box : nullptr;
  w.scale = T(1);
  if (gaussian) {
    if (boxes.ptr)
      take_grid(static_cast<const T *>(s.grid) + 3 * first, w.n, w.counts.size(), w.grid.data());
    whiten(static_cast<const T *>(s.mean) + 3 * box, l, w, w.profile.data());
    take_softmax(w.profile.data(), w);
  } else if (s.profile_kind == ProfileKind::logits) {
    take_softmax(static_cast<const T *>(s.profile) + first, w);
  } else {
    std::copy_n(static_cast<const T *>(s.profile) + first, w.n, w.profile.data());
    std::fill(w.profile.data() + w.n, w.profile.data() + w.length, T(0));
  }
  add_up<T, masked, flat>(w, s.profile_kind != ProfileKind::values);

  // nodes (I_k, B_k, weight_k)
  const double k_i = s.gammas[box], r_i = s.gammas[n_boxes + box];
  const double k_b = s.gammas[2 * n_boxes + box], r_b = s.gammas[3 * n_boxes + box];
  const bool monte_carlo = s.samples > 0;
  const int count = monte_carlo ? s.samples : s.nodes > 0 ? s.nodes : nodes_needed(k_i, k_b, w.photons);
  const double *draws[2] = {s.draws + box * count, s.draws + (n_boxes + box) * count};
  w.resize_nodes(count);
  double mean_i = k_i / r_i, mean_b = k_b / r_b;
  if (monte_carlo) {
    mean_i = mean_b = 0;
    for (int k = 0; k < count; ++k) {
      const double i = draws[0][k] / r_i, b = draws[1][k] / r_b;
      w.i_k[k] = static_cast<T>(i);
      w.b_k[k] = static_cast<T>(b);
      w.weight[k] = 1.0 / count;
      w.weighted_i[k] = static_cast<T>(w.weight[k] * i);
      mean_i += w.weight[k] * i;
      mean_b += w.weight[k] * b;
    }
  } else {
    w.rule.build(k_i, k_b, count);
    const double scale = std::exp(digamma(k_i + k_b)); // of the sum r_i I + r_b B, independent of the share
    for (int k = 0; k < count; ++k) {
      w.weight[k] = w.rule.weight[k];
      w.i_k[k] = static_cast<T>(scale / r_i * w.rule.share[k]);
      w.b_k[k] = static_cast<T>(scale / r_b * w.rule.rest[k]);
      w.weighted_i[k] = static_cast<T>(w.weight[k] * w.i_k[k]);
    }
  }

  // sweeps over the pixels: all, or those with counts where that saves more than gathering them costs
  const bool compact = count >= compact_from;
  if (compact)
    gather_lit<T, flat>(w);
  const std::int64_t length = compact ? w.lit_length : w.length;
  const T *counts = compact ? w.lit_counts.data() : w.counts.data();
  const T *p = compact ? w.lit_profile.data() : w.profile.data();
  const T *b = compact ? w.lit_background.data() : w.background.data();
  T *grad = compact ? w.lit_grad.data() : w.grad.data();
  const bool positive = flat && *std::min_element(w.b_k.begin(), w.b_k.end()) > T(smallest_rate);
  if (monte_carlo && positive)
    sweeps<T, true, flat, flat>(length, counts, p, b, count, w, grad);
  else if (monte_carlo)
    sweeps<T, true, flat, false>(length, counts, p, b, count, w, grad);
  else if (positive)
    sweeps<T, false, flat, flat>(length, counts, p, b, count, w, grad);
  else
    sweeps<T, false, flat, false>(length, counts, p, b, count, w, grad);

  double log_rates = 0;
  for (int k = 0; k < count; ++k)
    log_rates += w.weight[k] * w.sums[k].log_rate;
  s.loss[box] += mean_i * w.profile_sum + mean_b * w.background_sum + w.factorials - log_rates;
  if (!s.gradients)
    return;

  double spot_photons = 0; // expected in the spot; with those in the background they are the photons
  double by_q[4] = {};
  if (monte_carlo) {
    const double *slopes[2] = {s.slopes + box * count, s.slopes + (n_boxes + box) * count};
    for (int k = 0; k < count; ++k) {
      const double by_i = w.weight[k] * (w.profile_sum - w.sums[k].by_i) / r_i;
      const double by_b = w.weight[k] * (w.background_sum - w.sums[k].by_b) / r_b;
      by_q[0] += by_i * slopes[0][k];
      by_q[1] -= by_i * draws[0][k] / r_i;
      by_q[2] += by_b * slopes[1][k];
      by_q[3] -= by_b * draws[1][k] / r_b;
      spot_photons += double(w.weighted_i[k]) * w.sums[k].by_i;
    }
  } else {
    Vector<T> by_profile{};
    for (std::int64_t j = 0; j < length; j += Lanes<T>::count)
      by_profile += load(grad + j) * load(p + j);
    spot_photons = double(w.scale) * sum<T>(by_profile);
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
    const double by_sum = trigamma(k_i + k_b) * w.photons;
    by_q[0] = w.profile_sum / r_i - by_share - by_sum;
    by_q[1] = (spot_photons - mean_i * w.profile_sum) / r_i;
    by_q[2] = w.background_sum / r_b - by_rest - by_sum;
    by_q[3] = (w.photons - spot_photons - mean_b * w.background_sum) / r_b;
  }
  for (int k = 0; k < 4; ++k)
    s.grad_gammas[k * n_boxes + box] += by_q[k];

  if (compact)
    spread_lit(w);
  const T mean = static_cast<T>(mean_i), centre = static_cast<T>(mean_i * w.profile_sum - spot_photons);
  if (gaussian) {
    T *by_logit = w.grad.data();
    profile_gradient<T, masked, true>(w, mean, centre, false, by_logit);
    gaussian_gradients(w, l, by_logit, static_cast<T *>(s.grad_mean) + 3 * box,
                       static_cast<T *>(s.grad_scale) + 9 * box);
  } else if (s.profile_kind == ProfileKind::logits) {
    profile_gradient<T, masked, true>(w, mean, centre, w.past_cache, static_cast<T *>(s.grad_profile) + first);
  } else {
    profile_gradient<T, masked, false>(w, mean, centre, w.past_cache, static_cast<T *>(s.grad_profile) + first);
  }
}

// The divergences of `count` boxes, weighted, into the loss and its gradients, which the likelihood is added to.
void divergences(const ElboArguments &s, std::int64_t first, std::int64_t count) {
  const std::int64_t n = s.boxes.n;
  const auto row = [&](int k) { return load_first(s.gammas + k * n + first, count); };
  const auto write = [&](int k, Vector<double> v) { store_first(s.grad_gammas + k * n + first, v, count); };
  Vector<double> loss{};
  for (int which = 0; which < 2; ++which) {
    const int q = 2 * which, prior = 4 + 2 * which;
    const GammaDivergence kl = gamma_divergence(row(q), row(q + 1), row(prior), row(prior + 1));
    const Vector<double> kappa = row(8 + which);
    loss += kappa * kl.value;
    if (s.gradients) {
      write(q, kappa * kl.d_shape);
      write(q + 1, kappa * kl.d_rate);
      write(prior, kappa * kl.d_prior_shape);
      write(prior + 1, kappa * kl.d_prior_rate);
      write(8 + which, kl.value);
    }
  }
  store_first(s.loss + first, loss, count);
}

template <class T, bool masked, bool flat>
void some_boxes(const ElboArguments &s, std::int64_t first, std::int64_t last, Scratch<T> &w) {
  for (std::int64_t box = first; box < last; ++box)
    one_box<T, masked, flat>(s, box, w);
}

template <class T> void all_boxes(const ElboArguments &s) {
  constexpr std::int64_t block = Lanes<double>::count * (8 / Lanes<double>::count);
  const std::int64_t longest = s.boxes.longest(), n_pixels = s.boxes.first(s.boxes.n);
  const bool gaussian = s.profile_kind == ProfileKind::gaussian, masked = s.boxes.mask_type != MaskType::none;
  const auto run = masked               ? s.boxes.background ? some_boxes<T, true, false> : some_boxes<T, true, true>
                   : s.boxes.background ? some_boxes<T, false, false>
                                        : some_boxes<T, false, true>;
#pragma omp parallel num_threads(s.boxes.threads)
  {
    const FlushTinyToZero flush;
    Scratch<T> scratch(longest, gaussian);
    scratch.past_cache = n_pixels * sizeof(T) > cache_bytes;
    scratch.count_bytes = bytes_of(s.boxes.count_type);
    if (gaussian && !s.boxes.ptr)
      take_grid(static_cast<const T *>(s.grid), longest, scratch.counts.size(), scratch.grid.data());
#pragma omp for schedule(dynamic, 2)
    for (std::int64_t start = 0; start < s.boxes.n; start += block) {
      const std::int64_t end = std::min(start + block, s.boxes.n);
      for (std::int64_t first = start; first < end; first += Lanes<double>::count)
        divergences(s, first, std::min(Lanes<double>::count, end - first));
      run(s, start, end, scratch);
    }
  }
}

} // namespace

void poisson_gamma_elbo(const ElboArguments &s) {
  LogFactorials::instance(); // made before the threads start
  if (s.wide)
    all_boxes<double>(s);
  else
    all_boxes<float>(s);
}

} // namespace XTALFAST_ISA

#ifdef XTALFAST_LAST
void poisson_gamma_elbo(const ElboArguments &s) { XTALFAST_DISPATCH(poisson_gamma_elbo, s); }
#endif

} // namespace xtalfast
