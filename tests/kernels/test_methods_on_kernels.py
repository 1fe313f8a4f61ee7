"""Methods that read attention or choose tokens do on the kernels, forced onto the CPU, what references have them do."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn import ops

pytest.importorskip("triton")

ROWS, SUMS, FLOWCUT, SELECT = "query_row_attention", "received_attention", "flowcut_statistics", "select_tokens"
OPS = {name: getattr(ops, name) for name in (ROWS, SUMS, FLOWCUT, SELECT)}
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "FlowCut": ("FlowCut", {"keep": 4}, {FLOWCUT, SELECT}),
    "FlowCut by image": ("FlowCut", {"keep": 4, "count": "per_image"}, {FLOWCUT, SELECT}),
    "FlowCut by cosine": ("FlowCut", {"keep": 4, "semantic": "cosine"}, {ROWS, SELECT}),
    "FlowCut without CLS": ("FlowCut", {"keep": 4}, {ROWS, SELECT}),
    "FastV by the last row": ("FastV", {"keep": 5, "layer": 1}, {ROWS}),
    "FastV by the mean": ("FastV", {"keep": 5, "layer": 1, "query": "mean"}, {SUMS}),
    "SparseVLM": ("SparseVLM", {"layers": (1,), "counts": (5,)}, {ROWS}),
    "PyramidDrop": ("PyramidDrop", {"layers": (1,), "counts": (5,)}, {ROWS}),
    "HiPrune": ("HiPrune", {"keep": 5, "object_layer": 1}, {SUMS}),
    "HiPrune without CLS": ("HiPrune", {"keep": 5, "object_layer": 1}, {SUMS}),
    "VisionZip": ("VisionZip", {"dominant": 4, "contextual": 2}, {ROWS, SELECT}),
    "VisPruner": ("VisPruner", {"keep": 6}, {ROWS}),
    "PAINT": ("PAINT", {"alpha": 0.7, "beta": 0.4, "start_layer": 1}, {ROWS}),
    "PAINT without CLS": ("PAINT", {"alpha": 0.7, "beta": 0.4, "start_layer": 1}, {SUMS}),
}
"""{name: (method, its settings, the ops that it runs)}."""


@pytest.mark.parametrize("name", CASES)
def test_a_method_on_the_kernels_is_the_method_on_the_references(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method, settings, expected = CASES[name]
    model = tiny.llava(layers=4, decoder_layers=3, image_size=16, dtype=torch.float32, siglip="without" in name)
    inputs = tiny.prompts(model, images=(1, 2))
    called: set[str] = set()
    found, logits = [], []
    for backend in ("reference", "triton"):
        for op in OPS:
            force(monkeypatch, op, backend, called)
        called.clear()
        with getattr(vlattn, method)(**settings)(model) as trace, torch.no_grad():
            logits.append(model(**inputs, logits_to_keep=1).logits)
        assert called >= expected
        chosen = [*trace.kept_by_layer.values(), *trace.kept_in_decoder.values()]
        found.append([trace.visual_by_layer, *(x.tolist() for x in (trace.kept, *chosen) if x is not None)])
    assert found[0] == found[1]
    torch.testing.assert_close(*logits, rtol=2e-5, atol=2e-5)


def force(monkeypatch: pytest.MonkeyPatch, name: str, backend: str, called: set[str]) -> None:
    """Have every call of an op run on a backend, and be noted."""

    def forced(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return OPS[name](*args, **kwargs, backend=backend)

    monkeypatch.setattr(ops, name, forced)
