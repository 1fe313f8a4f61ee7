"""LLaVA and LLaVA-1.5: one CLIP or SigLIP tower, a two-layer projector, one span of placeholders per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter


class LlavaAdapter(Adapter):
    model_types: tuple[str, ...] = ("llava",)

    @property
    def tower(self) -> Any:
        return self.multimodal.vision_tower

    @property
    def vision_layers(self) -> Sequence[Any]:
        return getattr(self.tower, "vision_model", self.tower).encoder.layers

    @property
    def projector(self) -> Any:
        return self.multimodal.multi_modal_projector

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    @property
    def has_cls(self) -> bool:
        return self.config.vision_config.model_type == "clip_vision_model"

    @property
    def cls_in_features(self) -> bool:
        return self.has_cls and self.config.vision_feature_select_strategy == "full"

    @property
    def feature_layer(self) -> int:
        chosen = self.config.vision_feature_layer
        if not isinstance(chosen, int):
            raise InputError(
                f"vision_feature_layer: {chosen} joins several layers, which pruning inside the tower cannot follow; "
                "set model.config.vision_feature_layer to one layer"
            )
        layers = len(self.vision_layers)
        # Entry i of the tower's hidden states is the input of layer i, so the output of layer i is entry i + 1.
        return (chosen if chosen >= 0 else layers + 1 + chosen) - 1
