"""Raised attention logits on one unpadded prompt, in plain loops: full matrices, no cache, every layer spelled out.

The rows of naive_decoder_pruners.py are used; nothing comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


@torch.no_grad()
def run(
    pruners: Any,
    model: Any,
    row: Any,
    gamma: Sequence[float],
    layers: Sequence[int],
    *,
    at_prefill: bool = True,
    by_head: bool = False,
    stages: dict[int, Any] | None = None,
) -> torch.Tensor:
    """Logits [n, V] of what is left.

    Args:
        pruners: the module naive_decoder_pruners. row: its Row, generated tokens included.
        gamma: by running index of the visual token.
        layers: decoder layers whose attention is edited, in the last row of the prompt and in those behind it.
        at_prefill: False to leave the prompt's last row alone.
        by_head: multiply by each head's visual mass in the prompt's last row over the mean of all heads, 2 at most.
        stages: by layer, what drops tokens after it.
    """
    language = model.model.language_model
    for index, layer in enumerate(language.layers):
        module, normed = layer.self_attn, layer.input_layernorm(row.x)
        q = pruners.turned(model, pruners.heads(module.q_proj(normed), module.head_dim), row.positions)
        k = pruners.turned(model, pruners.heads(module.k_proj(normed), module.head_dim), row.positions)
        v = pruners.heads(module.v_proj(normed), module.head_dim)
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        logits = q @ k.transpose(1, 2) / math.sqrt(module.head_dim)
        logits = logits.masked_fill(~torch.ones(len(row.x), len(row.x), dtype=torch.bool).tril(), -torch.inf)
        stock, last = logits.softmax(-1), row.prompt - 1
        visual = [place for place, slot in enumerate(row.slots) if slot >= 0]
        scale = torch.ones(len(q), dtype=logits.dtype)
        if by_head and visual:
            mass = stock[:, last, visual].sum(-1)
            scale = (mass / mass.mean()).clamp(max=2)
        if index in layers:
            for i in range(last if at_prefill else last + 1, len(row.x)):
                for j in visual:
                    logits[:, i, j] += scale * gamma[row.slots[j]] * logits[:, i, j].abs()
        mixed = module.o_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
        hidden = row.x + mixed
        row.x = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if stages and index in stages:
            row = stages[index](row, stock)
    return model.lm_head(language.norm(row.x))


def informed(
    early: torch.Tensor, late: torch.Tensor, local: float = 0.25, iqr: float = 1.5
) -> tuple[list[int], list[int]]:
    """(local, summary) of one encoder image, from the scores [n] of its tokens."""
    values = late.double().numpy()
    low, high = np.percentile(values, 25), np.percentile(values, 75)
    summary = [i for i, value in enumerate(values) if value > high + iqr * (high - low)]
    order = sorted(range(len(early)), key=lambda i: (-float(early[i]), i))
    return sorted(set(order[: int(len(early) * local)]) - set(summary)), summary


def strengths(
    tower: Any, model: Any, pixels: torch.Tensor, alpha: float = 0.7, beta: float = 0.4, **how: Any
) -> list[list[float]]:
    """For each image of a LLaVA, gamma of its patches; tower: the module naive_tower."""
    found = []
    clip = model.config.vision_config.model_type == "clip_vision_model"
    layers = model.config.vision_config.num_hidden_layers
    late_layer = layers + model.config.vision_feature_layer  # -1 is the last layer's output
    early, late = (
        tower.look(model.model.vision_tower, pixels, layer).attention.sum(1)[:, :, int(clip) :]
        for layer in (0, late_layer)
    )
    for image in range(len(pixels)):
        scores = [x[image, 0] if clip else x[image].sum(0) for x in (early, late)]
        local, summary = informed(*scores, **how)
        found.append([alpha * (i in local) + beta * (i in summary) for i in range(len(scores[0]))])
    return found
