"""What encoder-side pruners share: hand K of the P features of each image to the decoder, mark the rest as dropped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

# features [images, P or K, C] without CLS -> int64 [images, K]: the patch ids to keep, ascending.
Chooser = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class VisualPruner(Intervention):
    """Base of pruners that act before the decoder.

    keep: visual tokens per image that reach the decoder (a CLS feature counts inside it, where the model uses one).
    positions: `compact` renumbers the prompt after the drop, as code that concatenates features does; `preserve` keeps
        the original position ids.
    """

    keep: int
    positions: Positions = "compact"

    place = "encoder"
    selects_features = True

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise InputError(f"keep: got {self.keep!r}; give the number of visual tokens to keep, at least 1")
        if self.positions not in ("compact", "preserve"):
            raise InputError(f"positions: got {self.positions!r}; give 'compact' or 'preserve'")

    @abstractmethod
    def _chooser(self, session: Session, hooks: HookSet, trace: Trace, target: int) -> Chooser:
        """Register what the method needs inside the tower; return what names the `target` patches to keep.

        The features it is called with have P rows, or K where the method shortened the tower's sequence itself.
        """

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        adapter = session.adapter
        lead = int(adapter.cls_in_features)
        total, target = adapter.patches, self.keep - lead
        if target > total or target < 1:
            raise InputError(
                f"keep: got {self.keep}; this model has {total + lead} visual tokens per image, "
                f"give {1 + lead} <= keep <= {total + lead}"
            )
        session.positions = self.positions
        session.drops_features = target < total
        trace.visual_tokens = total + lead
        chooser = self._chooser(session, hooks, trace, target)
        kept: list[torch.Tensor] = []

        def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
            features = args[0]  # [images, lead + P or K, C]
            ids = chooser(features[:, lead:])
            kept[:] = [ids]
            trace.kept = ids.cpu()
            if features.shape[1] - lead == ids.shape[1]:
                return None
            chosen = features[:, lead:].gather(1, ids[..., None].expand(-1, -1, features.shape[-1]))
            return (torch.cat([features[:, :lead], chosen], 1), *args[1:]), kwargs

        def spread(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            ids = kept.pop()
            if ids.shape[1] == total:
                return None
            full = output.new_full((output.shape[0], lead + total, output.shape[-1]), torch.nan)
            full[:, :lead] = output[:, :lead]
            return full.scatter(1, (ids + lead)[..., None].expand(-1, -1, output.shape[-1]), output[:, lead:])

        hooks.before(adapter.projector, choose)
        hooks.after(adapter.projector, spread)
