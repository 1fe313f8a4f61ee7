"""What an intervention did to the last prompt it saw."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Trace:
    """Filled during prefill, overwritten by the next one.

    kept: int64 [images, K], ascending patch ids that reached the decoder (CLS never counts); None before any image.
    kept_by_layer: {vision layer index: int64 [images, n]}: patch ids alive after each pruning inside the encoder;
        rows that kept fewer than n are padded with -1 at the end.
    visual_tokens: features one image has without pruning.
    prompt_length, kept_length: positions of the longest prompt before and after the drop, padding not counted.
    """

    kept: torch.Tensor | None = None
    kept_by_layer: dict[int, torch.Tensor] = field(default_factory=dict)
    visual_tokens: int = 0
    prompt_length: int = 0
    kept_length: int = 0

    def summary(self) -> dict[str, float | int]:
        """Plain numbers, ready for JSON."""
        images, kept = (0, 0) if self.kept is None else tuple(self.kept.shape)
        return {
            "images": images,
            "visual_tokens": self.visual_tokens,
            "kept": kept,
            "kept_ratio": kept / self.visual_tokens if self.visual_tokens else 0.0,
            "encoder_prunings": len(self.kept_by_layer),
            "prompt_length": self.prompt_length,
            "kept_length": self.kept_length,
        }
