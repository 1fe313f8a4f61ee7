"""How FlowCut scores patches in one encoder layer, and how many it drops.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from vlattn import ops
from vlattn.kernels.reference import accumulation_dtype
from vlattn.kernels.reference_flowcut_statistics import entropy, shares


def flowcut_score(
    cls_attention: torch.Tensor,
    value: torch.Tensor,
    alive: torch.Tensor | None = None,
    semantic: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of each patch in one layer: (attention + value similarity to CLS) times the size of its value.

    Args:
        cls_attention: the CLS row of the attention, softmaxed over all keys [B, H, 1 + P], CLS at slot 0.
        value: values, bias included [B, H, 1 + P, D].
        alive: bool [B, P], False for patches that only fill a ragged row; None for none.
        semantic: `softmax`: unscaled softmax of v_cls . v_j per head, CLS included, then averaged over heads, as the
            released code does; `cosine`: cosine similarity of the head-mean values, clamped at 0 (ours, from the
            paper's wording); `none`: attention alone, scaled to sum to 1 over patches (ours).

    Returns:
        (score [B, P], attention [B, P]): the score, and the head-mean attention over patches, not renormalised.
    """
    if semantic == "softmax":
        found = ops.flowcut_statistics(value, cls_attention=cls_attention, alive=alive)
        return found.score, found.attention
    dtype = accumulation_dtype(value.dtype)
    v = value.to(dtype, memory_format=torch.contiguous_format)
    attention = cls_attention.to(dtype).mean(1)[:, 1:]  # [B, P]
    mean_value = v.mean(1)  # [B, 1 + P, D]: heads are averaged first, then the norm is taken
    size = mean_value[:, 1:].abs().sum(-1)
    if semantic == "none":
        return shares(attention) * size, attention
    similarity = F.cosine_similarity(mean_value[:, :1], mean_value[:, 1:], dim=-1).clamp(min=0)
    if alive is not None:
        similarity = similarity * alive
    return (shares(attention) + shares(similarity)) * size, attention


def proxy_score(
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    alive: torch.Tensor | None = None,
    semantic: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for encoders without CLS, where the mean of all queries takes its place.

    Args:
        q, k, value: [B, H, P, D], positions turned in where the encoder has rotary ones.
        scale: factor on q k^T, D ** -0.5.
        alive: bool [B, P], False for patches that only fill a ragged row; None for none.
        semantic: `none`, as the released code for Qwen2-VL does: attention times size, nothing normalised; `softmax`
            and `cosine` add the similarity to the mean value (ours), both parts normalised as in `flowcut_score`.

    Returns:
        (score [B, P], attention [B, P]): the attention sums to 1 over the patches that are alive.
    """
    dtype = accumulation_dtype(value.dtype)
    weight = torch.ones_like(q[:, 0, :, 0], dtype=dtype) if alive is None else alive.to(dtype)  # [B, P]
    count = weight.sum(-1)

    def mean(x: torch.Tensor) -> torch.Tensor:  # over the patches that are alive
        return (x.to(dtype) * weight[:, None, :, None]).sum(2, keepdim=True) / count[:, None, None, None]

    attention = ops.query_row_attention(mean(q), k.to(dtype), scale=scale, key_mask=alive)[:, :, 0].mean(1)
    v = value.to(dtype)
    size = v.mean(1).abs().sum(-1)
    if semantic == "none":
        return attention * size, attention
    proxy = mean(v)  # [B, H, 1, D]
    if semantic == "softmax":
        similarity = ops.query_row_attention(proxy, v, scale=1.0, key_mask=alive)[:, :, 0].mean(1)
    else:
        similarity = F.cosine_similarity(proxy.mean(1), v.mean(1), dim=-1).clamp(min=0)
        if alive is not None:
            similarity = similarity * alive
    return (shares(attention) + shares(similarity)) * size, attention


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
    dtype = attention.dtype
    h = entropy(attention) / alive.clamp(min=2).to(dtype).log()
    n = (surplus.to(dtype) / math.sqrt(remaining) * (1 - h * h)).round().long()
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
