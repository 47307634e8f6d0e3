"""Shared fixtures, and the rule that a skipped test is an expected one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xtalfast.cli import main
from xtalfast.integration.simulate import SimulationConfig, SimulationResult, simulate


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


@pytest.fixture
def run_dials() -> Callable[..., Any]:
    """Runs Python code under the interpreter of DIALS, with arguments, and returns the json it prints last."""

    def run(code: str, *arguments: str | Path) -> Any:
        program = shutil.which("dials.import")
        assert program is not None, "mark the test with @pytest.mark.dials"
        interpreter = Path(program).read_text().splitlines()[0].removeprefix("#!").split()[0]
        done = subprocess.run([interpreter, "-c", code, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@dataclass(frozen=True)
class TinyRun:
    """A simulated data set of six images and its integration by the command line; not to be changed."""

    data: SimulationResult
    directory: Path  # of the integration

    def arguments(self, output: Path, *more: str) -> list[str]:
        """The command line that made `directory`, for another output directory."""
        return ["integrate", str(self.data.expt), str(self.data.refl), "-o", str(output), *EPOCHS, "--quiet", *more]


EPOCHS = ("--epochs", "3")  # of one step each


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimulationResult:
    """Six images, true models and predictions; not to be changed (`tiny_copy` may be)."""
    return simulate(tmp_path_factory.mktemp("tiny"), SimulationConfig.tiny())


@pytest.fixture
def tiny_copy(tiny: SimulationResult, tmp_path: Path) -> SimulationResult:
    """A data set to spoil."""
    directory = tmp_path / "data"
    shutil.copytree(tiny.directory, directory)
    images = [directory / "images" / path.name for path in tiny.images]
    return SimulationResult(
        directory, images, directory / tiny.expt.name, directory / tiny.refl.name, directory / tiny.truth.name
    )


@pytest.fixture(scope="session")
def tiny_run(tiny: SimulationResult, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One integration from end to end that many tests look at."""
    run = TinyRun(tiny, tmp_path_factory.mktemp("tiny_run") / "integrated")
    assert main(run.arguments(run.directory)) == 0
    return run


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
