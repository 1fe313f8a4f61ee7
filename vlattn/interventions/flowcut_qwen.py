"""FlowCut inside Qwen2-VL's and Qwen2.5-VL's tower, where patches of all images form one packed sequence.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.base import positions_for
from vlattn.interventions.flowcut_score import proxy_score, running_average
from vlattn.interventions.placement import Reduced, in_tile_order, place
from vlattn.ops import select_tokens
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace


@dataclass
class _Pass:
    """One run of the tower.

    full: patches of each image at the start.
    ids: int64 [n_i] for each image: places of its patches that are left, in the sequence as the blocks see it.
    average: running average of each image's scores.
    pruned: whether any patch may be gone.
    made: what the blocks get instead of tables and bounds of the full sequence, by the identity of those.
    """

    full: list[int]
    ids: list[torch.Tensor]
    average: list[torch.Tensor | None]
    pruned: bool = False
    made: dict[int, Any] = field(default_factory=dict)

    @property
    def index(self) -> torch.Tensor:
        """Rows of the full sequence that are left."""
        starts = [sum(self.full[:i]) for i in range(len(self.full))]
        return torch.cat([ids + start for ids, start in zip(self.ids, starts, strict=True)])


def proxy_count(attention: torch.Tensor, target: int, remaining: int) -> int:
    """How many of N patches to drop now, as the released code for Qwen2-VL counts: the entropy has an epsilon.

    attention: [N], sums to 1. target, remaining: as in `flowcut_score.adaptive_count`.
    """
    surplus = max(attention.shape[0] - target, 0)
    if remaining == 0:
        return surplus
    attention = attention.detach()
    h = float(-(attention * (attention + 1e-7).log()).sum()) / math.log(max(attention.shape[0], 2))
    return min(max(round(surplus / math.sqrt(remaining) * (1 - h * h)), 0), surplus)


class QwenFlow:
    """FlowCut's encoder stage for one tower; see `FlowCut` for the settings."""

    def __init__(self, keep: int, semantic: str, positions: Positions, group_aligned: bool) -> None:
        self.keep, self.positions, self.group_aligned = keep, positions, group_aligned
        self.semantic = "none" if semantic == "auto" else semantic

    def attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        adapter = session.adapter
        session.positions = positions_for("FlowCut", self.positions, "preserve", adapter)
        self.adapter, self.trace = adapter, trace
        self.merge = adapter.config.vision_config.spatial_merge_size**2
        self.now: _Pass | None = None
        self.ran = False
        self.merged: list[Reduced] = []
        hooks.before(adapter.tower, self._begin)
        layers: Sequence[Any] = adapter.vision_layers
        for index, layer in enumerate(layers):
            if index:
                hooks.before(layer, self._shorten)
            qkv: dict[str, torch.Tensor] = {}
            hooks.before(layer, self._note(qkv))
            hooks.after(adapter.vision_attention(index).qkv, self._keep(qkv))
            hooks.after(layer, self._prune(index, len(layers) - 1 - index, qkv))
        hooks.after(adapter.projector, self._spread)
        session.choosers.append(self._choose)
        hooks.also(lambda: session.choosers.remove(self._choose))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = as_keywords(module, args, kwargs)["grid_thw"]
        if bool((grid[:, 0] != 1).any()):
            raise InputError(
                "pixel_values_videos: FlowCut does not prune videos on this family; give images, or use a method that "
                "chooses at the decoder's door"
            )
        full = grid.prod(-1).tolist()
        ids = [torch.arange(n, device=grid.device) for n in full]
        self.ran = True
        self.now, self.trace.kept_by_layer = _Pass(full, ids, [None] * len(full)), {}

    def _keep(self, qkv: dict[str, Any]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            qkv["qkv"] = output

        return hook

    def _note(self, qkv: dict[str, Any]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            qkv["tables"] = as_keywords(module, args, kwargs)["position_embeddings"]

        return hook

    def _shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before a block: rotary tables and segment bounds of the patches that are left."""
        now = self.now
        if now is None or not now.pruned:
            return None
        call = dict(as_keywords(module, args, kwargs))
        for name in ("position_embeddings", "cu_seqlens"):
            given = call[name]
            if id(given) not in now.made:
                now.made[id(given)] = (
                    tuple(table[now.index] for table in given) if name == "position_embeddings" else self._bounds(given)
                )
            call[name] = now.made[id(given)]
        if call.get("max_seqlen") is not None:
            call["max_seqlen"] = call["cu_seqlens"].diff().max()
        return (), call

    def _bounds(self, bounds: torch.Tensor) -> torch.Tensor:
        """cu_seqlens of what is left: images or windows that hold nothing any more vanish."""
        assert self.now is not None
        left = torch.searchsorted(self.now.index.contiguous(), bounds.to(self.now.index.dtype))
        return left.unique_consecutive().to(bounds.dtype)

    def _prune(self, index: int, remaining: int, qkv: dict[str, Any]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            now = self.now
            packed, tables = qkv.pop("qkv"), qkv.pop("tables")
            if now is None:
                return None
            chosen = [torch.arange(len(ids), device=ids.device) for ids in now.ids]
            targets = [min(8 * self.keep, n) for n in now.full]
            if all(len(ids) <= target for ids, target in zip(now.ids, targets, strict=True)):
                return None
            q, k, v = self._states(index, packed, tables)
            start = 0
            for image, ids in enumerate(now.ids):
                stop = start + len(ids)
                if len(ids) > targets[image]:
                    part = (x[None, :, start:stop] for x in (q, k, v))
                    chosen[image] = self._choose_patches(image, part, targets[image], remaining)
                start = stop
            if remaining % 2:
                return None
            rows = torch.cat([c + sum(map(len, now.ids[:i])) for i, c in enumerate(chosen)])
            now.ids = [ids[c] for ids, c in zip(now.ids, chosen, strict=True)]
            now.pruned, now.made = True, {}
            self.trace.kept_by_layer[index] = _rows(now.ids).cpu()
            hidden = output[0] if isinstance(output, tuple) else output
            return (hidden[rows], *output[1:]) if isinstance(output, tuple) else hidden[rows]

        return hook

    def _states(self, index: int, packed: torch.Tensor, tables: Any) -> tuple[torch.Tensor, ...]:
        """q, k, v [H, N, D] of one block, positions turned in."""
        attention = self.adapter.vision_attention(index)
        q, k, v = packed.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)  # [N, H, D] each
        home = sys.modules[type(attention).__module__]
        q, k = home.apply_rotary_pos_emb_vision(q, k, *tables)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def _choose_patches(self, image: int, states: Any, target: int, remaining: int) -> torch.Tensor:
        """Score one image's patches, and on every second block the ones that stay, int64, ascending."""
        assert self.now is not None
        q, k, v = states
        score, attention = proxy_score(q, k, v, q.shape[-1] ** -0.5, None, self.semantic)
        unit = self.merge if self.group_aligned else 1
        score, attention = (x[0].unflatten(0, (-1, unit)).sum(-1)[None] for x in (score, attention))
        average = running_average(self.now.average[image], score)
        units = average.shape[1]
        everything = torch.arange(units * unit, device=average.device)
        if remaining % 2:
            self.now.average[image] = average
            return everything
        keep = units - proxy_count(attention[0], target // unit, remaining)
        chosen, self.now.average[image] = select_tokens(average, keep, average)
        return (chosen[0][:, None] * unit + torch.arange(unit, device=chosen.device)).flatten()

    def _spread(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """After the merger: its tokens at their cells, or kept for the decoder's door; NaN for what is gone."""
        now, self.now = self.now, None
        if now is not None:
            self.trace.kept = _rows(now.ids).cpu()
        if now is None or not now.pruned:
            self.merged.clear()
            return None
        cells = [n // self.merge for n in now.full]
        full = output.new_full((sum(cells), output.shape[-1]), torch.nan)
        if self.group_aligned:
            full[now.index[:: self.merge] // self.merge] = output
            self.merged.clear()
            return full
        parts = output.split([len(ids) // self.merge for ids in now.ids])
        longest = max(map(len, parts))
        features = output.new_zeros(len(parts), longest, output.shape[-1])
        alive = torch.zeros(len(parts), longest, dtype=torch.bool, device=output.device)
        for i, part in enumerate(parts):
            features[i, : len(part)], alive[i, : len(part)] = part, True
            if len(part) == cells[i]:  # untouched: at its own places, which Qwen2.5-VL finds by its order of windows
                full[sum(cells[:i]) : sum(cells[: i + 1])] = part
        self.merged[:] = [Reduced(features, torch.where(alive, -2, -1), alive, False)]
        return full

    def _choose(
        self, embeds: torch.Tensor, visual: VisualTokens, call: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.ran:
            raise InputError(
                "pixel_values: the image features were computed outside this context, so they are not pruned; "
                "give pixel_values (not precomputed features) inside the context"
            )
        self.ran = False
        self.trace.visual_tokens = int(visual.image[visual.mask].bincount().max())
        if not self.merged:
            return torch.zeros_like(visual.mask), None

        def arrange(tiles: list[Reduced], visual: VisualTokens, image: int) -> torch.Tensor:
            found, given = in_tile_order(tiles, visual, image), embeds[visual.image == image]
            return given if len(given) == len(found) else found

        return place("FlowCut", embeds, visual, self.merged[0], arrange)


def _rows(ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ragged ids as one tensor, -1 at the end of shorter rows."""
    return nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=-1)
