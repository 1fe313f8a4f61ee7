"""PyramidDrop: keep a shrinking share of the visual tokens at a few depths of the decoder.

"PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv 2410.17247.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.interventions.base import positions_for
from vlattn.interventions.decoder_pruner import (
    DecoderPruner,
    as_tuple,
    check_layers,
    is_count,
    is_share,
    keep_best,
    layers_of,
    share_of,
)
from vlattn.interventions.fastv import last_query_score
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


def probe_projections(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected query of the last position and the projected keys of all, as a decoder layer makes them.

    The layer's own norm and projections are called past their hooks, so that whoever watches the layer sees it run
    once.

    Args:
        layer: a decoder layer with input_layernorm and self_attn (q_proj, k_proj).
        hidden: what the layer is about to run on [B, N, C], no padding on the right.

    Returns:
        (q [B, 1, H * D], k [B, N, Hkv * D]), before any norm of heads and before rotary positions.
    """
    normed = layer.input_layernorm.forward(hidden)
    return layer.self_attn.q_proj.forward(normed[:, -1:]), layer.self_attn.k_proj.forward(normed)


def stage_counts(visual: int, ratios: tuple[float, ...]) -> list[int]:
    """How many of `visual` tokens are left after each stage: the ratios' shares of the original count, rounded down,
    at least 1."""
    return [max(1, share_of(visual, ratio)) for ratio in ratios]


@dataclass(frozen=True)
class PyramidDrop(DecoderPruner):
    """Keep a shrinking share of the visual tokens at a few depths, ranked by attention in the layer about to run.

    "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    arXiv 2410.17247. Before layer b runs, its norm and its query and key projections give the attention of the last
    prompt token at the current positions, over all keys it may see; the best visual tokens stay, all text does. Stages
    follow each other at prefill; decode steps keep what is left. All visual tokens of a prompt are ranked together.

    layers: the layers b in front of which tokens leave, from 1 on; a number in (0, 1) is a share of the depth, so that
        (0.25, 0.5, 0.75) is the default's (8, 16, 24) of 32 on a decoder of any depth.
    ratios: the share of the prompt's first count that is left after each stage, rounded down, at least one token.
    counts: the numbers left after each stage, instead of ratios; a prompt with no more than that loses nothing.
    positions: `compact` renumbers after each stage, as the released code does; `preserve` keeps position ids; `auto` is
        compact, and preserve where positions have three dimensions (Qwen-VL).
    """

    layers: tuple[float, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    counts: tuple[int, ...] | None = None
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers("layers", self.layers))
        object.__setattr__(self, "ratios", as_tuple("ratios", self.ratios))
        name, stages = "ratios", self.ratios
        if self.counts is not None:
            object.__setattr__(self, "counts", as_tuple("counts", self.counts))
            name, stages = "counts", self.counts
        right = is_share if name == "ratios" else is_count
        if not all(map(right, stages)) or list(stages) != sorted(stages, reverse=True):
            kind = "shares in (0, 1]" if name == "ratios" else "numbers of visual tokens, at least 1"
            raise InputError(f"{name}: got {stages}; give {kind}, none larger than the one before")
        if len(stages) != len(self.layers):
            raise InputError(
                f"{name}: got {len(stages)} for {len(self.layers)} layers; give one for each of layers={self.layers}"
            )
        if self.positions not in ("auto", "compact", "preserve"):
            raise InputError(f"positions: got {self.positions!r}; give 'auto', 'compact' or 'preserve'")

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        depth = len(session.adapter.decoder_layers)
        layers = layers_of("layers", self.layers, depth, 1, depth - 1)
        positions = positions_for("PyramidDrop", self.positions, "compact", session.adapter)
        budget: list[list[int]] = []  # of each prompt, by stage

        def stage(number: int) -> Request:
            def select(state: LayerState) -> Cut:
                if number == 0:
                    budget[:] = [self._left(n) for n in state.visual.sum(1).tolist()]
                return keep_best(self._score(state), state, [left[number] for left in budget])

            return Request(layers[number] - 1, select, positions=positions)

        for number in range(len(layers)):
            session.cuts.after(stage(number), hooks)

    def _left(self, visual: int) -> list[int]:
        return list(self.counts) if self.counts is not None else stage_counts(visual, self.ratios)

    def _score(self, state: LayerState) -> torch.Tensor:
        """What the last prompt token would attend to in the next layer, heads averaged [B, n]."""
        adapter, index = state.adapter, state.layer + 1
        attention = adapter.decoder_attention(index)
        q, k = probe_projections(adapter.decoder_layers[index], state.hidden)
        cos, sin = _tables(state, index)
        q = adapter.decoder_states(index, "q", q, cos[..., -1:, :], sin[..., -1:, :])
        k = adapter.decoder_states(index, "k", k, cos, sin)
        scale = float(getattr(attention, "scaling", attention.head_dim**-0.5))
        window = getattr(attention, "sliding_window", None)
        seen = state.seen.clone()
        if window is not None:
            seen[:, :-window] = False
        return last_query_score(q, k, scale=scale, key_mask=seen)


def _tables(state: LayerState, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary tables of another layer at the positions of this one: not the same where layers of two types mix."""
    kinds = getattr(state.adapter.text_config, "layer_types", None)
    ids = state.arguments.get("position_ids")
    if kinds is None or kinds[layer] == kinds[state.layer] or state.adapter.mrope or ids is None:
        return state.arguments["position_embeddings"]
    return state.adapter.rotary(layer, state.hidden, ids)
