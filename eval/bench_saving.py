"""Did a method remove visual tokens, or only hide them? The KV cache of the deep layers tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlattn.errors import InputError
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class Saving:
    """What became of the visual tokens of one prefill.

    kind: `removed`: the deepest layer caches fewer positions than vanilla. `masked`: tokens were given up, but the
        deepest layer caches them all, so neither time nor memory is saved. `none`: nothing was given up.
    first_short_layer: the first decoder layer that caches less than vanilla; None for none.
    """

    kind: Literal["removed", "masked", "none"]
    first_short_layer: int | None = None
    also_masked: bool = False

    @property
    def text(self) -> str:
        if self.kind == "masked":
            return "masked, no real saving"
        if self.kind == "none":
            return "nothing removed"
        where = "before the decoder" if self.first_short_layer == 0 else f"from layer {self.first_short_layer}"
        return f"removed {where}" + (", others only masked" if self.also_masked else "")


def cache_lengths(cache: Any) -> list[int]:
    """Positions that each layer of a transformers cache holds, padding included."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise InputError(f"cache: {type(cache).__name__} has no layers; give a transformers Cache such as out.cache")
    return [int(layer.get_seq_length()) for layer in layers]


def judge_saving(
    trace: Trace, visual: Sequence[int], cached: Sequence[int], vanilla: Sequence[int], patches: int | None = None
) -> Saving:
    """Compare the cache after a pruned prefill with the cache after the same prefill without pruning.

    Args:
        trace: what the method says it did.
        visual: visual tokens of each prompt, without pruning.
        cached, vanilla: positions in the cache of each decoder layer, with the method and without.
        patches: of one encoder image, where their number is the same for all.
    """
    short = [layer for layer, (now, full) in enumerate(zip(cached, vanilla, strict=True)) if now < full]
    first = short[0] if short else None
    if cached[-1] < vanilla[-1]:
        return Saving("removed", first, also_masked=trace.masked)
    given_up = trace.masked or gives_up(trace, visual, len(vanilla), patches)
    return Saving("masked" if given_up else "none", first)


def gives_up(trace: Trace, visual: Sequence[int], layers: int, patches: int | None = None) -> bool:
    """Whether the trace says that every prompt lost visual tokens before the last decoder layer.

    Every prompt, because the cache of a batch is as long as its longest row.
    """
    if trace.visual_by_layer and _fewer(trace.visual_by_layer[layers - 1], visual):
        return True
    inside = {layer: ids for layer, ids in trace.kept_in_decoder.items() if layer < layers - 1}
    if inside and _fewer(_count(inside[max(inside)]), visual):
        return True
    return trace.kept is not None and patches is not None and _fewer(_count(trace.kept), [patches] * len(trace.kept))


def _fewer(left: Sequence[int], full: Sequence[int]) -> bool:
    return bool(full) and all(a < b for a, b in zip(left, full, strict=True))


def _count(ids: torch.Tensor) -> list[int]:
    """Entries of each row that are no padding [rows, n]."""
    return (ids != -1).sum(1).tolist()
