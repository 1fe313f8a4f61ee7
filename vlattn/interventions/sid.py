"""SID: contrast the logits with those of a stream that sees only the image tokens it attends to least.

"Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models", arXiv 2408.02032.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.checks import require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.contrast import contrast
from vlattn.interventions.decoder_pruner import top_visual
from vlattn.runtime.decoder import Cut, DecoderCuts, Request
from vlattn.runtime.hooks import Gate, HookSet, as_keywords, cached_length
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.second_prompt import repeated, with_image
from vlattn.runtime.second_stream import SecondStream
from vlattn.runtime.sequence import valid_columns
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


def least_attended(state: LayerState, keep: int) -> torch.Tensor:
    """The `keep` visual tokens of each prompt that its newest token attends to least, heads averaged: bool [B, n].

    Ties go to the lower position; a prompt with no more visual tokens than that keeps them all.
    """
    rows = torch.full((state.hidden.shape[0], 1), state.last, device=state.hidden.device)
    score = state.attention_rows(rows)[:, :, 0].mean(1)  # [B, n]
    counts = torch.full((score.shape[0],), keep, device=score.device)
    return top_visual(-score, state.visual, counts)


@dataclass(frozen=True)
class SID(Intervention):
    """Baseline: subtract the logits of a stream that sees only the least attended image tokens, among plausible tokens.

    "Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models", arXiv 2408.02032. l is
    the model's logits, l' those of the same prompt where layers from A on see only the k image tokens to which the last
    position attends least in layer A - 1; they are chosen anew for each prompt at every step, so nothing leaves the
    cache and no time is saved. (1 + alpha) l - alpha l', where l >= max l + log beta. In the released code alpha is 0.5
    in effect, though its options say 1; its greedy branch has no mask (beta = 0), its sampling branch has.

    Methods that prune or edit act on the model's own stream: the second one chooses among all image tokens.

    layer: A, the first layer that sees less, at least 1.
    keep: k, image tokens of a prompt that stay visible: 100 of 576 in the released script for POPE, 50 for CHAIR.
    alpha: weight of the contrast; 0 leaves the model as it is, the mask included.
    beta: a token needs at least this share of the largest probability, 0 to 1; 0 keeps all tokens.
    """

    place = "decoder"

    layer: int = 2
    keep: int = 100
    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        require_count("layer", self.layer)
        require_count("keep", self.keep)
        require_number("alpha", self.alpha, 0)
        require_number("beta", self.beta, 0, 1)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        depth = len(session.adapter.decoder_layers)
        if self.layer >= depth:
            raise InputError(
                f"layer: got {self.layer}, but this decoder has layers 0 to {depth - 1}; give 1 <= layer <= {depth - 1}"
            )
        if self.alpha == 0:
            return
        hidden = _HiddenTokens(session, hooks, self.layer, self.keep)

        def combine(main: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
            return contrast(main, second, 1 + self.alpha, -self.alpha, self.beta)

        SecondStream(session, _whole_batch, combine, hidden.open).attach(hooks)


def _whole_batch(call: dict[str, Any], session: Session) -> dict[str, Any]:
    """The same prompt, beams and all: which tokens are hidden is kept by row."""
    inputs = with_image(call, session)
    rows = (call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]).shape[0]
    return repeated(inputs, rows // inputs["attention_mask"].shape[0], session)


class _HiddenTokens:
    """Hides image tokens in the second stream alone: cuts of its own, behind a gate that only this stream opens."""

    def __init__(self, session: Session, hooks: HookSet, layer: int, keep: int) -> None:
        self._adapter, self._gate = session.adapter, Gate(held=True)
        self._cuts = DecoderCuts(session.adapter, self._gate)
        self._visual: Any = None
        own = HookSet(self._gate)
        own.before(session.adapter.multimodal, self._find_images)
        own.before(session.adapter.language_model, self._begin)
        own.after(session.adapter.language_model, self._end)
        hooks.also(own.remove)

        def choose(state: LayerState) -> Cut:
            return Cut(~state.visual | least_attended(state, keep))

        self._cuts.after(Request(layer - 1, choose, hide=True, projections="qk", every_step=True), hooks)
        hooks.also(self._cuts.close)

    @contextmanager
    def open(self) -> Iterator[None]:
        self._gate.held = False
        try:
            yield
        finally:
            self._gate.held = True

    def _find_images(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = as_keywords(module, args, kwargs)
        if not cached_length(call):
            self._visual = self._adapter.visual_tokens(call)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = as_keywords(module, args, kwargs)
        if cached := cached_length(call):
            self._cuts.begin_step(cached)
            return
        batch, length = self._visual.mask.shape
        valid = valid_columns(call.get("attention_mask"), batch, length, self._visual.mask.device)
        self._cuts.begin_prefill(valid, self._visual, None)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._cuts.end()
