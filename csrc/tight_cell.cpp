#include "tight_cell.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace xtalfast {
namespace {

struct Copy {
  double shift[3], length;
};

double dot(const double *a, const double *b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

void invert(const double *m, double *inverse) {
  double cofactor[9];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      const int a = (i + 1) % 3, b = (i + 2) % 3, c = (j + 1) % 3, d = (j + 2) % 3;
      cofactor[3 * j + i] = m[3 * a + c] * m[3 * b + d] - m[3 * a + d] * m[3 * b + c];
    }
  const double determinant = m[0] * cofactor[0] + m[1] * cofactor[3] + m[2] * cofactor[6];
  for (int i = 0; i < 9; ++i)
    inverse[i] = cofactor[i] / determinant;
}

// Scratch of a search.
struct Work {
  std::vector<Copy> copies;
  std::vector<double> along;
  std::vector<std::int64_t> head, tail;
};

// Along a translation the molecule must be longer than the gap it leaves; the far ends alone can meet.
bool meets(const Molecule &molecule, const Copy &copy, double distance, Work &w) {
  const double unit[3] = {copy.shift[0] / copy.length, copy.shift[1] / copy.length, copy.shift[2] / copy.length};
  w.along.resize(molecule.n);
  for (std::int64_t i = 0; i < molecule.n; ++i)
    w.along[i] = dot(molecule.coords + 3 * i, unit);
  const auto [low, high] = std::minmax_element(w.along.begin(), w.along.end());
  const double gap = copy.length - distance, first = *low + gap, last = *high - gap;
  if (*high < first)
    return false;
  w.head.clear();
  w.tail.clear();
  for (std::int64_t i = 0; i < molecule.n; ++i) {
    if (w.along[i] >= first)
      w.head.push_back(i);
    if (w.along[i] <= last)
      w.tail.push_back(i);
  }
  for (const std::int64_t t : w.tail) {
    double to[3];
    for (int x = 0; x < 3; ++x)
      to[x] = molecule.coords[3 * t + x] + copy.shift[x];
    for (const std::int64_t h : w.head) {
      const double *at = molecule.coords + 3 * h, d[3] = {at[0] - to[0], at[1] - to[1], at[2] - to[2]};
      if (dot(d, d) <= distance * distance)
        return true;
    }
  }
  return false;
}

bool has_contact(const Molecule &molecule, const double *orth, double distance, Work &w) {
  double frac[9];
  invert(orth, frac);
  std::int64_t n[3];
  for (int axis = 0; axis < 3; ++axis) {
    const double edge[3] = {orth[axis], orth[3 + axis], orth[6 + axis]};
    if (std::sqrt(dot(edge, edge)) <= distance)
      return true; // each atom meets its own copy
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (std::int64_t i = 0; i < molecule.n; ++i) {
      const double at = dot(frac + 3 * axis, molecule.coords + 3 * i);
      low = std::min(low, at);
      high = std::max(high, at);
    }
    // Copies further away than the molecule is long and the distance wide are out of reach.
    n[axis] = static_cast<std::int64_t>(high - low + distance * std::sqrt(dot(frac + 3 * axis, frac + 3 * axis)));
  }
  w.copies.clear();
  for (std::int64_t a = 0; a <= n[0]; ++a)
    for (std::int64_t b = a > 0 ? -n[1] : 0; b <= n[1]; ++b)
      for (std::int64_t c = a > 0 || b > 0 ? -n[2] : 1; c <= n[2]; ++c) { // of n and -n one
        const double index[3] = {static_cast<double>(a), static_cast<double>(b), static_cast<double>(c)};
        Copy copy;
        for (int x = 0; x < 3; ++x)
          copy.shift[x] = dot(orth + 3 * x, index);
        copy.length = std::sqrt(dot(copy.shift, copy.shift));
        w.copies.push_back(copy);
      }
  // A contact is likeliest with the nearest copies.
  std::sort(w.copies.begin(), w.copies.end(), [](const Copy &p, const Copy &q) { return p.length < q.length; });
  return std::any_of(w.copies.begin(), w.copies.end(),
                     [&](const Copy &copy) { return meets(molecule, copy, distance, w); });
}

} // namespace

bool has_contact(const Molecule &molecule, const double *orth, double distance) {
  Work w;
  return has_contact(molecule, orth, distance, w);
}

double tight_cell_growth(const Molecule &molecule, const double *directions, const double *extents, double distance,
                         double step, double most) {
  Work w;
  for (std::int64_t i = 1; static_cast<double>(i) * step < most + step / 2; ++i) {
    const double growth = static_cast<double>(i) * step;
    double orth[9];
    for (int row = 0; row < 3; ++row)
      for (int axis = 0; axis < 3; ++axis)
        orth[3 * row + axis] = directions[3 * row + axis] * (extents[axis] + growth);
    if (!has_contact(molecule, orth, distance, w))
      return growth;
  }
  return -1;
}

} // namespace xtalfast
