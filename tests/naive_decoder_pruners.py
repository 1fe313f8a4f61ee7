"""FastV, SparseVLM and PyramidDrop on one unpadded prompt, in plain loops with full attention matrices.

The sequence is a list of rows; every layer of a Llama decoder is spelled out; nothing is cached: what follows the
prompt is computed anew with it. Nothing here comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# What a method does to the sequence after a layer, given that layer's weights [H, n, n].
Stage = Callable[["Row", torch.Tensor], "Row"]


@dataclass
class Row:
    """x [n, D], positions [n], and what each place holds: a visual token's index, -1 text, -2 merged.

    prompt: how many of the n belong to the prompt; the others were generated.
    lengths: n in front of each layer so far.
    """

    x: torch.Tensor
    positions: torch.Tensor
    slots: list[int]
    prompt: int
    lengths: list[int]

    @property
    def visual(self) -> list[int]:
        return [i for i, slot in enumerate(self.slots) if slot != -1]

    def taken(self, order: list[int], compact: bool) -> Row:
        """The places in `order`, with their positions or counted anew."""
        left = sum(i < self.prompt for i in order)
        positions = torch.arange(len(order)).to(self.positions) if compact else self.positions[order]
        return Row(self.x[order], positions, [self.slots[i] for i in order], left, self.lengths)


def start(tiny: Any, model: Any, inputs: dict[str, torch.Tensor], b: int, new: list[int]) -> Row:
    """Row b of a prompt's batch without its padding, followed by the tokens in `new`."""
    features = tiny.features(model, inputs["pixel_values"]).flatten(0, 1)
    ids, alive = inputs["input_ids"], inputs["attention_mask"].bool()
    before = int((ids[:b] == tiny.IMAGE).sum())
    rows, slots, count = [], [], 0
    for token in ids[b][alive[b]].tolist():
        if token == tiny.IMAGE:
            rows.append(features[before + count])
            slots.append(count)
            count += 1
        else:
            rows.append(model.get_input_embeddings().weight[token])
            slots.append(-1)
    prompt = len(rows)
    for token in new:
        rows.append(model.get_input_embeddings().weight[token])
        slots.append(-1)
    return Row(torch.stack(rows), torch.arange(len(rows)), slots, prompt, [])


def run(model: Any, row: Row, stages: dict[int, Stage]) -> tuple[torch.Tensor, Row, dict[int, list[int]]]:
    """(logits [n, V] of what is left, the row, the visual slots left after each stage)."""
    language, left = model.model.language_model, {}
    for index, layer in enumerate(language.layers):
        row.lengths.append(len(row.x))
        weights, mixed = attention(model, layer, row.x, row.positions)
        hidden = row.x + mixed
        row.x = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if index in stages:
            row = stages[index](row, weights)
            left[index] = [row.slots[i] for i in row.visual]
    return model.lm_head(language.norm(row.x)), row, left


def attention(
    model: Any, layer: Any, x: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [H, n, n], output [n, D]) of a layer's attention on its input; causal, and within `seen` [n, n]."""
    module, normed = layer.self_attn, layer.input_layernorm(x)
    q = turned(model, heads(module.q_proj(normed), module.head_dim), positions)
    k = turned(model, heads(module.k_proj(normed), module.head_dim), positions)
    v = heads(module.v_proj(normed), module.head_dim)
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    logits = q @ k.transpose(1, 2) / math.sqrt(module.head_dim)
    mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    weights = logits.masked_fill(~(mask if seen is None else mask & seen), -torch.inf).softmax(-1)
    return weights, module.o_proj((weights @ v).transpose(0, 1).flatten(1))


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.view(x.shape[0], -1, width).transpose(0, 1)  # [H, n, d]


