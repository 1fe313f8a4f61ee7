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

    def make(family: str, sharpness: float = 4.0, **options: Any) -> Any:
        model = families.model(family, **{"vision_layers": 6, **options})
        with torch.no_grad():
            for block in model.model.visual.blocks:
                block.attn.qkv.weight[:32] *= sharpness  # queries and keys
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
        stands: list[list[int]] = []
        rows, positions, at = [], [], 0
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


def test_windows_shrink_to_the_patches_that_are_left_and_empty_ones_vanish(
    qwen: Any, families: ModuleType, plain: ModuleType, stage: ModuleType
) -> None:
    """Qwen2.5-VL's blocks get the bounds of what is left: read off the blocks, against counts by window."""
    model = qwen("qwen2_5_vl", sharpness=5.0, vision_layers=8, seed=8)
    inputs = families.inputs("qwen2_5_vl", model, batch=1)
    (flow,) = flows_of(plain, model, inputs, 1)
    windows = [place.window for place in plain.order_of(model, *inputs["image_grid_thw"][0, 1:].tolist())]
    bounds: dict[int, list[int]] = {}
    with torch.no_grad(), vlattn.FlowCut(keep=1)(model), stage.watching(model) as seen:
        for number, block in enumerate(model.model.visual.blocks):
            block.register_forward_pre_hook(
                lambda module, args, kwargs, number=number: bounds.update({number: kwargs["cu_seqlens"].tolist()}),
                with_kwargs=True,
            )
        model(**inputs)
    counts = {}
    for layer in (1, 3, 5):
        left = [windows[i] for i in flow.by_layer[layer]]
        counts[layer] = [left.count(window) for window in range(4)]
        assert bounds[layer + 1][-1] == len(left)
        if layer + 1 < 7:  # the last block attends to everything
            assert bounds[layer + 1] == [0, *itertools.accumulate(n for n in counts[layer] if n)]
    assert bounds[7] == [0, len(flow.by_layer[5])]
    assert 0 not in counts[3]
    assert counts[5].count(0) == 1
    ((embeds, _, _),) = sequences(plain, model, inputs, [flow], 1)
    torch.testing.assert_close(entered_rows(seen[0])[0][0], embeds, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("aligned", [False, True], ids=["patches", "cells"])
@FAMILIES
def test_an_image_within_its_target_enters_the_decoder_untouched_beside_one_that_is_pruned(
    qwen: Any, families: ModuleType, plain: ModuleType, stage: ModuleType, family: str, aligned: bool
) -> None:
    model = qwen(family)
    # Images of 48, 32 and 24 patches; 8 x keep is 24. The last one's two windows are not in raster order.
    inputs = families.inputs(family, model, batch=3)
    flows = flows_of(plain, model, inputs, 3, unit=4 if aligned else 1)
    with torch.no_grad():
        with stage.watching(model) as seen:
            model(**inputs)
        with vlattn.FlowCut(keep=3, group_aligned=aligned)(model) as trace, stage.watching(model) as pruned:
            model(**inputs)
    stock, found = entered_rows(seen[0]), entered_rows(pruned[0])
    assert [len(its[0]) - len(mine[0]) for mine, its in zip(found, stock, strict=True)] == [6, 2, 0]
    for mine, its in zip(found[2], stock[2], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)
    for ids in trace.kept_by_layer.values():
        assert [i for i in ids[2].tolist() if i >= 0] == list(range(24))
    for b, (embeds, positions, _) in enumerate(sequences(plain, model, inputs, flows, 1, aligned)):
        torch.testing.assert_close(found[b][0], embeds, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[b][1], positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("aligned", [False, True], ids=["patches", "cells"])
@FAMILIES
def test_images_that_fit_give_the_stock_logits_bit_for_bit(
    qwen: Any, families: ModuleType, family: str, aligned: bool, dtype: torch.dtype
) -> None:
    model = qwen(family, dtype=dtype)
    inputs = families.inputs(family, model, images=2)
    more = {"max_new_tokens": STEPS, "do_sample": False}
    with torch.no_grad():
        expected, said = model(**inputs).logits, model.generate(**inputs, **more)
        with vlattn.FlowCut(keep=12, group_aligned=aligned)(model) as trace:  # the largest image has 12 cells
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, **more), said)
    assert trace.kept_by_layer == {}
    assert trace.kept_in_decoder == {}
    assert trace.visual_tokens == 12


