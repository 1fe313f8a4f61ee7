"""ACMIL: several attention branches over a bag, pushed to differ, with some of their best instances hidden in training.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv 2311.07125.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.abmil import ABMILPool, AttentionBag, weighted_sums
from vlattn.probing.poolers.bag_chunks import pool_in_chunks
from vlattn.probing.poolers.branches import BranchClassifiers, Branches, BranchLosses, BranchPooler, PoolOut
from vlattn.probing.poolers.stkim import STKIM

__all__ = ["ACMIL", "ABMILPool", "ACMILPool", "Branches", "PoolOut"]


class ACMILPool(AttentionBag):
    """M gated attention branches over instances h_n = ReLU(W x_n), and the feature of their mean map (ACMIL-GA).

    Branches share V and U of `ABMILPool` and differ in one vector each. In training `STKIM` hides the best instances.
    As a pooler it gives zb = mean_m P_m H [B, L]. A probe with it trains on the paper's three losses, with classifiers
    of the branches that training alone needs; `w_branch=0,w_div=0` trains on the loss of the bag alone. `ACMIL` is the
    same outside a probe. Give padded bags as `pooler(tokens, mask)`.

    n_token: branches M, 5 in the paper.
    n_masked_patch: K, the best instances of a branch that some are hidden of; of small images take about 5% of the
        tokens.
    mask_drop: p, the share of these K that is hidden. 0.6 in the paper; the authors later found 0 better at times.
    d_inner: L, see `BagPooler`.
    hidden: D, rows of V and U, 128 in the paper.
    seed: of STKIM's own generator.
    w_branch, w_div, share_branch_classifier: see `BranchLosses`; the pooler alone does not use them.
    """

    def __init__(
        self,
        dim: int,
        *,
        n_token: int = 5,
        n_masked_patch: int = 10,
        mask_drop: float = 0.6,
        d_inner: int | None = None,
        hidden: int = 128,
        seed: int = 0,
        w_branch: float = 1.0,
        w_div: float = 1.0,
        share_branch_classifier: bool = False,
    ) -> None:
        require_count("n_token", n_token)
        super().__init__(dim, d_inner, hidden, n_token, True)
        self.stkim = STKIM(n_masked_patch, mask_drop, seed)
        self.branch_losses = BranchLosses(w_branch, w_div, share_branch_classifier).of(n_token)

    def read(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        instances, scores = super().read(tokens, mask)
        return instances, self.stkim(scores, mask)

    def branches(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> Branches:
        """Maps and features of all branches, and zb, their mean; arguments as in `forward`."""
        instances, scores = self.read(tokens, mask)
        attention = scores.softmax(-1)
        features = weighted_sums(attention, instances)
        return Branches(features.mean(1), features, attention, scores)

    def branch_macs(self, tokens: int) -> int:
        """Multiply-accumulates of `branches`, which makes all M weighted sums, as released; `macs` has one, of the mean
        map."""
        return self.macs(tokens) + tokens * self.width * (self.n_token - 1)

    @torch.no_grad()
    def branches_in_chunks(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, *, chunk: int = 4096
    ) -> Branches:
        """As `branches` in eval mode and without gradients, `chunk` tokens at a time.

        Tokens may lie on another device than the pooler, such as in memory-mapped files; maps and scores still hold M
        numbers per token.

        Raises:
            InputError: in training mode, where STKIM has to see all scores first.
        """
        if self.training:
            raise InputError("chunk: this pooler is in training mode; call eval() first, or give whole bags")
        features, scores = pool_in_chunks(self, tokens, mask, chunk)
        return Branches(features.mean(1), features, scores.softmax(-1), scores)


class ACMIL(nn.Module):
    """The whole of ACMIL: a pooler with branches, a classifier for each branch, and one for the bag.

    Train with `acmil_loss`. Inference needs the logits of the bag alone. `ACMILPool(dim, n_token=1, n_masked_patch=0)`
    makes gated ABMIL of it, with a branch classifier that is never trained.

    pooler: `ACMILPool`, or `ACMILMHAPool`.
    classes: number of classes C.
    share_branch_classifier: one classifier for all branches instead of M, for large C; ours.
    norm: `bn` puts the batch norm of the common probe (no parameters, eps 1e-6) on zb, in front of the bag's
        classifier; `none` as released.
    dropout: in front of the classifiers; 0 as released.
    """

    def __init__(
        self,
        pooler: BranchPooler,
        classes: int,
        *,
        share_branch_classifier: bool = False,
        norm: Literal["none", "bn"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_count("classes", classes)
        require_choice("norm", norm, ("none", "bn"))
        width = pooler.width
        self.classes = classes
        self.pooler = pooler
        self.branch_classifiers = BranchClassifiers(width, classes, pooler.n_token, share_branch_classifier)
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False) if norm == "bn" else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> PoolOut:
        """Classify bags.

        Args:
            tokens: [B, N, D].
            mask: bool [B, N], True on real tokens; what stands in the others does not matter. None: all are real.

        Raises:
            InputError: a mask of another shape or dtype, or a bag without a real token.
        """
        return self._classify(self.pooler.branches(tokens, mask))

    @torch.no_grad()
    def in_chunks(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, *, chunk: int = 4096) -> PoolOut:
        """As `forward` in eval mode and without gradients, see `ACMILPool.branches_in_chunks`."""
        if not isinstance(self.pooler, ACMILPool):
            raise InputError(f"chunk: {type(self.pooler).__name__} takes whole bags only; call the model itself")
        return self._classify(self.pooler.branches_in_chunks(tokens, mask, chunk=chunk))

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of one bag with `tokens` tokens, all classifiers included."""
        return self.pooler.branch_macs(tokens) + (self.pooler.n_token + 1) * self.pooler.width * self.classes

    def inference_parameters(self) -> int:
        """Number of parameters without the branch classifiers, which only training needs."""
        dropped = sum(p.numel() for p in self.branch_classifiers.parameters())
        return sum(p.numel() for p in self.parameters()) - dropped

    def _classify(self, seen: Branches) -> PoolOut:
        branch_logits = self.branch_classifiers(self.dropout(seen.features))
        logits = self.classifier(self.dropout(self.norm(seen.feature)))
        return PoolOut(seen.feature, logits, branch_logits, seen.attention, seen.scores)
