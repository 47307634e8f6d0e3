"""The templates of the reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtalfast.errors import MissingExtraError

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(purpose: str) -> Environment:
    """Where the templates are found and how they are filled; `purpose` says who asks when jinja2 is missing."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", purpose) from error
    return Environment(
        loader=PackageLoader("xtalfast.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