@FAMILIES
def test_the_decoder_still_cuts_an_image_that_the_tower_left_alone(
    qwen: Any, families: ModuleType, stage: ModuleType, family: str
) -> None:
    model = qwen(family)
    inputs = families.inputs(family, model, batch=1)
    with torch.no_grad(), vlattn.FlowCut(keep=7)(model) as trace, stage.watching(model) as seen:
        model(**inputs)
    assert trace.kept_by_layer == {}
    assert seen[0].embeds.shape[1] == inputs["input_ids"].shape[1]
    assert trace.kept_in_decoder[1].shape == (1, 7)


@FAMILIES
def test_videos_are_refused_and_the_model_still_works(qwen: Any, families: ModuleType, family: str) -> None:
    model = qwen(family)
    inputs = families.inputs(family, model, images=0, video=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        refused = pytest.raises(InputError, match="pixel_values_videos: FlowCut does not prune videos")
        with refused, vlattn.FlowCut(keep=2)(model):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, expected)


# The decoder ----------------------------------------------------------------------------------------------------------
def decoded(
    stage: ModuleType, model: Any, entered: Any, stands: list[list[int]], b: int, keep: int, new: torch.Tensor
) -> Any:
    """The plain decoder on what entered as prompt b, followed by the tokens `new`."""
    embeds, positions = entered_rows(entered)[b]
    behind = torch.arange(len(new)) + positions.max() + 1
    whole = torch.cat([embeds, model.get_input_embeddings().weight.detach()[new]])
    places = torch.cat([positions, behind.expand(3, -1)], 1)
    return stage.decode(model, whole, places, stands, keep, compact=False, prompt=len(embeds))


@pytest.mark.parametrize(("keep", "images"), [(2, 1), (4, 1), (1, 2)], ids=["keep2", "one-untouched", "two-images"])
@pytest.mark.parametrize("aligned", [False, True], ids=["patches", "cells"])
@FAMILIES
def test_the_cut_behind_layer_1_the_logits_and_the_cache_are_those_of_a_plain_decoder(
    qwen: Any, families: ModuleType, plain: ModuleType, stage: ModuleType,
    family: str, aligned: bool, keep: int, images: int,
) -> None:  # fmt: skip
    model = qwen(family)
    inputs = families.inputs(family, model, images=images)
    flows = flows_of(plain, model, inputs, keep, unit=4 if aligned else 1)
    places = [stands for _, _, stands in sequences(plain, model, inputs, flows, images, aligned)]
    method = vlattn.FlowCut(keep=keep, group_aligned=aligned)
    with torch.no_grad(), method(model) as trace, stage.watching(model) as seen:
        out = model(**inputs, use_cache=True)
    lengths = []
    for b, stands in enumerate(places):
        expected = decoded(stage, model, seen[0], stands, b, keep, torch.tensor([], dtype=torch.long))
        torch.testing.assert_close(out.logits[b, -len(expected.kept) :], expected.logits, rtol=1e-10, atol=1e-10)
        lengths.append(expected.lengths)
        assert [layer[b] for layer in trace.visual_by_layer] == [sum(map(len, stands))] * 2 + [keep * images] * 3
        slots = [slot for slot in trace.kept_in_decoder[1][b].tolist() if slot >= 0]
        assert slots == slots_of(plain, inputs, flows, b, images, aligned, stands, expected.kept)
    # Layers 0 and 1 hold what entered, the others the kept visual tokens instead.
    longest = [max(row[layer] for row in lengths) for layer in range(4)]
    assert trace.decoder_lengths == longest
    cache = cache_of(dict(out))
    assert [cache.get_seq_length(layer) for layer in range(4)] == longest
    for row, stands in zip(lengths, places, strict=True):
        assert row[2:] == [row[0] - sum(map(len, stands)) + keep * images] * 2


