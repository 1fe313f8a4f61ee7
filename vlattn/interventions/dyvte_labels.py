"""What DyVTE's gates learn: whether the answer stays the same when visual tokens leave after a layer.

"Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
arXiv 2411.19628; the rule and its two constants follow the released code. The paper asks for equal answers and a
cross-entropy below a threshold; the code compares the two runs with each other.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vlattn.errors import InputError

IGNORED = -100
"""The target of a position that predicts no answer token."""


def answer_agreement(keep_logits: torch.Tensor, exit_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of answer positions where both runs would say the same token.

    Args:
        keep_logits, exit_logits: [B, A, V], what predicts `targets`, with and without visual tokens.
        targets: int64 [B, A]; -100 predicts nothing, and token id 0 does not count here, as in the released code.

    Returns:
        fp64 [B].
    """
    counted = targets > 0  # [B, A]
    same = (keep_logits.argmax(-1) == exit_logits.argmax(-1)) & counted
    # In fp64 99 of 100 is not above 0.99: answers of up to 100 tokens must agree everywhere.
    return same.sum(1).double() / counted.sum(1)


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each sample's answer under teacher forcing, in nats per token.

    Token id 0 adds to the sum and not to the number of tokens, as in the released code.

    Args:
        logits: [B, A, V].
        targets: int64 [B, A], -100 where nothing is predicted.

    Returns:
        [B], fp32 for half-precision logits, the logits' dtype otherwise.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    each = F.cross_entropy(logits.to(wide).transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")  # [B, A]
    return each.sum(1) / (targets > 0).sum(1)


def exit_labels(
    keep_logits: torch.Tensor,
    exit_logits: torch.Tensor,
    targets: torch.Tensor,
    agreement: float = 0.99,
    loss_ratio: float = 1.03,
) -> torch.Tensor:
    """Whether visual tokens could have left: the same answer, and hardly a larger loss.

    Args:
        keep_logits, exit_logits: [B, A, V], what predicts `targets`, with visual tokens to the end and without them
            after the layer in question.
        targets: int64 [B, A], the answer's tokens, -100 where a position predicts none.
        agreement: the share of equal argmaxes must be above this.
        loss_ratio: the loss without them must be below this many times the loss with them.

    Returns:
        bool [B], True for exit.

    Raises:
        InputError: shapes that do not fit, or an answer without a token.
    """
    if keep_logits.shape != exit_logits.shape or keep_logits.shape[:-1] != targets.shape:
        raise InputError(
            f"keep_logits, exit_logits, targets: expected [B, A, V] twice and [B, A], got {tuple(keep_logits.shape)}, "
            f"{tuple(exit_logits.shape)} and {tuple(targets.shape)}"
        )
    if not bool((targets > 0).any(1).all()):
        raise InputError("targets: an answer has no token; leave examples with an empty answer out")
    keep, leave = answer_loss(keep_logits, targets), answer_loss(exit_logits, targets)
    # A loss that underflows to 0 is not below 1.03 times itself, though nothing could be better.
    good = (leave < loss_ratio * keep) | (leave <= keep)
    return (answer_agreement(keep_logits, exit_logits, targets) > agreement) & good
