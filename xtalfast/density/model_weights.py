"""Weights of the density paper's public implementation in our network."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from xtalfast.density.model import RecCrysFormer
from xtalfast.errors import InputError

_NAMES = [
    (r"pos_embedding", r"positions"),
    (r"conv1\.(.*)", r"embed.conv_\1"),
    (r"bn1\.(.*)", r"embed.batch_norm.\1"),
    (r"conv1_p\.(.*)", r"residues.embed.conv_\1"),
    (r"bn1_p\.(.*)", r"residues.embed.batch_norm.\1"),
    (r"to_patch_embedding\.1\.(.*)", r"embed.patch_norm.\1"),
    (r"to_patch_embedding\.2\.(.*)", r"embed.projection.\1"),
    (r"to_patch_embedding\.3\.(.*)", r"embed.norm.\1"),
    (r"transformer\.pos_embedding", r"residues.positions"),
    (r"transformer\.partial_structure_to_patch_embedding\.1\.(.*)", r"residues.embed.patch_norm.\1"),
    (r"transformer\.partial_structure_to_patch_embedding\.2\.(.*)", r"residues.embed.projection.\1"),
    (r"transformer\.partial_structure_to_patch_embedding\.3\.(.*)", r"residues.embed.norm.\1"),
    (r"transformer\.layers\.(\d+)\.0\.norm\.(.*)", r"layers.\1.norm.\2"),
    (r"transformer\.layers\.(\d+)\.0\.norm_p\.(.*)", r"layers.\1.norm_residues.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.att_mask", r"layers.\1.attention.gate"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.weight", r"layers.\1.attention.to_qkv.weight"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.(.*)", r"layers.\1.attention.to_out.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.res_conv\.weight", r"layers.\1.attention.residual"),
    (r"transformer\.layers\.(\d+)\.1\.norm\.(.*)", r"layers.\1.norm_ff.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.net\.(\d+)\.(.*)", r"layers.\1.feed_forward.layers.\2.\3"),
    (r"from_patch_embedding\.(\d+)\.(.*)", r"head.\1.\2"),
    (r"bigGAN_layers\.(\d+)\.(bn|conv)(\d)\.(.*)", None),
    (r"conv2\.(.*)", r"last.\1"),
]


def our_name(key: str) -> str | None:
    """The name of a parameter or buffer of the public implementation in our network, None if it has none."""
    for pattern, name in _NAMES:
        found = re.fullmatch(pattern, key)
        if found and name is not None:
            return found.expand(name)
        if found:
            block, kind, number, rest = found.groups()
            return f"blocks.{block}.{'norms' if kind == 'bn' else 'convs'}.{int(number) - 1}.{rest}"
    return None


def load_reference_state_dict(model: RecCrysFormer, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights saved by the density paper's public implementation.

    Such weights want `pinv_scale="batch"` to give the same numbers to the last digit, and `legacy_inplace_skip=True`
    when they were trained before May 2026. Of the table of residue positions only the rows that are used are kept
    (3,240 of 89,100 at the paper's size).

    Args:
        model: made with the sizes of these weights.
        state_dict: its keys and tensors.

    Raises:
        InputError: keys that are unknown or missing, or a shape that does not fit; nothing is changed then.
    """
    ours = model.state_dict()
    unknown, misfits, loaded = [], [], {}
    for key, value in state_dict.items():
        name = our_name(key)
        if name is None or name not in ours:
            unknown.append(key)
            continue
        wanted = ours[name].shape
        if name == "positions":
            value = value.squeeze(0)[: wanted[0]]
        elif name == "residues.positions":
            value = value.squeeze(0)[: wanted[0] * wanted[1]].reshape(-1, *wanted[1:])
        elif name.endswith("attention.residual"):
            value = value.flatten(1)
        if value.shape != wanted:
            misfits.append(f"{key} {list(state_dict[key].shape)} for {name} {list(wanted)}")
        loaded[name] = value
    missing = sorted(set(ours) - set(loaded) - {"residues.maps"})
    for problem, names in (("unknown keys", unknown), ("shapes that do not fit", misfits), ("missing", missing)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"state dict does not fit this network: {problem}: {', '.join(names[:3])}{more}")
    model.load_state_dict(loaded, strict=False)
