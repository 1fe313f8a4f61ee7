"""Contrasting two streams of logits under a plausibility mask: one formula for VCD, ICD, SID, M3ID and PAI.

The mask is that of "Contrastive Decoding: Open-ended Text Generation as Optimization", arXiv 2210.15097, as VCD, arXiv
2311.16922, carried it to vision-language models.
"""

from __future__ import annotations

import math

import torch

from vlattn.kernels.reference import accumulation_dtype


def contrast(main: torch.Tensor, second: torch.Tensor, a: float, b: float, beta: float) -> torch.Tensor:
    """a l + b l', and -inf where the main stream finds a token implausible: l < max l + log beta.

    Raw logits and log-probabilities serve alike where a + b = 1: a constant per row changes no probability.

    Args:
        main: l, logits [..., V] of the stream that generates; -inf where a token is banned, and -inf it stays.
        second: l', logits [..., V] of the other stream, finite.
        a, b: the weights. a = 1 with b = 0 is the neutral setting: no mask either.
        beta: in [0, 1]; a token is kept where its probability is at least beta times the largest. 0 keeps all.

    Returns:
        [..., V], fp32 for half precision; `main` itself in the neutral setting.
    """
    if a == 1 and b == 0:
        return main
    dtype = accumulation_dtype(main.dtype)
    mine, other = main.to(dtype), second.to(dtype)
    mixed = torch.where(mine.isfinite(), a * mine + b * other, mine)
    if beta == 0:
        return mixed
    cutoff = mine.amax(-1, keepdim=True) + math.log(beta)
    return mixed.masked_fill(mine < cutoff, -torch.inf)
