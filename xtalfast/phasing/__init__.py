"""Phases without a network: dual-space solution, density modification, origin and hand matching."""

from xtalfast.phasing.match import Match, match, random_floor
from xtalfast.phasing.modify import Modified, ModifyOptions, density_modify
from xtalfast.phasing.search import SearchOptions
from xtalfast.phasing.shelx import solve_with_shelx
from xtalfast.phasing.solve import Solution, solve

__all__ = [
    "Match",
    "Modified",
    "ModifyOptions",
    "SearchOptions",
    "Solution",
    "density_modify",
    "match",
    "random_floor",
    "solve",
    "solve_with_shelx",
]
