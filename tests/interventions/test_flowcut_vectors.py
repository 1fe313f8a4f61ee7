"""FlowCut against numbers that the authors' released code gave for two towers whose weights are a formula."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn import ops
from vlattn.interventions.flowcut_score import adaptive_count, flowcut_score, running_average, select

V1_KEPT = [[2, 3, 11, 14, 17, 18, 21, 24, 29], [1, 7, 11, 13, 15, 18, 24, 25, 33]]
V1_LENGTHS = [37, 37, 25, 25, 15, 15, 10, 10, 10]
V2_KEPT = [13, 14, 16, 23, 34, 37, 53, 55, 61, 64, 68, 73, 80, 103, 126, 127, 129, 130, 132, 133]
V2_COUNTS = dict(zip(range(1, 22, 2), [124, 104, 89, 75, 65, 56, 47, 40, 33, 28, 20], strict=True))


def formula(k: int, *shape: int) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) that anyone can reproduce: the fraction of 43758.5453 sin(12.9898 (i + 1) + 78.233 k)."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    y = 43758.5453 * torch.sin(12.9898 * (i + 1) + 78.233 * k)
    return (y - y.floor() - 0.5).reshape(shape)


def vector_model(
    tiny: ModuleType, width: int, heads: int, layers: int, image_size: int, sharp: float, **options: Any
) -> Any:
    model = tiny.llava(width=width, heads=heads, layers=layers, image_size=image_size, act="relu", **options)
    with torch.no_grad():
        for index, layer in enumerate(model.model.vision_tower.encoder.layers):
            base, attention = 100 * index, layer.self_attn
            for offset, name in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
                projection, factor = getattr(attention, name), sharp if offset < 2 else 1.0
                projection.weight.copy_(factor * formula(base + 2 * offset, width, width))
                projection.bias.copy_(0.5 * formula(base + 2 * offset + 1, width))
            layer.mlp.fc1.weight.copy_(formula(base + 20, 2 * width, width))
            layer.mlp.fc2.weight.copy_(formula(base + 22, width, 2 * width))
            for bias in (layer.mlp.fc1.bias, layer.mlp.fc2.bias, layer.layer_norm1.bias, layer.layer_norm2.bias):
                bias.zero_()
            for norm in (layer.layer_norm1, layer.layer_norm2):
                norm.weight.fill_(1)
                assert norm.eps == 1e-5
    return model


def feed(model: Any, x: torch.Tensor) -> None:
    """Let `x` enter the first layer, whatever the pixels are."""
    value = x.to(model.dtype)
    model.model.vision_tower.pre_layrnorm.register_forward_hook(lambda module, args, output: value)


@pytest.fixture
def v1(tiny: ModuleType) -> Any:
    return lambda **options: vector_model(tiny, 16, 2, 8, 24, 3.0, **options)


def test_the_formula_gives_the_numbers_it_was_published_with(v1: Any) -> None:
    weight = v1().model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(
        weight.flatten()[:2], torch.tensor([1.265071169, -1.328345492], dtype=torch.float64), atol=1e-8, rtol=0
    )
    start = 2 * formula(7777, 2, 37, 16).flatten()[:2]
    torch.testing.assert_close(start, torch.tensor([-0.644785291, 0.264371196], dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("count", ["batch_max", "per_image"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("images", [[0, 1], [0], [1]])
def test_v1_keeps_the_published_patches_with_the_published_counts(
    v1: Any, tiny: ModuleType, images: list[int], dtype: torch.dtype, attn: str, count: str
) -> None:
    model = v1(dtype=dtype, attn=attn)
    feed(model, 2 * formula(7777, 2, 37, 16)[images])
    inputs = tiny.prompts(model, images=[len(images)])
    with torch.no_grad():
        model(**inputs)  # transformers' own recording hooks are there before ours
    with torch.no_grad(), vlattn.FlowCut(keep=9, count=count)(model) as trace:
        out = model(**inputs)
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert trace.kept.tolist() == [V1_KEPT[i] for i in images]
    assert {layer: ids.shape[1] for layer, ids in trace.kept_by_layer.items()} == {1: 24, 3: 14, 5: 9}
    assert [h.shape[1] for h in states] == V1_LENGTHS
    assert out.logits.shape[1] == inputs["input_ids"].shape[1] - 27 * len(images)
    assert bool(out.logits.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_v2_follows_the_published_counts_through_24_layers(tiny: ModuleType, dtype: torch.dtype) -> None:
    model = vector_model(tiny, 32, 4, 24, 48, 2.0, dtype=dtype)
    feed(model, 2 * formula(7777, 1, 145, 32))
    with torch.no_grad(), vlattn.FlowCut(keep=20)(model) as trace:
        model(**tiny.prompts(model))
    assert {layer: ids.shape[1] for layer, ids in trace.kept_by_layer.items()} == V2_COUNTS
    assert trace.kept.tolist() == [V2_KEPT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pure_functions_alone_reproduce_v1(v1: Any, naive: ModuleType, dtype: torch.dtype) -> None:
    tower = v1(dtype=dtype, attn="eager").model.vision_tower
    x, average = (2 * formula(7777, 2, 37, 16)).to(dtype), None
    ids, counts = torch.arange(36).expand(2, -1), {}
    for index, layer in enumerate(tower.encoder.layers[:6]):
        y, attention = layer.layer_norm1(x), layer.self_attn
        q, k, v = (naive.split(getattr(attention, f"{name}_proj")(y), 2) for name in "qkv")
        row = ops.query_row_attention(q[:, :, :1], k, scale=8**-0.5)[:, :, 0]
        score, cls = flowcut_score(row, v)
        average = running_average(average, score)
        x = layer(x, None)
        if index % 2:
            alive = torch.full((2,), ids.shape[1])
            drop = adaptive_count(cls, alive, 9, 5 - index).max()
            chosen, ragged = select(average, alive - drop)
            assert ragged is None
            ids, average = ids.gather(1, chosen), average.gather(1, chosen)
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, chosen[..., None].expand(-1, -1, 16))], 1)
            counts[index] = ids.shape[1]
    assert counts == {1: 24, 3: 14, 5: 9}
    assert ids.tolist() == V1_KEPT
