"""A second stream beside the one that generates: other inputs, a cache of its own, the same tokens, no interventions.

It runs inside a hook on the model, step by step with the main stream, and hands over the logits of its last position.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from vlattn.errors import InputError
from vlattn.runtime.hooks import as_keywords, cache_argument, cache_of, cached_length
from vlattn.runtime.sequence import Segment, valid_columns

if TYPE_CHECKING:
    from vlattn.runtime.session import Session

# (keyword arguments of the main prefill, the session) -> those of the second stream's prefill, without a cache.
MakeInputs = Callable[[dict[str, Any], "Session"], dict[str, Any]]
# (main logits [B, V], second logits [B, V], generated tokens so far, the new one counted: 1, 2, ...) -> [B, V].
Combine = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass
class _Stream:
    """The second stream of one generation. mask: bool [B, n], what its cache holds. times: rows per distinct prompt."""

    cache: Any
    mask: torch.Tensor
    step: int
    rope_deltas: Any = None


class SecondStream:
    """Two hooks on the model with the head. around: entered around every run of the second stream, gate shut."""

    def __init__(
        self, session: Session, make: MakeInputs, combine: Combine, around: Callable[[], Any] | None = None
    ) -> None:
        self._session, self._make, self._combine, self._around = session, make, combine, around
        self._call: dict[str, Any] = {}
        self._stream: _Stream | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = as_keywords(module, args, kwargs)
        self._prefill = not cached_length(self._call)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace the logits of the last position."""
        call, self._call = self._call, {}
        logits = output[0] if isinstance(output, tuple) else output.logits
        if call.get("labels") is not None:
            raise InputError("labels: contrasting two streams is for generation; leave the context to train")
        if self._prefill:
            second = self._start(module, call, output)
        else:
            second = self._go_on(module, call)
        stream = self._stream
        assert stream is not None
        stream.step += 1
        last = self._combine(logits[:, -1].float(), second.float(), stream.step)
        new = torch.cat([logits[:, :-1], last.to(logits.dtype)[:, None]], 1)
        if isinstance(output, tuple):
            return (new, *output[1:])
        return type(output)(**{**output, "logits": new})

    def _start(self, module: nn.Module, call: dict[str, Any], output: Any) -> torch.Tensor:
        inputs = self._make(call, self._session)
        mask = inputs["attention_mask"].bool()
        cache = DynamicCache(config=self._session.adapter.text_config)
        found, deltas = self._run(module, {**inputs, cache_argument(module): cache}, None)
        self._stream = _Stream(cache, mask, 0, deltas)
        main = cache_of(dict(output)) if not isinstance(output, tuple) else None
        if main is not None:
            self._follow_reorder(main)
        return found

    def _go_on(self, module: nn.Module, call: dict[str, Any]) -> torch.Tensor:
        stream = self._stream
        ids = call.get("input_ids")
        if stream is None or ids is None or ids.shape[0] != stream.mask.shape[0]:
            raise InputError(
                "cache: this step does not continue the last prompt, so the second stream has no state for it; "
                "start each generation with an empty cache, and give input_ids"
            )
        if ids.shape[1] != 1:
            raise InputError(
                f"input_ids: a second stream follows one token at a time, got {ids.shape[1]}; "
                "assisted generation, prompt lookup and prefix caches are not supported"
            )
        stream.mask = torch.cat([stream.mask, torch.ones_like(ids, dtype=torch.bool)], 1)
        inputs = {"input_ids": ids, "attention_mask": stream.mask.long(), cache_argument(module): stream.cache}
        if not self._session.adapter.mrope:
            inputs["position_ids"] = stream.mask.sum(1, keepdim=True) - 1
        found, stream.rope_deltas = self._run(module, inputs, stream.rope_deltas)
        return found

    def _run(self, module: nn.Module, inputs: dict[str, Any], deltas: Any) -> tuple[torch.Tensor, Any]:
        """One forward of the second stream; Qwen-VL keeps rope_deltas on the module, so they change hands around it."""
        holder = self._session.adapter.multimodal
        mine = getattr(holder, "rope_deltas", None)
        with self._session.gate.shut(), (self._around or nullcontext)():
            if deltas is not None:
                holder.rope_deltas = deltas
            try:
                output = module(**inputs, use_cache=True, logits_to_keep=1, return_dict=True)
                return output.logits[:, -1], getattr(holder, "rope_deltas", None)
            finally:
                if hasattr(holder, "rope_deltas"):
                    holder.rope_deltas = mine

    def _follow_reorder(self, main: Any) -> None:
        """Beam search reorders the main cache and tells nobody else: follow on this cache object alone."""
        stream, reorder = self._stream, main.reorder_cache

        def both(beam_idx: torch.Tensor) -> Any:
            if stream is not None:
                stream.cache.reorder_cache(beam_idx)
                stream.mask = stream.mask[beam_idx.to(stream.mask.device)]
                if isinstance(stream.rope_deltas, torch.Tensor):
                    stream.rope_deltas = stream.rope_deltas[beam_idx.to(stream.rope_deltas.device)]
            return reorder(beam_idx)

        main.reorder_cache = both


# Inputs of second streams ---------------------------------------------------------------------------------------------
def without_image(call: dict[str, Any], session: Session) -> dict[str, Any]:
    """The prompt with its visual tokens, and what a family wraps around them, taken out: left-padded, positions anew."""
    visual = session.visual
    assert visual is not None
    drop = visual.mask.clone()
    ids, embeds, mask = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
    if ids is not None:
        for wrapper in session.adapter.wrapper_ids:
            drop |= ids == wrapper
    batch, length = drop.shape
    valid = valid_columns(mask, batch, length, drop.device)
    segment = Segment.of(valid & ~drop)
    found: dict[str, Any] = {"attention_mask": segment.alive.long()}
    if ids is not None:
        found["input_ids"] = torch.where(segment.alive, segment.take(ids), ids.new_zeros(()))
    else:
        assert embeds is not None
        found["inputs_embeds"] = segment.rows(embeds)
    if not session.adapter.mrope:
        found["position_ids"] = (segment.alive.cumsum(1) - 1).clamp(min=0)
    return found
