"""Sequence editing inside the decoder: drop or hide visual tokens after a layer, and keep every later layer consistent.

A request asks to be called after one layer of each prefill. What it drops is gone for the layers above: they run on a
shorter sequence, and their part of the cache is shorter. Hooks on the layers above rewrite the mask, the position ids
and the rotary tables that stock code made once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.runtime.hooks import Gate, HookSet, as_keywords, cache_of
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.sequence import Positions, Segment, cache_width
from vlattn.runtime.tokens import VisualTokens

if TYPE_CHECKING:
    from vlattn.models.adapter import Adapter


@dataclass(frozen=True)
class Cut:
    """What a request wants after its layer.

    keep: bool [B, n], True for positions that stay; text must stay.
    hidden: [B, n, D] to go on with instead of the layer's output, for methods that merge; None for its output.
    slot: int64 [B, n], what each position holds from here on, for methods that move or merge tokens: the running index
        of a visual token within its prompt, -2 for a merged one; None: as before.
    """

    keep: torch.Tensor
    hidden: torch.Tensor | None = None
    slot: torch.Tensor | None = None


Select = Callable[[LayerState], "Cut | None"]


@dataclass(frozen=True, eq=False)
class Request:
    """Call `select` after decoder layer `layer` of each prefill.

    positions: `preserve` keeps position ids, `compact` renumbers what follows a dropped position.
    hide: hide the positions from attention instead of removing them; their rows run on.
    projections: of the layer's own q, k, v, which `select` reads ("qkv" for all).
    every_step: call again at every decode step, with the keys of the whole sequence (only with `hide`).
    """

    layer: int
    select: Select
    positions: Positions = "preserve"
    hide: bool = False
    projections: str = ""
    every_step: bool = False


@dataclass
class _Tokens:
    """What stands at each position of the sequence at hand [B, n]."""

    visual: torch.Tensor
    slot: torch.Tensor
    image: torch.Tensor


@dataclass
class _Now:
    """The sequence at hand, in one forward."""

    segment: Segment | None  # None: as the language model got it
    tokens: _Tokens
    alive: torch.Tensor
    ids: torch.Tensor | None = None  # [B, n] position ids, once a cut has renumbered them
    shift: torch.Tensor | None = None  # [B], what decode positions are lowered by


class DecoderCuts:
    """The requests on one model, and the state of the prompt at hand."""

    def __init__(self, adapter: Adapter, gate: Gate | None = None) -> None:
        self.adapter = adapter
        self.requests: list[Request] = []
        self._hooks = HookSet(gate)
        self._forget()

    # Requests ---------------------------------------------------------------------------------------------------------
    def after(self, request: Request, hooks: HookSet) -> None:
        """Register a request that leaves with `hooks`."""
        layers = len(self.adapter.decoder_layers)
        if not 0 <= request.layer < layers:
            raise InputError(
                f"layer: got {request.layer}, but this model's decoder has layers 0 to {layers - 1}; give one of them"
            )
        self.requests.append(request)
        hooks.also(lambda: self._drop_request(request))
        self._install()

    def _drop_request(self, request: Request) -> None:
        self.requests = [known for known in self.requests if known is not request]
        self._install()

    def _install(self) -> None:
        self._hooks.remove()
        self._forget()
        if not self.requests:
            return
        first = min(request.layer for request in self.requests)
        layers = self.adapter.decoder_layers
        wanted = {request.layer for request in self.requests}
        for index in range(len(layers)):
            if index > first:
                self._hooks.before(layers[index], self._rewrite(index))
            if index in wanted or (self.takes_deepstack and index < self.adapter.deepstack_layers):
                self._hooks.after(layers[index], self._cut(index))
            if index in wanted:
                self._hooks.before(layers[index], self._note(index))
                for name in sorted(set("".join(r.projections for r in self.requests if r.layer == index))):
                    projection = getattr(self.adapter.decoder_attention(index), f"{name}_proj")
                    self._hooks.after(projection, self._keep_projection(index, name))

    @property
    def takes_deepstack(self) -> bool:
        """Whether tokens may leave before all deepstack features have joined, so that adding those is done here."""
        return any(request.layer < self.adapter.deepstack_layers for request in self.requests)

    def close(self) -> None:
        self._hooks.remove()

    # One forward of the language model --------------------------------------------------------------------------------
    def _forget(self) -> None:
        self.prefill = False
        self.entering: dict[int, _Now] = {}
        self.now: _Now | None = None
        self.full = self.generated = 0
        self._start: _Now | None = None
        self._bases: dict[Request, _Now] = {}
        self._made: dict[tuple[Any, ...], Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._projected: dict[int, dict[str, torch.Tensor]] = {}
        self._deepstack: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def begin_prefill(self, alive: torch.Tensor, visual: VisualTokens, place: Segment | None) -> None:
        """The language model is about to run on a prompt.

        alive: bool [B, N0], no padding.
        visual: of the full prompt.
        place: where the N0 positions stand in the full prompt; None where nothing was dropped before.
        """
        self._forget()
        tokens = _Tokens(visual.mask, visual.slot, visual.image)
        if place is not None:
            tokens = _taken(tokens, place, alive)
        self.prefill, self.full = True, alive.shape[1]
        self.now = self._start = _Now(None, tokens, alive)

    def begin_step(self, cached: int) -> None:
        """The language model is about to run on positions behind the last prompt; `cached` are held by layer 0."""
        self.prefill, self.generated = False, cached - self.full
        self._made.clear()

    def end(self) -> None:
        self._made.clear()
        self._calls.clear()
        self._projected.clear()
        self._deepstack = None

    def take_deepstack(self, call: dict[str, Any]) -> dict[str, Any]:
        """Keep the deepstack features of a prefill for the hooks here."""
        where, features = call.get("visual_pos_masks"), call.get("deepstack_visual_embeds")
        if not self.takes_deepstack or where is None or features is None:
            return call
        self._deepstack = (where, list(features))
        return {**call, "visual_pos_masks": None, "deepstack_visual_embeds": None}

    def _keep_projection(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if self.now is not None:
                self._projected.setdefault(layer, {})[name] = output

        return hook

    def _note(self, layer: int) -> Any:
        """Before a layer with requests, behind the rewriting hook: remember the arguments it runs with."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[layer] = as_keywords(module, args, kwargs)

        return hook

    def _rewrite(self, layer: int) -> Any:
        """Before a layer above a cut: mask, positions and rotary tables of the sequence it runs on."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
            if self.prefill:
                if self.now is None:
                    return None
                self.entering[layer] = self.now
            now = self.entering.get(layer)
            if now is None or now.segment is None:
                return None
            call = as_keywords(module, args, kwargs)
            return (), self._rewritten(layer, now, call)

        return hook

    def _rewritten(self, layer: int, now: _Now, call: dict[str, Any]) -> dict[str, Any]:
        segment, hidden = now.segment, call["hidden_states"]
        assert segment is not None
        new = 0 if self.prefill else hidden.shape[1]
        generated = 0 if self.prefill else self._generated(layer, segment, call)
        call = dict(call)
        mask = call.get("attention_mask")
        # Masks of one step differ by the layer's kind (sliding or full) and by the sequence that it runs on.
        key = ("mask", id(mask), id(segment))
        if key not in self._made:
            how = {
                "width": cache_width(call, new or segment.length, layer),
                "implementation": self.adapter.text_config._attn_implementation or "eager",
                "dtype": hidden.dtype,
            }
            if self.prefill:
                self._made[key] = segment.mask(mask, generated=0, new=0, **how)
            else:
                self._made[key] = segment.step_mask(generated, new, **how)
        call["attention_mask"] = self._made[key]
        ids = call.get("position_ids")
        if self.prefill:
            if now.ids is not None:
                call["position_ids"] = now.ids
            elif ids is not None:
                call["position_ids"] = segment.take_positions(ids, -1)
        elif now.shift is not None:
            if ids is None:
                raise InputError(
                    f"{type(self.adapter.language_model).__name__}: positions='compact' needs position ids"
                )
            call["position_ids"] = ids - now.shift[:, None]
        tables = call.get("position_embeddings")
        if tables is not None:
            key = ("rotary", id(tables), id(segment))
            if key not in self._made:
                self._made[key] = self._rotary(layer, now, hidden, call["position_ids"], tables)
            call["position_embeddings"] = self._made[key]
        return call

    def _rotary(self, layer: int, now: _Now, hidden: torch.Tensor, ids: Any, tables: Any) -> Any:
        if now.shift is not None:
            return self.adapter.rotary(layer, hidden, ids)
        if not self.prefill:
            return tables
        assert now.segment is not None
        return tuple(now.segment.take_positions(table, -2) for table in tables)

    def _generated(self, layer: int, segment: Segment, call: dict[str, Any]) -> int:
        cache = cache_of(call)
        if cache is None:
            raise InputError("cache: a step behind a pruned prompt needs the cache of its prefill; pass it on")
        total = int(cache.get_seq_length(layer))
        generated = total - segment.length
        if generated != self.generated:
            raise InputError(
                f"cache: layer {layer} holds {total} positions where {segment.length + self.generated} were "
                "expected; after a cut inside the decoder the cache must not be cropped or replaced, as assisted "
                "generation and prompt lookup do"
            )
        return generated

    def _cut(self, layer: int) -> Any:
        """After a layer: add deepstack features where that is done here, then let its requests drop tokens."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.now is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            before = hidden
            if self.prefill:
                hidden = self._with_deepstack(layer, hidden)
            for request in self.requests:
                if request.layer == layer and self.prefill:
                    hidden = self._apply(request, hidden)
                elif request.layer == layer and request.every_step:
                    self._hide_anew(request, hidden)
            self._calls.pop(layer, None)
            self._projected.pop(layer, None)
            if hidden is before:
                return None
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _with_deepstack(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        if self._deepstack is None or layer >= len(self._deepstack[1]) or self.now is None:
            return hidden
        where, features = self._deepstack[0], self._deepstack[1][layer].to(hidden.device, hidden.dtype)
        full = hidden.new_zeros(*where.shape, hidden.shape[-1])
        full[where.to(hidden.device)] = features
        segment = self.now.segment
        return hidden + (full if segment is None else segment.rows(full))

    def _state(self, layer: int, hidden: torch.Tensor, now: _Now, behind: int = 0) -> LayerState:
        return LayerState(
            self.adapter,
            layer,
            hidden,
            F.pad(now.alive, (0, behind), value=True),
            F.pad(now.alive if now.segment is None else now.segment.keys, (0, behind), value=True),
            F.pad(now.tokens.visual, (0, behind)),
            F.pad(now.tokens.slot, (0, behind), value=-1),
            F.pad(now.tokens.image, (0, behind), value=-1),
            self._calls.get(layer, {}),
            projected=self._projected.get(layer, {}),
        )

    def _apply(self, request: Request, hidden: torch.Tensor) -> torch.Tensor:
        now = self.now
        assert now is not None
        if request.every_step:
            self._bases[request] = now
        state = self._state(request.layer, hidden, now)
        cut = request.select(state)
        if cut is None:
            return hidden
        hidden = hidden if cut.hidden is None else cut.hidden
        drop = now.alive & ~cut.keep
        if not bool(drop.any()):
            return hidden
        if request.hide:
            self.now = _hiding(now, drop)
            return hidden
        chosen = Segment.of(cut.keep & now.alive)
        tokens = _taken(now.tokens, chosen, chosen.alive)
        if cut.slot is not None:
            tokens.slot = torch.where(chosen.alive, chosen.take(cut.slot), -1)
        segment = chosen if now.segment is None else chosen.within(now.segment)
        ids, shift = self._renumbered(request, now, chosen, drop, state.arguments)
        self.now = _Now(segment, tokens, chosen.alive, ids, shift)
        return chosen.rows(hidden)

    def _hide_anew(self, request: Request, hidden: torch.Tensor) -> None:
        """At a decode step: choose again what the layers above may look at."""
        base = self._bases.get(request)
        if base is None:
            return
        behind = self.generated + hidden.shape[1]
        state = self._state(request.layer, hidden, base, behind)
        state.generated = self.generated
        layers = getattr(cache_of(state.arguments), "layers", None)
        held = getattr(layers[request.layer], "keys", None) if layers is not None else None
        wanted = base.alive.shape[1] + behind
        if held is None or held.shape[2] < wanted:
            raise InputError(
                f"cache: choosing anew at every step reads the keys of layer {request.layer} from the cache, and "
                f"{type(cache_of(state.arguments)).__name__} does not hold them; use a dynamic or static cache"
            )
        state.cached_key = held[:, :, :wanted]
        cut = request.select(state)
        drop = torch.zeros_like(base.alive) if cut is None else (base.alive & ~cut.keep[:, : base.alive.shape[1]])
        now = _hiding(base, drop)
        for layer in range(request.layer + 1, len(self.adapter.decoder_layers)):
            self.entering[layer] = now

    def _renumbered(
        self, request: Request, now: _Now, chosen: Segment, drop: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Position ids and decode shift after a cut; (None, None) while all cuts preserve positions."""
        if request.positions != "compact":
            return (None if now.ids is None else chosen.take(now.ids)), now.shift
        ids = now.ids
        if ids is None:
            ids = arguments.get("position_ids")
            if ids is None or ids.ndim != 2:
                raise InputError(
                    "positions: 'compact' needs one-dimensional position ids, which this model family does not use; "
                    "give positions='preserve'"
                )
            ids = ids.expand(drop.shape[0], -1)
        shift = drop.sum(1) if now.shift is None else now.shift + drop.sum(1)
        return chosen.take(ids - drop.cumsum(1)).clamp(min=0), shift

    def at(self, layer: int) -> _Now | None:
        """The sequence that a layer runs on, in the prompt at hand; None before any prompt."""
        return self.entering.get(layer, self._start)

    # What the trace tells ---------------------------------------------------------------------------------------------
    def visual_by_layer(self) -> list[list[int]]:
        """Visual tokens of each prompt that enter each layer, and that the last one hands on."""
        return self._by_layer(lambda now: now.tokens.visual.sum(1).tolist())

    def lengths(self) -> list[int]:
        """Positions of the longest row that enter each layer, padding not counted."""
        return self._by_layer(lambda now: int(now.alive.sum(1).max()))[:-1]

    def _by_layer(self, measure: Callable[[_Now], Any]) -> list[Any]:
        found: dict[int, Any] = {}
        steps = self._sequence()
        for now in steps:
            if id(now) not in found:
                found[id(now)] = measure(now)
        return [found[id(now)] for now in steps]

    def _sequence(self) -> list[_Now]:
        """What entered each layer, and what the last one handed on."""
        assert self._start is not None
        assert self.now is not None
        layers = range(len(self.adapter.decoder_layers))
        return [self.entering.get(layer, self._start) for layer in layers] + [self.now]

    def kept(self) -> dict[int, torch.Tensor]:
        """{layer after which tokens left: slots of the visual tokens that are left [B, n], -1 pads}."""
        found, steps = {}, self._sequence()
        for layer, (before, after) in enumerate(pairwise(steps)):
            if after is not before:
                found[layer] = _left_aligned(after.tokens.slot, after.tokens.visual).cpu()
        return found

    def surviving(self) -> Segment | None:
        """What is left after the last layer, in the sequence that the language model got; None for all of it."""
        return None if self.now is None else self.now.segment

    @property
    def hides(self) -> bool:
        return any(request.hide for request in self.requests)


def _hiding(now: _Now, drop: torch.Tensor) -> _Now:
    whole = Segment.whole(now.alive) if now.segment is None else now.segment
    tokens = _Tokens(now.tokens.visual & ~drop, now.tokens.slot, now.tokens.image)
    return _Now(whole.hiding(drop), tokens, now.alive, now.ids, now.shift)


def _left_aligned(slots: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The slots of visual positions of each row, in order, padded with -1 at the end."""
    counts = visual.sum(1)
    order = (~visual).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    places = torch.arange(order.shape[1], device=slots.device)
    return torch.where(places < counts[:, None], slots.gather(1, order), -1)


def _taken(tokens: _Tokens, segment: Segment, alive: torch.Tensor) -> _Tokens:
    return _Tokens(
        segment.take(tokens.visual) & alive,
        torch.where(alive, segment.take(tokens.slot), -1),
        torch.where(alive, segment.take(tokens.image), -1),
    )
