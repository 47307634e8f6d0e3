#include "fourier.hpp"

#include <algorithm>
#include <vector>

#include "line_fft.hpp"

namespace xtalfast {
namespace {

template <class T> constexpr std::int64_t lanes = Lanes<T>::count;

// Between stages a spectrum is [x or h][l][y], y padded to whole vectors: the lines of x and of z are then side by side
// in y, and a transposition of tiles brings those of y side by side in l.
template <class T> struct Workspace {
  std::vector<T> re, im;             // of the spectrum
  std::vector<T> line;               // four arrays of the longest line
  std::vector<T> plane_re, plane_im; // [k][l] of one h
  std::vector<T> root;               // exp(-2 pi i j / n) of the real transform, j = 0 .. n / 2
  std::vector<SpectrumRow> rows;
  std::vector<std::int64_t> last; // of l that h holds, plus 1

  LineBuffer<T> lines(std::int64_t longest) {
    const std::int64_t size = lanes<T> * padded<T>(longest + 1);
    if (static_cast<std::int64_t>(line.size()) < 4 * size)
      line.resize(4 * size);
    return {line.data(), line.data() + size, line.data() + 2 * size, line.data() + 3 * size};
  }
  void set_root(std::int64_t n) {
    root.resize(n + 2);
    for (std::int64_t j = 0; 2 * j <= n; ++j) {
      const double angle = 2 * pi * static_cast<double>(j) / static_cast<double>(n);
      root[2 * j] = static_cast<T>(std::cos(angle));
      root[2 * j + 1] = static_cast<T>(-std::sin(angle));
    }
  }
};

// Element j of vector i becomes element i of vector j.
XTALFAST_INLINE void transpose(Vector<float> *v) {
  for (int i = 0; i < 8; i += 2) {
    const auto a = v[i], b = v[i + 1];
    v[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    v[i + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (const int i : {0, 1, 4, 5}) {
    const auto a = v[i], b = v[i + 2];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    v[i + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    const auto a = v[i], b = v[i + 4];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
XTALFAST_INLINE void transpose(Vector<double> *v) {
  for (int i = 0; i < 4; i += 2) {
    const auto a = v[i], b = v[i + 1];
    v[i] = __builtin_shufflevector(a, b, 0, 4, 2, 6);
    v[i + 1] = __builtin_shufflevector(a, b, 1, 5, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    const auto a = v[i], b = v[i + 2];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    v[i + 2] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }
}

// Starts of tiles of whole vectors that cover n >= lanes elements; the last two may overlap.
template <class T> XTALFAST_INLINE std::int64_t tile_start(std::int64_t at, std::int64_t n) {
  return std::min(at, n - lanes<T>);
}

// Real lines of n values, `row(lane)` each, as n / 2 complex points: even values real, odd ones imaginary.
template <class T, class Row> XTALFAST_INLINE void load_rows(LineBuffer<T> &b, std::int64_t n, Row row) {
  for (std::int64_t at = 0; at < n && n >= lanes<T>; at += lanes<T>) {
    const std::int64_t z = tile_start<T>(at, n);
    Vector<T> tile[lanes<T>];
    for (int w = 0; w < lanes<T>; ++w)
      tile[w] = load(row(w) + z);
    transpose(tile);
    for (std::int64_t j = 0; j < lanes<T>; j += 2) {
      store(b.re + (z + j) / 2 * lanes<T>, tile[j]);
      store(b.im + (z + j) / 2 * lanes<T>, tile[j + 1]);
    }
  }
  for (std::int64_t z = 0; z < n && n < lanes<T>; ++z)
    for (int w = 0; w < lanes<T>; ++w)
      (z % 2 == 0 ? b.re : b.im)[z / 2 * lanes<T> + w] = row(w)[z];
}

// The reverse, for the first `count` lines.
template <class T, class Row>
XTALFAST_INLINE void store_rows(const LineBuffer<T> &b, std::int64_t n, std::int64_t count, Row row) {
  for (std::int64_t at = 0; at < n && n >= lanes<T>; at += lanes<T>) {
    const std::int64_t z = tile_start<T>(at, n);
    Vector<T> tile[lanes<T>];
    for (std::int64_t j = 0; j < lanes<T>; j += 2) {
      tile[j] = load(b.re + (z + j) / 2 * lanes<T>);
      tile[j + 1] = load(b.im + (z + j) / 2 * lanes<T>);
    }
    transpose(tile);
    for (int w = 0; w < count; ++w)
      store(row(w) + z, tile[w]);
  }
  for (std::int64_t z = 0; z < n && n < lanes<T>; ++z)
    for (int w = 0; w < count; ++w)
      row(w)[z] = (z % 2 == 0 ? b.re : b.im)[z / 2 * lanes<T> + w];
}

// From the transform of n / 2 points (even values real, odd ones imaginary) entry l of the transform of n real ones.
template <class T>
XTALFAST_INLINE void real_entry(const LineBuffer<T> &b, const T *root, std::int64_t n, std::int64_t l, Vector<T> &re,
                                Vector<T> &im) {
  const std::int64_t half = n / 2, i = l == half ? 0 : l, j = l == 0 ? 0 : half - l;
  const auto a_re = load(b.re + i * lanes<T>), a_im = load(b.im + i * lanes<T>);
  const auto b_re = load(b.re + j * lanes<T>), b_im = load(b.im + j * lanes<T>);
  const auto odd_re = a_im + b_im, odd_im = b_re - a_re;
  const T c = root[2 * l], s = root[2 * l + 1];
  re = T(0.5) * (a_re + b_re + odd_re * c - odd_im * s);
  im = T(0.5) * (a_im - b_im + odd_im * c + odd_re * s);
}

// The reverse: points whose transform of n / 2 gives n real values, from entries l < n_kept (the rest is 0).
template <class T, class Entry>
XTALFAST_INLINE void complex_points(LineBuffer<T> &b, const T *root, std::int64_t n, std::int64_t n_kept, Entry entry) {
  const std::int64_t half = n / 2;
  for (std::int64_t l = 0; l < half; ++l) {
    Vector<T> x_re{}, x_im{}, y_re{}, y_im{};
    if (l < n_kept)
      entry(l, x_re, x_im);
    if (half - l < n_kept)
      entry(half - l, y_re, y_im);
    if (l == 0)
      x_im = y_im = Vector<T>{}; // both are their own mates
    const auto d_re = x_re - y_re, d_im = x_im + y_im;
    const T c = root[2 * l], s = root[2 * l + 1];
    store(b.re + l * lanes<T>, x_re + y_re - (d_im * c - d_re * s));
    store(b.im + l * lanes<T>, x_im - y_im + (d_re * c + d_im * s));
  }
}

// Vectors of y, at points of l side by side in b, to the rows of y of one h; and back.
template <class T>
XTALFAST_INLINE void store_columns(const LineBuffer<T> &b, std::int64_t n_y, std::int64_t count, T *re, T *im) {
  for (std::int64_t y = 0; y < n_y; y += lanes<T>)
    for (int part = 0; part < 2; ++part) {
      Vector<T> tile[lanes<T>];
      for (int j = 0; j < lanes<T>; ++j)
        tile[j] = load((part == 0 ? b.re : b.im) + (y + j) * lanes<T>);
      transpose(tile);
      for (int w = 0; w < count; ++w)
        store((part == 0 ? re : im) + w * n_y + y, tile[w]);
    }
}
template <class T>
XTALFAST_INLINE void load_columns(LineBuffer<T> &b, std::int64_t n_y, std::int64_t count, const T *re, const T *im) {
  for (std::int64_t y = 0; y < n_y; y += lanes<T>)
    for (int part = 0; part < 2; ++part) {
      Vector<T> tile[lanes<T>];
      for (int w = 0; w < lanes<T>; ++w)
        tile[w] = load((part == 0 ? re : im) + (w < count ? w : 0) * n_y + y);
      transpose(tile);
      for (int j = 0; j < lanes<T>; ++j)
        store((part == 0 ? b.re : b.im) + (y + j) * lanes<T>, tile[j]);
    }
}

struct Sizes {
  std::int64_t x, y, z;
  std::int64_t y_kept; // planes of y that the spectrum between stages has, padded
  std::int64_t l_kept; // planes of l
  std::int64_t longest() const { return std::max({x, y, z}); }
};

// Transforms over x of all lines [l][y], those h that hold an entry at l before (inverse) or after it (forward).
template <class T> XTALFAST_INLINE void stage_x(const Sizes &n, Workspace<T> &w, bool inverse) {
  const auto &plan = LinePlan<T>::of(n.x);
  LineBuffer<T> b = w.lines(n.longest());
  const std::int64_t stride = n.l_kept * n.y_kept;
  for (std::int64_t l = 0; l < n.l_kept; ++l)
    for (std::int64_t y = 0; y < n.y_kept; y += lanes<T>) {
      T *re = w.re.data() + l * n.y_kept + y, *im = w.im.data() + l * n.y_kept + y;
      for (std::int64_t x = 0; x < n.x; ++x) {
        const bool empty = inverse && w.last[x] <= l;
        store(b.re + x * lanes<T>, empty ? Vector<T>{} : load(re + x * stride));
        store(b.im + x * lanes<T>, empty ? Vector<T>{} : load(im + x * stride));
      }
      transform_lines(plan, b, inverse);
      for (std::int64_t x = 0; x < n.x; ++x)
        if (inverse || w.last[x] > l) {
          store(re + x * stride, load(b.re + x * lanes<T>));
          store(im + x * stride, load(b.im + x * lanes<T>));
        }
    }
}

// The last transform, over z to real values; `row(x, y)` is where they go, `done(x, y)` is told.
template <class T, class Row, class Done>
XTALFAST_INLINE void stage_z_inverse(const Sizes &n, std::int64_t n_y, Workspace<T> &w, Row row, Done done) {
  const auto &plan = LinePlan<T>::of(n.z / 2);
  LineBuffer<T> b = w.lines(n.longest());
  w.set_root(n.z);
  for (std::int64_t x = 0; x < n.x; ++x)
    for (std::int64_t y = 0; y < n_y; y += lanes<T>) {
      const T *re = w.re.data() + x * n.l_kept * n.y_kept + y, *im = w.im.data() + x * n.l_kept * n.y_kept + y;
      complex_points(b, w.root.data(), n.z, n.l_kept, [&](std::int64_t l, Vector<T> &to_re, Vector<T> &to_im) {
        to_re = load(re + l * n.y_kept);
        to_im = load(im + l * n.y_kept);
      });
      transform_lines(plan, b, true);
      const std::int64_t count = std::min(lanes<T>, n_y - y);
      store_rows(b, n.z, count, [&](std::int64_t lane) { return row(x, y + lane); });
      for (std::int64_t lane = 0; lane < count; ++lane)
        done(x, y + lane);
    }
}

// Limits of l in every row [h][k], and how far each h reaches; returns how far all do.
template <class T> std::int64_t find_rows(const HalfSpectra &s, std::int64_t i, Workspace<T> &w) {
  const SpectrumMetric m = spectrum_metric(s, i);
  w.rows.resize(s.n[0] * s.n[1]);
  w.last.assign(s.n[0], 0);
  double reach[2]; // |h| <= a / d_min: other rows are empty
  for (int axis = 0; axis < 2; ++axis)
    reach[axis] = s.cells[6 * i + axis] * std::sqrt(s.inverse_d2_max) * (1 + 1e-9);
  for (std::int64_t h = 0; h < s.n[0]; ++h) {
    const bool empty = static_cast<double>(std::min(h, s.n[0] - h)) > reach[0];
    for (std::int64_t k = 0; k < s.n[1]; ++k) {
      SpectrumRow &row = w.rows[h * s.n[1] + k];
      if (empty || static_cast<double>(std::min(k, s.n[1] - k)) > reach[1])
        row = {0, 0, 0, 0, 0};
      else
        row = spectrum_row(s, m, h, k);
      w.last[h] = std::max(w.last[h], row.end);
    }
  }
  return *std::max_element(w.last.begin(), w.last.end());
}

// Room for the spectrum between stages.
template <class T> void reserve(const Sizes &n, Workspace<T> &w) {
  const auto size = static_cast<std::size_t>(n.x * n.l_kept * n.y_kept);
  if (w.re.size() < size) {
    w.re.resize(size);
    w.im.resize(size);
  }
}

template <class T>
XTALFAST_INLINE void one_spectrum(const HalfSpectra &s, std::int64_t n_z, double blur, std::int64_t i, const T *map,
                                  T *out, Workspace<T> &w) {
  Sizes n{s.n[0], s.n[1], n_z, padded<T>(s.n[1]), find_rows(s, i, w)};
  reserve(n, w);
  {
    const auto &plan = LinePlan<T>::of(n_z / 2);
    LineBuffer<T> b = w.lines(n.longest());
    w.set_root(n_z);
    for (std::int64_t x = 0; x < n.x && n.l_kept > 0; ++x)
      for (std::int64_t y = 0; y < n.y; y += lanes<T>) {
        load_rows(b, n_z, [&](std::int64_t lane) { return map + (x * n.y + std::min(y + lane, n.y - 1)) * n_z; });
        transform_lines(plan, b, false);
        const std::int64_t at = x * n.l_kept * n.y_kept + y;
        for (std::int64_t l = 0; l < n.l_kept; ++l) {
          Vector<T> re, im;
          real_entry(b, w.root.data(), n_z, l, re, im);
          store(w.re.data() + at + l * n.y_kept, re);
          store(w.im.data() + at + l * n.y_kept, im);
        }
      }
  }
  if (n.l_kept > 0)
    stage_x(n, w, false);
  const SpectrumMetric m = spectrum_metric(s, i);
  const auto &plan = LinePlan<T>::of(n.y);
  LineBuffer<T> b = w.lines(n.longest());
  const std::int64_t n_l = padded<T>(n.l_kept);
  w.plane_re.resize(n.y * n_l);
  w.plane_im.resize(n.y * n_l);
  const auto scale = static_cast<T>(m.scale);
  for (std::int64_t h = 0; h < n.x; ++h) {
    for (std::int64_t l = 0; l < w.last[h]; l += lanes<T>) {
      const std::int64_t at = (h * n.l_kept + l) * n.y_kept;
      load_columns(b, n.y_kept, std::min(lanes<T>, n.l_kept - l), w.re.data() + at, w.im.data() + at);
      transform_lines(plan, b, false);
      for (std::int64_t k = 0; k < n.y; ++k) {
        store(w.plane_re.data() + k * n_l + l, load(b.re + k * lanes<T>));
        store(w.plane_im.data() + k * n_l + l, load(b.im + k * lanes<T>));
      }
    }
    for (std::int64_t k = 0; k < n.y; ++k) {
      const SpectrumRow row = w.rows[h * n.y + k];
      const T *re = w.plane_re.data() + k * n_l, *im = w.plane_im.data() + k * n_l;
      T *to = out + 2 * (h * n.y + k) * s.n_l;
      std::fill(to, to + 2 * row.begin, T(0));
      for (std::int64_t l = row.begin; l < row.end; ++l) {
        to[2 * l] = scale * re[l];
        to[2 * l + 1] = -scale * im[l];
      }
      std::fill(to + 2 * row.end, to + 2 * s.n_l, T(0));
      for (std::int64_t l = row.begin; l < row.end && blur != 0; ++l) {
        const auto index = static_cast<double>(l);
        const auto sharper =
            static_cast<T>(std::exp(0.25 * blur * (row.constant + index * (row.linear + index * row.square))));
        to[2 * l] *= sharper;
        to[2 * l + 1] *= sharper;
      }
    }
  }
}

// How many entries of each row [h][k] of n values there are before the zeros: `last` [X]; returns the largest.
template <class T, class Zero>
XTALFAST_INLINE std::int64_t find_last(std::int64_t n_x, std::int64_t n_y, std::int64_t n,
                                       std::vector<std::int64_t> &last, Zero zero) {
  last.assign(n_x, 0);
  for (std::int64_t h = 0; h < n_x; ++h)
    for (std::int64_t k = 0; k < n_y; ++k) {
      std::int64_t end = n;
      while (end > last[h] && zero((h * n_y + k) * n + end - 1))
        --end;
      last[h] = std::max(last[h], end);
    }
  return *std::max_element(last.begin(), last.end());
}

template <class T>
XTALFAST_INLINE void one_map(const HalfSpectra &s, std::int64_t n_z, std::int64_t i, const T *in, T *map,
                             Workspace<T> &w) {
  const std::int64_t last = find_last<T>(s.n[0], s.n[1], s.n_l, w.last,
                                         [&](std::int64_t at) { return in[2 * at] == 0 && in[2 * at + 1] == 0; });
  Sizes n{s.n[0], s.n[1], n_z, padded<T>(s.n[1]), std::max<std::int64_t>(last, 1)};
  reserve(n, w);
  const auto scale = static_cast<T>(spectrum_metric(s, i).scale);
  const auto &plan = LinePlan<T>::of(n.y);
  LineBuffer<T> b = w.lines(n.longest());
  const std::int64_t n_l = padded<T>(n.l_kept);
  w.plane_re.assign(n.y * n_l, T(0));
  w.plane_im.assign(n.y * n_l, T(0));
  for (std::int64_t h = 0; h < n.x; ++h) {
    const std::int64_t end = w.last[h];
    for (std::int64_t k = 0; k < n.y; ++k) {
      const T *from = in + 2 * (h * n.y + k) * s.n_l;
      T *re = w.plane_re.data() + k * n_l, *im = w.plane_im.data() + k * n_l;
      for (std::int64_t l = 0; l < end; ++l) {
        re[l] = scale * from[2 * l];
        im[l] = -scale * from[2 * l + 1];
      }
    }
    for (std::int64_t l = 0; l < end; l += lanes<T>) {
      for (std::int64_t k = 0; k < n.y; ++k) {
        store(b.re + k * lanes<T>, load(w.plane_re.data() + k * n_l + l));
        store(b.im + k * lanes<T>, load(w.plane_im.data() + k * n_l + l));
      }
      transform_lines(plan, b, true);
      const std::int64_t at = (h * n.l_kept + l) * n.y_kept;
      store_columns(b, n.y_kept, std::min(lanes<T>, n.l_kept - l), w.re.data() + at, w.im.data() + at);
    }
  }
  stage_x(n, w, true);
  stage_z_inverse(
      n, n.y, w, [&](std::int64_t x, std::int64_t y) { return map + (x * n.y + y) * n_z; },
      [](std::int64_t, std::int64_t) {});
}

// The transform over y of real intensities is known from y = 0 .. Y / 2, and so is the map, which is its own mirror
// image.
template <class T> XTALFAST_INLINE void one_patterson(const Intensities &s, const T *in, T *map, Workspace<T> &w) {
  const std::int64_t n_x = s.n[0], n_y = s.n[1], n_z = s.n[2], half_y = n_y / 2 + 1;
  const std::int64_t last = find_last<T>(n_x, n_y, s.n_l, w.last, [&](std::int64_t at) { return in[at] == 0; });
  Sizes n{n_x, n_y, n_z, padded<T>(half_y), std::max<std::int64_t>(last, 1)};
  reserve(n, w);
  const auto &plan = LinePlan<T>::of(n_y / 2);
  LineBuffer<T> b = w.lines(n.longest());
  w.set_root(n_y);
  for (std::int64_t h = 0; h < n_x; ++h)
    for (std::int64_t l = 0; l < w.last[h]; l += lanes<T>) {
      const std::int64_t count = std::min(lanes<T>, s.n_l - l);
      for (std::int64_t k = 0; k < n_y; ++k) {
        const T *from = in + (h * n_y + k) * s.n_l + l;
        T *to = (k % 2 == 0 ? b.re : b.im) + k / 2 * lanes<T>;
        if (count == lanes<T>) {
          store(to, load(from));
        } else {
          std::copy_n(from, count, to);
          std::fill(to + count, to + lanes<T>, T(0));
        }
      }
      transform_lines(plan, b, false);
      LineBuffer<T> result{b.spare_re, b.spare_im, nullptr, nullptr};
      for (std::int64_t y = 0; y < n.y_kept; ++y) {
        Vector<T> re{}, im{};
        if (y < half_y)
          real_entry(b, w.root.data(), n_y, y, re, im);
        store(result.re + y * lanes<T>, re);
        store(result.im + y * lanes<T>, -im);
      }
      const std::int64_t at = (h * n.l_kept + l) * n.y_kept;
      store_columns(result, n.y_kept, std::min(lanes<T>, n.l_kept - l), w.re.data() + at, w.im.data() + at);
    }
  stage_x(n, w, true);
  const auto row = [&](std::int64_t x, std::int64_t y) { return map + (x * n_y + y) * n_z; };
  stage_z_inverse(n, half_y, w, row, [&](std::int64_t x, std::int64_t y) {
    if (y == 0 || 2 * y == n_y)
      return; // these planes hold their own mirror image
    const T *from = row(x, y);
    T *to = row(x == 0 ? 0 : n_x - x, n_y - y);
    to[0] = from[0];
    std::reverse_copy(from + 1, from + n_z, to + 1);
  });
}

XTALFAST_CLONES void spectrum_float(const HalfSpectra &s, std::int64_t n_z, double blur, std::int64_t i,
                                    const float *map, float *out, Workspace<float> &w) {
  one_spectrum(s, n_z, blur, i, map, out, w);
}
XTALFAST_CLONES void spectrum_double(const HalfSpectra &s, std::int64_t n_z, double blur, std::int64_t i,
                                     const double *map, double *out, Workspace<double> &w) {
  one_spectrum(s, n_z, blur, i, map, out, w);
}
XTALFAST_CLONES void map_float(const HalfSpectra &s, std::int64_t n_z, std::int64_t i, const float *in, float *map,
                               Workspace<float> &w) {
  one_map(s, n_z, i, in, map, w);
}
XTALFAST_CLONES void map_double(const HalfSpectra &s, std::int64_t n_z, std::int64_t i, const double *in, double *map,
                                Workspace<double> &w) {
  one_map(s, n_z, i, in, map, w);
}
XTALFAST_CLONES void patterson_float(const Intensities &s, const float *in, float *map, Workspace<float> &w) {
  one_patterson(s, in, map, w);
}
XTALFAST_CLONES void patterson_double(const Intensities &s, const double *in, double *map, Workspace<double> &w) {
  one_patterson(s, in, map, w);
}

// f(i, workspace) for every map, in parallel.
template <class T, class F> void for_each_map(std::int64_t n_maps, int n_threads, F f) {
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && n_maps > 1)
  {
    Workspace<T> w;
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < n_maps; ++i)
      f(i, w);
  }
}

} // namespace

bool can_transform(const std::int64_t *n) {
  return n[2] % 2 == 0 && has_line_plan(n[0]) && has_line_plan(n[1]) && has_line_plan(n[2] / 2);
}

void maps_to_spectra(const HalfSpectra &s, std::int64_t n_z, double blur, const void *maps, void *out, int n_threads) {
  const std::int64_t size = s.n[0] * s.n[1] * n_z, out_size = 2 * s.n[0] * s.n[1] * s.n_l;
  if (s.wide)
    for_each_map<double>(s.n_maps, n_threads, [&](std::int64_t i, Workspace<double> &w) {
      spectrum_double(s, n_z, blur, i, static_cast<const double *>(maps) + i * size,
                      static_cast<double *>(out) + i * out_size, w);
    });
  else
    for_each_map<float>(s.n_maps, n_threads, [&](std::int64_t i, Workspace<float> &w) {
      spectrum_float(s, n_z, blur, i, static_cast<const float *>(maps) + i * size,
                     static_cast<float *>(out) + i * out_size, w);
    });
}

void spectra_to_maps(const HalfSpectra &s, std::int64_t n_z, const void *in, void *maps, int n_threads) {
  const std::int64_t size = s.n[0] * s.n[1] * n_z, in_size = 2 * s.n[0] * s.n[1] * s.n_l;
  if (s.wide)
    for_each_map<double>(s.n_maps, n_threads, [&](std::int64_t i, Workspace<double> &w) {
      map_double(s, n_z, i, static_cast<const double *>(in) + i * in_size, static_cast<double *>(maps) + i * size, w);
    });
  else
    for_each_map<float>(s.n_maps, n_threads, [&](std::int64_t i, Workspace<float> &w) {
      map_float(s, n_z, i, static_cast<const float *>(in) + i * in_size, static_cast<float *>(maps) + i * size, w);
    });
}

void intensities_to_pattersons(const Intensities &s, const void *in, void *maps, int n_threads) {
  const std::int64_t size = s.n[0] * s.n[1] * s.n[2], in_size = s.n[0] * s.n[1] * s.n_l;
  if (s.wide)
    for_each_map<double>(s.n_maps, n_threads, [&](std::int64_t i, Workspace<double> &w) {
      patterson_double(s, static_cast<const double *>(in) + i * in_size, static_cast<double *>(maps) + i * size, w);
    });
  else
    for_each_map<float>(s.n_maps, n_threads, [&](std::int64_t i, Workspace<float> &w) {
      patterson_float(s, static_cast<const float *>(in) + i * in_size, static_cast<float *>(maps) + i * size, w);
    });
}

} // namespace xtalfast
