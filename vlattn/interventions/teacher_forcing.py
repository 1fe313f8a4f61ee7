"""Given tokens fed behind a prompt, with its images and without, and what the heads put out at each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from vlattn.interventions.text_only import TextPrompt, head_outputs, places_for, unseen
from vlattn.runtime.hooks import Gate, cache_argument
from vlattn.runtime.second_prompt import text_positions
from vlattn.runtime.session import Session


class Forced(ABC):
    """A prompt with a cache of its own, and tokens fed behind it.

    mask: int64 [B, n], what the cache holds.
    gate: behind it, when shut, heads are not looked at.
    """

    gate: Gate | None = None

    def __init__(self, session: Session, mask: torch.Tensor) -> None:
        self.session, self.adapter, self.mask = session, session.adapter, mask
        self.cache = DynamicCache(config=self.adapter.text_config)

    @abstractmethod
    def prefill(self) -> None:
        """Run the prompt."""

    @abstractmethod
    def step(self, ids: torch.Tensor, places: torch.Tensor) -> None:
        """Feed ids [B, n] at places [B, n], counted from the first position that is no padding."""

    def forwards(self, generated: torch.Tensor, size: int) -> Iterator[tuple[int, Callable[[], None]]]:
        """Forwards, to be run in order, whose last n positions predict the next n tokens; `size` tokens at once."""
        yield 1, self.prefill
        for ids in generated[:, :-1].split(size, 1) if generated.shape[1] > 1 else ():
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
            places = self.mask.cumsum(1)[:, -ids.shape[1] :] - 1
            yield ids.shape[1], partial(self.step, ids, places)

    def heads(self, generated: torch.Tensor, size: int) -> dict[int, torch.Tensor]:
        """{layer: head outputs where each token was predicted [B, N, H, d]}."""
        layers = range(len(self.adapter.decoder_layers))
        found = [
            head_outputs(self.adapter, layers, forward, self.gate, rows)
            for rows, forward in self.forwards(generated, size)
        ]
        return {layer: torch.cat([heads[layer] for heads in found], 1) for layer in layers}


class Seeing(Forced):
    """The prompt as given, under whatever is attached to the model."""

    def __init__(self, session: Session, inputs: Mapping[str, Any]) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if mask is None:
            shape = inputs["inputs_embeds"] if ids is None else ids
            mask = torch.ones(shape.shape[:2], dtype=torch.long, device=shape.device)
        super().__init__(session, mask.long())
        self.gate = session.gate
        self.call = {**inputs, "attention_mask": self.mask}
        if not self.adapter.mrope:  # else the model counts them itself, image by image
            self.call.setdefault("position_ids", text_positions(self.mask))

    def _run(self, **call: Any) -> None:
        cache = {cache_argument(self.adapter.multimodal): self.cache}
        self.adapter.multimodal(**call, **cache, use_cache=True)

    def prefill(self) -> None:
        self._run(**self.call)

    def step(self, ids: torch.Tensor, places: torch.Tensor) -> None:
        if self.adapter.mrope:
            places = places + self.adapter.multimodal.rope_deltas.to(places.device)
        self._run(input_ids=ids, attention_mask=self.mask, position_ids=places_for(self.adapter, places))


class Blind(Forced):
    """The prompt without its images, under nothing."""

    def __init__(self, session: Session, prompt: TextPrompt) -> None:
        super().__init__(session, prompt.alive.long())
        self.prompt = prompt

    def _run(self, **call: Any) -> None:
        language_model = self.adapter.language_model
        cache = {cache_argument(language_model): self.cache}
        unseen(self.session, lambda: language_model(**call, **cache, use_cache=True))

    def prefill(self) -> None:
        self._run(**self.prompt.arguments(self.adapter))

    def step(self, ids: torch.Tensor, places: torch.Tensor) -> None:
        embeds = self.adapter.language_model.get_input_embeddings()(ids)
        positions = places_for(self.adapter, places)
        self._run(inputs_embeds=embeds, attention_mask=self.mask, position_ids=positions)
