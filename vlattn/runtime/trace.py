"""What an intervention did to the last prompt it saw."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Trace:
    """Filled during prefill, overwritten by the next one.

    kept: int64 [images, K], ascending patch ids that the encoder side handed on, by encoder image (tile or frame), CLS
        not counted; -1 pads rows that kept fewer. Where a method merges or reorders, in the decoder's order: -1 is also
        a CLS that it hands on, -2 a token merged from several. None where nothing was chosen there.
    kept_by_layer: {vision layer index: int64 [images, n]}: patch ids alive after each pruning inside the encoder;
        rows that kept fewer than n are padded with -1 at the end.
    kept_in_decoder: {decoder layer index: int64 [B, n]}: the visual tokens of each prompt that are left after that
        layer, as running indices of the prompt's visual tokens; -1 pads, -2 marks a token merged from several.
    visual_tokens: features one image has without pruning (the largest, where images differ).
    prompt_length, kept_length: positions of the longest prompt before and after the drop in front of the decoder,
        padding not counted.
    decoder_lengths: positions that enter each decoder layer in the longest row, padding not counted.
    visual_by_layer: for each decoder layer, how many visual tokens of each prompt enter it; the last entry, one more
        than there are layers, is what the last layer hands on.
    visual_full: visual tokens of each prompt without pruning.
    masked: True where a method hides visual tokens from attention instead of removing them: no time is saved.
    notes: what a method has to say about its last prefill, by name (the exit layer, the raters, ...).
    """

    kept: torch.Tensor | None = None
    kept_by_layer: dict[int, torch.Tensor] = field(default_factory=dict)
    kept_in_decoder: dict[int, torch.Tensor] = field(default_factory=dict)
    visual_tokens: int = 0
    prompt_length: int = 0
    kept_length: int = 0
    decoder_lengths: list[int] = field(default_factory=list)
    visual_by_layer: list[list[int]] = field(default_factory=list)
    visual_full: list[int] = field(default_factory=list)
    masked: bool = False
    notes: dict[str, object] = field(default_factory=dict)

    def budget(self) -> dict[str, float]:
        """Visual tokens per prompt in the three senses that tables mix up, means over the batch.

        final: left at the end. average: mean over decoder layers of what each layer processes. counted: mean over
        layers of what each layer hands on, so that a pruning layer already counts its smaller number (SparseVLM's way).
        """
        if not self.visual_by_layer:
            return {"final": 0.0, "average": 0.0, "counted": 0.0}
        means = [sum(layer) / len(layer) for layer in self.visual_by_layer]
        layers = len(means) - 1
        return {"final": means[-1], "average": sum(means[:-1]) / layers, "counted": sum(means[1:]) / layers}

    def summary(self) -> dict[str, float | int]:
        """Plain numbers, ready for JSON."""
        images, kept = (0, 0) if self.kept is None else tuple(self.kept.shape)
        return {
            "images": images,
            "visual_tokens": self.visual_tokens,
            "kept": kept,
            "kept_ratio": kept / self.visual_tokens if self.visual_tokens else 0.0,
            "encoder_prunings": len(self.kept_by_layer),
            "decoder_prunings": len(self.kept_in_decoder),
            "prompt_length": self.prompt_length,
            "kept_length": self.kept_length,
            **{f"budget_{name}": value for name, value in self.budget().items()},
        }