def turned(model: Any, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding of [H, n, d], with angles in single precision as the model has them."""
    cos, sin = (table[0] for table in model.model.language_model.rotary_emb(x, positions[None]))  # [n, d]
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    out[..., :half] = x[..., :half] * cos[:, :half] - x[..., half:] * sin[:, :half]
    out[..., half:] = x[..., half:] * cos[:, half:] + x[..., :half] * sin[:, half:]
    return out


def best(score: list[float], places: list[int], keep: int) -> list[int]:
    """The `keep` places with the highest scores, ascending; score[i] belongs to places[i]."""
    order = sorted(range(len(places)), key=lambda i: (-score[i], i))[:keep]
    return sorted(places[i] for i in order)


def dropped(row: Row, kept: list[int], compact: bool) -> Row:
    gone = set(row.visual) - set(kept)
    return row.taken([i for i in range(len(row.x)) if i not in gone], compact)


def fastv(layer: int, keep: int, query: str = "last", compact: bool = False) -> dict[int, Stage]:
    def stage(row: Row, weights: torch.Tensor) -> Row:
        mean, places = weights.mean(0), row.visual
        phi = mean[row.prompt - 1] if query == "last" else mean[: row.prompt].sum(0) / row.prompt
        return dropped(row, best([float(phi[i]) for i in places], places, keep), compact)

    return {layer - 1: stage}


def masked_fastv(model: Any, row: Row, layer: int, keep: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [n, V] with tokens hidden instead of dropped, chosen anew by each generated token for itself, and the
    choices of the last prompt token and of each generated one.
    """
    language, n, chosen = model.model.language_model, len(row.x), []
    seen = torch.ones(n, n, dtype=torch.bool)
    for index, block in enumerate(language.layers):
        weights, mixed = attention(model, block, row.x, row.positions, seen if index >= layer else None)
        hidden = row.x + mixed
        row.x = hidden + block.mlp(block.post_attention_layernorm(hidden))
        if index == layer - 1:
            places = row.visual
            for i in range(n):
                phi = weights.mean(0)[max(i, row.prompt - 1)]
                kept = best([float(phi[j]) for j in places], places, keep)
                seen[i, [j for j in places if j not in kept and j != i]] = False
                if i >= row.prompt - 1:
                    chosen.append(kept)
    return model.lm_head(language.norm(row.x)), chosen


def pyramiddrop(model: Any, layers: list[int], counts: list[int], compact: bool = True) -> dict[int, Stage]:
    def stage(layer: Any, keep: int) -> Stage:
        def cut(row: Row, weights: torch.Tensor) -> Row:
            phi = attention(model, layer, row.x, row.positions)[0].mean(0)[row.prompt - 1]
            places = row.visual
            return dropped(row, best([float(phi[i]) for i in places], places, keep), compact)

        return cut

    decoder = model.model.language_model.layers
    return {b - 1: stage(decoder[b], keep) for b, keep in zip(layers, counts, strict=True)}


def flow(model: Any, target: int) -> dict[int, Stage]:
    """FlowCut's cut after the second layer, by that layer's queries, keys and values."""
    layer = model.model.language_model.layers[1]
    entering: list[torch.Tensor] = []

    def remember(row: Row, weights: torch.Tensor) -> Row:
        entering[:] = [row.x]
        return row

    def cut(row: Row, weights: torch.Tensor) -> Row:
        module, normed = layer.self_attn, layer.input_layernorm(entering[0])
        q = turned(model, heads(module.q_proj(normed), module.head_dim), row.positions)
        k = turned(model, heads(module.k_proj(normed), module.head_dim), row.positions)
        v = heads(module.v_proj(normed), module.head_dim)
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        last, places = row.prompt - 1, row.visual
        relevance = (k[:, places] @ q[:, last, :, None] / math.sqrt(module.head_dim))[..., 0].softmax(-1).mean(0)
        semantic = (v[:, places] @ v[:, last, :, None] / math.sqrt(module.head_dim))[..., 0].softmax(-1).mean(0)
        size = v[:, places].mean(0).abs().sum(-1)
        score = (relevance / relevance.sum() + semantic / semantic.sum()) * size
        return dropped(row, best(score.tolist(), places, target), True)

    return {0: remember, 1: cut}


def raters(row: Row) -> list[int]:
    """Places of the raters, from what enters the decoder."""
    visual = row.visual
    text = [i for i in range(visual[0], row.prompt) if row.slots[i] == -1]
    mean = torch.zeros(len(text), dtype=row.x.dtype)
    for i in visual:
        mean += torch.stack([row.x[i] @ row.x[j] for j in text]).softmax(0) / len(visual)
    return [j for j, m in zip(text, mean.tolist(), strict=True) if m > 1 / len(text)]


def sparsevlm(
    row: Row, layers: list[int], counts: list[int], plus: bool = False, compact: bool = True
) -> dict[int, Stage]:
    """Stages for a row that is about to enter the decoder; with 8 dimensions in each head."""
    ordinal = [sum(slot == -1 for slot in row.slots[:place]) for place in raters(row)]  # text never leaves

    def stage(keep: int) -> Stage:
        def cut(row: Row, weights: torch.Tensor) -> Row:
            text = [i for i, slot in enumerate(row.slots) if slot == -1]
            voters, places = [text[i] for i in ordinal], row.visual
            if plus:
                weights = undistanced(weights, row, voters, places)
            votes = [float(weights[:, voters, j].mean()) for j in places]
            if keep >= len(places):
                return row
            kept = best(votes, places, keep)
            return dropped(row, kept, compact) if plus else merged(row, kept, votes, compact)

        return cut

    return {layer: stage(keep) for layer, keep in zip(layers, counts, strict=True)}


def undistanced(weights: torch.Tensor, row: Row, voters: list[int], places: list[int]) -> torch.Tensor:
    """Weights over what distance alone would give, of the half of the heads that look at the image most."""
    weights, width = weights.clone(), 8
    for i in voters:
        for j in places:
            distance = float(row.positions[i] - row.positions[j])
            gain = sum(2 * math.cos(distance / 10000 ** (2 * d / width)) for d in range(width // 2))
            weights[:, i, j] /= max(gain / math.sqrt(width), 0.1 * math.sqrt(width))
    sums = [float(one[voters][:, places].sum()) for one in weights]
    return weights[sorted(range(len(sums)), key=lambda h: -sums[h])[: len(sums) // 2]]


def merged(row: Row, kept: list[int], votes: list[float], compact: bool) -> Row:
    """The row with the best pruned tokens merged: behind all visual tokens, or each at the place of its centre."""
    places = row.visual
    pruned = [i for i in places if i not in kept]
    ranked = sorted(pruned, key=lambda j: -votes[places.index(j)])[: int(0.3 * len(pruned)) + 1]
    means, _, centres = clusters(row.x[ranked], int(len(ranked) / 10) + 1)
    if not compact:
        x, slots = row.x.clone(), list(row.slots)
        for mean, centre in zip(means, centres, strict=True):
            x[ranked[centre]], slots[ranked[centre]] = mean, -2
        again = Row(x, row.positions, slots, row.prompt, row.lengths)
        return dropped(again, kept + [ranked[centre] for centre in centres], compact)
    short, at = dropped(row, kept, True), max(places) + 1 - len(pruned)
    x = torch.cat([short.x[:at], means, short.x[at:]])
    slots = short.slots[:at] + [-2] * len(means) + short.slots[at:]
    return Row(x, torch.arange(len(x)), slots, short.prompt + len(means), row.lengths)


def clusters(x: torch.Tensor, count: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """(means, the cluster of each token, the centres) of density peaks among x [n, C]; nothing may be equal."""
    n = len(x)
    distance = [[float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    density = [float(torch.tensor(sorted(row)[:count]).double().square().mean().neg().exp()) for row in distance]
    furthest = max(max(row) for row in distance)
    delta = []
    for i in range(n):
        above = [distance[i][j] for j in range(n) if density[j] > density[i]]
        delta.append(min(above) if above else furthest)
    centres = sorted(range(n), key=lambda i: -density[i] * delta[i])[:count]
    member = [
        centres.index(i) if i in centres else min(range(count), key=lambda c: distance[i][centres[c]]) for i in range(n)
    ]
    rows = [x[[i for i in range(n) if member[i] == c]].mean(0) for c in range(count)]
    return torch.stack(rows), member, centres
