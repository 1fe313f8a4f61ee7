"""Qwen2-VL: a tower without CLS for images and videos of any size, 2x2 patches merged into one token, M-RoPE."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.layouts import place_layouts
from vlattn.runtime.tokens import ImageLayout, VisualTokens


class Qwen2VLAdapter(Adapter):
    model_types = ("qwen2_vl",)
    patchwise = False
    mrope = True
    size_arguments = ("image_grid_thw", "video_grid_thw")

    @property
    def tower(self) -> Any:
        return self.multimodal.visual

    @property
    def vision_layers(self) -> Sequence[Any]:
        return self.tower.blocks

    def vision_attention(self, layer: int) -> Any:
        return self.vision_layers[layer].attn

    @property
    def projector(self) -> Any:
        return self.tower.merger

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    @property
    def wrapper_ids(self) -> tuple[int, ...]:
        return self.config.vision_start_token_id, self.config.vision_end_token_id

    @property
    def grid(self) -> tuple[int, int]:
        raise InputError(
            f"grid: images of {self.config.model_type} have any size, so there is no one grid; "
            "ask visual_tokens(call) for the rows and columns of a prompt's images"
        )

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def feature_layer(self) -> int:
        return len(self.vision_layers) - 1

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """As `Adapter.visual_tokens`. Needs image_grid_thw [images, 3] and video_grid_thw [videos, 3] in the call.

        A tile is one image or one temporal step of a video; `patch`, rows and columns count merged cells.
        """
        kinds = self.visual_kinds(call)
        layouts: list[list[ImageLayout]] = []
        for kind, modality in enumerate(("image", "video")):
            grids = []
            if bool((kinds == kind).any()):
                grids = torch.as_tensor(self._required_sizes(call, f"{modality}_grid_thw", modality)).tolist()
            merge = self.config.vision_config.spatial_merge_size
            layouts.append([ImageLayout.of_grid(h // merge, w // merge, tiles=t) for t, h, w in grids])
        return place_layouts(kinds, layouts)

    def rotary(self, layer: int, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Adapter.rotary`, for position ids [B, N] of text, [3, B, N], or [4, B, N] with those of text in front."""
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, -1, -1)
        return self.language_model.rotary_emb(hidden, position_ids[-3:])

    def rotate(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        home = sys.modules[type(self.decoder_attention(layer)).__module__]
        # Older versions of transformers mix the three tables here, newer ones in rotary_emb already.
        mixing = getattr(home, "apply_multimodal_rotary_pos_emb", None)
        if mixing is None:
            return home.apply_rotary_pos_emb(q, k, cos, sin)
        return mixing(q, k, cos, sin, self.text_config.rope_parameters["mrope_section"])
