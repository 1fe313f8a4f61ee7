"""Quantised caches keep keys elsewhere and less exactly, and change nothing about which positions a layer holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import cache_utils

import vlattn
from vlattn.interventions.uniform_prune import UniformPrune, uniform_indices

METHODS = {
    "in front of the decoder": vlattn.FlowCut(keep=8),
    "inside the decoder": vlattn.FastV(keep=8, layer=1),
    "inside, compact": vlattn.PyramidDrop(layers=(1, 2), ratios=(0.5, 0.25)),
}


class Lossless(cache_utils.QuantizedLayer):  # type: ignore[misc]
    """Keeps what a quantised layer would quantise, exactly, and flushes its window every second token."""

    def __init__(self) -> None:
        super().__init__(residual_length=2)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, stored: torch.Tensor) -> torch.Tensor:
        return stored


def say(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=7, do_sample=False, **more)[:, -7:]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_a_quantised_layer_that_loses_nothing_says_what_a_dynamic_cache_says(
    llava: Any, prompts: Any, tiny: Any, method: Any, images: tuple[int, ...]
) -> None:
    model = llava(decoder_layers=4)
    inputs = prompts(model, images=images)
    with method(model):
        expected = say(model, inputs)
        cache = cache_utils.Cache(layers=[Lossless() for _ in range(4)])
        assert torch.equal(say(model, inputs, **{tiny.CACHE: cache}), expected)
        lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[-1] < inputs["input_ids"].shape[1]
    assert len(set(expected.flatten().tolist())) > 2


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
def test_an_fp8_cache_says_what_the_stock_model_says_to_the_short_sequence_with_one(
    llava: Any, prompts: Any, tiny: Any
) -> None:
    model = llava(dtype=torch.float32)
    inputs = prompts(model, images=(1, 2))
    more = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    slots = uniform_indices(36, 7)
    with torch.no_grad():
        features = tiny.features(model, inputs["pixel_values"])
    short, _ = tiny.short_sequence(model, inputs, [tiny.with_slots(rows[slots], slots) for rows in features])
    expected = say(model, short, **more)
    with UniformPrune(keep=7)(model):
        assert torch.equal(say(model, inputs, **more), expected)
