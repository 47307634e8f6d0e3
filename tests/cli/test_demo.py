"""`xtalfast demo` on a smaller crystal."""

from __future__ import annotations

from functools import partial

from xtalfast.cli import main
from xtalfast.integration import integrate
from xtalfast.integration.simulate import SimulationConfig


def test_demo_ends_with_a_table_against_the_truth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SimulationConfig, "demo", SimulationConfig.tiny)
    monkeypatch.setattr(integrate, "IntegrateOptions", partial(integrate.IntegrateOptions, epochs=1))
    assert main(["demo", "-o", str(tmp_path), "--seed", "2", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "against the true photons of fully recorded reflections" in text
    assert "summation" in text and "profile fit" in text
    assert f"wrote {tmp_path}/integrated/report.html" in text
    assert (tmp_path / "integrated" / "report.html").is_file()
