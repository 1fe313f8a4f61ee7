"""Attention calibration of a Llama decoder in plain loops: one prompt at a time, full attention matrices, no cache."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """As `vlattn.ACT` has them; fade: how much of the edit is made."""

    beta: float = 0.4
    theta: float = 0.1
    threshold: str = "absolute"
    alpha: float = 5.0
    donors: str = "all"
    recipients: str = "all"
    stat_rows: str = "text"
    edit_rows: str = "text"
    decode: str = "frozen"
    spare: str = "first_token"
    min_rows: int = 8
    fade: float = 1.0


@torch.no_grad()
def embedded(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """One unpadded prompt as the decoder gets it [T, D], and which positions are visual."""
    visual = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(visual, 0))
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    embeds[visual] = torch.cat(list(features)).to(embeds.dtype)
    return embeds, visual.tolist()


@torch.no_grad()
def run(
    model: Any,
    embeds: torch.Tensor,
    visual: Sequence[bool],
    heads: Mapping[int, Sequence[int]],
    settings: Settings,
    prompt: int | None = None,
    start: int = 0,
) -> tuple[torch.Tensor, dict[tuple[int, int], list[int]]]:
    """A sequence through a Llama decoder.

    Args:
        embeds: [T, D], generated tokens included.
        visual: which of its positions are visual.
        heads: {layer: query heads}.
        prompt: how many positions are the prompt's; what follows was generated.
        start: position id of the first.

    Returns:
        (logits [T, V], {(layer, head): later sinks among the prompt's positions}).
    """
    decoder = model.model.language_model
    prompt = len(embeds) if prompt is None else prompt
    hidden, found = embeds[None], {}
    tables = decoder.rotary_emb(hidden, torch.arange(start, start + len(embeds))[None])
    for number, layer in enumerate(decoder.layers):
        weights, value = _attention(layer.self_attn, layer.input_layernorm(hidden), tables)
        for head in heads.get(number, ()):
            weights[head], found[number, head] = _edited(weights[head], visual, prompt, settings)
        output = (weights @ value).transpose(0, 1).flatten(1)[None]  # [1, T, H * d]
        hidden = hidden + layer.self_attn.o_proj(output)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))[0], found


def _attention(attention: Any, x: torch.Tensor, tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [H, T, T] and values [H, T, d]."""
    q, k, v = (
        getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in "qkv"
    )
    q, k = sys.modules[type(attention).__module__].apply_rotary_pos_emb(q, k, *tables)
    groups, n = q.shape[1] // k.shape[1], x.shape[1]
    k, v = k.repeat_interleave(groups, 1)[0], v.repeat_interleave(groups, 1)[0]
    logits = q[0] @ k.transpose(1, 2) * attention.head_dim**-0.5
    return logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1), v


def _edited(
    weights: torch.Tensor, visual: Sequence[bool], prompt: int, settings: Settings
) -> tuple[torch.Tensor, list[int]]:
    """One head's [T, T] edited, and the sinks of the prompt."""
    n = len(weights)
    behind = [i for i in range(prompt) if not visual[i] and any(visual[:i])]
    every = list(range(prompt))
    counted = every if settings.stat_rows == "all" else behind
    edited = every if settings.edit_rows == "all" else behind
    sinks = _sinks(weights, counted, prompt, settings)
    new = weights.clone()
    for i in edited:
        new[i] = _row(weights[i], sinks, visual, settings)
    for i in range(prompt, n):
        if settings.decode == "frozen":
            new[i] = _row(weights[i], sinks, visual, settings)
        if settings.decode == "running":
            now = _sinks(weights, [*counted, *range(prompt, i + 1)], i + 1, settings)
            new[i] = _row(weights[i], now, visual, settings)
    return weights + settings.fade * (new - weights), sinks


def _sinks(weights: torch.Tensor, counted: Sequence[int], length: int, settings: Settings) -> list[int]:
    threshold = settings.theta if settings.threshold == "absolute" else settings.alpha / length
    detected = []
    for j in range(length):
        rows = [float(weights[i, j]) for i in counted if i >= j]
        if len(rows) >= settings.min_rows and sum(rows) / len(rows) > threshold:
            detected.append(j)
    return detected[1:] if settings.spare == "first_detected" else [j for j in detected if j != 0]


def _row(row: torch.Tensor, sinks: Sequence[int], visual: Sequence[bool], settings: Settings) -> torch.Tensor:
    def fits(j: int, kind: str) -> bool:
        return kind == "all" or visual[j] == (kind == "visual")

    gives = [j for j in sinks if fits(j, settings.donors)]
    takes = [j for j in range(len(row)) if j not in sinks and fits(j, settings.recipients)]
    given, held = float(row[gives].sum()), float(row[takes].sum())
    if not given or held < 1e-6:
        return row
    new = row.clone()
    new[gives] *= settings.beta
    new[takes] *= 1 + (1 - settings.beta) * given / held
    return new
