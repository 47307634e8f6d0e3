"""The blocks of a `.expt` file (beam, detector, goniometer, scan, crystal) to the models and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from xtalfast.errors import InputError
from xtalfast.models import Array, Beam, Crystal, Detector, Goniometer, Panel, Scan, rotation_matrix

Block = dict[str, Any]

_IDENTITY = np.eye(3).ravel().tolist()


def _value(block: Block, key: str, where: str) -> Any:
    if key not in block:
        raise InputError(f"{where}: wanted the key {key!r}, got {', '.join(block) or 'an empty block'}")
    return block[key]


def _vector(block: Block, key: str, n: int, where: str, default: list[float] | None = None) -> Array:
    value = _value(block, key, where) if default is None else block.get(key, default)
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (n,) or not np.isfinite(array).all():
        raise InputError(f"{where}: {key} must be {n} finite numbers, got {value!r:.60}")
    return array


def _number(block: Block, key: str, where: str, default: float | None = None) -> float:
    value = _value(block, key, where) if default is None else block.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{where}: {key} must be a number, got {value!r:.60}")
    return float(value)


def _unit(vector: Array, key: str, where: str) -> Array:
    norm = np.linalg.norm(vector)
    if norm == 0:
        raise InputError(f"{where}: {key} must have a direction, got {vector.tolist()}")
    return vector / norm


def read_beam(block: Block, where: str) -> Beam:
    """The beam block; raises InputError for a polychromatic beam."""
    if "wavelength" not in block:
        kind = block.get("__id__", "no wavelength")
        raise InputError(f"{where}: wanted a monochromatic beam, got {kind}; only monochromatic data can be integrated")
    wavelength = _number(block, "wavelength", where)
    if wavelength <= 0:
        raise InputError(f"{where}: wavelength must be positive, got {wavelength}")
    return Beam(
        direction=_unit(_vector(block, "direction", 3, where), "direction", where),
        wavelength=wavelength,
        divergence=_number(block, "divergence", where, 0.0),
        sigma_divergence=_number(block, "sigma_divergence", where, 0.0),
        polarization_normal=_vector(block, "polarization_normal", 3, where, [0.0, 1.0, 0.0]),
        polarization_fraction=_number(block, "polarization_fraction", where, 0.999),
    )


def beam_block(beam: Beam) -> Block:
    """A beam block that dxtbx reads."""
    return {
        "direction": beam.direction.tolist(),
        "wavelength": beam.wavelength,
        "divergence": beam.divergence,
        "sigma_divergence": beam.sigma_divergence,
        "polarization_normal": beam.polarization_normal.tolist(),
        "polarization_fraction": beam.polarization_fraction,
        "flux": 0.0,
        "transmission": 1.0,
    }


Frame = tuple[Array, Array]  # orientation [3, 3] with columns fast, slow, normal; origin [3]


def _frame(block: Block, where: str) -> Frame:
    fast = _unit(_vector(block, "fast_axis", 3, where), "fast_axis", where)
    slow = _unit(_vector(block, "slow_axis", 3, where), "slow_axis", where)
    return np.stack([fast, slow, np.cross(fast, slow)], axis=1), _vector(block, "origin", 3, where)


def parent_frames(block: Block, where: str) -> list[Frame]:
    """The laboratory frame of the group that each panel hangs on; the laboratory itself without a hierarchy."""
    frames: list[Frame] = [(np.eye(3), np.zeros(3))] * len(_value(block, "panels", where))

    def walk(group: Block, parent: Frame) -> None:
        if "panel" in group:
            index = group["panel"]
            if not isinstance(index, int) or not 0 <= index < len(frames):
                raise InputError(f"{where}: hierarchy names panel {index!r}, there are {len(frames)} panels")
            frames[index] = parent
            return
        orientation, origin = _frame(group, f"{where} hierarchy")
        frame = parent[0] @ orientation, parent[0] @ origin + parent[1]
        for child in group.get("children", []):
            walk(child, frame)

    if block.get("hierarchy"):
        walk(block["hierarchy"], (np.eye(3), np.zeros(3)))
    return frames


def _read_panel(block: Block, parent: Frame, where: str) -> Panel:
    orientation, origin = _frame(block, where)
    lab = parent[0] @ orientation
    strategy = (block.get("px_mm_strategy") or {}).get("type", "SimplePxMmStrategy")
    # The offsets of the third strategy live in the dx and dy maps of the imageset; io.expt warns about those.
    parallax = strategy in ("ParallaxCorrectedPxMmStrategy", "OffsetParallaxCorrectedPxMmStrategy")
    if not parallax and strategy not in ("SimplePxMmStrategy", "OffsetPxMmStrategy"):
        raise InputError(f"{where}: px_mm_strategy {strategy!r} is unknown; wanted Simple or ParallaxCorrected")
    mu, thickness = _number(block, "mu", where, 0.0), _number(block, "thickness", where, 0.0)
    if parallax and not (mu > 0 and thickness > 0):
        raise InputError(f"{where}: parallax correction needs mu > 0 and thickness > 0, got {mu} and {thickness}")
    pixel_size = _vector(block, "pixel_size", 2, where)
    image_size = _vector(block, "image_size", 2, where)
    if min(*pixel_size, *image_size) <= 0:
        raise InputError(f"{where}: pixel_size and image_size must be positive, got {pixel_size} and {image_size}")
    low, high = _vector(block, "trusted_range", 2, where)
    offset = _vector(block, "raw_image_offset", 2, where, [0.0, 0.0])
    return Panel(
        origin=parent[0] @ origin + parent[1],
        fast=lab[:, 0],
        slow=lab[:, 1],
        pixel_size=(float(pixel_size[0]), float(pixel_size[1])),
        image_size=(int(image_size[0]), int(image_size[1])),
        trusted_range=(float(low), float(high)),
        gain=_number(block, "gain", where, 1.0),
        pedestal=_number(block, "pedestal", where, 0.0),
        thickness=thickness,
        mu=mu,
        material=block.get("material", ""),
        parallax=parallax,
        mask=[(int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in block.get("mask") or []],
        raw_image_offset=(int(offset[0]), int(offset[1])),
        name=block.get("name", "Panel"),
    )


def read_detector(block: Block, where: str) -> Detector:
    """The panels of a detector block, in the laboratory frame."""
    panels = _value(block, "panels", where)
    if not panels:
        raise InputError(f"{where}: wanted at least one panel, got none")
    parents = parent_frames(block, where)
    return Detector(_read_panel(p, parent, f"{where} panel {i}") for i, (p, parent) in enumerate(zip(panels, parents)))


def panel_block(panel: Panel, parent: Frame) -> Block:
    """A panel block, its frame relative to `parent`, that dxtbx reads."""
    orientation, origin = parent
    return {
        "name": panel.name,
        "type": "SENSOR_PAD",
        "fast_axis": (panel.fast @ orientation).tolist(),
        "slow_axis": (panel.slow @ orientation).tolist(),
        "origin": ((panel.origin - origin) @ orientation).tolist(),
        "raw_image_offset": list(panel.raw_image_offset),
        "image_size": list(panel.image_size),
        "pixel_size": list(panel.pixel_size),
        "trusted_range": list(panel.trusted_range),
        "thickness": panel.thickness,
        "material": panel.material,
        "mu": panel.mu,
        "identifier": "",
        "mask": [list(rectangle) for rectangle in panel.mask],
        "gain": panel.gain,
        "pedestal": panel.pedestal,
        "px_mm_strategy": {"type": "ParallaxCorrectedPxMmStrategy" if panel.parallax else "SimplePxMmStrategy"},
    }


def detector_block(detector: Detector) -> Block:
    """A detector block without hierarchy that dxtbx reads."""
    return {"panels": [panel_block(panel, (np.eye(3), np.zeros(3))) for panel in detector]}


def read_goniometer(block: Block, where: str) -> Goniometer:
    """A single-axis goniometer, or the motors of a multi-axis one folded into `fixed` and `setting`."""
    if "axes" not in block:
        axis = _unit(_vector(block, "rotation_axis", 3, where), "rotation_axis", where)
        fixed = _vector(block, "fixed_rotation", 9, where, _IDENTITY).reshape(3, 3)
        setting = _vector(block, "setting_rotation", 9, where, _IDENTITY).reshape(3, 3)
        return Goniometer(axis, fixed, setting)
    axes = [_unit(_vector({"axes": axis}, "axes", 3, where), "axes", where) for axis in block["axes"]]
    angles = np.radians(_vector(block, "angles", len(axes), where))
    scan_axis = int(_number(block, "scan_axis", where))
    if not 0 <= scan_axis < len(axes):
        raise InputError(f"{where}: scan_axis must number one of {len(axes)} axes, got {scan_axis}")
    fixed, setting = np.eye(3), np.eye(3)
    for i, (axis, angle) in enumerate(zip(axes, angles)):  # from the crystal to the base
        if i < scan_axis:
            fixed = rotation_matrix(axis, angle) @ fixed
        elif i > scan_axis:
            setting = rotation_matrix(axis, angle) @ setting
    return Goniometer(axes[scan_axis], fixed, setting)


def goniometer_block(goniometer: Goniometer) -> Block:
    """A single-axis goniometer block that dxtbx reads."""
    return {
        "rotation_axis": goniometer.axis.tolist(),
        "fixed_rotation": goniometer.fixed.ravel().tolist(),
        "setting_rotation": goniometer.setting.ravel().tolist(),
    }


def read_scan(block: Block, where: str) -> Scan:
    """A scan block of either layout: `oscillation` (start, width), or `properties` with one start angle per image."""
    first, last = (int(n) for n in _vector(block, "image_range", 2, where))
    n = last - first + 1
    if n < 1:
        raise InputError(f"{where}: image_range must hold an image, got {first} to {last}")
    properties = block.get("properties")
    if properties is None:
        start, width = _vector(block, "oscillation", 2, where, [0.0, 0.0])
        exposure = block.get("exposure_time") or 0.0
    else:
        exposure = properties.get("exposure_time") or 0.0
        starts = _vector(properties, "oscillation", n, where, [0.0] * n)
        start = starts[0]
        if "oscillation_width" in properties:
            width = _vector(properties, "oscillation_width", 1, where)[0]
        else:
            width = (starts[-1] - start) / max(n - 1, 1)
        if n > 1 and np.abs(start + width * np.arange(n) - starts).max() > 1e-3 * abs(width):
            raise InputError(f"{where}: images must be of equal width, got start angles {starts[:4].tolist()}...")
    return Scan(
        image_range=(first, last),
        oscillation=(float(start), float(width)),
        batch_offset=int(block.get("batch_offset", 0)),
        exposure_time=float(np.ravel(exposure)[0]),
    )


def scan_block(scan: Scan) -> Block:
    """A scan block of the older layout, which every dxtbx reads."""
    return {
        "image_range": list(scan.image_range),
        "batch_offset": scan.batch_offset,
        "oscillation": list(scan.oscillation),
        "exposure_time": [scan.exposure_time] * scan.n_images,
        "epochs": [0.0] * scan.n_images,
        "valid_image_ranges": {},
    }


def read_crystal(block: Block, where: str) -> Crystal:
    """A crystal block, static or scan-varying."""
    real = np.stack([_vector(block, f"real_space_{x}", 3, where) for x in "abc"])
    if np.linalg.det(real) == 0:
        raise InputError(f"{where}: real_space_a, b, c must span space, got {real.tolist()}")
    scan_points = block.get("A_at_scan_points") or None
    if scan_points is not None:
        scan_points = np.asarray(scan_points, np.float64)
        if scan_points.ndim != 2 or scan_points.shape[1] != 9:
            raise InputError(f"{where}: A_at_scan_points must be [n_images + 1, 9], got {list(scan_points.shape)}")
        scan_points = scan_points.reshape(-1, 3, 3)
    return Crystal(
        A=np.linalg.inv(real).astype(np.float64),
        hall_symbol=block.get("space_group_hall_symbol", " P 1"),
        A_at_scan_points=scan_points,
        half_mosaicity_deg=block.get("ML_half_mosaicity_deg"),
        domain_size_a=block.get("ML_domain_size_ang"),
    )


def crystal_block(crystal: Crystal) -> Block:
    """A crystal block that dxtbx reads."""
    a, b, c = np.linalg.inv(crystal.A)
    block: Block = {
        "__id__": "crystal",
        "real_space_a": a.tolist(),
        "real_space_b": b.tolist(),
        "real_space_c": c.tolist(),
        "space_group_hall_symbol": crystal.hall_symbol,
    }
    if crystal.A_at_scan_points is not None:
        block["A_at_scan_points"] = crystal.A_at_scan_points.reshape(-1, 9).tolist()
    for key, value in (
        ("ML_half_mosaicity_deg", crystal.half_mosaicity_deg),
        ("ML_domain_size_ang", crystal.domain_size_a),
    ):
        if value is not None:
            block[key] = value
    return block
