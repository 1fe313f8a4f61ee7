"""HiPrune: keep patches that a middle encoder layer attends to, their neighbours, and those that a deep layer does.

"HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", arXiv 2508.00553.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlattn.checks import require_bool, require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.merged_cells import ImageCells, choose_cells
from vlattn.interventions.tower_selector import PatchChooser, TowerSelector
from vlattn.interventions.vision_attention import LayerWatch
from vlattn.models.adapter import Adapter
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


def neighborhood(anchors: torch.Tensor, grid: tuple[int, int], wrap: bool = True) -> torch.Tensor:
    """The patches left, right, above and below of `anchors`, themselves not counted.

    Args:
        anchors: bool [B, N], row-major over the grid.
        grid: rows and columns, N = rows * columns.
        wrap: as the released code: ids -1, +1, -columns, +columns, clamped to 0..N-1, so that a row's end touches the
            next row's start, and the first and last row reach patch 0 and patch N-1. False: true neighbours only.

    Returns:
        bool [B, N].
    """
    rows, columns = grid
    total = rows * columns
    found = torch.zeros_like(anchors)
    if wrap:
        image, patch = anchors.nonzero(as_tuple=True)
        for shift in (-1, 1, -columns, columns):
            found[image, (patch + shift).clamp(0, total - 1)] = True
    else:
        square, near = anchors.view(-1, rows, columns), found.view(-1, rows, columns)
        near[:, :, :-1] |= square[:, :, 1:]
        near[:, :, 1:] |= square[:, :, :-1]
        near[:, :-1] |= square[:, 1:]
        near[:, 1:] |= square[:, :-1]
    return found & ~anchors


def hiprune_choice(
    middle: torch.Tensor, deep: torch.Tensor, keep: int, grid: tuple[int, int], alpha: float = 0.1, wrap: bool = True
) -> torch.Tensor:
    """Anchors by the middle layer, their neighbours as buffers, and registers by the deep layer to fill up.

    Args:
        middle: attention each patch receives in the middle layer [B, N]; ties go to the lower id.
        deep: the same in the deep layer [B, N].
        keep: T, 1 <= T <= N.
        grid: rows and columns of the patches.
        alpha: share of T for anchors and buffers: round(T * alpha / 5) anchors, half to even, with four buffers each.
            Where they would be more than T, which the released code does not guard against, the buffers that the deep
            layer attends to most stay.
        wrap: see `neighborhood`.

    Returns:
        int64 [B, T], ascending.
    """
    best = middle.sort(dim=-1, descending=True, stable=True).indices[:, : round(keep * alpha / 5)]
    anchors = torch.zeros_like(middle, dtype=torch.bool).scatter(1, best, True)
    buffers = neighborhood(anchors, grid, wrap)
    by_deep = deep.sort(dim=-1, descending=True, stable=True).indices  # [B, N]
    # Anchors before buffers before the rest, each in the order of the deep layer.
    tier = torch.where(anchors, 0, torch.where(buffers, 1, 2)).gather(1, by_deep)
    return by_deep.gather(1, tier.argsort(dim=-1, stable=True))[:, :keep].sort(-1).values


@dataclass(frozen=True)
class HiPrune(TowerSelector):
    """HiPrune, by the attention that patches receive; no CLS needed.

    "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", arXiv
    2508.00553. Anchors and buffers come from a middle layer of the tower, registers from the layer whose output is the
    image feature. On the Qwen-VL families the registers come from the last layer and the choice is made among merged
    cells of images; one with no more than `keep` of them stays whole. Column sums are made in blocks of rows, never as
    a whole matrix.

    keep: visual tokens per encoder image (tile) that reach the decoder; a CLS feature counts inside it.
    positions: see `VisualPruner`.
    alpha: share of the kept patches that are anchors and their buffers, one anchor for every five.
    object_layer: the middle layer, counted from 1 (the paper: 9 of CLIP's 24, 16 of Qwen2.5-VL's 32).
    wrap: let the end of a row neighbour the start of the next, and the border the first or last patch, as the released
        code does; False is recommended.
    """

    keep: int = 192
    alpha: float = 0.1
    object_layer: int = 9
    wrap: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha, 0.0, 1.0)
        require_count("object_layer", self.object_layer)
        require_bool("wrap", self.wrap)

    @classmethod
    def refuses(cls, family: type[Adapter]) -> str | None:
        return None if issubclass(family, Qwen2VLAdapter) else super().refuses(family)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        if not isinstance(session.adapter, Qwen2VLAdapter):
            super()._attach(session, hooks, trace)
            return
        layers = [self._middle(session.adapter), session.adapter.feature_layer]
        choose_cells("HiPrune", session, hooks, trace, self.positions, layers, self._of_image)

    def _middle(self, adapter: Adapter) -> int:
        """0-based index of the middle layer."""
        if self.object_layer > adapter.feature_layer + 1:
            raise InputError(
                f"object_layer: got {self.object_layer}; the image feature comes from layer "
                f"{adapter.feature_layer + 1}, counted from 1, so give 1 <= object_layer <= {adapter.feature_layer + 1}"
            )
        return self.object_layer - 1

    def _watch(self, session: Session, hooks: HookSet, target: int) -> PatchChooser:
        adapter = session.adapter
        middle = LayerWatch(adapter, self._middle(adapter), hooks)
        deep = LayerWatch(adapter, adapter.feature_layer, hooks)
        return lambda features: hiprune_choice(
            middle.view().received(), deep.view().received(), target, adapter.grid, self.alpha, self.wrap
        )

    def _of_image(self, image: ImageCells) -> tuple[torch.Tensor, None]:
        frames, rows, columns = image.grid
        if frames > 1:
            raise InputError(
                "pixel_values_videos: HiPrune looks for neighbours in the grid of one image, and videos have several; "
                "give images, or use a method that knows no grid, such as VisionZip"
            )
        middle, deep = (received[None] for received in image.received)
        keep = min(self.keep, rows * columns)
        return hiprune_choice(middle, deep, keep, (rows, columns), self.alpha, self.wrap)[0], None
