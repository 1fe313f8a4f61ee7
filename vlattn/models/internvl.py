"""InternVL: a tower with CLS, 2x2 patches shuffled into one token, an image's tiles one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlattn.models.layouts import place_layouts, run_lengths
from vlattn.models.llava import LlavaAdapter
from vlattn.runtime.tokens import ImageLayout, VisualTokens


class InternVLAdapter(LlavaAdapter):
    model_types = ("internvl",)
    patchwise = False
    many_tiles = True

    @property
    def vision_layers(self) -> Sequence[Any]:
        return self.tower.encoder.layer

    def vision_attention(self, layer: int) -> Any:
        return self.vision_layers[layer].attention

    @property
    def grid(self) -> tuple[int, int]:
        vision, ratio = self.config.vision_config, self.config.downsample_ratio
        height, width = (int(s // p * ratio) for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        return height, width

    @property
    def has_cls(self) -> bool:
        return True

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """As `Adapter.visual_tokens`. Placeholders without text between them are one image, in one or more tiles.

        The call does not say how tiles lie in the image, so rows and columns are those within each tile. Video frames
        have text between them and count as images.
        """
        kinds = self.visual_kinds(call)
        tiles = [self._whole_images(length, self.patches) for length in run_lengths(kinds)]
        return place_layouts(kinds, [[ImageLayout.of_grid(*self.grid, tiles=n) for n in tiles]])
