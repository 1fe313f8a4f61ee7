"""What an OAT is: sizes and switches, with the published code's values as defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from vlattn.checks import require_bool, require_choice, require_count, require_divisor, require_number, require_positive
from vlattn.errors import InputError
from vlattn.gaze.positions import KINDS, axis_width


@dataclass(frozen=True)
class OATConfig:
    """Sizes of an Object-Level Attention Transformer (arXiv 2407.13335); the defaults have 18,255,843 parameters.

    dim: width of a token: half appearance, half position.
    heads, ffn, encoder_layers, decoder_layers, dropout: of the transformer, post-norm.
    pointer_heads: of the output; 1 has no readout. head: `pointer`, or `linear`, the reference's first version, which
        fits one number of objects alone.
    objects: that number, for `linear`.
    positions, rows, sigma, scale: the table of positions; see `vlattn.gaze.positions`. rows: the longest side of a
        grid. table_steps, table_seed: of the fit of a `learned` table.
    appearance: `cnn`, or `features` of a frozen backbone, `features` wide. crop: height and width for the CNN, levels
        of its pyramid, scaling `minmax` or `none`, and the channels' order; the reference has `none` and `bgr` for book
        covers.
    reveal_target_position: whether the target token says where the target is, as published; without, it says only
        what it looks like.
    parity: leave the padding class (and, for the first fixation, the end) among the choices while training, as the
        reference does, though generation excludes both.
    longest: fixations of the longest path to generate; training sets it.
    """

    dim: int = 512
    heads: int = 4
    ffn: int = 512
    encoder_layers: int = 4
    decoder_layers: int = 4
    dropout: float = 0.1
    pointer_heads: int = 2
    head: str = "pointer"
    objects: int | None = None
    positions: str = "distance"
    rows: int = 14
    sigma: float = 2.0
    scale: float = 8.76
    table_steps: int = 10_000
    table_seed: int = 0
    appearance: str = "cnn"
    features: int | None = None
    crop: tuple[int, int] = (150, 93)
    levels: int | None = None
    scaling: str = "minmax"
    order: str = "rgb"
    reveal_target_position: bool = True
    parity: bool = False
    longest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", tuple(self.crop))  # a list, where it was read from a file
        for name in ("dim", "heads", "ffn", "encoder_layers", "decoder_layers", "pointer_heads", "table_steps"):
            require_count(name, getattr(self, name))
        require_divisor("heads", self.heads, "dim", self.dim)
        require_divisor("2, the halves of a token,", 2, "dim", self.dim)
        require_number("dropout", self.dropout, 0, 1)
        require_choice("head", self.head, ("pointer", "linear"))
        require_choice("positions", self.positions, KINDS)
        require_choice("appearance", self.appearance, ("cnn", "features"))
        require_choice("scaling", self.scaling, ("minmax", "none"))
        require_choice("order", self.order, ("rgb", "bgr"))
        for name in ("reveal_target_position", "parity"):
            require_bool(name, getattr(self, name))
        require_count("rows", self.rows, 2)
        for name in ("sigma", "scale"):
            require_positive(name, getattr(self, name))
        if self.positions == "distance" and self.rows > axis_width(self.dim // 2):
            most = axis_width(self.dim // 2)
            raise InputError(f"rows: got {self.rows}; dim={self.dim} has room for {most}: give fewer, or a larger dim")
        for name, needed in (("features", self.appearance == "features"), ("objects", self.head == "linear")):
            value = getattr(self, name)
            if needed or value is not None:
                require_count(name, value)
        if self.longest is not None:
            require_count("longest", self.longest)

    @classmethod
    def small(cls, **changes: Any) -> OATConfig:
        """Narrower, half as deep, smaller crops: trains on one core in minutes."""
        return cls(**{"dim": 192, "ffn": 192, "encoder_layers": 2, "decoder_layers": 2, "crop": (60, 60), **changes})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OATConfig:
        """Raises InputError for keys that no config has."""
        odd = sorted(data.keys() - {field.name for field in fields(cls)})
        if odd:
            raise InputError(f"config: has the unknown key {odd[0]!r}; give a config that this vlattn wrote")
        return cls(**data)
