"""Idefics3 and SmolVLM: a SigLIP-like tower, patches shuffled together, text between an image's tiles.

Each tile counts as an image of its own: which ones belong together is told by text alone.
"""

from __future__ import annotations

from typing import Any

from vlattn.models.llava import LlavaAdapter


class Idefics3Adapter(LlavaAdapter):
    model_types = ("idefics3", "smolvlm")
    patchwise = False

    @property
    def tower(self) -> Any:
        return self.multimodal.vision_model

    @property
    def projector(self) -> Any:
        return self.multimodal.connector

    @property
    def language_model(self) -> Any:
        return self.multimodal.text_model

    @property
    def grid(self) -> tuple[int, int]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        return side, side

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def feature_layer(self) -> int:
        return len(self.vision_layers) - 1
