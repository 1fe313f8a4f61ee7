"""Stage one of the tiny LLaVA: teach the CLIP tower to see, by dense patch labels and a CLS multi-label loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlattn.assets.scenes import NAMES, SIZE, Scene, draw_scene
from vlattn.assets.training import Log, Optimiser, learning_rate_factor, load_checkpoint, save_checkpoint, step_rng

PATCH, MEAN, STD = 8, 0.5, 0.25
K = len(NAMES)
BATCH = 64

TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_act": "gelu",
}


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Normalised images, float32 [B, 3, S, S]."""
    stacked = np.stack([(s.image - MEAN) / STD for s in scenes]).astype(np.float32)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def patch_labels(scenes: list[Scene]) -> torch.Tensor:
    """Category under each patch's centre, int64 [B, patches]; K is background."""
    half = PATCH // 2
    return torch.from_numpy(np.stack([s.label_map(K)[half::PATCH, half::PATCH] for s in scenes])).flatten(1)


def presence(scenes: list[Scene]) -> torch.Tensor:
    """Multi-hot categories, float32 [B, K]."""
    out = torch.zeros(len(scenes), K)
    for i, s in enumerate(scenes):
        out[i, [o.category for o in s.objects]] = 1
    return out


def sincos_positions(grid: int, dim: int) -> torch.Tensor:
    """Two-dimensional sine-cosine table [grid * grid, dim], the starting point of the learned positions."""
    freq = 1 / 100 ** (torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(grid)[:, None] * freq
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [grid, dim / 2]
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, dim)


def train_tower(
    work: Path, sprites: list, steps: int, seed: int, device: str, compiled: bool, log: Log
) -> CLIPVisionModel:
    """Train (or go on training) for `steps` steps of 64 fresh scenes; returns the tower on the CPU."""
    torch.manual_seed(seed)
    # Attention by plain matrix products: on a CPU the fused kernel's backward pass takes half of the step.
    tower = CLIPVisionModel(CLIPVisionConfig(**(TOWER | {"attn_implementation": "eager"})))
    width = tower.config.hidden_size
    embeddings: Any = tower.get_submodule("embeddings")
    table = embeddings.position_embedding.weight
    with torch.no_grad():
        table[1:] = 0.3 * sincos_positions(SIZE // PATCH, width)
    heads = {"patch": nn.Linear(width, K + 1), "cls": nn.Linear(width, K), "pooled": nn.Linear(width, K)}
    net: Any = nn.ModuleDict({"tower": tower, **heads}).to(device)
    optimiser = Optimiser(net, lr=1.5e-3)
    path = work / "tower.pt"
    first = load_checkpoint(path, net, optimiser)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(device, torch.bfloat16):
            out = net["tower"](x, output_hidden_states=True)
            feature = out.hidden_states[-2]  # what LLaVA reads
            return net["patch"](feature[:, 1:]), net["cls"](feature[:, 0]), net["pooled"](out.pooler_output)

    run = torch.compile(forward) if compiled else forward
    for step in range(first, steps):
        rng = step_rng(seed, 1, step)
        scenes = [draw_scene(rng, sprites) for _ in range(BATCH)]
        labels, present = patch_labels(scenes).to(device), presence(scenes).to(device)
        patch, cls, pooled = (t.float() for t in run(pixels(scenes).to(device)))
        loss_patch = F.cross_entropy(patch.transpose(1, 2), labels)
        loss_cls = F.binary_cross_entropy_with_logits(cls, present)
        loss_pooled = F.binary_cross_entropy_with_logits(pooled, present)
        (loss_patch + 3 * loss_cls + loss_pooled).backward()
        optimiser.step(learning_rate_factor(step, steps))
        if step % 50 == 49 or step == steps - 1:
            front = labels < K
            right = (patch.argmax(-1) == labels)[front].float().mean().item()
            log(stage="tower", step=step + 1, patch=loss_patch.item(), cls=loss_cls.item(), foreground=right)
        if step % 200 == 199 or step == steps - 1:
            save_checkpoint(path, step + 1, net, optimiser)
    return net["tower"].cpu()
