"""What methods share that keep some patches of each tile as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlattn.interventions.placement import Reduced
from vlattn.interventions.tower_pruner import Reducer, TowerPruner
from vlattn.interventions.visual_pruner import VisualPruner
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

# patch features [tiles, P, C] -> int64 [tiles, K]: the patches to keep, ascending.
PatchChooser = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TowerSelector(VisualPruner, TowerPruner):
    """Base of methods that keep `keep` patches of every tile, by what they see in the tower."""

    @abstractmethod
    def _watch(self, session: Session, hooks: HookSet, target: int) -> PatchChooser:
        """Check the settings against the model, register what has to be seen; return what names `target` patches."""

    def _reducer(self, session: Session, hooks: HookSet, trace: Trace) -> Reducer | None:
        adapter = session.adapter
        self._check_keep(adapter, tiles=True)
        target, patches = self.keep - int(adapter.cls_in_features), adapter.patches
        choose = self._watch(session, hooks, target)
        if target == patches:
            return None

        def reduce(features: torch.Tensor) -> Reduced:
            lead = features.shape[1] - patches  # 1 where CLS is handed over
            ids = choose(features[:, lead:])  # [tiles, K]
            slots = torch.cat([ids.new_zeros(len(ids), lead), ids + lead], 1)  # [tiles, lead + K]
            kept = features.gather(1, slots[..., None].expand(-1, -1, features.shape[-1]))
            return Reduced(kept, slots - lead)

        return reduce
