"""Files in and out: DIALS models and reflections, images, MTZ; no DIALS install needed."""

from xtalfast.io.cbf import MiniCbfHeader, write_cbf
from xtalfast.io.expt import ExperimentList, read_expt, write_expt
from xtalfast.io.images import ImageReader, open_images, read_image
from xtalfast.io.mtz import write_merged_mtz, write_unmerged_mtz
from xtalfast.io.refl import Flag, RawColumn, ReflectionTable, read_refl, write_refl
from xtalfast.io.shoebox_column import ShoeboxColumn

__all__ = [
    "ExperimentList",
    "Flag",
    "ImageReader",
    "MiniCbfHeader",
    "RawColumn",
    "ReflectionTable",
    "ShoeboxColumn",
    "open_images",
    "read_expt",
    "read_image",
    "read_refl",
    "write_cbf",
    "write_expt",
    "write_merged_mtz",
    "write_refl",
    "write_unmerged_mtz",
]
