"""PruMerge: keep the outliers of the CLS attention, and let each absorb its neighbours in key space.

"LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_bool, require_choice, require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.placement import Reduced
from vlattn.interventions.tower_pruner import Reducer, TowerPruner
from vlattn.interventions.vision_attention import LayerWatch
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Order = Literal["official", "raster"]


def outlier_count(attention: torch.Tensor, iqr: float = 1.5) -> int:
    """How many patches of one image lie above the upper fence Q3 + iqr * (Q3 - Q1); attention [N]."""
    a = attention.to(accumulation_dtype(attention.dtype))
    low, high = a.quantile(a.new_tensor([0.25, 0.75])).unbind()  # linear interpolation
    return int((a > high + iqr * (high - low)).sum())


def adaptive_choice(attention: torch.Tensor, iqr: float = 1.5, plus: bool = False) -> torch.Tensor:
    """The patches one image keeps, as many as its attention has outliers.

    Args:
        attention: [N], CLS attention of each patch.
        iqr: see `outlier_count`. Where no patch is an outlier, the best one is kept.
        plus: append a regular grid over the ids, sparser where outliers are fewer: a third of the mean distance
            between outliers. The last patch is never a grid point, as in the released code.

    Returns:
        int64 [m], unique: by score, highest first (ties: the lower id), then the grid points that were not there yet.
    """
    total = attention.shape[0]
    count = max(1, outlier_count(attention, iqr))
    best = _by_score(attention)[:count]
    if not plus:
        return best
    step = max(1, total // count // 3)
    return _append(best, torch.arange(0, total - 1, step, device=attention.device))


def exact_choice(attention: torch.Tensor, count: int, plus: bool = False) -> torch.Tensor:
    """`count` patches of one image, ours: by score, or with `plus` a quarter by score and the rest from a uniform grid.

    Args:
        attention: [N], CLS attention of each patch.
        count: 1 <= count <= N.
        plus: of the count + 1 tokens that `merge` gives, round(1/4) are chosen by score (at least one).

    Returns:
        int64 [count], unique: by score, highest first, then the grid points ascending.
    """
    if not plus:
        return _by_score(attention)[:count]
    scored = min(count, max(1, round((count + 1) / 4)))
    order = _by_score(attention)
    free = order[scored:].sort().values
    wanted = count - scored
    points = torch.arange(wanted, device=free.device) * (len(free) - 1) // max(1, wanted - 1)  # both ends included
    return torch.cat([order[:scored], free[points]])


def merge(
    features: torch.Tensor,
    attention: torch.Tensor,
    key: torch.Tensor,
    chosen: torch.Tensor,
    neighbors: int = 32,
) -> torch.Tensor:
    """Each chosen patch plus the attention-weighted sum of its nearest patches, and one token for all the others.

    Args:
        features: [N, C] of one image.
        attention: [N], CLS attention of each patch, the weight of what is absorbed; not renormalised.
        key: [N, D]. Nearest is by cosine, among all other patches, chosen or not; ties go to the lower id.
        chosen: int64 [m], unique.
        neighbors: how many each one absorbs, N - 1 at most.

    Returns:
        [m + 1, C] in the dtype of `features`, in the order of `chosen`, the token of the rest last; [m, C] where every
        patch is chosen and there is no rest.
    """
    dtype = accumulation_dtype(features.dtype)
    total, weight = features.shape[0], attention.to(dtype)
    unit = F.normalize(key.to(accumulation_dtype(key.dtype)), dim=-1)
    cosine = unit[chosen] @ unit.T  # [m, N]
    cosine = cosine.scatter(1, chosen[:, None], -torch.inf)  # none is its own neighbour
    nearest = cosine.sort(dim=-1, descending=True, stable=True).indices[:, : min(neighbors, total - 1)]  # [m, k]
    rest = torch.ones(total, dtype=torch.bool, device=features.device)
    rest[chosen] = False
    gain = torch.zeros(len(chosen) + 1, total, dtype=dtype, device=features.device)  # [m + 1, N]
    gain[:-1].scatter_(1, nearest, weight[nearest]).scatter_(1, chosen[:, None], 1)
    gain[-1] = weight * rest
    if len(chosen) == total:
        gain = gain[:-1]
    return (gain @ features.to(dtype)).to(features.dtype)


def _by_score(attention: torch.Tensor) -> torch.Tensor:
    return attention.sort(descending=True, stable=True).indices


def _append(chosen: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return torch.cat([chosen, more[~torch.isin(more, chosen)]])


@dataclass(frozen=True)
class PruMerge(TowerPruner):
    """PruMerge and PruMerge+ for towers whose patches become one visual token each.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388. Scores and keys
    come from the tower's last layer, features from the layer that the model uses. As the released code does: one
    softmax over all heads together; what a kept patch absorbs is added, weighted by attention that is not renormalised;
    neighbours may be kept patches too. The number of tokens follows each image (ours: also within a batch). Every tile
    is reduced alone. In towers without CLS the attention each patch receives from all stands for the CLS row (ours).

    plus: PruMerge+: a regular grid of patches besides the outliers.
    keep: visual tokens per encoder image (tile), exactly; None lets the outliers decide, as the paper does. Ours: the
        best by score, with `plus` a quarter by score and a uniform grid; the token of the rest counts.
    iqr: how far above the third quartile an outlier lies, in interquartile ranges.
    neighbors: patches that each kept one absorbs.
    order: `official` by score, then the grid, then the token of the rest; `raster` sorts the patches.
    per_head: a softmax per head, averaged, instead of one at full width.
    positions: `compact` renumbers the prompt after the drop, `preserve` keeps the original position ids; `auto` is
        compact.
    """

    plus: bool = False
    keep: int | None = None
    iqr: float = 1.5
    neighbors: int = 32
    order: Order = "official"
    per_head: bool = False
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        require_bool("plus", self.plus)
        if self.keep is not None:
            require_count("keep", self.keep, least=2)
        require_number("iqr", self.iqr, 0.0)
        require_count("neighbors", self.neighbors)
        require_choice("order", self.order, ("official", "raster"))
        require_bool("per_head", self.per_head)
        require_choice("positions", self.positions, ("auto", "compact", "preserve"))

    def _reducer(self, session: Session, hooks: HookSet, trace: Trace) -> Reducer:
        adapter = session.adapter
        patches, extra = adapter.patches, 1 + int(adapter.cls_in_features)  # the token of the rest, and CLS
        if self.keep is not None and not extra < self.keep < patches + extra:
            raise InputError(
                f"keep: got {self.keep}; {extra} of them are no single patch and an image has {patches}, so give "
                f"{extra + 1} <= keep <= {patches + extra - 1}"
            )
        watch = LayerWatch(adapter, len(adapter.vision_layers) - 1, hooks)

        def reduce(features: torch.Tensor) -> Reduced:
            view = watch.view(one_head=not self.per_head)
            attention = view.salience()  # [tiles, P]
            key = view.k[:, :, view.lead :].transpose(1, 2).flatten(2)  # [tiles, P, C], heads together
            lead = features.shape[1] - patches
            rows, ids = [], []
            for tile, a, k in zip(features, attention, key, strict=True):
                chosen = self._choose(a, extra)
                merged = merge(tile[lead:], a, k, chosen, self.neighbors)
                rows.append(torch.cat([tile[:lead], merged]))
                rest = chosen.new_full((len(merged) - len(chosen),), -2)
                ids.append(torch.cat([chosen.new_full((lead,), -1), chosen, rest]))
            return _ragged(rows, ids)

        return reduce

    def _choose(self, attention: torch.Tensor, extra: int) -> torch.Tensor:
        if self.keep is None:
            chosen = adaptive_choice(attention, self.iqr, self.plus)
        else:
            chosen = exact_choice(attention, self.keep - extra, self.plus)
        return chosen.sort().values if self.order == "raster" else chosen


def _ragged(rows: list[torch.Tensor], ids: list[torch.Tensor]) -> Reduced:
    """Tiles with different numbers of tokens, filled up at the end."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    features = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    alive = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return Reduced(features, padded, None if bool(alive.all()) else alive, selected=False)
