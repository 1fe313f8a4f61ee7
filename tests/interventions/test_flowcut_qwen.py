"""FlowCut on Qwen2-VL and Qwen2.5-VL against plain loops: the tower, what enters the decoder, and the cut inside it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.flowcut_qwen import proxy_count
from vlattn.interventions.flowcut_score import proxy_score
from vlattn.runtime.hooks import cache_of

FAMILIES = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
STEPS = 4

Inputs = dict[str, torch.Tensor]


def helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    """`tests/naive_flowcut_qwen.py`: the tower in plain loops."""
    return helper("naive_flowcut_qwen")


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    """`tests/naive_flowcut_decoder.py`: the decoder with its cut in plain loops."""
    return helper("naive_flowcut_decoder")


@pytest.fixture
def qwen(families: ModuleType) -> Callable[..., Any]:
    """A tiny model whose tower attends sharply, so that it prunes in several steps."""

    def make(family: str, **options: Any) -> Any:
        model = families.model(family, **{"vision_layers": 6, **options})
        with torch.no_grad():
            for block in model.model.visual.blocks:
                block.attn.qkv.weight[:32] *= 4  # queries and keys
        return model

    return make


def prompt_of(inputs: Inputs, b: int, images: int = 1) -> Inputs:
    """Prompt b of a batch whose prompts have `images` images each, alone and unpadded."""
    alive, grids = inputs["attention_mask"][b].bool(), inputs["image_grid_thw"]
    before, own = int(grids[: b * images].prod(1).sum()), grids[b * images : (b + 1) * images]
    row = {name: inputs[name][b : b + 1, alive] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    pixels = inputs["pixel_values"][before : before + int(own.prod(1).sum())]
    return {**row, "pixel_values": pixels, "image_grid_thw": own}


def flows_of(plain: ModuleType, model: Any, inputs: Inputs, keep: int, **options: Any) -> list[Any]:
    """The plain loops over each image of a batch, each alone."""
    found, at = [], 0
    for _, rows, columns in inputs["image_grid_thw"].tolist():
        pixels = inputs["pixel_values"][at : at + rows * columns]
        found.append(plain.flow(model, pixels, rows, columns, keep, **options))
        assert found[-1].gap > 1e-5  # far above the fp32 rounding of stock code's rotation
        at += rows * columns
    return found


def sequences(
    plain: ModuleType, model: Any, inputs: Inputs, flows: list[Any], images: int, aligned: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor, list[list[int]]]]:
    """What each prompt becomes in front of the decoder, written out token by token.

    Returns:
        For each prompt (embeds [n, D], positions [3, n], where the tokens of each image stand).
    """
    table, found, left = model.get_input_embeddings().weight.detach(), [], list(flows)
    sizes = [(rows, columns) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    for b, ids in enumerate(inputs["input_ids"]):
        tokens = ids[inputs["attention_mask"][b].bool()].tolist()
        places = plain.positions_of(tokens, model.config.image_token_id, sizes[b * images : (b + 1) * images])
        rows, positions, stands, at = [], [], [], 0
        while at < len(tokens):
            if tokens[at] != model.config.image_token_id:
                rows.append(table[tokens[at]])
                positions.append(places[at])
                at += 1
                continue
            flow, size = left.pop(0), sizes[b * images + len(stands)]
            cells = [place.cell for place in flow.patches[::4]]
            whole = len(flow.patches) == size[0] * size[1]
            if aligned or whole:  # cells at their own places
                order = sorted(range(len(cells)), key=lambda i: cells[i])
                own = [cells[i] for i in order]
            else:  # mixed ones at the first places
                order = own = list(range(len(cells)))
            stands.append(list(range(len(rows), len(rows) + len(order))))
            rows += list(flow.features[order])
            positions += [places[at + cell] for cell in own]
            at += size[0] * size[1] // 4
        found.append((torch.stack(rows), torch.tensor(positions).T, stands))
    return found


def entered_rows(entered: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The embeds and M-RoPE positions of each prompt that the language model got, without padding."""
    alive, positions = entered.alive, entered.positions[-3:]
    return [(entered.embeds[b][alive[b]], positions[:, b][:, alive[b]]) for b in range(len(alive))]


# The score ------------------------------------------------------------------------------------------------------------
def test_the_score_and_the_count_are_those_of_the_released_code(formula: Any, numbers: Any) -> None:
    q, k, value = (6 * formula(seed, 1, 2, 12, 4) for seed in (11, 12, 13))
    score, attention = proxy_score(q, k, value, 0.5)
    expected = numbers(
        "0.097103 0.047647 0.193153 0.206057 0.197872 0.575499 0.242692 0.169522 0.292474 0.856608 0.449147 0.265793"
    )
    torch.testing.assert_close(score[0], expected, atol=6e-7, rtol=0)
    assert score[0].topk(5).indices.sort().values.tolist() == [5, 8, 9, 10, 11]
    assert proxy_count(attention[0], 4, 4) == 1


