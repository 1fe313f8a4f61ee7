"""The edit of attention calibration: sinks keep a share of their attention, other tokens get the rest.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", arXiv 2406.15765. Restricting who receives is ours, and so is the second way to the same outputs, which
reads sink columns alone and leaves everything else to the stock kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlattn.interventions.act_sinks import HeadScores

Tokens = Literal["all", "text", "visual"]

LEAST = 1e-6
"""Rows whose receivers hold less attention than this are left alone: there is nothing to divide in proportion to."""
CANCELS = 0.75
"""Above this share of sinks the rest of a row's output is not taken as a difference, but computed."""


@dataclass(frozen=True)
class Roles:
    """Who gives and who receives in the chosen heads of a layer, bool [B, H, K] each.

    sinks: all later sinks; they never receive.
    donors: the sinks that give.
    receivers: the tokens that receive; None for all but the sinks.
    """

    sinks: torch.Tensor
    donors: torch.Tensor
    receivers: torch.Tensor | None

    @classmethod
    def of(cls, sinks: torch.Tensor, visual: torch.Tensor, donors: Tokens, recipients: Tokens) -> Roles:
        """Roles of the later sinks [B, H, K], by which keys are visual (bool [B, K])."""
        classes = {"text": ~visual[:, None], "visual": visual[:, None]}
        gives = sinks if donors == "all" else sinks & classes[donors]
        return cls(sinks, gives, None if recipients == "all" else ~sinks & classes[recipients])

    def take(self, columns: torch.Tensor) -> Roles:
        """The same for the keys `columns` (int64 [C]) alone."""
        receivers = None if self.receivers is None else self.receivers[..., columns]
        return Roles(self.sinks[..., columns], self.donors[..., columns], receivers)


def calibrate(weights: torch.Tensor, roles: Roles, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Donors keep the share `beta` of their attention; receivers get the rest in proportion to what they have.

    Args:
        weights: attention [B, H, R, K], rows sum to 1, 0 where a row does not look.
        roles: of the keys.
        beta: kept share, from 0 to 1.

    Returns:
        (new weights [B, H, R, K], whose rows sum to what they did; which rows changed, bool [B, H, R]). Rows that see
        no donor, or whose receivers hold no attention, are as they were.
    """
    donors = roles.donors[:, :, None]  # [B, H, 1, K]
    receivers = (~roles.sinks if roles.receivers is None else roles.receivers)[:, :, None]
    given = weights.masked_fill(~donors, 0).sum(-1, keepdim=True)  # [B, H, R, 1]
    held = weights.masked_fill(~receivers, 0).sum(-1, keepdim=True)
    changed = (given > 0) & (held >= LEAST)
    grown = weights * (1 + (1 - beta) * given / held.clamp(min=LEAST))
    new = torch.where(donors, beta * weights, torch.where(receivers, grown, weights))
    return torch.where(changed, new, weights), changed[..., 0]


def calibrated_outputs(
    output: torch.Tensor, value: torch.Tensor, scores: HeadScores, lse: torch.Tensor, roles: Roles, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs that `calibrate` leads to, from those of any attention kernel and the logits of a few columns.

    With a = exp(s - lse) at the columns that matter, and A, U the sums of a and a v over donors (S) or receivers (R):
    out' = out - (1 - beta) U_S + (1 - beta) (A_S / A_R) U_R. Where all but sinks receive, A_R and U_R are what sinks
    leave of 1 and of out. Rows whose sinks hold almost all attention are computed over all keys instead.

    Args:
        output: [B, H, Q, d], what attention put out.
        value: [B, H, K, d], one for each query head.
        scores: queries and keys of these heads.
        lse: [B, H, Q], log-sum-exp of their rows.
        roles: of the keys.
        beta: kept share.

    Returns:
        (outputs [B, H, Q, d] in fp32, fp64 for fp64; which rows changed, bool [B, H, Q]).
    """
    matters = roles.sinks if roles.receivers is None else roles.donors | roles.receivers
    columns = matters.any(0).any(0).nonzero()[:, 0]  # [C]
    few, values = roles.take(columns), value[:, :, columns].to(lse.dtype)
    parts, changes = [], []
    for start, stop in scores.blocks():
        before = output[:, :, start:stop].to(lse.dtype)
        a = (scores.logits(start, stop, columns) - lse[:, :, start:stop, None]).exp()  # [B, H, r, C]
        a = a.nan_to_num(0)  # rows of padding that see nothing: -inf - -inf

        def share(tokens: torch.Tensor, a: torch.Tensor = a) -> tuple[torch.Tensor, torch.Tensor]:
            part = a.masked_fill(~tokens[:, :, None], 0)
            return part.sum(-1, keepdim=True), part @ values

        given, given_values = share(few.donors)
        if few.receivers is None:
            drained, drained_values = share(few.sinks)
            held, held_values = 1 - drained, before - drained_values
        else:
            held, held_values = share(few.receivers)
        changed = (given > 0) & (held >= LEAST)
        new = before + (1 - beta) * (given / held.clamp(min=LEAST) * held_values - given_values)
        if few.receivers is None and bool((drained > CANCELS).any()):
            weights = scores.logits(start, stop).softmax(-1).nan_to_num(0)
            dense, dense_changed = calibrate(weights, roles, beta)
            new = torch.where(drained > CANCELS, dense @ value.to(lse.dtype), new)
            changed = torch.where(drained > CANCELS, dense_changed[..., None], changed)
        parts.append(torch.where(changed, new, before))
        changes.append(changed[..., 0])
    return torch.cat(parts, 2), torch.cat(changes, 2)
