"""Self-contained HTML reports; jinja2 comes with the extra `report`."""

from xtalfast.report.data import Comparison, ProfileGrid, ReportData, ShoeboxExample, example_rows, mean_profiles
from xtalfast.report.integration import render_report, write_report

__all__ = [
    "Comparison",
    "ProfileGrid",
    "ReportData",
    "ShoeboxExample",
    "example_rows",
    "mean_profiles",
    "render_report",
    "write_report",
]