# The tower ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keep", "images", "options"),
    [(2, 1, {}), (1, 2, {}), (2, 1, {"semantic": "softmax"}), (2, 1, {"semantic": "cosine"})],
    ids=["keep2", "two-images", "softmax", "cosine"],
)
@pytest.mark.parametrize("aligned", [False, True], ids=["patches", "cells"])
@FAMILIES
def test_kept_patches_features_and_positions_are_those_of_plain_loops_over_each_image(
    qwen: Any, families: ModuleType, plain: ModuleType, stage: ModuleType,
    family: str, aligned: bool, keep: int, images: int, options: dict[str, Any],
) -> None:  # fmt: skip
    """Two left-padded prompts whose images differ in size: each becomes what it becomes alone."""
    model = qwen(family)
    inputs = families.inputs(family, model, images=images)
    flows = flows_of(plain, model, inputs, keep, unit=4 if aligned else 1, **options)
    method = vlattn.FlowCut(keep=keep, group_aligned=aligned, **options)
    with torch.no_grad(), method(model) as trace, stage.watching(model) as seen:
        model(**inputs)
    assert sorted(trace.kept_by_layer) == [1, 3, 5]
    before = [len(plain.order_of(model, r, c)) for _, r, c in inputs["image_grid_thw"].tolist()]
    steps = []
    for layer, ids in trace.kept_by_layer.items():
        rows = [flow.by_layer[layer] for flow in flows]
        assert ids.tolist() == [row + [-1] * (ids.shape[1] - len(row)) for row in rows]
        steps.append([old - len(row) for old, row in zip(before, rows, strict=True)])
        before = [len(row) for row in rows]
    assert before == [8 * keep] * len(flows)
    assert all(sum(step) > 0 for step in steps)  # no pruning left all the work to the last one
    expected = sequences(plain, model, inputs, flows, images, aligned)
    for (embeds, positions), (rows_, places, _) in zip(entered_rows(seen[0]), expected, strict=True):
        torch.testing.assert_close(embeds, rows_, rtol=1e-6, atol=1e-6)
        assert torch.equal(positions, places)


@FAMILIES
def test_patches_are_merged_across_cells_and_cells_are_not_where_they_are_kept_whole(
    qwen: Any, families: ModuleType, plain: ModuleType, family: str
) -> None:
    """What the two ways to prune differ in shows in these images: without this, the tests above prove less."""
    model = qwen(family)
    inputs = families.inputs(family, model)
    for flow in flows_of(plain, model, inputs, 2):
        groups = [{place.cell for place in flow.patches[i : i + 4]} for i in range(0, 16, 4)]
        assert max(map(len, groups)) > 1
    for flow in flows_of(plain, model, inputs, 2, unit=4):
        groups = [{place.cell for place in flow.patches[i : i + 4]} for i in range(0, 16, 4)]
        assert [len(group) for group in groups] == [1, 1, 1, 1]


def test_windows_shrink_to_their_patches_and_empty_ones_vanish(
    qwen: Any, families: ModuleType, plain: ModuleType
) -> None:
    """Qwen2.5-VL's blocks get the bounds of what is left: read off the blocks, against counts by window."""
    model = qwen("qwen2_5_vl")
    inputs = families.inputs("qwen2_5_vl", model)
    flows = flows_of(plain, model, inputs, 1)
    bounds: dict[int, list[int]] = {}
    with torch.no_grad(), vlattn.FlowCut(keep=1)(model):
        for number, block in enumerate(model.model.visual.blocks):
            block.register_forward_pre_hook(
                lambda module, args, kwargs, number=number: bounds.update({number: kwargs["cu_seqlens"].tolist()}),
                with_kwargs=True,
            )
        model(**inputs)
    vanished = 0
    for layer in (1, 3):
        sizes = []
        for flow, (_, rows, columns) in zip(flows, inputs["image_grid_thw"].tolist(), strict=True):
            windows = [place.window for place in plain.order_of(model, rows, columns)]
            left = [windows[i] for i in flow.by_layer[layer]]
            counts = [left.count(window) for window in sorted(set(windows))]
            vanished += counts.count(0)
            sizes += [count for count in counts if count]
        assert bounds[layer + 1] == [0, *itertools.accumulate(sizes)]
    assert vanished > 0
