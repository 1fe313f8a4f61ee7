"""The model's side of OPERA: one cache for all beams, tokens fed to it, tried behind it and taken back from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlattn.errors import InputError
from vlattn.interventions.opera_scores import summary_rows
from vlattn.runtime.hooks import cache_argument
from vlattn.runtime.routing import AttentionCall, Plain, base_name
from vlattn.runtime.session import Session


@dataclass
class Read:
    """One reading of the last layer. rows: [R, Q, K], as `summary_rows` makes them; visual: bool [R, K]; prompt: its
    keys that are the prompt's.
    """

    rows: torch.Tensor
    visual: torch.Tensor
    prompt: int


class RowReader(Plain):
    """Looks at the attention rows of the queries at hand while it is `open`, and leaves them as they are."""

    def __init__(self) -> None:
        self.open = False
        self.last: Read | None = None

    def rows(self, call: AttentionCall) -> int:
        return call.query.shape[2] if self.open else 0

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.last = Read(summary_rows(weights), call.visual, call.prompt)
        return weights, None

    def take(self) -> Read:
        """The reading of the last forward; it is let go of."""
        read, self.last = self.last, None
        assert read is not None
        return read


class Stream:
    """B prompts with K rows each, in a batch of R = B * K, that all have equally many generated tokens in the cache.

    given: int64 [R, T], the prompts; T = 0 where they were given as embeddings.
    held: int64 [R, t], the generated tokens that the cache holds.
    forwards: runs of the model.
    """

    def __init__(
        self, session: Session, reader: RowReader, model: Any, given: torch.Tensor, arguments: dict[str, Any]
    ) -> None:
        self._session, self._reader, self._model, self._arguments = session, reader, model, arguments
        self.given, self.held, self.forwards = given, given[:, :0], 0
        name = cache_argument(model)
        self.cache: Any = arguments.get(name)
        layers = getattr(self.cache, "layers", [])
        if not isinstance(self.cache, DynamicCache) or any(getattr(layer, "is_sliding", False) for layer in layers):
            raise InputError(
                f"{name}: OPERA takes tokens back from the cache, which this {type(self.cache).__name__} does not "
                "allow; leave the cache to generate, and take a model without sliding windows"
            )
        if held := self.cache.get_seq_length():
            raise InputError(f"{name}: it holds {held} positions already; give an empty one, or none")
        implementation = base_name(session.adapter.text_config._attn_implementation)
        # Others may edit the row of a step's only token, and cuts inside the decoder make masks of their own.
        alone = len(session.members) == 1 and not session.adapter.masks_above_decoder
        self.at_once = alone and implementation in ("sdpa", "eager")

    @property
    def followed(self) -> bool:
        """Whether somebody else's cache follows this one, as that of a second stream does."""
        return "reorder_cache" in vars(self.cache)

    @property
    def ids(self) -> torch.Tensor:
        """Prompts and what the cache holds of their answers, int64 [R, T + t]."""
        return torch.cat([self.given, self.held], 1)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that stand for visual features."""
        return self._session.adapter.placeholder_ids

    def prefill(self) -> torch.Tensor:
        """Logits behind the prompts [R, V], fp32."""
        return self._logits(
            self._model.prepare_inputs_for_generation(self.given, is_first_iteration=True, **self._arguments)
        )

    def _logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        return self._run(self._model, inputs).logits[:, -1].to(self.given.device, torch.float32)

    def _run(self, module: Any, inputs: dict[str, Any]) -> Any:
        self.forwards += 1
        return module(**inputs, return_dict=True)

    def _step_inputs(self, column: torch.Tensor) -> dict[str, Any]:
        """What the model is called with for one token more in each row; column: int64 [R, 1]."""
        new = self.held.shape[1] + 1
        arguments = self._model._update_model_kwargs_for_generation({}, dict(self._arguments), num_new_tokens=new)
        ids = torch.cat([self.ids, column], 1)
        return self._model.prepare_inputs_for_generation(ids, next_sequence_length=1, **arguments)

    def feed(self, answers: Sequence[torch.Tensor], done: Sequence[bool]) -> torch.Tensor:
        """One token more for each row, the first of its answer that the cache lacks: logits behind it [R, V], fp32.

        The cache is first cut to what all answers have in common with rows of it, and put into their order.

        Args:
            answers: for each prompt int64 [K, n], the tokens of its beams; n of its own.
            done: for each prompt, whether nothing depends on it any more: it says its last token again and again.
        """
        column = self._follow(answers, done)
        logits = self._logits(self._step_inputs(column))
        self.held = torch.cat([self.held, column], 1)
        return logits

    def _follow(self, answers: Sequence[torch.Tensor], done: Sequence[bool]) -> torch.Tensor:
        """Cut and order the cache; returns the next token of each row [R, 1]."""
        number, common, sources = len(answers[0]), self.held.shape[1], []
        for at, (ids, idle) in enumerate(zip(answers, done, strict=True)):
            rows = self.held[at * number : (at + 1) * number]  # [K, t]
            source = torch.arange(number, device=rows.device)
            if not idle:
                limit = min(rows.shape[1], ids.shape[1] - 1)  # the last token is fed again, for its logits
                same = ids[:, None, :limit] == rows[None, :, :limit]  # [K, K, limit]
                shared, source = same.int().cumprod(-1).sum(-1).max(1)  # [K]
                common = min(common, int(shared.min()))
            sources.append(source + at * number)
        order = torch.cat(sources)
        self.cache.reorder_cache(order)
        self._take_back(self.held.shape[1] - common)
        self.held = self.held[order, :common]
        return torch.cat([ids[:, min(common, ids.shape[1] - 1)] for ids in answers])[:, None]

    def _take_back(self, tokens: int) -> None:
        if tokens:
            self.cache.crop(-tokens)

    # Candidates -------------------------------------------------------------------------------------------------------
    def attempt(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each of C tokens would look at, behind what the cache holds.

        Args:
            tokens: int64 [R, C].

        Returns:
            Its row on the generated tokens and itself [R, C, t + 1], and what it has on the image [R, C].
        """
        inputs = self._step_inputs(tokens[:, :1])
        tokens = tokens.to(inputs["input_ids"].device)
        if self.at_once and inputs.get("position_ids") is not None:
            return self._attempt_at_once(inputs, tokens)
        found = [self._read({**inputs, "input_ids": column}) for column in tokens.split(1, 1)]
        return torch.cat([row for row, _ in found], 1), torch.cat([image for _, image in found], 1)

    def _attempt_at_once(self, inputs: dict[str, Any], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All C at one position, under a mask by which each sees the cache and itself."""
        rows, count = tokens.shape
        behind = int(self.cache.get_seq_length())
        mask = inputs.get("attention_mask")
        seen = tokens.new_ones(rows, behind) if mask is None else mask[:, :behind]
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
        allowed = torch.cat([seen.bool()[:, None].expand(-1, count, -1), own], 2)[:, None]  # [R, 1, C, behind + C]
        if base_name(self._session.adapter.text_config._attn_implementation) == "eager":
            least = torch.finfo(self._model.dtype).min
            allowed = torch.where(allowed, 0.0, least).to(self._model.dtype)
        inputs = {**inputs, "input_ids": tokens, "attention_mask": allowed}
        for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
            # Where older transformers give token types of the whole sequence, no step reads them.
            if inputs.get(name) is not None and inputs[name].shape[-1] == 1:
                inputs[name] = inputs[name].expand(*inputs[name].shape[:-1], count)
        return self._read(inputs)

    def _read(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run Q tokens, take them back: their rows on the generated tokens and themselves, and their image's share."""
        inputs.pop("logits_to_keep", None)  # the head is not run
        self._reader.open = True
        try:
            self._run(self._session.adapter.multimodal, inputs)
        finally:
            self._reader.open = False
        read = self._reader.take()
        count = read.rows.shape[1]
        self._take_back(count)
        image = (read.rows * read.visual[:, None]).sum(-1)  # [R, Q]
        own = read.rows[..., -count:].diagonal(dim1=1, dim2=2)[..., None]  # [R, Q, 1]
        rows = torch.cat([read.rows[..., read.prompt : -count], own], 2)  # [R, Q, t + 1]
        return rows.to(self.given.device), image.to(self.given.device)
