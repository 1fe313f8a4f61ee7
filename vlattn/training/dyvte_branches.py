"""The frozen model's part in training DyVTE: gate inputs, and whether visual tokens could have left after a layer.

"Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
arXiv 2411.19628. One pass with all visual tokens gives the state after every layer; for each layer asked about, the
layers above it run again with visual keys masked for everybody, at the same positions. For text that equals removing
the visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.eval.answer import chat_prompt
from vlattn.interventions.dyvte_gates import gate_input, gate_span, text_after_image
from vlattn.interventions.dyvte_labels import IGNORED, exit_labels
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.sequence import Segment
from vlattn.training.examples import Example, open_image

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


# Examples as model inputs ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AnsweredPrompts:
    """Left-padded prompts with their answers at the end.

    inputs: what the model's forward takes.
    prompt: bool [B, T], True at the prompt, False on padding and on the answer.
    """

    inputs: dict[str, torch.Tensor]
    prompt: torch.Tensor


def answered_prompts(processor: ProcessorMixin, examples: Sequence[Example], device: torch.device) -> AnsweredPrompts:
    """Each question in the model's own chat template, followed by its answer and the end token."""
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if getattr(tokenizer, "padding_side", None) != "left":
        raise InputError("processor: its tokenizer pads on the right; set processor.tokenizer.padding_side = 'left'")
    texts, answers = [], []
    for example in examples:
        asked = chat_prompt(processor, example.question)
        texts.append(f"{asked}{'' if asked[-1].isspace() else ' '}{example.answer}{tokenizer.eos_token or ''}")
        answers.append(_answer_length(tokenizer, asked, texts[-1]))
    process: Any = processor
    found = process(
        images=[open_image(example.image) for example in examples], text=texts, return_tensors="pt", padding=True
    )
    inputs = dict(found.to(device))
    width = inputs["input_ids"].shape[1]
    before = width - torch.tensor(answers, device=device)  # [B]
    prompt = inputs["attention_mask"].bool() & (torch.arange(width, device=device) < before[:, None])  # [B, T]
    return AnsweredPrompts(inputs, prompt)


def _answer_length(tokenizer: Any, asked: str, full: str) -> int:
    """Tokens of `full` after what it has in common with `asked`: their seam may tokenise otherwise when joined."""
    ids, whole = (list(tokenizer(text).input_ids) for text in (asked, full))
    same = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    return len(whole) - same


# Both branches --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GateTask:
    """What one gate learns from a batch. u: its input [B, 2C]; y: bool [B], True for exit."""

    u: torch.Tensor
    y: torch.Tensor


class Branches:
    """Runs the frozen model with visual tokens (branch K), and without them after chosen layers (branch X).

    agreement, loss_ratio: of the labels, see `exit_labels`.
    """

    def __init__(self, model: PreTrainedModel, agreement: float = 0.99, loss_ratio: float = 1.03) -> None:
        self.model, self.adapter = model, adapter_for(model)
        self.agreement, self.loss_ratio = agreement, loss_ratio
        head: Any = model.get_output_embeddings()
        if head is None:
            raise InputError(f"model: {type(model).__name__} has no language model head; give the model that generates")
        self.head: nn.Module = head
        self.attention = self.adapter.text_config._attn_implementation or "eager"

    @property
    def layers(self) -> int:
        return len(self.adapter.decoder_layers)

    @torch.no_grad()
    def run(self, batch: AnsweredPrompts, layers: Sequence[int]) -> dict[int, GateTask]:
        """For each layer of `layers` the gate's input and its label, {layer: GateTask}."""
        ids = batch.inputs["input_ids"]
        visual = self.adapter.visual_mask(batch.inputs)  # [B, T]
        answer = batch.inputs["attention_mask"].bool() & ~batch.prompt  # [B, T]
        longest = int(answer.sum(1).max())
        # An answer's tokens are predicted one position earlier; shorter answers have targets to ignore in front.
        targets = ids.masked_fill(~answer, IGNORED)[:, -longest:]  # [B, A]
        asked = slice(ids.shape[1] - longest - 1, -1)
        states, calls, last = self._keep(batch.inputs, layers)
        keep_logits = self.head(last[:, asked])  # [B, A, V]
        span = gate_span(batch.prompt & ~visual, text_after_image(visual, batch.prompt))
        if bool(visual.any()):
            calls = self._blind(calls, visual, batch.inputs["attention_mask"].bool(), last.dtype)
        found = {}
        for layer in layers:
            exit_logits = self.head(self._exit(states[layer], calls, layer)[:, asked])
            y = exit_labels(keep_logits, exit_logits, targets, self.agreement, self.loss_ratio)
            found[layer] = GateTask(gate_input(states[layer], span), y)
        return found

    def _keep(
        self, inputs: dict[str, torch.Tensor], wanted: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], list[dict[str, Any]], torch.Tensor]:
        """Branch K: the states after the layers `wanted` [B, T, C], every layer's other arguments, and the normed last
        state."""
        states: dict[int, torch.Tensor] = {}
        calls: list[dict[str, Any]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = as_keywords(module, args, kwargs)
            del call["hidden_states"]
            calls.append(call)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(calls) - 1 in wanted:
                states[len(calls) - 1] = _state(output)

        hooks = HookSet()
        try:
            for layer in self.adapter.decoder_layers:
                hooks.before(layer, before)
                hooks.after(layer, after)
            last = self.adapter.multimodal(**inputs, use_cache=False).last_hidden_state
        finally:
            hooks.remove()
        if last.shape[1] != inputs["input_ids"].shape[1]:
            raise InputError(
                "model: an intervention on it drops tokens; leave its context, and train the gates on the bare model"
            )
        return states, calls, last

    def _blind(
        self, calls: list[dict[str, Any]], visual: torch.Tensor, valid: torch.Tensor, dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        """The layers' arguments with masks that hide visual keys [B, T] from everybody."""
        segment = Segment.whole(valid).hiding(visual)
        made: dict[int, Any] = {}  # layers share masks
        for call in calls:
            mask = call.get("attention_mask")
            if id(mask) not in made:
                made[id(mask)] = segment.mask(
                    mask, generated=0, new=0, width=None, implementation=self.attention, dtype=dtype
                )
        return [{**call, "attention_mask": made[id(call.get("attention_mask"))]} for call in calls]

    def _exit(self, hidden: torch.Tensor, calls: list[dict[str, Any]], layer: int) -> torch.Tensor:
        """Branch X: the layers after `layer` run again with the arguments `calls`; the normed last state [B, T, C]."""
        for module, call in list(zip(self.adapter.decoder_layers, calls, strict=True))[layer + 1 :]:
            hidden = _state(module(hidden, **call))
        return self.adapter.language_model.norm(hidden)


def _state(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
