"""FlowCut: prune visual tokens progressively inside a CLIP encoder, by the information that flows through CLS.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.visual_pruner import Chooser, VisualPruner
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.captures import ProjectionCapture
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Semantic = Literal["softmax", "cosine"]
Count = Literal["batch_max", "per_image"]


def flowcut_score(
    cls_attention: torch.Tensor,
    value: torch.Tensor,
    alive: torch.Tensor | None = None,
    semantic: Semantic = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of each patch in one layer: (attention + value similarity to CLS) times the size of its value.

    Args:
        cls_attention: the CLS row of the attention, softmaxed over all keys [B, H, 1 + P], CLS at slot 0.
        value: values, bias included [B, H, 1 + P, D].
        alive: bool [B, P], False for patches that only fill a ragged row; None for none.
        semantic: `softmax`: unscaled softmax of v_cls . v_j per head, CLS included, then averaged over heads, as the
            released code does; `cosine`: cosine similarity of the head-mean values, clamped at 0 (ours, from the
            paper's wording).

    Returns:
        (score [B, P], attention [B, P]): the score, and the head-mean attention over patches, not renormalised.
    """
    dtype = accumulation_dtype(value.dtype)
    v = value.to(dtype)
    attention = cls_attention.to(dtype).mean(1)[:, 1:]  # [B, P]
    mean_value = v.mean(1)  # [B, 1 + P, D]: heads are averaged first, then the norm is taken
    if semantic == "softmax":
        logits = (v @ v[:, :, 0, :, None]).squeeze(-1)  # [B, H, 1 + P], no 1 / sqrt(D)
        if alive is not None:
            dead = F.pad(~alive, (1, 0))[:, None]
            logits = logits.masked_fill(dead, -torch.inf)
        similarity = logits.softmax(-1).mean(1)[:, 1:]
    else:
        similarity = F.cosine_similarity(mean_value[:, :1], mean_value[:, 1:], dim=-1).clamp(min=0)
        if alive is not None:
            similarity = similarity * alive
    size = mean_value[:, 1:].abs().sum(-1)
    return (_shares(attention) + _shares(similarity)) * size, attention


def _shares(weights: torch.Tensor) -> torch.Tensor:
    """Rows scaled to sum to 1; a row that vanished (CLS relates to itself alone) stays 0 instead of turning NaN."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def running_average(average: torch.Tensor | None, score: torch.Tensor) -> torch.Tensor:
    """Half the past, half this layer; the first layer is taken whole. [B, P] each."""
    return score if average is None else 0.5 * average + 0.5 * score


def adaptive_count(attention: torch.Tensor, alive: torch.Tensor, target: int, remaining: int) -> torch.Tensor:
    """How many patches to drop now: more where CLS attention is concentrated, fewer where it is spread.

    n = round((P - T) / sqrt(R) * (1 - h^2)), half to even, with h the entropy of the attention over log P.

    Args:
        attention: head-mean CLS attention over patches [B, P]; filler patches have 0.
        alive: int64 [B], the number of patches P of each image.
        target: T, the patches to end with.
        remaining: R, layers between this one and the last pruning; at 0 everything above the target goes.

    Returns:
        int64 [B], never more than P - T.
    """
    surplus = (alive - target).clamp(min=0)
    if remaining == 0:
        return surplus
    p = _shares(attention)
    h = torch.special.entr(p).sum(-1) / alive.clamp(min=2).to(p.dtype).log()  # 0 log 0 = 0
    n = (surplus.to(p.dtype) / math.sqrt(remaining) * (1 - h * h)).round().long()
    return n.clamp(min=0).minimum(surplus)


def select(average: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `keep[b]` highest-scored patches of each image in raster order, in rows as long as the longest.

    Returns:
        (index int64 [B, K], alive bool [B, K] or None): K = max(keep); `alive` marks filler where rows are ragged.
    """
    longest = int(keep.max())
    if bool((keep == longest).all()):
        return ops.select_tokens(average, longest)[0], None
    order = average.sort(dim=-1, descending=True, stable=True).indices[:, :longest]
    index, place = order.sort(dim=-1)
    return index, place < keep[:, None]


@dataclass
class _Flow:
    """The state of one encoder pass."""

    average: torch.Tensor | None
    ids: torch.Tensor  # [B, P]
    alive: torch.Tensor | None = None  # [B, P], None where no row is ragged


