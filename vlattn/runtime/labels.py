"""Training on a pruned prompt: labels are given for the full prompt, the loss is taken over what survives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.runtime.hooks import as_keywords

if TYPE_CHECKING:
    from vlattn.runtime.session import Session

IGNORED = -100


class LabelledCall:
    """Two hooks on the model with the head: hold its labels back, and add the loss to its output."""

    def __init__(self, model: nn.Module, session: Session) -> None:
        self._model: Any = model
        self._session = session
        self._labels: torch.Tensor | None = None
        self._extra: dict[str, Any] = {}
        self._as_tuple = False

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before the model: without labels it computes no loss of its own, whose shapes would not fit."""
        self._labels = None
        call = as_keywords(module, args, kwargs)
        if not self._session.drops or call.get("labels") is None:
            return None
        if not hasattr(module, "loss_function"):
            raise InputError(f"labels: {type(module).__name__} has no loss; give the model with its head")
        self._labels = call["labels"]
        self._extra = {name: call[name] for name in ("num_items_in_batch",) if call.get(name) is not None}
        return (), {**call, "labels": None}

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the model: the same output with the loss over surviving positions."""
        labels, self._labels = self._labels, None
        if labels is None:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = self._model.loss_function(
            logits=logits,
            labels=self._surviving(labels, logits),
            vocab_size=self._session.adapter.text_config.vocab_size,
            **self._extra,
        )
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(loss=loss, **{name: value for name, value in output.items() if name != "loss"})

    def _surviving(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        segment = self._session.surviving
        if segment is not None:
            if labels.shape[1] != segment.full:
                raise InputError(
                    f"labels: expected [{segment.index.shape[0]}, {segment.full}] for the full prompt, "
                    f"got {list(labels.shape)}"
                )
            labels = torch.where(segment.alive, segment.take(labels), IGNORED)
        if labels.shape[1] != logits.shape[1]:
            raise InputError(
                f"logits_to_keep: the loss needs logits of all {labels.shape[1]} positions, got {logits.shape[1]}; "
                "leave logits_to_keep at 0 when giving labels"
            )
        return labels
