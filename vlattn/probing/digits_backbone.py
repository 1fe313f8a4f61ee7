"""A small vision transformer that has seen handwritten digits without labels: a real subject for probing, offline.

Trained to fill in masked patches, as in "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886. No
loss ever reaches its class token, so that what it knows lies in the patch tokens, as in large masked-image models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.backbones.timm_backbone import timm_images
from vlattn.probing.backbones.transforms import eval_transform
from vlattn.probing.data.digits import digits
from vlattn.probing.train_seed import seeded
from vlattn.runtime.run_folder import replacing

STEPS = 300
"""Updates by default, about a minute on one core."""

MASKED = 0.5
BATCH = 32
LR = 1e-3
SIZE, PATCH, DIM, DEPTH = 32, 4, 96, 4


def digits_vit() -> Any:
    """The transformer with random weights: 32 x 32 pixels, 64 patches and CLS, width 96, 4 blocks, a timm model."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=4, num_classes=0, class_token=True
    )


def digits_backbone(
    path: str | Path, *, steps: int = STEPS, seed: int = 0, progress: Callable[[int, float], object] | None = None
) -> Any:
    """The transformer in a file, trained and written there first where there is none.

    Args:
        path: safetensors file.
        steps: updates of 32 images; 0 leaves random weights.
        seed: of weights, order and masks.
        progress: called after each update with its number and its loss.

    Returns:
        A timm model for `vlattn.probing.backbones.load.load_backbone`.

    Raises:
        InputError: the file holds no such model.
    """
    file = Path(path)
    with seeded(seed, "digits backbone", 0):
        model = digits_vit()
        if file.is_file():
            _read(model, file)
        else:
            _train(model, steps, progress)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(partial))
    return model.eval().requires_grad_(False)


def masked_loss(
    model: Any, token: torch.Tensor, decoder: nn.Module, pixels: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean absolute error of the pixels of masked patches.

    Args:
        model: from `digits_vit`.
        token: [D], stands in for masked patches.
        decoder: D to the pixels of a patch.
        pixels: [B, 3, H, W].
        mask: bool [B, N], True where a patch is hidden; at least one is.
    """
    patches = model.patch_embed(pixels)  # [B, N, D]
    tokens = torch.where(mask[..., None], token.to(patches), patches)
    tokens = model._pos_embed(tokens)
    for block in model.blocks:
        tokens = block(tokens)
    guess = decoder(model.norm(tokens)[:, model.num_prefix_tokens :])
    true = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # [B, N, 3 * PATCH * PATCH]
    return (guess - true).abs()[mask].mean()


def draw_masks(images: int, patches: int) -> torch.Tensor:
    """bool [images, patches], the same number of True in each row, drawn from torch's generator."""
    order = torch.rand(images, patches).argsort(1)
    return order < round(MASKED * patches)


def _train(model: Any, steps: int, progress: Callable[[int, float], object] | None) -> None:
    images = digits(SIZE, "train", eval_transform(timm_images(model)))
    pixels = torch.stack([image for image, _ in images])  # type: ignore[attr-defined]
    token, decoder = nn.Parameter(torch.zeros(DIM)), nn.Linear(DIM, 3 * PATCH * PATCH)
    nn.init.normal_(token, std=0.02)
    parameters = [*model.parameters(), token, *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.05)
    warmup = max(1, steps // 20)
    model.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LR * factor
        rows = torch.randint(len(pixels), (BATCH,))
        loss = masked_loss(model, token, decoder, pixels[rows], draw_masks(BATCH, (SIZE // PATCH) ** 2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))


def _read(model: nn.Module, file: Path) -> None:
    try:
        model.load_state_dict(load_file(str(file)))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"path: {str(file)!r} holds no digits backbone ({reason}); delete it, or give another"
        ) from None
