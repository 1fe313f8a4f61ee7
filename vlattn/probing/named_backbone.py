"""Backbones by the texts that probing commands take: those of `load_backbone`, and one trained on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vlattn.errors import InputError
from vlattn.probing.backbones.base import Backbone, FinalNorm
from vlattn.probing.backbones.load import load_backbone
from vlattn.probing.digits_backbone import STEPS, digits_backbone

DIGITS = "digits-mim"


def named_backbone(
    text: str,
    work: str | Path,
    *,
    layer: int | None = None,
    final_norm: FinalNorm = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> Backbone:
    """A backbone by name.

    Args:
        text: what `load_backbone` takes, or "digits-mim[:STEPS]", trained on first use (see
            `vlattn.probing.digits_backbone`).
        work: folder in which a trained one is kept, as backbones/digits-mim-STEPS.safetensors.
        layer, final_norm, device: as `load_backbone` takes them.
        progress: hears of training; see `digits_backbone`.

    Raises:
        InputError: as `load_backbone` does, or STEPS is no number.
    """
    name, _, count = text.partition(":")
    if name != DIGITS:
        return load_backbone(text, layer=layer, final_norm=final_norm, device=device)
    if count and not count.isdecimal():
        raise InputError(f"backbone: got {text!r}; give {DIGITS}, or {DIGITS}:STEPS with a number of updates")
    steps = int(count or STEPS)
    model = digits_backbone(Path(work) / "backbones" / f"{DIGITS}-{steps}.safetensors", steps=steps, progress=progress)
    backbone = load_backbone(model, layer=layer, final_norm=final_norm, device=device)
    backbone.name = f"{DIGITS}:{steps}"
    return backbone
