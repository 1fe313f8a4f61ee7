"""Attention over bags that are too large for memory: one pass, some tokens at a time, with a running softmax."""

from __future__ import annotations

import torch

from vlattn.checks import require_count
from vlattn.probing.poolers.abmil import AttentionBag, weighted_sums
from vlattn.probing.poolers.bag import check_mask, hide_padding


def pool_in_chunks(
    pooler: AttentionBag, tokens: torch.Tensor, mask: torch.Tensor | None, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and scores of all branches, without holding instances for more than `chunk` tokens.

    For each branch the largest score so far, the sum of exp(score - largest) and the sum of exp(...) h are kept, and
    are scaled down where a later chunk holds a larger score.

    Args:
        pooler: gives instances and scores.
        tokens: [B, N, D] on any device; chunks go to the pooler's.
        mask: bool [B, N] or None, as everywhere in bags.
        chunk: tokens of a bag at a time, at least 1.

    Returns:
        z_m [B, M, L] in the dtype of instances and scores [B, M, N], -inf on padding.
    """
    require_count("chunk", chunk)
    pooler.check(tokens)
    check_mask(tokens, mask)
    device = pooler.score.w.weight.device
    scores: list[torch.Tensor] = []
    lowest = torch.finfo(torch.float32).min
    largest = torch.tensor(lowest, device=device)
    total = sums = torch.zeros((), device=device)
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        real = None if mask is None else mask[:, part].to(device)
        instances = pooler.reduce_tokens(tokens[:, part].to(device), real)
        score = hide_padding(pooler.score(instances), real)  # [B, M, n]
        # A chunk of padding alone has -inf as its largest score, and -inf - -inf would be NaN.
        best = torch.maximum(largest, score.amax(-1, keepdim=True).clamp(min=lowest))
        weight, scale = (score - best).exp(), (largest - best).exp()
        with torch.autocast(device.type, enabled=False):
            sums = sums * scale + weighted_sums(weight, instances.to(weight.dtype))
        total = total * scale + weight.sum(-1, keepdim=True)
        largest = best
        scores.append(score)
    return (sums / total).to(instances.dtype), torch.cat(scores, -1)
