"""DyVTE: drop all visual tokens after one decoder layer, which small gates choose for each prompt.

"Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
arXiv 2411.19628.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.dyvte_gates import DyVTEGates, gate_input, gate_span, load_gates, text_after_image, wants_exit
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

BatchPolicy = Literal["single", "all", "mask"]


@dataclass(frozen=True)
class DyVTE(Intervention):
    """After each decoder layer of a prefill a gate reads the text; the first that says exit drops the image there.

    Visual tokens take part in the layers up to the exit, which cache them for every later token, and are gone above.
    Text keeps its position ids. Gates are not asked again while decoding. In the trace's notes, `exit_layer` has one
    entry for each prompt, -1 for none, and `exit_probability` is {layer: one entry for each prompt} of gates asked.

    gates: a folder that `vlattn train dyvte` wrote, or such gates loaded, which run in their own dtype; "auto" is those
        embedded for the tiny model.
    exit_layer: exit after this layer (0-based) whatever gates would say; None asks them.
    batch_policy: where prompts of a batch may disagree: "single" takes one prompt at a time, as the released code does;
        "all" exits when every prompt wants to; "mask" lets each exit for itself by hiding its visual keys, which saves
        no time. Beams are a batch: give "all".
    threshold: exit where the gate's probability is above this; from 0 (at once) to 1 (never).
    """

    gates: str | Path | DyVTEGates = "auto"
    exit_layer: int | None = None
    batch_policy: BatchPolicy = "single"
    threshold: float = 0.5

    place = "decoder"

    def __post_init__(self) -> None:
        layer = self.exit_layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise InputError(f"exit_layer: got {layer!r}; give a 0-based decoder layer, or None to ask the gates")
        if self.batch_policy not in ("single", "all", "mask"):
            raise InputError(f"batch_policy: got {self.batch_policy!r}; give 'single', 'all' or 'mask'")
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold <= 1:
            raise InputError(f"threshold: got {self.threshold!r}; give a probability from 0 to 1")

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        adapter = session.adapter
        layers = len(adapter.decoder_layers)
        if self.exit_layer is not None and self.exit_layer >= layers:
            raise InputError(
                f"exit_layer: got {self.exit_layer}; this model's decoder has layers 0 to {layers - 1}, give one"
            )
        run = _Run(self, session, trace, None if self.exit_layer is not None else self._gates_of(session))
        for layer in range(layers) if self.exit_layer is None else [self.exit_layer]:
            request = Request(layer, run.select, positions="preserve", hide=self.batch_policy == "mask")
            session.cuts.after(request, hooks)

    def _gates_of(self, session: Session) -> DyVTEGates:
        """The gates, each on the device of its layer; of gates that were given, a copy."""
        gates = copy.deepcopy(self.gates) if isinstance(self.gates, DyVTEGates) else load_gates(self.gates)
        gates.check(session.adapter)
        for gate, layer in zip(gates.layers, session.adapter.decoder_layers, strict=True):
            gate.to(next(layer.parameters()).device)
        return gates


class _Run:
    """The method on one model, and how far the batch of prompts at hand has come."""

    def __init__(self, method: DyVTE, session: Session, trace: Trace, gates: DyVTEGates | None) -> None:
        self.method, self.session, self.trace, self.gates = method, session, trace, gates
        self.first = method.exit_layer or 0
        self.exit_layer: list[int] = []
        self.probability: dict[int, list[float]] = {}
        self.after = torch.empty(0)

    def select(self, state: LayerState) -> Cut | None:
        """After a layer: who exits here loses all visual tokens that are left."""
        if state.layer == self.first:
            self._begin(state)
        if min(self.exit_layer) >= 0:
            return None  # the first exit counts: gates above it are not asked
        exited = torch.tensor([layer >= 0 for layer in self.exit_layer], device=state.hidden.device)  # [B]
        leaves = ~exited if self.gates is None else self._wants(state, self.gates) & ~exited  # [B]
        if not bool(leaves.any()):
            return None
        self.exit_layer[:] = [
            state.layer if now else before for now, before in zip(leaves.tolist(), self.exit_layer, strict=True)
        ]
        return Cut(~(leaves[:, None] & (state.slot != -1)))

    def _begin(self, state: LayerState) -> None:
        """A new prefill: nobody has exited."""
        batch = len(state.hidden)
        if self.gates is not None and self.method.batch_policy == "single" and batch > 1:
            raise InputError(
                f"batch_policy: 'single' takes one prompt at a time, got {batch} (beams count); "
                "give batch_policy='all' or 'mask', or one prompt"
            )
        assert self.session.visual is not None
        visual = self.session.visual.mask
        # Padding stands on the left, where it is behind no image; in a row without one it is no text later on.
        self.after = text_after_image(visual, torch.ones_like(visual)).to(state.hidden.device)
        self.exit_layer, self.probability = [-1] * batch, {}
        self.trace.notes.update(exit_layer=self.exit_layer, exit_probability=self.probability)

    @torch.no_grad()
    def _wants(self, state: LayerState, gates: DyVTEGates) -> torch.Tensor:
        """What the gates say, bool [B], after the batch policy."""
        text = state.alive & (state.slot == -1)
        logits = gates(state.layer, gate_input(state.hidden, gate_span(text, self.after)))  # [B, 2]
        self.probability[state.layer] = logits.float().softmax(-1)[:, 1].tolist()
        wants = wants_exit(logits, self.method.threshold)
        if self.method.batch_policy == "mask":
            return wants
        has_image = (state.slot != -1).any(1)  # a prompt without one has nothing to lose
        return (wants | ~has_image).all().expand_as(wants)
