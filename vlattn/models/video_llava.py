"""Video-LLaVA: LLaVA with one tower for images and one for video frames, behind the same projector.

`tower`, `vision_layers` and `cls_in_features` are those of images. Frames always keep their CLS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlattn.models.layouts import place_layouts
from vlattn.models.llava import LlavaAdapter
from vlattn.runtime.tokens import ImageLayout, VisualTokens


class VideoLlavaAdapter(LlavaAdapter):
    model_types = ("video_llava",)
    many_tiles = True
    size_arguments = ("pixel_values_videos",)

    @property
    def tower(self) -> Any:
        return self.multimodal.image_tower

    @property
    def video_tower(self) -> Any:
        """The tower of video frames, built as `tower` is."""
        return self.multimodal.video_tower

    @property
    def towers(self) -> tuple[Any, ...]:
        return self.tower, self.video_tower

    @property
    def encoders(self) -> tuple[Sequence[Any], ...]:
        return self.vision_layers, getattr(self.video_tower, "vision_model", self.video_tower).encoder.layers

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """As `Adapter.visual_tokens`. Needs pixel_values_videos [videos, frames, ...] where a prompt has videos.

        Each frame is a tile of its video, its CLS in front.
        """
        kinds = self.visual_kinds(call)
        image = ImageLayout.of_grid(*self.grid, leading=int(self.cls_in_features))
        images = [image] * self._whole_images(int((kinds == 0).sum()), len(image))
        videos: list[ImageLayout] = []
        in_videos = int((kinds == 1).sum())
        if in_videos:
            frames = self._required_sizes(call, "pixel_values_videos", "video")[1]
            video = ImageLayout.of_grid(*self.grid, leading=int(self.has_cls), tiles=frames)
            videos = [video] * self._whole_images(in_videos, len(video))
        return place_layouts(kinds, [images, videos])
