"""FlowCut on images in tiles, frames or single views, in plain loops: a tower without CLS, and the prompt written out.

Nothing here comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Placed(NamedTuple):
    """What is left of one image or video, in the decoder's order: features [n, D]; slots: the placeholder that each
    takes the place of, counted from the image's first; total: how many placeholders there are."""

    features: torch.Tensor
    slots: list[int]
    total: int


class Prompt(NamedTuple):
    """A prompt without padding as it enters the decoder: embeds [n, D]; places [n]: where each token stands in the full
    prompt; images: where the tokens of each image stand among the n; slots: which of the prompt's placeholders each of
    the n is, -1 for text."""

    embeds: torch.Tensor
    places: torch.Tensor
    images: list[list[int]]
    slots: list[int]


def sequences(model: Any, inputs: dict[str, torch.Tensor], images: Sequence[Placed]) -> list[Prompt]:
    """Each prompt of a batch with the images put in by hand, in the order of the prompts."""
    config = model.config
    placeholders = {config.image_token_id, getattr(config, "video_token_id", config.image_token_id)}
    table, found, left = model.get_input_embeddings().weight.detach(), [], list(images)
    for ids, alive in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        tokens, rows, places, stands, slots, before = ids[alive].tolist(), [], [], [], [], 0
        at = 0
        while at < len(tokens):
            if tokens[at] not in placeholders:
                rows.append(table[tokens[at]])
                places.append(at)
                slots.append(-1)
                at += 1
                continue
            image = left.pop(0)
            assert set(tokens[at : at + image.total]) <= placeholders
            stands.append(list(range(len(rows), len(rows) + len(image.slots))))
            rows += list(image.features)
            places += [at + slot for slot in image.slots]
            slots += [before + slot for slot in image.slots]
            at, before = at + image.total, before + image.total
        found.append(Prompt(torch.stack(rows), torch.tensor(places), stands, slots))
    assert not left
    return found


def stitched(
    kept: Sequence[Sequence[int]], high: int, wide: int, side: int, size: tuple[int, int]
) -> tuple[list[tuple[int, int]], list[int], int]:
    """The order in which the kept patches of an anyres image enter the decoder.

    kept: patch ids of each tile, the small view first, then high x wide tiles of side x side patches. size: (height,
    width) of the original image, whose letterbox padding is cropped.

    Returns:
        ((tile, patch) of each, the placeholder it has in the stock prompt, where each row ends with a newline, and how
        many placeholders there are).
    """
    rows, columns, (height, width) = side * high, side * wide, size
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(height * (columns / width))) // 2
    else:
        left = (columns - int(width * (rows / height))) // 2
    order, slots, slot = [(0, patch) for patch in sorted(kept[0])], sorted(kept[0]), side * side
    for row in range(top, rows - top):
        for column in range(left, columns - left):
            tile, patch = 1 + row // side * wide + column // side, row % side * side + column % side
            if patch in kept[tile]:
                order.append((tile, patch))
                slots.append(slot)
            slot += 1
        slot += 1  # the row's newline
    return order, slots, slot


class Flow(NamedTuple):
    """feature [P', C]: output of the feature layer; kept: patch ids; by_layer: those left after each pruning; gap: by
    how much the worst score that stays beats the best that leaves, over the best."""

    feature: torch.Tensor
    kept: list[int]
    by_layer: dict[int, list[int]]
    gap: float


@torch.no_grad()
def without_cls(
    tower: Any, pixels: torch.Tensor, target: int, feature_layer: int, semantic: str = "none"
) -> list[Flow]:
    """FlowCut in a SigLIP tower on images [B, 3, h, w], the drop at each pruning shared: the largest of the batch.

    Scored by the mean query over all patches, as the released code does for Qwen2-VL; the last pruning follows the
    layer before the feature layer.
    """
    tower = getattr(tower, "vision_model", tower)
    states = list(tower.embeddings(pixels))
    kept = [list(range(len(x))) for x in states]
    averages: list[list[float] | None] = [None] * len(states)
    features, by_layer = states, [dict[int, list[int]]() for _ in states]
    gaps = [math.inf] * len(states)
    for number, layer in enumerate(tower.encoder.layers):
        attentions, wanted, n = [], [], len(states[0])
        pruning = number < feature_layer and n > target
        remaining = feature_layer - 1 - number
        for image, x in enumerate(states):
            y, attention = layer.layer_norm1(x), layer.self_attn
            d = y.shape[-1] // attention.num_heads
            q, k, v = (torch.stack(getattr(attention, f"{name}_proj")(y).split(d, -1)) for name in "qkv")
            mixed = [(a @ b.T / math.sqrt(d)).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
            x = x + attention.out_proj(torch.cat(mixed, -1))
            states[image] = x + layer.mlp(layer.layer_norm2(x))
            if not pruning:
                continue
            seen = [((a.mean(0) @ b.T) / math.sqrt(d)).softmax(-1) for a, b in zip(q, k, strict=True)]
            weights = (sum(seen) / len(seen)).tolist()
            size = [float(v[:, j].mean(0).abs().sum()) for j in range(n)]
            alike = _alike(v, semantic)
            if alike is None:
                score = [a * s for a, s in zip(weights, size, strict=True)]
            else:
                score = [(a / sum(weights) + b / sum(alike)) * s for a, b, s in zip(weights, alike, size, strict=True)]
            old = averages[image]
            averages[image] = score if old is None else [0.5 * a + 0.5 * b for a, b in zip(old, score, strict=True)]
            attentions.append(weights)
            if remaining:
                entropy = -sum(a * math.log(a + 1e-7) for a in weights) / math.log(n)
                wanted.append(round((n - target) / math.sqrt(remaining) * (1 - entropy**2)))
        if number == feature_layer:
            features = list(states)
        if not pruning or remaining % 2:
            continue
        keep = max(n - max(wanted), target) if remaining else target
        for image, average in enumerate(averages):
            assert average is not None
            ranked = sorted(range(n), key=lambda i: -average[i])
            if keep < n:
                gaps[image] = min(gaps[image], (average[ranked[keep - 1]] - average[ranked[keep]]) / max(average))
            chosen = sorted(ranked[:keep])
            states[image], averages[image] = states[image][chosen], [average[i] for i in chosen]
            kept[image] = [kept[image][i] for i in chosen]
            by_layer[image][number] = kept[image]
    return [Flow(*parts) for parts in zip(features, kept, by_layer, gaps, strict=True)]


def _alike(v: torch.Tensor, semantic: str) -> list[float] | None:
    """Likeness of each value [H, n, d] to the mean value; None for none."""
    if semantic == "none":
        return None
    if semantic == "softmax":
        return (sum((head @ head.mean(0)).softmax(0) for head in v) / len(v)).tolist()
    mean = v.mean(0)
    whole = mean.mean(0)
    return [max(float(one @ whole) / float(one.norm() * whole.norm()), 0.0) for one in mean]