def slots_of(
    plain: ModuleType, inputs: Inputs, flows: list[Any], b: int, images: int, aligned: bool,
    stands: list[list[int]], kept: list[int],
) -> list[int]:  # fmt: skip
    """Which of a prompt's placeholders the kept tokens stand at."""
    found, before = [], 0
    for number, stand in enumerate(stands):
        flow = flows[b * images + number]
        total = int(inputs["image_grid_thw"][b * images + number].prod()) // 4
        cells = sorted(place.cell for place in flow.patches[::4]) if aligned else range(len(stand))
        found += [before + cell for place, cell in zip(stand, cells, strict=True) if place in kept]
        before += total
    return found


@pytest.mark.parametrize(("keep", "images"), [(2, 1), (1, 2)], ids=["keep2", "two-images"])
@pytest.mark.parametrize("aligned", [False, True], ids=["patches", "cells"])
@FAMILIES
def test_cached_decoding_equals_recomputing_everything_with_the_same_kept_set(
    qwen: Any, families: ModuleType, plain: ModuleType, stage: ModuleType,
    family: str, aligned: bool, keep: int, images: int,
) -> None:  # fmt: skip
    """Text keeps its positions, so what is generated goes on behind the unpruned prompt's last one, in every layer."""
    model = qwen(family)
    inputs = families.inputs(family, model, images=images)
    flows = flows_of(plain, model, inputs, keep, unit=4 if aligned else 1)
    places = [stands for _, _, stands in sequences(plain, model, inputs, flows, images, aligned)]
    method = vlattn.FlowCut(keep=keep, group_aligned=aligned)
    with torch.no_grad(), method(model), stage.watching(model) as seen:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    new = out.sequences[:, -STEPS:]
    for b, stands in enumerate(places):
        expected = decoded(stage, model, seen[0], stands, b, keep, new[b, :-1])
        for step in range(STEPS):  # generate hands logits on in fp32
            torch.testing.assert_close(out.logits[step][b], expected.logits[step - STEPS].float(), rtol=2e-6, atol=2e-6)
    assert len(set(new.flatten().tolist())) > 2


@pytest.mark.parametrize("aligned", [False, True], ids=["patches", "cells"])
@FAMILIES
def test_a_batch_says_what_each_prompt_says_alone_with_beams_too(
    qwen: Any, families: ModuleType, family: str, aligned: bool
) -> None:
    model = qwen(family)
    inputs = families.inputs(family, model, images=2)
    for more in ({}, {"num_beams": 3}):
        generate = {"max_new_tokens": STEPS, "do_sample": False, **more}
        with torch.no_grad(), vlattn.FlowCut(keep=1, group_aligned=aligned)(model):
            together = model.generate(**inputs, **generate)[:, -STEPS:]
            for b in range(2):
                assert torch.equal(model.generate(**prompt_of(inputs, b, 2), **generate)[0, -STEPS:], together[b])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAMILIES
def test_eager_attention_and_half_precision_keep_as_many_tokens_and_give_finite_logits(
    qwen: Any, families: ModuleType, family: str, attn: str, dtype: torch.dtype
) -> None:
    model = qwen(family, attn=attn, dtype=dtype)
    inputs = families.inputs(family, model)
    with torch.no_grad(), vlattn.FlowCut(keep=2)(model) as trace:
        logits = model(**inputs).logits
    assert logits.dtype == dtype
    assert bool(logits[:, -1].isfinite().all())
    assert trace.kept_by_layer[5].shape == (2, 16)
    assert trace.visual_by_layer == [[4, 4], [4, 4], [2, 2], [2, 2], [2, 2]]
    assert bool((trace.kept_by_layer[5].diff(dim=1) > 0).all())


@FAMILIES
def test_renumbered_positions_are_refused(qwen: Any, family: str) -> None:
    model = qwen(family)
    with pytest.raises(InputError, match="positions: 'compact' has no meaning"):
        vlattn.attach(model, vlattn.FlowCut(keep=2, positions="compact"))
