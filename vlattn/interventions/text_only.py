"""The prompt without its images on the model's own decoder, beside the prompt with them, untouched by interventions.

`TextPrompt.run` is one stock forward. `TextStream` goes layer by layer, in step with a main stream that is under way,
so that what is learnt from both at one layer can act on both before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.runtime.hooks import Gate, HookSet, as_keywords
from vlattn.runtime.second_prompt import text_positions, without_image
from vlattn.runtime.session import Session

T = TypeVar("T")


def unseen(session: Session, run: Callable[[], T]) -> T:
    """`run()` without gradients, with no intervention of `session`, and unseen by a forward that is under way.

    transformers collects hidden states and attentions through hooks that ask a context variable whether to: in an
    empty context they rest.
    """
    with torch.no_grad(), session.gate.shut():
        return Context().run(run)


def output_projection(adapter: Adapter, layer: int) -> nn.Module:
    """The module that mixes the heads of a decoder layer; its input is what they put out, side by side."""
    projection = getattr(adapter.decoder_attention(layer), "o_proj", None)
    if not isinstance(projection, nn.Module):
        raise InputError(
            f"model: {type(adapter.decoder_attention(layer)).__name__} has no o_proj, so the outputs of its heads "
            "cannot be read"
        )
    return projection


def split_heads(adapter: Adapter, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Inputs of a layer's output projection [B, N, H * d] as heads [B, N, H, d]."""
    return x.unflatten(-1, (-1, adapter.decoder_attention(layer).head_dim))


def head_outputs(
    adapter: Adapter, layers: Iterable[int], run: Callable[[], Any], gate: Gate | None = None, rows: int = 1
) -> dict[int, torch.Tensor]:
    """What the heads of `layers` put out at the last `rows` positions while `run()` runs.

    Read before any method changes them. gate: calls behind it, when shut, are not looked at.

    Returns:
        {layer: [B, rows, H, d]}, copies.
    """
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if gate is None or not gate.closed:
                found[layer] = split_heads(adapter, layer, args[0][:, -rows:].detach().clone())

        return hook

    handles = [
        output_projection(adapter, layer).register_forward_pre_hook(keep(layer), prepend=True) for layer in layers
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class TextPrompt:
    """A batch of prompts without their visual tokens and what a family wraps around them, padded on the left.

    embeds: [B, N, D].
    alive: bool [B, N], no padding.
    had_image: bool [B], whether anything visual was taken out; where not, the image changes nothing by definition.
    """

    embeds: torch.Tensor
    alive: torch.Tensor
    had_image: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, call: dict[str, Any], session: Session) -> TextPrompt:
        """From the keyword arguments of the multimodal forward, in a prefill that `session` has read.

        Raises:
            InputError: a prompt is nothing but visual tokens.
        """
        inputs = without_image(call, session)
        alive = inputs["attention_mask"].bool()
        empty = (~alive.any(1)).nonzero().flatten().tolist() if alive.shape[1] else list(range(len(alive)))
        if empty:
            raise InputError(
                f"input_ids: nothing is left of prompt {empty[0]} without its visual tokens; put text beside the image"
            )
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = session.adapter.language_model.get_input_embeddings()(inputs["input_ids"])
        assert session.visual is not None
        return cls(embeds, alive, session.visual.mask.any(1))

    def only_where_image(self, vhd: torch.Tensor) -> torch.Tensor:
        """VHD [B, ...] with 0 for prompts that had no image, in place of what rounding makes of it."""
        return vhd.masked_fill(~self.had_image.to(vhd.device).view(-1, *[1] * (vhd.ndim - 1)), 0)

    def arguments(self, adapter: Adapter) -> dict[str, Any]:
        """Keyword arguments of the language model, positions counted anew."""
        return {
            "inputs_embeds": self.embeds,
            "attention_mask": self.alive.long(),
            "position_ids": places_for(adapter, text_positions(self.alive)),
        }

    def run(self, session: Session, layers: Iterable[int]) -> dict[int, torch.Tensor]:
        """One stock forward; what the heads of `layers` put out at the last position, {layer: [B, H, d]}."""
        adapter = session.adapter
        call = {**self.arguments(adapter), "use_cache": False}
        found = head_outputs(adapter, layers, lambda: unseen(session, lambda: adapter.language_model(**call)))
        return {layer: heads[:, -1] for layer, heads in found.items()}


def places_for(adapter: Adapter, places: torch.Tensor) -> torch.Tensor:
    """Position ids of text [B, N] as the language model wants them: three times over where it has M-RoPE."""
    return places.expand(3, -1, -1) if adapter.mrope else places


class _AllSeen(Exception):
    """Ends a forward of which only the arguments of its layers were wanted."""


class TextStream:
    """A text-only prompt that goes through the decoder layer by layer, when told to."""

    def __init__(self, session: Session, prompt: TextPrompt) -> None:
        self._session, self._next = session, 0
        self._arguments = _layer_arguments(session, prompt)
        self._hidden: torch.Tensor = self._arguments[0]["hidden_states"]

    def run_through(self, layer: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Go on to the end of `layer`; `edit` gets the input of its output projection [B, N, H * d] and replaces it."""
        unseen(self._session, lambda: self._run_through(layer, edit))

    def _run_through(self, last: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        adapter = self._session.adapter
        hooks = HookSet()  # behind a gate of its own: the session's is shut
        try:
            while self._next <= last:
                if self._next == last:
                    projection = output_projection(adapter, last)
                    hooks.before(projection, lambda module, args, kwargs: ((edit(args[0]), *args[1:]), kwargs))
                # Not called but run: whatever hooks a layer is for the main stream.
                arguments = {**self._arguments[self._next], "hidden_states": self._hidden}
                output = adapter.decoder_layers[self._next].forward(**arguments)
                self._hidden = output[0] if isinstance(output, tuple) else output
                self._next += 1
        finally:
            hooks.remove()


def _layer_arguments(session: Session, prompt: TextPrompt) -> list[dict[str, Any]]:
    """What stock code calls each decoder layer with: masks and rotary tables of the layer's kind.

    The forward is left as soon as a layer of each kind has been called, in most families before any has run.
    """
    adapter = session.adapter
    kinds = list(getattr(adapter.text_config, "layer_types", None) or ["all"] * len(adapter.decoder_layers))
    seen: dict[str, dict[str, Any]] = {}

    def note(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(kind, as_keywords(module, args, kwargs))
            if len(seen) == len(set(kinds)):
                raise _AllSeen

        return hook

    hooks = HookSet()
    for layer, kind in zip(adapter.decoder_layers, kinds, strict=True):
        hooks.before(layer, note(kind))
    call = {**prompt.arguments(adapter), "use_cache": False}
    try:
        unseen(session, lambda: adapter.language_model(**call))
    except _AllSeen:
        pass
    finally:
        hooks.remove()
    return [seen[kind] for kind in kinds]
