"""VAR in plain loops: one prompt in a Llama decoder, full attention weights, one head and one row at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Found:
    """logits: [n, V] of what is left. sinks, weights, chosen: {layer: positions, [H, n, n], {(head, row)}}."""

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sinks: dict[int, list[int]] = field(default_factory=dict)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)
    chosen: dict[int, set[tuple[int, int]]] = field(default_factory=dict)


def row_after(
    row: list[float], sinks: list[int], image: list[int], method: Any
) -> tuple[list[float], bool]:  # fmt: skip
    """One row of weights as the method leaves it, and whether it was chosen."""
    on_image = sum(row[j] for j in image)
    on_visual_sinks = sum(row[j] for j in image if j in sinks)
    free = [j for j in image if j not in sinks]
    on_free = sum(row[j] for j in free)
    has_visual_sink = any(j in sinks for j in image)
    if not on_free or on_image < method.min_visual_mass or (method.require_visual_sink and not has_visual_sink):
        return row, False
    if on_visual_sinks / sum(row[j] + method.eps for j in image) > 1 - method.rho_nonsink:
        return row, False
    on_sinks = sum(row[j] for j in sinks)
    new = list(row)
    for j in sinks:
        new[j] = (1 - method.move) * row[j]
    for j in free:
        new[j] = row[j] + method.move * on_sinks * row[j] / on_free
    return new, True


@torch.no_grad()
def run(
    model: Any,
    embeds: torch.Tensor,
    image: list[int],
    method: Any,
    prompt: int | None = None,
    cuts: dict[int, list[int]] | None = None,
) -> Found:
    """Args:
    embeds: [T, D] of the full sequence, generated tokens included.
    image: positions of visual tokens.
    method: a VAR with tau and sink_dims given.
    prompt: length of the prompt; what follows can be no sink.
    cuts: {layer: positions that are left after it}.
    """
    decoder = model.model.language_model
    depth = len(decoder.layers)
    prompt = len(embeds) if prompt is None else prompt
    found, hidden, places = Found(), embeds, list(range(len(embeds)))
    for number, layer in enumerate(decoder.layers):
        here = [places.index(j) for j in image if j in places]
        acts = method.skip_first_layers <= number < depth - int(method.skip_last_layer)
        sinks = [i for i in range(len(places)) if acts and places[i] < prompt and _is_sink(hidden[i], method)]
        found.sinks[number] = [places[i] for i in sinks]
        first = max(here) + 1 if here else len(places)
        hidden = hidden + _attention(model, layer, number, hidden, places, sinks, here, first, method, found)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if cuts and number in cuts:
            stay = [i for i, place in enumerate(places) if place in cuts[number] or place >= prompt]
            hidden, places = hidden[stay], [places[i] for i in stay]
    found.logits = model.lm_head(decoder.norm(hidden))
    return found


def _is_sink(x: torch.Tensor, method: Any) -> bool:
    rms = math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + 1e-6)
    return max(abs(float(x[d])) / rms for d in method.sink_dims) > method.tau


def _attention(
    model: Any,
    layer: Any,
    number: int,
    hidden: torch.Tensor,
    places: list[int],
    sinks: list[int],
    image: list[int],
    first: int,
    method: Any,
    found: Found,
) -> torch.Tensor:
    attention = layer.self_attn
    n, width = len(places), attention.head_dim
    x = layer.input_layernorm(hidden)
    q = attention.q_proj(x).view(n, -1, width)
    k = attention.k_proj(x).view(n, -1, width)
    v = attention.v_proj(x).view(n, -1, width)
    tables = model.model.language_model.rotary_emb(hidden[None], torch.tensor([places]))
    q, k = (_turned(t, *tables) for t in (q, k))
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    found.weights[number] = torch.zeros(q.shape[1], n, n, dtype=q.dtype)
    found.chosen[number] = set()
    for h in range(q.shape[1]):
        for i in range(n):
            logits = [float(q[i, h] @ k[j, h // group]) / math.sqrt(width) for j in range(i + 1)]
            top = max(logits)
            total = sum(math.exp(s - top) for s in logits)
            row = [math.exp(s - top) / total for s in logits] + [0.0] * (n - i - 1)
            if i >= first and image and sinks:
                row, changed = row_after(row, sinks, image, method)
                if changed:
                    found.chosen[number].add((h, i))
            found.weights[number][h, i] = torch.tensor(row, dtype=q.dtype)
            out[i, h] = sum(row[j] * v[j, h // group] for j in range(i + 1))
    return attention.o_proj(out.reshape(n, -1))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, tables [1, n, d], turned into [n, H, d]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
