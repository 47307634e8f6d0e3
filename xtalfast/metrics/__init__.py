"""How good the data are: agreement of equivalent observations."""

from xtalfast.metrics.merging import merging_statistics, stats_for_file
from xtalfast.metrics.observations import INTENSITY_CHANNELS, Observations, load_observations, observations_from_table
from xtalfast.metrics.shells import MergingStatistics, ShellStatistics, side_by_side

__all__ = [
    "INTENSITY_CHANNELS",
    "MergingStatistics",
    "Observations",
    "ShellStatistics",
    "load_observations",
    "merging_statistics",
    "observations_from_table",
    "side_by_side",
    "stats_for_file",
]
