"""How good the data are: agreement of equivalent observations."""

from xtalfast.metrics.merging import (
    MergingStatistics,
    ShellStatistics,
    merging_statistics,
    side_by_side,
    stats_for_file,
)
from xtalfast.metrics.observations import CHANNELS, Observations, load_observations, observations_from_table

__all__ = [
    "CHANNELS",
    "MergingStatistics",
    "Observations",
    "ShellStatistics",
    "load_observations",
    "merging_statistics",
    "observations_from_table",
    "side_by_side",
    "stats_for_file",
]
