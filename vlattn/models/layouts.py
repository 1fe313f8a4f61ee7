"""Bringing the layouts of images and videos into the order of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from vlattn.errors import InputError
from vlattn.runtime.tokens import ImageLayout, VisualTokens


@dataclass(frozen=True)
class MixedLayout(ImageLayout):
    """A layout whose last `unnamed` encoder images are named by no token, their patches being mixed."""

    unnamed: int = 0


def place_layouts(kinds: torch.Tensor, layouts: Sequence[Sequence[ImageLayout]]) -> VisualTokens:
    """The visual tokens of prompts whose images and videos have the given layouts.

    Args:
        kinds: int64 [B, T], which kind of placeholder a position holds, -1 for text.
        layouts: per kind, the layouts of the batch in prompt order. Where beams or several return sequences repeat each
            prompt while its features are told once, the layouts are repeated likewise.
    """
    times = _repeats(kinds, layouts)
    queues = [iter(of_kind) for of_kind in layouts]
    order: list[ImageLayout] = []
    for row in kinds[::times].tolist():
        order += _row_order([kind for kind in row if kind >= 0], queues) * times
    left = sum(len(list(queue)) for queue in queues)
    if left:
        raise InputError(
            f"input_ids: {left} images or videos have no placeholders in the prompts; "
            "prepare the prompt and its images together with this model's own processor"
        )
    visual = VisualTokens.from_layouts(kinds >= 0, order)
    unnamed = torch.tensor([0, *(layout.unnamed if isinstance(layout, MixedLayout) else 0 for layout in order)])
    if not bool(unnamed.any()):
        return visual
    before = unnamed.cumsum(0).to(kinds.device)[visual.image.clamp(min=0)]
    return replace(visual, tile=torch.where(visual.tile >= 0, visual.tile + before, -1))


def run_lengths(kinds: torch.Tensor) -> list[int]:
    """How long each run of placeholders of `kinds` [B, T] is, prompt by prompt."""
    visual = torch.nn.functional.pad((kinds >= 0).int(), (1, 1))  # a run ends with its row
    steps = visual.diff(dim=1)
    return ((steps < 0).nonzero()[:, 1] - (steps > 0).nonzero()[:, 1]).tolist()


def _repeats(kinds: torch.Tensor, layouts: Sequence[Sequence[ImageLayout]]) -> int:
    features = sum(len(layout) for of_kind in layouts for layout in of_kind)
    total = int((kinds >= 0).sum())
    times = total // features if features else 1
    if times > 1 and times * features == total and kinds.shape[0] % times == 0:
        groups = kinds.reshape(-1, times, kinds.shape[1])
        if bool((groups == groups[:, :1]).all()):
            return times
    return 1


def _row_order(places: list[int], queues: Sequence[Iterator[ImageLayout]]) -> list[ImageLayout]:
    order: list[ImageLayout] = []
    at = 0
    while at < len(places):
        kind = places[at]
        layout = next(queues[kind], None)
        if layout is None or places[at : at + len(layout)] != [kind] * len(layout):
            raise InputError(
                f"input_ids: image or video {len(order)} of a prompt has "
                f"{'no' if layout is None else len(layout)} features, which its placeholders do not match; "
                "prepare the prompt and its images together with this model's own processor"
            )
        order.append(layout)
        at += len(layout)
    return order
