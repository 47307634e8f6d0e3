#include "line_fft.hpp"

#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace xtalfast {
namespace {

constexpr int largest_radix = 19;
constexpr double two_pi = 6.28318530717958648;

std::vector<int> factors(std::int64_t n) {
  std::vector<int> found;
  for (const int radix : {4, 2, 3, 5, 7, 11, 13, 17, largest_radix})
    for (; n % radix == 0; n /= radix)
      found.push_back(radix);
  if (n != 1)
    found.clear();
  return found;
}

template <class T> LinePlan<T> make_plan(std::int64_t n) {
  LinePlan<T> plan{n, {}};
  std::int64_t outer = 1;
  for (const int radix : factors(n)) {
    const std::int64_t inner = n / (outer * radix);
    typename LinePlan<T>::Pass pass{radix, inner, outer, {}, {}, {}};
    for (int u = 1; u < radix; ++u)
      for (std::int64_t j = 0; j < inner; ++j) {
        const double angle = two_pi * static_cast<double>(u * j * outer) / static_cast<double>(n);
        pass.twiddle.push_back(static_cast<T>(std::cos(angle)));
        pass.twiddle.push_back(static_cast<T>(-std::sin(angle)));
      }
    for (int u = 1; radix % 2 == 1 && u <= radix / 2; ++u)
      for (int v = 1; v <= radix / 2; ++v) {
        const double angle = two_pi * (u * v % radix) / radix;
        pass.cosine.push_back(static_cast<T>(std::cos(angle)));
        pass.sine.push_back(static_cast<T>(std::sin(angle)));
      }
    plan.passes.push_back(std::move(pass));
    outer *= radix;
  }
  return plan;
}

template <class T> struct Point {
  Vector<T> re, im;
};

// The points of one butterfly: read `radix` at distance `from`, write as many at distance `to`, all but the first
// turned by their twiddles.
template <class T> struct Butterfly {
  const T *re, *im;
  T *out_re, *out_im;
  std::int64_t from, to;
  const T *twiddle; // of u = 1; those of u + 1 are 2 x inner further on
  std::int64_t inner;

  XTALFAST_INLINE Point<T> get(int u) const { return {load(re + u * from), load(im + u * from)}; }
  XTALFAST_INLINE void put(int u, Point<T> x) const {
    if (u > 0 && inner > 1) {
      const T *w = twiddle + 2 * inner * (u - 1);
      x = {x.re * w[0] - x.im * w[1], x.re * w[1] + x.im * w[0]};
    }
    store(out_re + u * to, x.re);
    store(out_im + u * to, x.im);
  }
};

template <class T> XTALFAST_INLINE void butterfly_2(const Butterfly<T> &b) {
  const auto x = b.get(0), y = b.get(1);
  b.put(0, {x.re + y.re, x.im + y.im});
  b.put(1, {x.re - y.re, x.im - y.im});
}

template <class T> XTALFAST_INLINE void butterfly_4(const Butterfly<T> &b) {
  const auto x0 = b.get(0), x1 = b.get(1), x2 = b.get(2), x3 = b.get(3);
  const Point<T> s02{x0.re + x2.re, x0.im + x2.im}, d02{x0.re - x2.re, x0.im - x2.im};
  const Point<T> s13{x1.re + x3.re, x1.im + x3.im}, d13{x1.re - x3.re, x1.im - x3.im};
  b.put(0, {s02.re + s13.re, s02.im + s13.im});
  b.put(1, {d02.re + d13.im, d02.im - d13.re});
  b.put(2, {s02.re - s13.re, s02.im - s13.im});
  b.put(3, {d02.re - d13.im, d02.im + d13.re});
}

// y_u = x_0 + sum_v (x_v + x_-v) cos - i sum_v (x_v - x_-v) sin, and y_-u with the other sign.
template <int R, class T> XTALFAST_INLINE void butterfly_odd(const Butterfly<T> &b, const T *cosine, const T *sine) {
  constexpr int half = R / 2;
  const auto first = b.get(0);
  Point<T> sum[half], difference[half];
  auto total = first;
#pragma GCC unroll 9
  for (int v = 1; v <= half; ++v) {
    const auto x = b.get(v), y = b.get(R - v);
    sum[v - 1] = {x.re + y.re, x.im + y.im};
    difference[v - 1] = {x.re - y.re, x.im - y.im};
    total = {total.re + sum[v - 1].re, total.im + sum[v - 1].im};
  }
  b.put(0, total);
#pragma GCC unroll 9
  for (int u = 1; u <= half; ++u) {
    auto even = first;
    Point<T> odd{};
#pragma GCC unroll 9
    for (int v = 0; v < half; ++v) {
      const T c = cosine[(u - 1) * half + v], s = sine[(u - 1) * half + v];
      even = {even.re + sum[v].re * c, even.im + sum[v].im * c};
      odd = {odd.re + difference[v].re * s, odd.im + difference[v].im * s};
    }
    b.put(u, {even.re + odd.im, even.im - odd.re});
    b.put(R - u, {even.re - odd.im, even.im + odd.re});
  }
}

template <class T, class F>
XTALFAST_INLINE void for_each_butterfly(const typename LinePlan<T>::Pass &pass, const LineBuffer<T> &lines, F f) {
  constexpr std::int64_t lanes = Lanes<T>::count;
  const std::int64_t inner = pass.inner, outer = pass.outer;
  for (std::int64_t k = 0; k < outer; ++k)
    for (std::int64_t j = 0; j < inner; ++j) {
      const std::int64_t in = lanes * (j + inner * pass.radix * k), out = lanes * (j + inner * k);
      f(Butterfly<T>{lines.re + in, lines.im + in, lines.spare_re + out, lines.spare_im + out, lanes * inner,
                     lanes * inner * outer, pass.twiddle.data() + 2 * j, inner});
    }
}

template <int R, class T>
XTALFAST_INLINE void odd_pass(const typename LinePlan<T>::Pass &pass, const LineBuffer<T> &lines) {
  const T *cosine = pass.cosine.data(), *sine = pass.sine.data();
  for_each_butterfly<T>(pass, lines, [&](const Butterfly<T> &b) { butterfly_odd<R>(b, cosine, sine); });
}

template <class T> XTALFAST_INLINE void run(const LinePlan<T> &plan, LineBuffer<T> &lines) {
  for (const auto &pass : plan.passes) {
    switch (pass.radix) {
    case 2:
      for_each_butterfly<T>(pass, lines, [](const Butterfly<T> &b) { butterfly_2(b); });
      break;
    case 3:
      odd_pass<3, T>(pass, lines);
      break;
    case 4:
      for_each_butterfly<T>(pass, lines, [](const Butterfly<T> &b) { butterfly_4(b); });
      break;
    case 5:
      odd_pass<5, T>(pass, lines);
      break;
    case 7:
      odd_pass<7, T>(pass, lines);
      break;
    case 11:
      odd_pass<11, T>(pass, lines);
      break;
    case 13:
      odd_pass<13, T>(pass, lines);
      break;
    case 17:
      odd_pass<17, T>(pass, lines);
      break;
    default:
      odd_pass<largest_radix, T>(pass, lines);
    }
    std::swap(lines.re, lines.spare_re);
    std::swap(lines.im, lines.spare_im);
  }
}

XTALFAST_CLONES void run_float(const LinePlan<float> &plan, LineBuffer<float> &lines) { run(plan, lines); }
XTALFAST_CLONES void run_double(const LinePlan<double> &plan, LineBuffer<double> &lines) { run(plan, lines); }

// The other sign: real and imaginary parts change their places, before and after.
template <class T> void swap_parts(LineBuffer<T> &lines) {
  std::swap(lines.re, lines.im);
  std::swap(lines.spare_re, lines.spare_im);
}

} // namespace

bool has_line_plan(std::int64_t n) { return n == 1 || (n > 1 && !factors(n).empty()); }

template <class T> const LinePlan<T> &LinePlan<T>::of(std::int64_t n) {
  static std::mutex mutex;
  static std::map<std::int64_t, std::unique_ptr<const LinePlan<T>>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto &plan = plans[n];
  if (!plan)
    plan = std::make_unique<const LinePlan<T>>(make_plan<T>(n));
  return *plan;
}
template struct LinePlan<float>;
template struct LinePlan<double>;

void transform_lines(const LinePlan<float> &plan, LineBuffer<float> &lines, bool inverse) {
  if (inverse)
    swap_parts(lines);
  run_float(plan, lines);
  if (inverse)
    swap_parts(lines);
}
void transform_lines(const LinePlan<double> &plan, LineBuffer<double> &lines, bool inverse) {
  if (inverse)
    swap_parts(lines);
  run_double(plan, lines);
  if (inverse)
    swap_parts(lines);
}

} // namespace xtalfast
