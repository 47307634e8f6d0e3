"""Files in and out: DIALS models and reflections, images, MTZ; no DIALS install needed."""

from xtalfast.io.expt import ExperimentList, read_expt, write_expt
from xtalfast.io.refl import Flag, RawColumn, ReflectionTable, read_refl, write_refl
from xtalfast.io.shoebox_column import ShoeboxColumn

__all__ = [
    "ExperimentList",
    "Flag",
    "RawColumn",
    "ReflectionTable",
    "ShoeboxColumn",
    "read_expt",
    "read_refl",
    "write_expt",
    "write_refl",
]
