"""What pruners that act in the vision tower share: hand fewer features of each tile to the projector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention, positions_for
from vlattn.interventions.placement import Reduced, in_tile_order, newlines_to_drop, place
from vlattn.models.adapter import Adapter
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace

Reducer = Callable[[torch.Tensor], Reduced]


@dataclass(frozen=True)
class TowerPruner(Intervention):
    """Base of pruners whose choice is made by the end of the vision tower, tile by tile.

    Works where each patch becomes one visual token. Features that are only selected stay at their places, so that tiles
    are stitched and padding is cut by the model's own code; merged ones are put at the front of their image's span.
    """

    place = "encoder"
    selects_features = True

    @classmethod
    def refuses(cls, family: type[Adapter]) -> str | None:
        if not family.patchwise:
            return "it chooses among encoder patches, and here several patches make one visual token"
        return None

    @abstractmethod
    def _reducer(self, session: Session, hooks: HookSet, trace: Trace) -> Reducer | None:
        """Register what the method needs inside the tower; return what reduces the projector's input, or None where
        nothing is to be done.

        The reducer gets features [tiles, lead + P, C], lead being 1 where CLS is among them, or fewer rows where the
        method shortened the tower's sequence itself. It fills `trace` but for `trace.kept`.
        """

    def _arrange(self, tiles: list[Reduced], visual: VisualTokens, image: int) -> torch.Tensor:
        """Merged features of one image's tiles [K_image, D], in the decoder's order; by default tile after tile."""
        return in_tile_order(tiles, visual, image)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        adapter = session.adapter
        name = type(self).__name__
        session.positions = positions_for(name, getattr(self, "positions", "auto"), "compact", adapter)
        patches = adapter.patches
        trace.visual_tokens = patches + int(adapter.cls_in_features)
        reduce = self._reducer(session, hooks, trace)
        if reduce is None:
            hooks.before(adapter.projector, _trace_everything(trace, patches))
            return
        session.drops_features = True
        pending: list[Reduced] = []  # between the two hooks around the projector
        rows: list[int] = []
        merged: list[Reduced] = []  # projected, until the decoder's door

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple:
            reduced = reduce(args[0])
            lead = _lead(reduced)
            if reduced.features.shape[1] > lead + patches:
                raise InputError(
                    f"{name}: {reduced.features.shape[1]} tokens per tile were asked for, but this model has "
                    f"{lead + patches}; give a smaller budget"
                )
            pending[:] = [reduced]
            # A CLS that goes to the decoder (frames of Video-LLaVA keep it) makes the projector's input one row longer.
            given = args[0].shape[1]
            rows[:] = [given if given >= patches else patches + int(bool((reduced.ids[:, 0] == -1).all()))]
            trace.kept = reduced.ids[:, lead:].cpu()
            trace.visual_tokens = lead + patches
            return (reduced.features, *args[1:]), kwargs

        def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            reduced = pending.pop()
            projected = Reduced(output, reduced.ids, reduced.alive, reduced.selected)
            if reduced.selected:
                merged.clear()
                return spread(projected, patches)
            merged[:] = [projected]
            return output.new_full((output.shape[0], rows[0], output.shape[-1]), torch.nan)

        def choose(
            embeds: torch.Tensor, visual: VisualTokens, call: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if not adapter.patches_stay_whole(visual, call):
                raise InputError(
                    f"{name}: this model pools or shrinks the features of this input behind the projector (videos, or "
                    "images of many tiles), where dropped patches would leave holes; give single images within the "
                    "model's tile limit, or use a method that chooses at the decoder's door, such as DivPrune"
                )
            if merged and int(adapter.visual_kinds(call).unique().ge(0).sum()) > 1:
                raise InputError(
                    f"{name}: images and videos in one batch are not supported where tokens are merged; give one kind, "
                    "or use a method that only selects, such as VisPruner"
                )
            if merged:
                return place(name, embeds, visual, merged[0], self._arrange)
            return newlines_to_drop(visual), None

        hooks.before(adapter.projector, before)
        hooks.after(adapter.projector, after)
        session.choosers.append(choose)
        hooks.also(lambda: session.choosers.remove(choose))


def _lead(reduced: Reduced) -> int:
    """1 where the tiles' first feature is a CLS of the model's own."""
    return int(reduced.selected and reduced.ids.numel() > 0 and bool((reduced.ids[:, 0] == -1).all()))


def spread(reduced: Reduced, patches: int) -> torch.Tensor:
    """Selected features at their own places among all of their tile [tiles, lead + P, D], NaN in the other places."""
    features, lead = reduced.features, _lead(reduced)
    total = lead + patches
    slots = (reduced.ids + lead).clamp(min=0)  # CLS has id -1
    row = torch.arange(features.shape[0], device=features.device)[:, None].expand_as(slots)
    full = features.new_full((features.shape[0], total, features.shape[-1]), torch.nan)
    if reduced.alive is not None:  # filler stays behind
        row, slots, features = row[reduced.alive], slots[reduced.alive], features[reduced.alive]
    full[row, slots] = features
    return full


def _trace_everything(trace: Trace, patches: int) -> Any:
    """Where nothing is pruned, the trace still says that every patch was kept."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.kept = torch.arange(patches).expand(args[0].shape[0], -1)

    return note
