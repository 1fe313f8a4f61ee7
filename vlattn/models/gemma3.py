"""Gemma 3: a SigLIP tower, a projector that pools patches, image tokens that see each other, two kinds of layers.

With pan and scan each crop counts as an image of its own: which ones belong together is told by text alone.
"""

from __future__ import annotations

from vlattn.models.llava import LlavaAdapter


class Gemma3Adapter(LlavaAdapter):
    model_types = ("gemma3",)
    patchwise = False
    masks_above_decoder = True

    @property
    def wrapper_ids(self) -> tuple[int, ...]:
        return self.config.boi_token_index, self.config.eoi_token_index

    @property
    def grid(self) -> tuple[int, int]:
        side = int(self.config.mm_tokens_per_image**0.5)
        return side, side

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def feature_layer(self) -> int:
        return len(self.vision_layers) - 1
