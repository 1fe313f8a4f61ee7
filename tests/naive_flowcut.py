"""FlowCut as the released code runs it, in plain loops over the tower's weights: full attention, no hooks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).permute(0, 2, 1, 3)


def entropy(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0)


def naive_flowcut(
    tower: nn.Module, x: torch.Tensor, target: int, feature_layer: int, semantic: str = "softmax"
) -> dict[str, Any]:
    """Run the layers on x [B, 1 + P, C] (the tower's embeddings) with the count shared by the batch.

    Returns:
        feature [B, 1 + P', C] of the feature layer, kept [B, P'], by_layer {layer: kept}, lengths: each layer's input.
    """
    batch, patches = x.shape[0], x.shape[1] - 1
    kept = [list(range(patches)) for _ in range(batch)]
    cumulative: torch.Tensor | None = None
    by_layer: dict[int, list[list[int]]] = {}
    lengths, feature = [], x
    for index, layer in enumerate(tower.encoder.layers):
        lengths.append(x.shape[1])
        attention = layer.self_attn
        heads = attention.num_heads
        y = nn.functional.layer_norm(
            x, x.shape[-1:], layer.layer_norm1.weight, layer.layer_norm1.bias, layer.layer_norm1.eps
        )
        q = split(linear(attention.q_proj, y) * (y.shape[-1] // heads) ** -0.5, heads)
        k, v = split(linear(attention.k_proj, y), heads), split(linear(attention.v_proj, y), heads)
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        mixed = (weights @ v).permute(0, 2, 1, 3).reshape(x.shape)
        x = x + linear(attention.out_proj, mixed)
        z = nn.functional.layer_norm(
            x, x.shape[-1:], layer.layer_norm2.weight, layer.layer_norm2.bias, layer.layer_norm2.eps
        )
        x = x + linear(layer.mlp.fc2, layer.mlp.activation_fn(linear(layer.mlp.fc1, z)))
        if index == feature_layer:
            feature = x
        patches = x.shape[1] - 1
        if patches <= target or index >= feature_layer:
            continue
        cls = sum(weights[:, h, 0, 1:] for h in range(heads)) / heads
        mean_value = sum(v[:, h] for h in range(heads)) / heads
        if semantic == "softmax":
            per_head = [torch.softmax((v[:, h] @ v[:, h, 0, :, None])[..., 0], -1) for h in range(heads)]
            similar = (sum(per_head) / heads)[:, 1:]
        else:
            similar = nn.functional.cosine_similarity(mean_value[:, :1], mean_value[:, 1:], dim=-1).clamp(min=0)
        size = mean_value[:, 1:].abs().sum(-1)
        score = (cls / cls.sum(-1, keepdim=True) + similar / similar.sum(-1, keepdim=True)) * size
        cumulative = score if cumulative is None else 0.5 * cumulative + 0.5 * score
        remaining = feature_layer - 1 - index
        if remaining % 2:
            continue
        if remaining == 0:
            keep = target
        else:
            wanted = []
            for b in range(batch):
                h = entropy((cls[b] / cls[b].sum()).tolist()) / math.log(patches)
                wanted.append((patches - target) / math.sqrt(remaining) * (1 - h * h))
            keep = max(patches - round(max(wanted)), target)
        chosen = [sorted(sorted(range(patches), key=lambda i: (-row[i], i))[:keep]) for row in cumulative.tolist()]
        rows = torch.tensor(chosen)
        x = torch.stack([torch.cat([x[b, :1], x[b, 1:][rows[b]]]) for b in range(batch)])
        cumulative = torch.stack([cumulative[b][rows[b]] for b in range(batch)])
        kept = [[kept[b][i] for i in chosen[b]] for b in range(batch)]
        by_layer[index] = kept
    return {"feature": feature, "kept": kept, "by_layer": by_layer, "lengths": lengths}


def embeddings(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What enters the first layer [B, 1 + P, C]."""
    return tower.pre_layrnorm(tower.embeddings(pixels))


def naive_features(
    model: nn.Module, pixels: torch.Tensor, keep: int, **options: str
) -> tuple[torch.Tensor, list[list[int]]]:
    """Projected features [images, keep, D] of the pruned tower, and the patch ids they come from."""
    tower = model.model.vision_tower
    layer = model.config.vision_feature_layer
    feature_layer = layer - 1 if layer >= 0 else len(tower.encoder.layers) + layer
    full = model.config.vision_feature_select_strategy == "full"
    found = naive_flowcut(tower, embeddings(tower, pixels), keep - int(full), feature_layer, **options)
    feature = found["feature"] if full else found["feature"][:, 1:]
    return model.model.multi_modal_projector(feature), found["kept"]
