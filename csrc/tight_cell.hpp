// How far a cell must grow until no atom of a molecule meets a lattice copy of another. The definition, in numpy, is
// xtalfast/density/cells.py.
#pragma once

#include <cstdint>

namespace xtalfast {

struct Molecule {
  const double *coords; // [n, 3] A
  std::int64_t n;
};

// Whether an atom lies within `distance` (A) of a copy moved by a lattice vector; columns of `orth` are a, b, c.
bool has_contact(const Molecule &molecule, const double *orth, double distance);

// The first of step, 2 step, ... up to `most` that, added to the edges of a cell with unit axes in the columns of
// `directions` [3, 3], leaves no contact; -1 if none does.
double tight_cell_growth(const Molecule &molecule, const double *directions, const double *extents, double distance,
                         double step, double most);

} // namespace xtalfast
