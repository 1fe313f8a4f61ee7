"""ToMe's parts: how many tokens each layer merges, which ones, and what becomes of them.

"Token Merging: Your ViT But Faster", arXiv 2210.09461.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.kernels.reference import accumulation_dtype

Rate = int | tuple[int, float] | list[int]


def merge_schedule(rate: Rate, layers: int) -> list[int]:
    """How many tokens each of `layers` layers merges away, as the paper's code reads `r`.

    rate: an int for the same number everywhere; a pair (r, inflect) for a line from r * (1 - inflect), rounded down,
        with mean r: (r, -1) falls from 2 r to 0, (r, 1) rises; a list gives the numbers, zeros follow where it ends.
    """
    if isinstance(rate, list):
        return [*rate[:layers], *[0] * (layers - len(rate))]
    if isinstance(rate, int):
        return [rate] * layers
    mean, inflect = rate
    first = int(mean * (1 - inflect))
    last, steps = 2 * mean - first, max(1, layers - 1)
    return [(first * (steps - i) + last * i) // steps for i in range(layers)]


def exact_schedule(patches: int, keep: int, layers: int, lead: int = 0) -> list[int]:
    """An even schedule that leaves exactly `keep` tokens: earlier layers merge one more where it does not divide.

    A layer can merge at most half of its patches, so small numbers are out of reach of few layers; where late layers
    could not keep up, early ones merge more.

    lead: tokens that never merge and count in `keep`.

    Raises:
        InputError: `keep` cannot be reached; the message names the smallest that can.
    """
    least = _halved(patches, layers) + lead
    if not least <= keep <= patches + lead:
        raise InputError(
            f"keep: got {keep}; {layers} layers that merge at most half of their patches take {patches + lead} visual "
            f"tokens to {least} or more, so give {least} <= keep <= {patches + lead}"
        )
    keep, schedule, now = keep - lead, [], patches
    for layer in range(layers):
        left = layers - layer
        r = -((keep - now) // left)  # rounded up
        while _halved(now - r, left - 1) > keep:
            r += 1
        schedule.append(r)
        now -= r
    return schedule


def _halved(patches: int, times: int) -> int:
    for _ in range(times):
        patches -= patches // 2
    return patches


class Matching(NamedTuple):
    """Who joins whom in one layer; positions in the layer's sequence, int64.

    unmerged: [B, ceil(t / 2) - r], even positions that stay.
    source: [B, r], even positions that leave.
    destination: [B, r], the odd position each source joins; several may join one.
    """

    unmerged: torch.Tensor
    source: torch.Tensor
    destination: torch.Tensor


def match(metric: torch.Tensor, r: int, cls: bool = True) -> Matching:
    """Find the r even positions whose most similar odd position is most similar (cosine).

    Args:
        metric: head-mean keys, not normalised [B, t, D].
        r: how many to merge, 1 <= r <= (t - cls) // 2.
        cls: slot 0 is CLS, which neither joins nor is joined. The unmerged positions then ascend; without CLS they
            stand by similarity, highest first, as in the released code. Ties go to the lower position.
    """
    unit = F.normalize(metric.to(accumulation_dtype(metric.dtype)), dim=-1)
    cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [B, ceil(t / 2), t / 2]
    choice = cosine.argmax(-1)  # [B, ceil(t / 2)]
    alike = cosine.amax(-1)
    if cls:
        alike[:, 0] = -torch.inf
    order = alike.sort(dim=-1, descending=True, stable=True).indices
    source, unmerged = order[:, :r], order[:, r:]
    if cls:
        unmerged = unmerged.sort(-1).values
    return Matching(2 * unmerged, 2 * source, 2 * choice.gather(1, source) + 1)


def merge(x: torch.Tensor, size: torch.Tensor, matching: Matching) -> tuple[torch.Tensor, torch.Tensor]:
    """Average each destination with what joins it, weighted by how many tokens each of them stands for.

    Args:
        x: [B, t, C].
        size: [B, t], fp32 or fp64; tokens that each position stands for.
        matching: of `match`.

    Returns:
        (x [B, t - r, C], size [B, t - r]): the unmerged even positions, then all odd ones.
    """
    dtype = accumulation_dtype(x.dtype)
    odd = x.shape[1] // 2
    # One product with zeros and ones instead of a scatter-add, whose order of summing is not fixed on a GPU.
    joins = F.one_hot(matching.destination // 2, odd).to(dtype).transpose(1, 2)  # [B, t / 2, r]
    source_size = size.gather(1, matching.source)  # [B, r]
    source = _rows(x, matching.source).to(dtype) * source_size[..., None].to(dtype)
    odd_size = size[:, 1::2]
    new_size = odd_size + (joins.to(size.dtype) @ source_size[..., None]).squeeze(-1)  # [B, t / 2]
    total = x[:, 1::2].to(dtype) * odd_size[..., None].to(dtype) + joins @ source
    merged = total / new_size[..., None].to(dtype)
    # What nobody joined stays as it was, bit for bit.
    alone = (new_size == odd_size)[..., None]
    merged = torch.where(alone, x[:, 1::2], merged.to(x.dtype))
    return (
        torch.cat([_rows(x, matching.unmerged), merged], 1),
        torch.cat([size.gather(1, matching.unmerged), new_size], 1),
    )


def follow(groups: torch.Tensor, matching: Matching) -> torch.Tensor:
    """Where each original token is after a merge.

    Args:
        groups: int64 [B, N], the position each original token had in the sequence before.
        matching: of `match`.

    Returns:
        int64 [B, N], its position after.
    """
    unmerged = matching.unmerged.shape[1]
    length = 2 * unmerged + 2 * matching.source.shape[1]
    place = torch.arange(length, device=groups.device).div(2, rounding_mode="floor") + unmerged  # right for odd ones
    place = place.expand(len(groups), -1)  # [B, t or t + 1]
    place = place.scatter(1, matching.unmerged, torch.arange(unmerged, device=groups.device).expand(len(groups), -1))
    place = place.scatter(1, matching.source, matching.destination // 2 + unmerged)
    return place.gather(1, groups)


def smallest_source(groups: torch.Tensor, length: int) -> torch.Tensor:
    """The smallest original token in each position of a merged sequence: int64 [B, N] -> [B, length]."""
    original = torch.arange(groups.shape[1], device=groups.device).expand(len(groups), -1)
    start = torch.full((len(groups), length), groups.shape[1], dtype=torch.int64, device=groups.device)
    return start.scatter_reduce(1, groups, original, "amin")


def proportional_bias(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """log(size) of each key, an additive mask [B, 1, 1, t] by which a merged token weighs as much as its parts."""
    return size.log().to(dtype)[:, None, None]


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
