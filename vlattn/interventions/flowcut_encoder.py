"""FlowCut inside a tower whose images are rows of one length: CLIP, whose CLS it follows, and SigLIP, which has none.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlattn import ops
from vlattn.interventions.flowcut_score import adaptive_count, flowcut_score, proxy_score, running_average, select
from vlattn.runtime.captures import ProjectionCapture
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.trace import Trace


@dataclass
class Flow:
    """The state of one encoder pass.

    average: running average of the scores [B, P]; None before the first layer.
    ids: int64 [B, P], the patches that are left.
    alive: bool [B, P], False for filler; None where no row is ragged.
    """

    average: torch.Tensor | None
    ids: torch.Tensor
    alive: torch.Tensor | None = None


class EncoderFlow:
    """Hooks on the layers of one tower that shorten its sequence to `target` patches.

    last: index of the layer after which the last pruning happens, one before the feature layer.
    lead: 1 where slot 0 is CLS, else 0.
    semantic: "softmax", "cosine" or "none".
    per_image: whether each image has its own count, instead of the batch's largest drop.
    """

    def __init__(
        self, layers: Sequence[Any], last: int, lead: int, target: int, semantic: str, per_image: bool, trace: Trace
    ) -> None:
        self.layers, self.last, self.lead, self.target = layers, last, lead, target
        self.semantic, self.per_image, self.trace = semantic, per_image, trace
        self.flow: Flow | None = None

    def attach(self, hooks: HookSet) -> None:
        for index in range(self.last + 1):
            capture = ProjectionCapture(self.layers[index].self_attn, hooks)
            hooks.after(self.layers[index], self._after(index, capture))
            if self.per_image:
                hooks.before(self.layers[index + 1], self._mask_filler)

    def take(self) -> Flow:
        """What is left after the pass, and forget it."""
        flow, self.flow = self.flow, None
        assert flow is not None
        # Moved at once, at the end: a copy per pruning would make a GPU wait for each.
        self.trace.kept_by_layer = {layer: ids.cpu() for layer, ids in self.trace.kept_by_layer.items()}
        return flow

    def _after(self, index: int, capture: ProjectionCapture) -> Any:
        heads = self.layers[index].self_attn.num_heads

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output  # [B, lead + P, C]
            q, k, v = capture.take(heads)
            patches = hidden.shape[1] - self.lead
            if index == 0:
                ids = torch.arange(patches, device=hidden.device).expand(hidden.shape[0], -1)
                self.flow, self.trace.kept_by_layer = Flow(None, ids), {}
            if patches <= self.target or self.flow is None:
                return None
            score, attention = self._score(q, k, v, self.flow.alive)
            self.flow.average = running_average(self.flow.average, score)
            remaining = self.last - index
            if remaining % 2:
                return None
            chosen = self._prune(self.flow, attention, remaining)
            self.trace.kept_by_layer[index] = padded(self.flow.ids, self.flow.alive)
            if chosen.shape[1] == patches:
                return None  # all of them, in their order
            rows = hidden[:, self.lead :].gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
            short = torch.cat([hidden[:, : self.lead], rows], 1)
            return (short, *output[1:]) if isinstance(output, tuple) else short

        return hook

    def _score(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alive: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = q.shape[-1] ** -0.5
        if not self.lead:
            return proxy_score(q, k, v, scale, alive, self.semantic)
        if self.semantic == "softmax":  # the row of CLS and what values say in one pass over keys and values
            found = ops.flowcut_statistics(v, cls_query=q[:, :, 0], k=k, scale=scale, alive=alive)
            return found.score, found.attention
        keys = None if alive is None else F.pad(alive, (1, 0), value=True)
        row = ops.query_row_attention(q[:, :, :1], k, scale=scale, key_mask=keys)
        return flowcut_score(row[:, :, 0], v, alive, self.semantic)

    def _prune(self, flow: Flow, attention: torch.Tensor, remaining: int) -> torch.Tensor:
        """Choose what stays, int64 [B, K], and shorten the state accordingly."""
        assert flow.average is not None
        if flow.alive is None:
            alive = torch.full((flow.ids.shape[0],), flow.ids.shape[1], device=flow.ids.device)
        else:
            alive, flow.average = flow.alive.sum(-1), flow.average.masked_fill(~flow.alive, -torch.inf)
        drop = adaptive_count(attention, alive, self.target, remaining)
        keep = alive - (drop if self.per_image else drop.max())
        chosen, flow.alive = select(flow.average, keep)
        flow.average, flow.ids = flow.average.gather(1, chosen), flow.ids.gather(1, chosen)
        return chosen

    def _mask_filler(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before a layer: keep filler patches of ragged rows out of its attention."""
        if self.flow is None or self.flow.alive is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        keys = F.pad(self.flow.alive, (self.lead, 0), value=True)[:, None, None]
        mask = torch.zeros(keys.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~keys, torch.finfo(hidden.dtype).min).expand(-1, 1, keys.shape[-1], -1)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}


def padded(ids: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    """Kept ids; filler becomes -1 at the end of its row."""
    if alive is None:
        return ids
    big = torch.iinfo(ids.dtype).max
    ordered = ids.masked_fill(~alive, big).sort(-1).values
    return ordered.masked_fill(ordered == big, -1)
