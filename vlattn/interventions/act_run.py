"""Attention calibration at work on one model: sinks found at each prefill, and the rows that follow edited by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.interventions.act_edit import Roles, calibrate, calibrated_outputs
from vlattn.interventions.act_sinks import (
    HeadScores,
    LayerSinks,
    Received,
    Sight,
    count_behind_image,
    find_sinks,
    first_token,
    last_text,
    received,
)
from vlattn.runtime.hooks import HookSet, as_keywords, cache_of
from vlattn.runtime.routing import AttentionCall, Plain

if TYPE_CHECKING:
    from vlattn.interventions.act import ACT
    from vlattn.runtime.session import Session
    from vlattn.runtime.trace import Trace


@dataclass
class _Layer:
    """What is known of one layer, from its prefill on.

    sinks: bool [B, H, n], later sinks among the prompt's keys, or all keys where averages run on.
    any_sinks: whether there are some; one look for all decode steps.
    first: bool [B, n], the first token.
    received: what keys have received so far, for averages that run on.
    """

    sinks: torch.Tensor
    any_sinks: bool
    first: torch.Tensor
    received: Received


@dataclass
class _Rows:
    """Rows of a prefill, bool [B, Q].

    first: the first of either kind; handed: how many there are from the first edited one on.
    """

    counted: torch.Tensor
    edited: torch.Tensor
    first: int
    handed: int


class ActRun(Plain):
    """The edits of attention rows that `ACT` makes on one model.

    heads: {layer: query heads}.
    dense: whether rows are edited by their weights even where all prompt rows are.
    """

    def __init__(
        self, method: ACT, session: Session, trace: Trace, heads: Mapping[int, tuple[int, ...]], dense: bool = False
    ) -> None:
        self.method, self.session, self.trace, self.heads = method, session, trace, dict(heads)
        # Where every row is edited, weights of all rows at once would be the [Q, K] matrix that attention avoids.
        self.on_outputs = method.edit_rows == "all" and not dense
        self._index: dict[int, torch.Tensor] = {}
        self._layers: dict[int, _Layer] = {}
        self._masks: dict[int, Any] = {}
        self._pending: dict[int, tuple[AttentionCall, HeadScores, torch.Tensor, torch.Tensor]] = {}
        self._rows_of: tuple[Any, _Rows] | None = None
        self._followed: Any = None

    def attach(self, hooks: HookSet) -> None:
        adapter = self.session.adapter
        for layer in self.heads:
            attention = adapter.decoder_attention(layer)
            hooks.before(attention, self._note(layer))
            if self.on_outputs:
                hooks.before(attention.o_proj, self._outputs(layer))
        self.session.attention.add(sorted(self.heads), self, hooks)
        hooks.also(self._unfollow)

    # Before attention -------------------------------------------------------------------------------------------------
    def _note(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = as_keywords(module, args, kwargs)
            self._masks[layer] = call.get("attention_mask")
            if self.method.decode == "running":
                self._follow(cache_of(call))

        return hook

    # What routing asks ------------------------------------------------------------------------------------------------
    def rows(self, call: AttentionCall) -> int:
        mask = self._masks.pop(call.layer, None)
        with torch.no_grad():
            return self._prompt(call, mask) if call.prefill else self._step(call, mask)

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads, rows = self._heads(call), weights.shape[2]
        old = weights[:, heads]  # [B, h, R, K]
        new, changed = calibrate(old, self._roles(call), self.method.beta)
        if call.prefill:
            changed = changed & self._prompt_rows(call).edited[:, None, -rows:]
        new = self.blend(call.layer, old, torch.where(changed[..., None], new, old))
        touched = changed.new_zeros(weights.shape[:3])
        touched[:, heads] = changed
        return weights.index_copy(1, heads, new), touched

    def blend(self, layer: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """What becomes of a row [B, h, R, K] and its edited form; for those who measure the edit."""
        return new

    # A prompt ---------------------------------------------------------------------------------------------------------
    def _prompt(self, call: AttentionCall, mask: Any) -> int:
        """Find the prompt's sinks; how many rows routing shall hand over."""
        rows = self._prompt_rows(call)
        scores = self._scores(call, mask)
        found = received(scores, rows.counted, rows.first)
        sinks = self._sinks(call, found)
        state = _Layer(sinks, bool(sinks.any()), first_token(call.alive), found)
        self._layers[call.layer] = state
        self._tell(call, state)
        if not state.any_sinks:
            return 0
        if not self.on_outputs:
            return rows.handed
        if len(self.session.attention.on(call.layer)) > 1:
            raise InputError(
                "edit_rows: 'all' works on what attention puts out, and another method edits attention rows of layer "
                f"{call.layer}; give edit_rows='text', or leave one of the contexts"
            )
        self._pending[call.layer] = (call, scores, found.lse, rows.edited)
        return 0

    def _prompt_rows(self, call: AttentionCall) -> _Rows:
        """Which rows count and which are edited: the same for all layers between two cuts."""
        now = self.session.cuts.at(call.layer)
        assert now is not None
        if self._rows_of is None or self._rows_of[0] is not now:
            assert self.session.visual is not None
            count = count_behind_image(self.session.visual.mask).to(now.alive.device)
            text = last_text(now.alive & (now.tokens.slot == -1), count)
            counted = now.alive if self.method.stat_rows == "all" else text
            edited = now.alive if self.method.edit_rows == "all" else text
            first, first_edited = _first(counted | edited), _first(edited)
            self._rows_of = (now, _Rows(counted, edited, first, edited.shape[1] - first_edited))
        return self._rows_of[1]

    def _tell(self, call: AttentionCall, state: _Layer) -> None:
        now = self.session.cuts.at(call.layer)
        assert now is not None
        found, n = state.received, call.prompt
        share = found.sums[..., :n] / found.rows.clamp(min=1)[:, None, None]
        where = (state.first[:, :n], now.tokens.visual, now.tokens.image, now.tokens.slot)
        notes = self.trace.notes.setdefault("sinks", {})
        assert isinstance(notes, dict)
        notes[call.layer] = LayerSinks(self.heads[call.layer], state.sinks[..., :n], share, *where)

    # A step behind it -------------------------------------------------------------------------------------------------
    def _step(self, call: AttentionCall, mask: Any) -> int:
        state = self._layers.get(call.layer)
        if self.method.decode == "off" or state is None:
            return 0
        batch, queries = call.query.shape[0], call.query.shape[2]
        if queries > 1 or batch != len(state.sinks):
            raise InputError(
                f"cache: {batch} x {queries} new positions go on with a prompt of {len(state.sinks)} rows, whose sinks "
                "were found in one prefill; give the whole prompt at once with an empty cache (prompts in pieces, "
                "prefix caches and assisted generation are not supported), or decode='off'"
            )
        if self.method.decode == "running":
            self._run_on(call, mask, state)
            return 1
        return 1 if state.any_sinks else 0

    def _run_on(self, call: AttentionCall, mask: Any, state: _Layer) -> None:
        """Count the new row in, and find sinks anew."""
        every = torch.ones(call.query.shape[0], 1, dtype=torch.bool, device=call.query.device)
        new = received(self._scores(call, mask), every)
        old, missing = state.received, call.key.shape[2] - state.received.sums.shape[-1]
        state.received = Received(
            F.pad(old.sums, (0, missing)) + new.sums,
            F.pad(old.counts, (0, missing)) + new.counts,
            old.rows + new.rows,
            old.lse,
        )
        state.sinks = self._sinks(call, state.received)

    def _follow(self, cache: Any) -> None:
        """Beam search reorders the cache and tells nobody else: have sums that run on follow, on this cache alone."""
        if cache is None or cache is self._followed or not hasattr(cache, "reorder_cache"):
            return
        self._unfollow()
        reorder = cache.reorder_cache

        def both(beam_idx: torch.Tensor) -> Any:
            for state in self._layers.values():
                old, order = state.received, beam_idx.to(state.sinks.device)
                state.received = Received(old.sums[order], old.counts[order], old.rows[order], old.lse)
            return reorder(beam_idx)

        cache.reorder_cache, self._followed = both, cache

    def _unfollow(self) -> None:
        if self._followed is not None:
            del self._followed.reorder_cache  # of the instance: the class's own is behind it
            self._followed = None

    # Parts ------------------------------------------------------------------------------------------------------------
    def _heads(self, call: AttentionCall) -> torch.Tensor:
        if call.layer not in self._index or self._index[call.layer].device != call.query.device:
            self._index[call.layer] = torch.tensor(self.heads[call.layer], device=call.query.device)
        return self._index[call.layer]

    def _scores(self, call: AttentionCall, mask: Any) -> HeadScores:
        attention = self.session.adapter.decoder_attention(call.layer)
        heads = self._heads(call)
        groups = call.query.shape[1] // call.key.shape[1]
        sight = Sight(mask, call.alive, call.query.shape[2], getattr(attention, "sliding_window", None))
        scale = float(getattr(attention, "scaling", attention.head_dim**-0.5))
        cap = getattr(attention, "attn_logit_softcapping", None)
        return HeadScores(call.query[:, heads], call.key[:, heads // groups], scale, sight, cap)

    def _sinks(self, call: AttentionCall, found: Received) -> torch.Tensor:
        method = self.method
        threshold: float | torch.Tensor = method.theta
        if method.threshold == "relative":
            threshold = method.alpha / call.alive.sum(1)  # [B]
        return find_sinks(found.mean, found.counts, call.alive, threshold, method.min_rows, method.spare)

    def _roles(self, call: AttentionCall) -> Roles:
        sinks = self._layers[call.layer].sinks
        sinks = F.pad(sinks, (0, call.key.shape[2] - sinks.shape[-1]))
        return Roles.of(sinks, call.visual, self.method.donors, self.method.recipients)

    # Where all rows of a prompt are edited ----------------------------------------------------------------------------
    def _outputs(self, layer: int) -> Any:
        """Before the output projection of a prefill: what the chosen heads put out, edited."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
            pending = self._pending.pop(layer, None)
            if pending is None:
                return None
            call, scores, lse, edited = pending
            heads = self._heads(call)
            groups = call.query.shape[1] // call.value.shape[1]
            outputs = args[0].unflatten(-1, (call.query.shape[1], -1)).transpose(1, 2)  # [B, H, Q, d]
            old = outputs[:, heads]
            lse = F.pad(lse, (old.shape[2] - lse.shape[2], 0))
            new, changed = calibrated_outputs(
                old, call.value[:, heads // groups], scores, lse, self._roles(call), self.method.beta
            )
            changed = changed & edited[:, None]
            new = torch.where(changed[..., None], new.to(old.dtype), old)
            outputs = outputs.index_copy(1, heads, new)
            return (outputs.transpose(1, 2).flatten(-2).to(args[0].dtype), *args[1:]), kwargs

        return hook


def _first(rows: torch.Tensor) -> int:
    """The first column of rows (bool [B, Q]) with an entry; Q for none."""
    some = rows.any(0)
    return int(some.int().argmax()) if bool(some.any()) else len(some)
