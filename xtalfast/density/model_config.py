"""What a RecCrysFormer is made of, and the quirks and changes that can be switched."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_type_hints

from xtalfast.errors import InputError
from xtalfast.ops.nystrom_attention import faster_attention


@dataclass(frozen=True)
class RecCrysFormerConfig:
    """Sizes and options of the network; the defaults are the density paper's (Table in its Appendix G).

    Attributes:
        dim: width of a token, d_t.
        depth: transformer layers, L.
        heads, dim_head: of the attention, H and d_h.
        ff_dim: hidden width of the feed-forward layers, d_ff.
        patch: voxels along each edge of a token.
        channels: of the convolutions, c.
        stem_kernel: of the periodic convolution in front.
        decoder_blocks: residual blocks of 5^3 convolutions behind the transformer.
        landmarks, pinv_iterations: of the Nystrom attention.
        n_residues: residues given with a Patterson map, at most.
        residue_map_size: grid points along each edge of a residue's map.
        max_grid: grid points along a, b, c, at most (their product counts, for the table of positions).
        recycle: a template density is a second input channel.
        attention: "nystrom", "exact" (weights are not interchangeable), or "auto": exact where it is cheaper.
        dropout, emb_dropout: in the layers, and of the embedded map.
        positions: "table", one learned row per token number; "metric", a function of the token's place in fractions of
            the cell and in A, which needs `cell` and means the same in every grid.
        residue_patches: keep this many patches of each residue's map, the densest; None keeps all.
        legacy_inplace_skip: residual blocks skip from relu(x) instead of x, as in weights published with the paper.
        pinv_scale: "matrix" scales each pseudo-inverse by itself; "batch" by the largest of the whole batch, as the
            public implementation does, which makes an example's output depend on its batch.
        pinv: "iterative", or "ridge": regularised least squares instead, for weights trained with it.
        mask_padding: leave the zero tokens out that fill sequences up to a multiple of `landmarks`.
        decoder_padding: "zeros" outside the cell, or "wrap" around it.
        sim_gate: a learned gate on the similarities of landmarks.
        conv_taps: tokens along which values are convolved beside the attention; 0 for none.
        centre_patterson: move the Patterson's origin to the middle of the cell, where the molecule is: what a token
            sees then lies where it is to be drawn.
    """

    dim: int = 512
    depth: int = 10
    heads: int = 8
    dim_head: int = 64
    ff_dim: int = 2048
    patch: int = 4
    channels: int = 10
    stem_kernel: int = 7
    decoder_blocks: int = 2
    landmarks: int = 64
    pinv_iterations: int = 6
    n_residues: int = 15
    residue_map_size: int = 24
    max_grid: tuple[int, int, int] = (88, 72, 60)
    recycle: bool = False
    attention: Literal["nystrom", "exact", "auto"] = "nystrom"
    dropout: float = 0.1
    emb_dropout: float = 0.1
    positions: Literal["table", "metric"] = "table"
    residue_patches: int | None = None
    legacy_inplace_skip: bool = False
    pinv_scale: Literal["matrix", "batch"] = "matrix"
    pinv: Literal["iterative", "ridge"] = "iterative"
    mask_padding: bool = False
    decoder_padding: Literal["zeros", "wrap"] = "zeros"
    sim_gate: bool = True
    conv_taps: int = 33
    centre_patterson: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_grid", tuple(self.max_grid))
        hints = get_type_hints(type(self))
        for item in fields(self):
            allowed, value = get_args(hints[item.name]), getattr(self, item.name)
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise InputError(f"{item.name} must be one of {', '.join(allowed)}, got {value!r}")
        least = {"depth": 0, "decoder_blocks": 0, "pinv_iterations": 0, "conv_taps": 0}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < least.get(item.name, 1):
                raise InputError(f"{item.name} must be {least.get(item.name, 1)} or more, got {value}")
        if len(self.max_grid) != 3 or any(n < self.patch or n % self.patch for n in self.max_grid):
            raise InputError(f"max_grid must be three multiples of patch = {self.patch}, got {self.max_grid}")
        if self.residue_map_size % self.patch:
            raise InputError(
                f"residue_map_size must be a multiple of patch = {self.patch}, got {self.residue_map_size}"
            )
        if self.stem_kernel % 2 == 0:
            raise InputError(f"stem_kernel must be odd, got {self.stem_kernel}")
        if not (0 <= self.dropout < 1 and 0 <= self.emb_dropout < 1):
            raise InputError(f"dropout must be from 0 to below 1, got {self.dropout} and {self.emb_dropout}")
        if self.residue_patches is not None and self.residue_patches > self.residue_tokens:
            raise InputError(
                f"a residue's map has {self.residue_tokens} patches, got residue_patches {self.residue_patches}"
            )

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest map."""
        x, y, z = (n // self.patch for n in self.max_grid)
        return x * y * z

    @property
    def residue_tokens(self) -> int:
        """Patches of a residue's map."""
        return (self.residue_map_size // self.patch) ** 3

    @property
    def uses_exact_attention(self) -> bool:
        """What `attention` comes to: "auto" is decided once, for the largest map: weights do not fit both."""
        if self.attention != "auto":
            return self.attention == "exact"
        keys = self.max_tokens + self.n_residues * (self.residue_patches or self.residue_tokens)
        return faster_attention(self.max_tokens, keys, self.landmarks) == "exact"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises InputError for names this version does not know."""
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise InputError(f"unknown network settings {', '.join(unknown)}; the file is of another version")
        return cls(**values)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The network of the paper's 15-residue runs."""
        return cls(**changes)

    @classmethod
    def fast(cls, **changes: Any) -> Self:
        """The paper's sizes with what costs less or fits crystals better: see `docs/density.md`."""
        better: dict[str, Any] = {
            "attention": "exact",
            "residue_patches": 32,
            "positions": "metric",
            "decoder_padding": "wrap",
            "mask_padding": True,
            "centre_patterson": True,
            "conv_taps": 0,
        }
        return cls(**(better | changes))

    @classmethod
    def dipeptide(cls, **changes: Any) -> Self:
        """The network of the paper's dipeptide runs (its Table 3)."""
        sizes: dict[str, Any] = {"dim": 512, "ff_dim": 512, "heads": 8, "depth": 6, "n_residues": 2}
        return cls(**(sizes | {"max_grid": (64, 64, 64)} | changes))
