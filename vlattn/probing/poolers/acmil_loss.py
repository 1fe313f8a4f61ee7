"""The three losses of ACMIL, and two numbers that tell how far attention spreads.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv 2311.07125.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.branches import PoolOut

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def acmil_loss(
    out: PoolOut,
    target: torch.Tensor,
    *,
    w_branch: float = 1.0,
    w_div: float = 1.0,
    criterion: Criterion = F.cross_entropy,
) -> dict[str, torch.Tensor]:
    """bag + w_branch * branch + w_div * div, all weights 1 as released.

    Args:
        out: what `ACMIL` gave.
        target: int64 [B]; or what `criterion` takes, [B, ...].
        w_branch: weight of the mean over branches of each one's own loss.
        w_div: weight of `branch_similarity`.
        criterion: task loss that averages over rows of logits [rows, C] and targets; such as
            `F.binary_cross_entropy_with_logits` for several labels.

    Returns:
        Scalars `bag`, `branch`, `div`, and `total`. With one branch, branch and div are 0.
    """
    if len(target) != len(out.logits):
        raise InputError(f"target: got {len(target)} labels for {len(out.logits)} bags; give one per bag")
    bag = criterion(out.logits, target)
    branches = out.branch_logits.shape[1]
    branch = torch.zeros_like(bag)
    if branches > 1:
        repeated = target[:, None].expand(-1, branches, *target.shape[1:])
        branch = criterion(out.branch_logits.flatten(0, 1), repeated.flatten(0, 1))
    div = branch_similarity(out.attention)
    return {"bag": bag, "branch": branch, "div": div, "total": bag + w_branch * branch + w_div * div}


def branch_similarity(attention: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of branches of the cosine of their maps: the diversity loss, from 0 to 1.

    1 for equal maps, as all but exactly at the start; 0 for maps that share no token, or for one branch. Scale-free: it
    falls where maps only grow sharper, and where STKIM hides other tokens in each branch, so training and evaluation do
    not compare.

    Args:
        attention: [..., M, N], at least 0; averaged over leading dimensions (bags, heads).
    """
    branches = attention.shape[-2]
    if branches == 1:
        return attention.new_zeros(())
    unit = F.normalize(attention, dim=-1, eps=1e-8)
    with torch.autocast(attention.device.type, enabled=False):
        cosine = unit @ unit.transpose(-2, -1)
    row, column = torch.triu_indices(branches, branches, 1, device=attention.device)
    return cosine[..., row, column].mean()


def attention_entropy(attention: torch.Tensor) -> torch.Tensor:
    """Entropy of maps [..., N] in nats, [...]: log N for a uniform map.

    The released code prints minus this, summed over bags, as its diversity in evaluation.
    """
    return -torch.special.xlogy(attention, attention).sum(-1)


def top_mass(attention: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Share of attention [..., N] that goes to its `k` largest entries, [...]."""
    require_count("k", k)
    return attention.topk(min(k, attention.shape[-1]), dim=-1).values.sum(-1)
