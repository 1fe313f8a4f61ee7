"""What pruners inside the decoder share: their settings checked, and the best visual tokens of each prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.runtime.decoder import Cut
from vlattn.runtime.layer_state import LayerState


@dataclass(frozen=True)
class DecoderPruner(Intervention):
    """Base of pruners that rank visual tokens inside the decoder; only one of them can act on a model."""

    place = "decoder"
    ranks_in_decoder = True


def top_visual(score: torch.Tensor, visual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The best `keep[b]` visual tokens of each prompt; ties go to the lower position.

    Args:
        score: [B, N].
        visual: bool [B, N], which positions compete.
        keep: int64 [B]; a prompt with no more visual tokens than that keeps them all.

    Returns:
        bool [B, N], False outside `visual`.
    """
    # A stable sort, so that ties fall alike on every device.
    order = score.masked_fill(~visual, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    best = torch.arange(score.shape[1], device=score.device) < keep[:, None]  # [B, N], by rank
    return torch.zeros_like(visual).scatter(1, order, best) & visual


def candidates(state: LayerState) -> torch.Tensor:
    """The visual tokens that may leave, bool [B, n]: all but the last position, which speaks for the whole prompt."""
    visual = state.visual.clone()
    visual[:, -1] = False
    return visual


def keep_best(score: torch.Tensor, state: LayerState, keep: Sequence[int]) -> Cut:
    """The cut that leaves the best `keep[b]` visual tokens of prompt b, and everything else."""
    visual = candidates(state)
    counts = torch.tensor(list(keep), device=score.device)
    return Cut(~visual | top_visual(score, visual, counts))


def share_of(total: int, share: float) -> int:
    """floor(total * share), with the share taken as the decimal number it is written as: 0.29 of 100 is 29, not 28."""
    return math.floor(total * Fraction(repr(float(share))))


def is_count(value: object) -> bool:
    """Whether `value` is a positive integer (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_share(value: object) -> bool:
    """Whether `value` is a real number in (0, 1]; the integer 1 is a share as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def as_tuple(name: str, value: object) -> tuple:
    """A sequence setting as a tuple, so that a list from a configuration file works too."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
        raise InputError(f"{name}: got {value!r}; give a sequence with one entry for each stage")
    return tuple(value)


def check_layers(name: str, layers: object) -> tuple:
    """Layers as a tuple of indices and shares of the depth; see `layers_of`."""
    entries = as_tuple(name, layers)
    for entry in entries:
        whole = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
        if not whole and not (isinstance(entry, float) and 0 < entry < 1):
            raise InputError(f"{name}: got {entry!r}; give layer indices, or shares of the depth such as 0.25")
    return entries


def layers_of(name: str, layers: tuple, depth: int, first: int, last: int) -> list[int]:
    """The layers that a setting names on a decoder of `depth` layers: indices as they are, shares (0.25) rounded.

    Raises:
        InputError: one is outside first...last, or they do not increase.
    """
    found = [entry if isinstance(entry, int) else round(entry * depth) for entry in layers]
    if any(not first <= layer <= last for layer in found) or any(a >= b for a, b in pairwise(found)):
        raise InputError(
            f"{name}: got {layers}, which is {tuple(found)} here, but this decoder has layers 0 to {depth - 1}; give "
            f"increasing indices from {first} to {last}, such as {_example(first, last, len(found))}, "
            "or shares of the depth in (0, 1)"
        )
    return found


def _example(first: int, last: int, stages: int) -> tuple[int, ...]:
    """Indices spread evenly, as many as there are stages where they fit."""
    stages = min(stages, last - first + 1)
    return tuple(first + round((i + 1) * (last - first + 1) / (stages + 1) - 0.5) for i in range(stages))
