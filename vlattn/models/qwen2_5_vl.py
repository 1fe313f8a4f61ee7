"""Qwen2.5-VL: Qwen2-VL with window attention in most layers of the tower.

The tower and its merger work window by window. The merged tokens are put back in row order behind the merger.
"""

from __future__ import annotations

from vlattn.models.qwen2_vl import Qwen2VLAdapter


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    model_types = ("qwen2_5_vl",)
