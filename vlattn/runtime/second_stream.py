"""A second stream beside the one that generates: another prompt, a cache of its own, the same tokens, no interventions.

It runs inside a hook on the model, step by step with the main stream, and its logits are combined with those of the
main stream in the model's output, so that greedy search, sampling, beams and every logits processor go on from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from vlattn.errors import InputError
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.hooks import HookSet, as_keywords, cache_argument, cache_of, cached_length
from vlattn.runtime.second_prompt import rows_of, text_positions

if TYPE_CHECKING:
    from vlattn.runtime.session import Session

# (keyword arguments of the main prefill, the session) -> those of the second stream's prefill, without a cache:
# attention_mask [B', T'] (2-D), input_ids or inputs_embeds, and whatever else the model needs. B' divides the main
# stream's batch: each of its rows then serves as many rows in a row, as beams do. Positions may be left out.
MakeInputs = Callable[[dict[str, Any], "Session"], dict[str, Any]]
# (main logits [B, V], second logits [B, V], generated tokens so far, the new one counted: 1, 2, ...) -> [B, V].
# fp32 for half precision. The main logits given back as they are leave the output as it is.
Combine = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
Around = Callable[[], AbstractContextManager[Any]]

_BEHIND = 1e3  # e^-1000 is 0 in every dtype, and beside it fp32 still tells logits apart


@dataclass
class _Stream:
    """The second stream of one generation, R rows.

    mask: bool [R, n], what its cache holds, padding False; None where there is no padding.
    following: int64 [R], position id of the first generated token.
    held: positions that the main stream's cache holds after its last run.
    step: generated tokens, the one that the last logits are for counted.
    """

    cache: Any
    mask: torch.Tensor | None
    following: torch.Tensor
    held: int
    step: int = 1


class SecondStream:
    """Two hooks on the model with its head; `attach` registers them.

    make: the second prompt. combine: the two streams' logits into one. around: entered around every run of the second
    stream, while the gate of all interventions is shut.

    The state of a generation lives as long as the main stream's cache does.
    """

    def __init__(self, session: Session, make: MakeInputs, combine: Combine, around: Around = nullcontext) -> None:
        self._session, self._make, self._combine, self._around = session, make, combine, around
        self._call: dict[str, Any] = {}
        self._held = 0
        self._streams: weakref.WeakKeyDictionary[Any, _Stream] = weakref.WeakKeyDictionary()

    def attach(self, hooks: HookSet) -> None:
        """Follow the session's model until `hooks` are removed.

        Raises:
            InputError: the model has no head, or another second stream follows it already.
        """
        session = self._session
        if session.adapter.multimodal is session.model:
            raise InputError(
                f"model: {type(session.model).__name__} has no head whose logits could be contrasted; "
                "attach to the model with its head, before anything else is attached to its inside"
            )
        if session in _FOLLOWED:
            raise InputError(
                "model: its logits are contrasted with a second stream already; two contrasts do not add up to either "
                "method, so leave one context or drop one from compose"
            )
        _FOLLOWED.add(session)
        hooks.also(lambda: _FOLLOWED.discard(session))
        # In front of all hooks, so that what the user gave is seen before anybody takes it away.
        handle = session.model.register_forward_pre_hook(self._refuse_labels, prepend=True, with_kwargs=True)
        hooks.also(handle.remove)
        own = HookSet(session.gate)
        own.before(session.model, self.before)
        own.after(session.model, self.after)
        hooks.also(own.remove)

    def _refuse_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = as_keywords(module, args, kwargs)
        if call.get("labels") is not None and not self._session.gate.held and self._session.sees_images(call):
            raise InputError("labels: contrasting two streams is for generation; leave the context to train")

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the call: the main stream is about to run."""
        call = as_keywords(module, args, kwargs)
        keep = call.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep > 1:
            raise InputError(
                f"logits_to_keep: got {keep!r}; a second stream speaks for the last position alone, so give 0 or 1. "
                "Assisted generation and prompt lookup ask for more, and are not supported"
            )
        self._call, self._held = call, cached_length(call)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace the logits of the last position; where they are all there is, they stay in fp32."""
        call, self._call = self._call, {}
        main = _cache_among(output)
        if main is None:
            raise InputError(
                "use_cache: a second stream is followed by the cache of the first; leave use_cache at True"
            )
        with self._session.gate.shut(), self._around():
            stream, second = self._go_on(module, call, main) if self._held else self._start(module, call, main)
        stream.held = int(main.get_seq_length())
        logits = output[0] if isinstance(output, tuple) else output.logits
        mine = logits[:, -1].to(accumulation_dtype(logits.dtype))  # [R, V]
        last = self._combine(mine, second.to(mine.dtype), stream.step)
        if last is mine:
            return None
        last = _behind_the_rest(last, mine)[:, None]
        new = last if logits.shape[1] == 1 else torch.cat([logits[:, :-1], last.to(logits.dtype)], 1)
        if isinstance(output, tuple):
            return (new, *output[1:])
        output.logits = new
        return output

    def _start(self, module: nn.Module, call: dict[str, Any], main: Any) -> tuple[_Stream, torch.Tensor]:
        inputs = _distinct(self._make(call, self._session))
        mask = inputs["attention_mask"].bool()
        if not bool(mask.any(1).all()):
            raise InputError("input_ids: a prompt has nothing left for the second stream; put text beside the image")
        padded = not bool(mask.all())
        inputs["attention_mask"] = mask.long() if padded else None
        if inputs.get("position_ids") is None and not self._session.adapter.mrope:
            inputs["position_ids"] = text_positions(mask)
        cache = DynamicCache(config=self._session.adapter.text_config)
        logits, deltas = self._run(module, {**inputs, cache_argument(module): cache})
        following = _following(mask, inputs.get("position_ids"), deltas)
        ids = call.get("input_ids")
        rows = (call["inputs_embeds"] if ids is None else ids).shape[0]
        times = rows // mask.shape[0]
        if times > 1:
            cache.batch_repeat_interleave(times)
            mask, following, logits = (x.repeat_interleave(times, 0) for x in (mask, following, logits))
        stream = _Stream(cache, mask if padded else None, following, 0)
        self._streams[main] = stream
        _follow_reorder(main, stream)
        return stream, logits

    def _go_on(self, module: nn.Module, call: dict[str, Any], main: Any) -> tuple[_Stream, torch.Tensor]:
        stream, ids = self._streams.get(main), call.get("input_ids")
        if stream is None or ids is None or ids.shape[0] != stream.following.shape[0] or self._held != stream.held:
            raise InputError(
                "cache: this step does not continue the last prompt, so the second stream has no state for it; start "
                "each generation with an empty cache, give input_ids at each step, and do not crop or copy the cache"
            )
        if ids.shape[1] != 1:
            raise InputError(
                f"input_ids: a second stream follows one token at a time, got {ids.shape[1]} behind cached ones; "
                "assisted generation, prompt lookup, prefix caches and prefill_chunk_size are not supported"
            )
        if stream.mask is not None:
            stream.mask = torch.cat([stream.mask, torch.ones_like(ids, dtype=torch.bool)], 1)
        places = (stream.following + stream.step - 1)[:, None]  # [R, 1]
        inputs = {
            "input_ids": ids,
            "attention_mask": None if stream.mask is None else stream.mask.long(),
            "position_ids": places.expand(3, -1, -1) if self._session.adapter.mrope else places,
            cache_argument(module): stream.cache,
        }
        stream.step += 1
        return stream, self._run(module, inputs)[0]

    def _run(self, module: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """One forward of the second stream: last logits [B, V], and the rope_deltas that it left behind.

        Qwen-VL keeps these on the module, where those of the main stream must stand again afterwards.
        """
        holder = self._session.adapter.multimodal
        mine = getattr(holder, "rope_deltas", None)
        try:
            output = module(**inputs, use_cache=True, logits_to_keep=1, return_dict=True)
            return output.logits[:, -1], getattr(holder, "rope_deltas", None)
        finally:
            if hasattr(holder, "rope_deltas"):
                holder.rope_deltas = mine


# Sessions whose model has a second stream.
_FOLLOWED: weakref.WeakSet[Session] = weakref.WeakSet()


def _behind_the_rest(last: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """What is -inf in `last` alone, far behind all else instead, in the main stream's order [R, V].

    Its probability still is 0, but generation may ban each plausible token afterwards (min_new_tokens, bad words, no
    repeated n-grams), and with nothing finite left it would fail, or say token 0.
    """
    least = last.masked_fill(~last.isfinite(), torch.inf).amin(-1, keepdim=True)
    behind = least - _BEHIND + (mine - mine.amax(-1, keepdim=True))
    return torch.where(last.isneginf() & mine.isfinite(), behind, last)


def _cache_among(output: Any) -> Any:
    if isinstance(output, tuple):
        return next((entry for entry in output if isinstance(entry, Cache)), None)
    return cache_of(dict(output))


def _follow_reorder(main: Any, stream: _Stream) -> None:
    """Beam search reorders the main cache and tells nobody else: follow on this cache object alone."""
    # Weak, so that the cache does not hold itself and is freed as soon as generation lets go of it.
    place = weakref.ref(main)

    def both(beam_idx: torch.Tensor) -> Any:
        cache = place()
        assert cache is not None
        stream.cache.reorder_cache(beam_idx)
        stream.following = stream.following[beam_idx.to(stream.following.device)]
        if stream.mask is not None:
            stream.mask = stream.mask[beam_idx.to(stream.mask.device)]
        return type(cache).reorder_cache(cache, beam_idx)

    main.reorder_cache = both


def _distinct(inputs: dict[str, Any]) -> dict[str, Any]:
    """A prompt of text alone that stands in several rows in a row, as for beams, needs to run once."""
    ids, mask = inputs.get("input_ids"), inputs["attention_mask"]
    if ids is None or not set(inputs) <= {"input_ids", "attention_mask", "position_ids"}:
        return dict(inputs)
    both = torch.stack([ids.masked_fill(mask == 0, 0), mask.to(ids.dtype)], -1)  # [R, T, 2]
    new = (both[1:] != both[:-1]).flatten(1).any(1).tolist()  # where a row differs from the one before
    times = next(n for n in range(len(both), 0, -1) if len(both) % n == 0 and not _inside(new, n))
    return {name: rows_of(value, times) for name, value in inputs.items()}


def _inside(new: list[bool], times: int) -> bool:
    """Whether something new begins inside a group of `times` rows."""
    return any(begins and (row + 1) % times for row, begins in enumerate(new))


def _following(mask: torch.Tensor, ids: Any, deltas: Any) -> torch.Tensor:
    """Position id of the first generated token [B], from those of the prompt ([B, T], [3, B, T] or [4, B, T])."""
    if ids is None:  # the model made them: M-RoPE
        length = mask.sum(1)
        return length if deltas is None else length + deltas.to(length.device).view(-1)
    if ids.ndim == 3:
        ids = ids[-3:].amax(0)  # a fourth in front counts tokens
    return torch.where(mask, ids, 0).amax(1) + 1
