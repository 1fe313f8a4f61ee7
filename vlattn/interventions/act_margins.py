"""Held-out questions and what heads do to them: the margin of right answers over wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.interventions.base import Intervention

Head = tuple[int, int]
"""(layer, query head)."""


@dataclass(frozen=True)
class MarginBatch:
    """Questions whose answer is one of two tokens, ready for the model.

    ids: one for each question, for the record.
    inputs: keyword arguments of the model, prompts padded on the left, up to where the answer begins.
    right, wrong: int64 [B], first token of the right and of the wrong answer.
    """

    ids: tuple[str, ...]
    inputs: Mapping[str, Any]
    right: torch.Tensor
    wrong: torch.Tensor


@dataclass(frozen=True)
class Gain:
    """What editing `heads` does to the margin z(right) - z(wrong), paired with the model as it is.

    gain, error: mean over questions and its standard error; accuracy: share of questions answered right.
    """

    heads: tuple[Head, ...]
    gain: float
    error: float
    accuracy: float


@torch.no_grad()
def margins(model: nn.Module, items: Sequence[MarginBatch], method: Intervention | None = None) -> torch.Tensor:
    """z(right) - z(wrong) of every question [N], fp64 on the CPU, under `method`."""
    with nullcontext() if method is None else method(model):
        return torch.cat([margin(model, batch) for batch in items]).double().cpu()


def margin(model: nn.Module, batch: MarginBatch) -> torch.Tensor:
    """z(right) - z(wrong) of the questions of one batch [B], at least fp32."""
    last = model(**batch.inputs, logits_to_keep=1).logits[:, -1]  # [B, V]
    right, wrong = (last.gather(1, ids.to(last.device)[:, None])[:, 0] for ids in (batch.right, batch.wrong))
    return right.to(torch.promote_types(last.dtype, torch.float32)) - wrong


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of [N] and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def accuracy(margin: torch.Tensor) -> float:
    """Share of questions whose right answer is ahead."""
    return float((margin > 0).double().mean())
