"""Boxes from a first look at a few images."""

from __future__ import annotations

import numpy as np

from xtalfast.integration.columns import add_derived_columns
from xtalfast.integration.integrate import IntegrateOptions, prepare
from xtalfast.integration.pilot import PILOT_BOX, model_boxes
from xtalfast.integration.simulate import SimulationConfig, simulate
from xtalfast.io import read_expt, read_refl


def test_boxes_follow_the_spots(tmp_path) -> None:
    """Long for low zeta, the same when the job is taken up again, and the store has them."""
    files = simulate(tmp_path / "data", SimulationConfig(n_images=10, d_min=2.8, photons_mean=2000.0))
    experiments, table = read_expt(files.expt), read_refl(files.refl)
    add_derived_columns(table, experiments)
    bbox = model_boxes(table, experiments, tmp_path)
    assert not isinstance(bbox, tuple) and (tmp_path / "spot_shape.json").is_file()
    assert not (tmp_path / "pilot").exists()
    length, zeta = bbox[:, 5] - bbox[:, 4], np.abs(table["zeta"])
    assert length[zeta < 0.3].mean() > 1.5 * length[zeta > 0.8].mean()
    inside = (bbox[:, ::2] <= table["xyzcal.px"]) & (table["xyzcal.px"] < bbox[:, 1::2])
    assert inside.all()
    np.testing.assert_array_equal(bbox, model_boxes(table, experiments, tmp_path))
    store = prepare(files.expt, files.refl, tmp_path, IntegrateOptions()).store
    assert store.box is None
    np.testing.assert_array_equal(store.metadata["bbox"], bbox[store.metadata["row"]])


def test_too_few_spots_take_boxes_of_one_size(tiny, tmp_path) -> None:
    experiments, table = read_expt(tiny.expt), read_refl(tiny.refl)
    few = table.select(np.arange(10))
    add_derived_columns(few, experiments)
    assert model_boxes(few, experiments, tmp_path) == PILOT_BOX == model_boxes(few, experiments, tmp_path)
