"""Shared fixtures, and the rule that a skipped test is an expected one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expected-skips",
        metavar="FILE",
        help="fail when the tests skipped differ from those listed in FILE (one `node id: reason` a line)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("dials.import") is None:
        for item in items:
            if item.get_closest_marker("dials"):
                item.add_marker(pytest.mark.skip(reason="DIALS is not installed (make system)"))


def _skips(reporter) -> list[str]:
    lines = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        lines.append(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
    return sorted(lines)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("--expected-skips"):
        terminalreporter.section("skipped tests")
        for line in _skips(terminalreporter) or ["none"]:
            terminalreporter.line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--expected-skips")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not file or reporter is None or session.exitstatus not in (0, 1):
        return
    expected = [line for line in Path(file).read_text().splitlines() if line and not line.startswith("#")]
    skipped = _skips(reporter)
    for line in sorted(set(skipped) ^ set(expected)):
        reporter.line(f"{'unexpected skip' if line in skipped else 'expected skip did not happen'}: {line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
