"""Which heads are worth a trial: those that have sinks, and whose edit raises the margin of right answers at first.

Ours: with a gate g on the edit of each head, out + g (edited - out), one backward pass at g = 0 gives the slope of the
margin for all heads at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlattn.interventions.act import ACT
from vlattn.interventions.act_edit import Roles
from vlattn.interventions.act_head_file import chosen_heads
from vlattn.interventions.act_margins import MarginBatch, margin
from vlattn.interventions.act_run import ActRun
from vlattn.interventions.act_sinks import LayerSinks
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class Screened:
    """A head before its trial.

    share: of questions in which it has a sink that may give.
    slope: how fast the margin rises as the head's edit is faded in, mean over questions; None where it was not asked.
    """

    layer: int
    head: int
    share: float
    slope: float | None


def screen(
    model: nn.Module,
    items: Sequence[MarginBatch],
    method: ACT,
    heads: Mapping[int, Sequence[int]],
    slopes: bool = True,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Screened]:
    """Share and slope of every head, on the model as it is; the steepest first, or those with sinks in most questions.

    Args:
        model: its parameters get no gradients.
        items: held-out questions.
        method: settings of the edit; its own heads do not matter.
        heads: to be screened.
        slopes: whether to run backward.
        advance: called with the number of batches done.
    """
    faded = _Faded(**{**_settings(method), "heads": heads})
    share = {layer: torch.zeros(len(chosen), dtype=torch.float64) for layer, chosen in heads.items()}
    slope = {layer: torch.zeros(len(chosen), dtype=torch.float64) for layer, chosen in heads.items()}
    with _frozen(model), torch.set_grad_enabled(slopes):
        for done, batch in enumerate(items, 1):
            faded.gates.clear()
            with faded(model) as trace:
                ahead = margin(model, batch)
            for layer in heads:
                share[layer] += _gives(trace, layer, method).sum(0).cpu()
            if slopes and faded.gates:
                grads = torch.autograd.grad(ahead.sum(), list(faded.gates.values()))
                for layer, grad in zip(faded.gates, grads, strict=True):
                    slope[layer] += grad.double().sum(0).cpu()
            advance(done)
    questions = sum(len(batch.ids) for batch in items)
    found = [
        Screened(
            layer, head, float(share[layer][n]) / questions, float(slope[layer][n]) / questions if slopes else None
        )
        for layer, chosen in heads.items()
        for n, head in enumerate(chosen)
    ]
    return sorted(found, key=lambda one: -one.share if one.slope is None else -one.slope)


def _gives(trace: Trace, layer: int, method: ACT) -> torch.Tensor:
    """Which heads have a sink that may give, bool [B, h]."""
    notes = trace.notes["sinks"]
    assert isinstance(notes, dict)
    sinks: LayerSinks = notes[layer]
    return Roles.of(sinks.found, sinks.visual, method.donors, method.recipients).donors.any(-1)


def _settings(method: ACT) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(ACT)}


@dataclass(frozen=True)
class _Faded(ACT):
    """ACT with its edits faded out; gates: {layer: [B, h]}, filled by each forward."""

    gates: dict[int, torch.Tensor] = field(default_factory=dict)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        assert self.heads is not None
        run = _FadedRun(self, session, trace, chosen_heads(self.heads, session.adapter), dense=True)
        run.gates = self.gates
        run.attach(hooks)


class _FadedRun(ActRun):
    """Edits behind gates of 0, one for each prompt and head."""

    gates: dict[int, torch.Tensor]

    def blend(self, layer: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        gate = torch.zeros(old.shape[:2], dtype=old.dtype, device=old.device, requires_grad=True)  # [B, h]
        self.gates[layer] = gate
        return old + gate[:, :, None, None] * (new - old).detach()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters: the graph then begins at the first gate."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)
