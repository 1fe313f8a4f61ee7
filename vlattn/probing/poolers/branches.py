"""What poolers with several attention branches give, and what training them on the branches' own losses takes.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv 2311.07125.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from vlattn.checks import require_bool, require_number


@dataclass(frozen=True)
class Branches:
    """What a pooler with branches sees in a bag; see `PoolOut`.

    features: z_m [B, M, L].
    """

    feature: torch.Tensor
    features: torch.Tensor
    attention: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class PoolOut:
    """Output of `vlattn.probing.poolers.acmil.ACMIL`.

    feature: zb [B, L], of the mean of the maps.
    logits: [B, C] from zb, the prediction.
    branch_logits: [B, M, C], for the loss in training.
    attention: maps P [B, M, N], fp32 or finer, 0 on padding and on what STKIM hid; in heads, [B, H, M, N], of the
        multi-head variant. The map to draw is their mean over M, in eval mode.
    scores: what the softmax got, -inf there; `scores.isneginf() & mask[:, None]` is what STKIM hid.
    """

    feature: torch.Tensor
    logits: torch.Tensor
    branch_logits: torch.Tensor
    attention: torch.Tensor
    scores: torch.Tensor


class BranchPooler(Protocol):
    """A pooler whose branches can be classified: `ACMILPool` or `ACMILMHAPool`."""

    n_token: int
    width: int

    def branches(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> Branches: ...

    def branch_macs(self, tokens: int) -> int: ...


@dataclass(frozen=True)
class BranchLosses:
    """What training adds to the loss of the bag: w_branch * branch + w_div * div, both weights 1 as released.

    w_branch: weight of the branches' own losses, each from a classifier of its own; 0 makes no such classifiers.
    w_div: weight of `vlattn.probing.poolers.acmil_loss.branch_similarity`.
    share_branch_classifier: one classifier for all branches, for very many classes; ours.
    """

    w_branch: float = 1.0
    w_div: float = 1.0
    share_branch_classifier: bool = False

    def __post_init__(self) -> None:
        for name in ("w_branch", "w_div"):
            require_number(name, getattr(self, name), 0)
        require_bool("share_branch_classifier", self.share_branch_classifier)

    def of(self, branches: int) -> BranchLosses | None:
        """Themselves, or None where they add nothing: with one branch, or weights of 0."""
        return self if branches > 1 and (self.w_branch or self.w_div) else None

    def departures(self) -> list[str]:
        """Where a probe that is trained with them leaves the common protocol of probes, and where ACMIL's own."""
        added = [f"{weight:g} x {name}" for weight, name in ((self.w_branch, "branch"), (self.w_div, "diversity"))]
        return [
            f"loss of the bag + {' + '.join(added)}, ACMIL's own, instead of the loss of the bag alone",
            "batch norm in front of the bag's classifier and batches of many bags, as in any probe, where ACMIL has "
            "no norm, one bag, and AdamW at 1e-4 with weight decay 1e-5",
        ]


class BranchClassifiers(nn.ModuleList):
    """A linear classifier for each of M branches, or one for all.

    width: L, of the branches' features.
    classes: number of classes C.
    branches: M.
    shared: whether there is one for all.
    """

    def __init__(self, width: int, classes: int, branches: int, shared: bool = False) -> None:
        super().__init__(nn.Linear(width, classes) for _ in range(1 if shared else branches))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [B, M, C] of features [B, M, L]."""
        if len(self) != features.shape[1]:
            shared: torch.Tensor = self[0](features)
            return shared
        return torch.stack([classify(z) for classify, z in zip(self, features.unbind(1), strict=True)], 1)

    def of_stacked(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [R, B, M, C] of features [R, B, M, L], where the weights of R heads are stacked, [R, C, L]."""
        linears: list[nn.Linear] = list(self)  # type: ignore[arg-type]
        weight = torch.stack([one.weight for one in linears], 1).expand(-1, features.shape[2], -1, -1)  # [R, M, C, L]
        bias = torch.stack([one.bias for one in linears], 1)
        return torch.einsum("rbml,rmcl->rbmc", features, weight) + bias[:, None]