@dataclass(frozen=True)
class FlowCut(VisualPruner):
    """FlowCut for LLaVA with a CLIP tower.

    "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536. In
    each encoder layer up to the one before the feature layer, patches are scored by (CLS attention + value similarity
    to CLS) x L1 norm of the value, scores are averaged over layers, and every second layer drops patches; the last
    pruning lands on `keep`. Scoring computes the CLS row alone, so layers stay on sdpa or flash attention.

    keep: visual tokens per image that reach the decoder (the paper: 192, 128 or 64 of 576).
    positions: see `VisualPruner`.
    semantic: how value similarity is measured. Default `softmax` is the released code; the paper's text is said to use
        a cosine, which `cosine` offers.
    count: `batch_max` drops the batch's largest count from every image, as the released code does, so that an image's
        kept set can depend on its batch; `per_image` gives each image the set it has when it is alone (ragged rows are
        masked inside the tower; needs eager or sdpa attention there).
    """

    semantic: Semantic = "softmax"
    count: Count = "batch_max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.semantic not in ("softmax", "cosine"):
            raise InputError(f"semantic: got {self.semantic!r}; give 'softmax' or 'cosine'")
        if self.count not in ("batch_max", "per_image"):
            raise InputError(f"count: got {self.count!r}; give 'batch_max' or 'per_image'")

    def _chooser(self, session: Session, hooks: HookSet, trace: Trace, target: int) -> Chooser:
        adapter = session.adapter
        if not adapter.has_cls:
            raise InputError(
                "FlowCut: this vision tower has no CLS token, which the method follows; use a model with a CLIP tower"
            )
        layers, last = adapter.vision_layers, adapter.feature_layer - 1
        if last < 0:
            raise InputError(
                "FlowCut: image features come from the first vision layer, so there is none before it to prune in; "
                "set model.config.vision_feature_layer to a later layer"
            )
        implementation = adapter.tower.config._attn_implementation or "eager"
        if self.count == "per_image" and implementation not in ("eager", "sdpa"):
            raise InputError(
                f"count: 'per_image' masks keys inside the tower, which {implementation} cannot; "
                "load the model with attn_implementation='sdpa' or use count='batch_max'"
            )
        state: dict[str, _Flow] = {}
        if target < adapter.patches:
            for index in range(last + 1):
                capture = ProjectionCapture(layers[index].self_attn, hooks)
                hooks.after(layers[index], self._prune(session, trace, state, capture, index, last - index, target))
                if self.count == "per_image":
                    hooks.before(layers[index + 1], _mask_filler(state))

        def choose(features: torch.Tensor) -> torch.Tensor:
            if target == adapter.patches:
                return torch.arange(target, device=features.device).expand(features.shape[0], -1)
            # Moved at once, at the end: a copy per pruning would make a GPU wait for each.
            trace.kept_by_layer = {layer: ids.cpu() for layer, ids in trace.kept_by_layer.items()}
            return state.pop("flow").ids

        return choose

    def _prune(
        self,
        session: Session,
        trace: Trace,
        state: dict[str, _Flow],
        capture: ProjectionCapture,
        index: int,
        remaining: int,
        target: int,
    ) -> Any:
        """The hook after vision layer `index`: score, average, and on every second layer shorten its output."""
        attention_module = session.adapter.vision_layers[index].self_attn
        heads = attention_module.num_heads

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output  # [B, 1 + P, C]
            q, k, v = capture.take(heads)
            batch, patches = hidden.shape[0], hidden.shape[1] - 1
            if index == 0:
                state["flow"] = _Flow(None, torch.arange(patches, device=hidden.device).expand(batch, -1))
                trace.kept_by_layer = {}
            flow = state["flow"]
            if patches <= target:
                return None
            keys = None if flow.alive is None else F.pad(flow.alive, (1, 0), value=True)
            row = ops.query_row_attention(q[:, :, :1], k, scale=q.shape[-1] ** -0.5, key_mask=keys)
            score, attention = flowcut_score(row[:, :, 0], v, flow.alive, self.semantic)
            flow.average = running_average(flow.average, score)
            if remaining % 2:
                return None
            if flow.alive is not None:
                alive, flow.average = flow.alive.sum(-1), flow.average.masked_fill(~flow.alive, -torch.inf)
            else:
                alive = torch.full((batch,), patches, device=hidden.device)
            drop = adaptive_count(attention, alive, target, remaining)
            if self.count == "batch_max":
                chosen = ops.select_tokens(flow.average, patches - int(drop.max()))[0]
            else:
                chosen, flow.alive = select(flow.average, alive - drop)
            flow.average, flow.ids = flow.average.gather(1, chosen), flow.ids.gather(1, chosen)
            trace.kept_by_layer[index] = _padded(flow.ids, flow.alive)
            patch_rows = hidden[:, 1:].gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
            short = torch.cat([hidden[:, :1], patch_rows], 1)
            return (short, *output[1:]) if isinstance(output, tuple) else short

        return hook


def _mask_filler(state: dict[str, _Flow]) -> Any:
    """A hook before a layer: keep filler patches of ragged rows out of its attention."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        flow = state.get("flow")
        if flow is None or flow.alive is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        keys = F.pad(flow.alive, (1, 0), value=True)[:, None, None]
        mask = torch.zeros(keys.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~keys, torch.finfo(hidden.dtype).min).expand(-1, 1, keys.shape[-1], -1)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _padded(ids: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    """Kept ids; filler becomes -1 at the end of its row."""
    if alive is None:
        return ids
    big = torch.iinfo(ids.dtype).max
    ordered = ids.masked_fill(~alive, big).sort(-1).values
    return ordered.masked_fill(ordered == big, -1)
