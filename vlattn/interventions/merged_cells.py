"""Choosing among merged cells: towers of the Qwen-VL kind pack the patches of all images and merge 2x2 into a token.

Attention is read inside the tower, patch by patch; the choice falls at the decoder's door, where a cell is one token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.base import positions_for
from vlattn.interventions.prompt_pruner import kept_patches
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class ImageCells:
    """One image (or video) of a prompt: its n cells in the decoder's order.

    features: [n, D], as the decoder would get them.
    received: for each watched layer [n], attention the cell's patches receive, mean over heads, queries and patches.
    key: for each watched layer [n, d], mean over heads and patches, as the projection gave them, not rotated.
    grid: frames, rows and columns of cells.
    """

    features: torch.Tensor
    received: list[torch.Tensor]
    key: list[torch.Tensor]
    grid: tuple[int, int, int]


# An image's cells -> (int64 [k], the cells that stay; their features [k, D] where they change, else None).
CellChooser = Callable[[ImageCells], tuple[torch.Tensor, torch.Tensor | None]]


class _Layer:
    """Attention received and keys [cells, ...] in one layer's last pass, in the tower's own order of cells."""

    def __init__(self, attention: Any, merge: int, hooks: HookSet) -> None:
        self.attention, self.merge = attention, merge
        self.received: torch.Tensor | None = None
        self.key: torch.Tensor | None = None
        self._call: dict[str, Any] = {}
        hooks.before(attention, self._note)
        hooks.after(attention.qkv, self._look)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = as_keywords(module, args, kwargs)

    def _look(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        q, k, _ = output.unflatten(-1, (3, self.attention.num_heads, -1)).unbind(1)  # [N, H, D] each
        cells = k.mean(1).unflatten(0, (-1, self.merge))  # [cells, 4, D]
        self.key = cells.mean(1)
        home = sys.modules[type(self.attention).__module__]
        q, k = home.apply_rotary_pos_emb_vision(q, k, *self._call["position_embeddings"])
        q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]  # [1, H, N, D]
        bounds = self._call["cu_seqlens"].tolist()
        self._call = {}
        parts = [
            ops.received_attention(q[:, :, a:b], k[:, :, a:b], scale=q.shape[-1] ** -0.5).mean(1)[0] / (b - a)
            for a, b in pairwise(bounds)
            if b > a
        ]
        self.received = torch.cat(parts).unflatten(0, (-1, self.merge)).mean(-1)  # [cells]


class CellWatch:
    """Looks at some layers of a tower whenever it runs, and tells at the door which cells belong to which image."""

    def __init__(self, session: Session, layers: Sequence[int], hooks: HookSet) -> None:
        adapter = session.adapter
        self._vision = adapter.config.vision_config
        self._merge = self._vision.spatial_merge_size
        self._layers = [_Layer(adapter.vision_attention(layer), self._merge**2, hooks) for layer in layers]
        self._tower = adapter.tower
        self._grids: list[list[int]] = []
        self._order: torch.Tensor | None = None
        hooks.before(self._tower, self._begin)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = as_keywords(module, args, kwargs)
        self._grids, self._order = call["grid_thw"].tolist(), None
        if hasattr(self._vision, "window_size"):  # cells stand window by window inside the tower
            index = call.get("window_index")
            if index is None:
                home = sys.modules[type(module).__module__]
                index, _ = home.get_vision_window_index(
                    call["grid_thw"],
                    spatial_merge_size=self._merge,
                    window_size=self._vision.window_size,
                    patch_size=self._vision.patch_size,
                )
            self._order = index.argsort()

    def images(self, embeds: torch.Tensor, visual: VisualTokens) -> list[ImageCells]:
        """The images of the prompts, in their order."""
        grids = [(t, h // self._merge, w // self._merge) for t, h, w in self._grids]
        self._grids = []
        counts = [t * h * w for t, h, w in grids]
        wanted = visual.image[visual.mask].bincount(minlength=visual.images).tolist()
        source = _source_of_images(visual, len(grids))
        if source is None or [counts[i] for i in source] != wanted:
            raise InputError(
                f"pixel_values: the prompts have images of {wanted} visual tokens, but features of {counts} went "
                "through the vision tower in this context; give images or videos, not both, and pixels instead of "
                "features computed before"
            )
        received, key = [], []
        for layer in self._layers:
            assert layer.received is not None
            assert layer.key is not None
            order = slice(None) if self._order is None else self._order.to(layer.key.device)
            received.append(layer.received[order].split(counts))
            key.append(layer.key[order].split(counts))
            layer.received = layer.key = None
        return [
            ImageCells(embeds[visual.image == i], [r[s] for r in received], [k[s] for k in key], grids[s])
            for i, s in enumerate(source)
        ]


def _source_of_images(visual: VisualTokens, computed: int) -> list[int] | None:
    """For each image of the prompts, which of the `computed` ones it is; None where that does not work out.

    Features may be computed before generation repeats every prompt for its beams: then there are fewer of them.
    """
    total, batch = visual.images, visual.mask.shape[0]
    if not computed or total % computed or batch % (total // computed):
        return None
    times = total // computed
    source: list[int] = []
    for sample in range(0, batch, times):
        count = int(visual.image[sample][visual.mask[sample]].unique().numel())
        first = source[-1] + 1 if source else 0
        source += list(range(first, first + count)) * times
    return source if len(source) == total else None


def choose_cells(
    name: str,
    session: Session,
    hooks: HookSet,
    trace: Trace,
    positions: Positions,
    layers: Sequence[int],
    choose: CellChooser,
) -> None:
    """Attach a method that chooses cells of every image by what `layers` of the tower attend to.

    name: of the method, for errors; positions: its setting; choose: its choice for one image.
    """
    session.positions = positions_for(name, positions, "preserve", session.adapter)
    watch = CellWatch(session, layers, hooks)

    def at_door(
        embeds: torch.Tensor, visual: VisualTokens, call: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        stays, new = torch.zeros_like(visual.mask), embeds
        for image, cells in enumerate(watch.images(embeds, visual)):
            batch, position = (visual.image == image).nonzero(as_tuple=True)
            ids, features = choose(cells)
            stays[batch[ids], position[ids]] = True
            if features is not None:
                new = new.clone() if new is embeds else new
                new[batch[ids], position[ids]] = features.to(embeds.dtype)
        trace.kept = kept_patches(visual, stays)
        trace.visual_tokens = int(visual.image[visual.mask].bincount().max())
        return visual.mask & ~stays, None if new is embeds else new

    session.choosers.append(at_door)
    hooks.also(lambda: session.choosers.remove(at_door))
