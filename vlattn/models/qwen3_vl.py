"""Qwen3-VL: video frames behind timestamps of their own, and features of early vision layers added in the decoder.

A video is one image of several tiles, though text stands between its frames.
"""

from __future__ import annotations

from vlattn.models.qwen2_vl import Qwen2VLAdapter


class Qwen3VLAdapter(Qwen2VLAdapter):
    model_types = ("qwen3_vl",)

    @property
    def deepstack_layers(self) -> int:
        return min(len(self.tower.deepstack_visual_indexes), len(self.decoder_layers))
