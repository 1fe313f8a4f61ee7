"""ToMe: the published vector, the merge in plain loops, and what a live model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.tome import ToMe
from vlattn.interventions.tome_merge import (
    exact_schedule,
    follow,
    match,
    merge,
    merge_schedule,
    proportional_bias,
    smallest_source,
)

Numbers = Callable[..., torch.Tensor]


def groups_in_order(groups: torch.Tensor, length: int) -> list[set[int]]:
    return [{i for i, at in enumerate(groups.tolist()) if at == position} for position in range(length)]


def step_by_loops(
    x: torch.Tensor, size: list[float], sources: list[set[int]], metric: torch.Tensor, r: int, cls: bool
) -> tuple[torch.Tensor, list[float], list[set[int]]]:
    """One image, one layer: [t, C] and what each position stands for."""
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best, alike = {}, {}
    for a in even:
        cosine = [float(metric[a] @ metric[b] / (metric[a].norm() * metric[b].norm())) for b in odd]
        best[a], alike[a] = odd[cosine.index(max(cosine))], max(cosine)
    if cls:
        alike[0] = -2.0
    order = sorted(even, key=lambda a: -alike[a])
    leaving, staying = order[:r], order[r:]
    total = {b: size[b] * x[b] for b in odd}
    weight, found = {b: size[b] for b in odd}, {b: set(sources[b]) for b in odd}
    for a in leaving:
        b = best[a]
        total[b] = total[b] + size[a] * x[a]
        weight[b] += size[a]
        found[b] |= sources[a]
    staying = sorted(staying) if cls else staying
    rows = [x[a] for a in staying] + [total[b] / weight[b] for b in odd]
    return (
        torch.stack(rows),
        [size[a] for a in staying] + [weight[b] for b in odd],
        [sources[a] for a in staying] + [found[b] for b in odd],
    )


def test_the_published_vector_is_reproduced(formula: Numbers) -> None:
    x, size, groups = formula(52, 1, 13, 3), torch.ones(1, 13, dtype=torch.float64), torch.arange(13)[None]
    first = match(formula(51, 1, 13, 4), 4)
    x, size = merge(x, size, first)
    groups = follow(groups, first)
    assert groups_in_order(groups[0], 9) == [{0}, {4}, {8}, {1, 2, 12}, {3}, {5}, {6, 7}, {9}, {10, 11}]
    assert size.tolist() == [[1, 1, 1, 3, 1, 1, 2, 1, 2]]
    expected = [[-0.207467, -0.167618, -0.048060], [-0.327988, 0.040076, 0.185684]]
    torch.testing.assert_close(x[0, [3, 8]], torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)
    second = match(formula(53, 1, 9, 4), 3)
    groups = follow(groups, second)
    assert groups_in_order(groups[0], 6) == [{0}, {8}, {4}, {1, 2, 12}, {5, 6, 7, 10, 11}, {3, 9}]
    assert smallest_source(groups, 6).tolist() == [[0, 8, 4, 1, 5, 3]]


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("length", [3, 12, 13, 37])
def test_merging_layer_after_layer_equals_plain_loops(length: int, cls: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 5, generator=generator, dtype=torch.float64)
    size, groups = torch.ones(2, length, dtype=torch.float64), torch.arange(length).expand(2, -1)
    naive = [(x[b], [1.0] * length, [{i} for i in range(length)]) for b in range(2)]
    now, start = length, x.sum(1)
    for _ in range(4):
        r = min(5, (now - cls) // 2)
        if r < 1:
            break
        metric = torch.randn(2, now, 4, generator=generator, dtype=torch.float64)
        matching = match(metric, r, cls)
        x, size = merge(x, size, matching)
        groups = follow(groups, matching)
        naive = [step_by_loops(*naive[b], metric[b], r, cls) for b in range(2)]
        now -= r
        assert x.shape[1] == size.shape[1] == now
        for b in range(2):
            torch.testing.assert_close(x[b], naive[b][0])
            assert size[b].tolist() == naive[b][1]
            assert groups_in_order(groups[b], now) == naive[b][2]
        torch.testing.assert_close((size[..., None] * x).sum(1), start)
        assert size.sum(1).tolist() == [length, length]
        if cls:
            assert groups[:, 0].tolist() == [0, 0]
            assert size[:, 0].tolist() == [1, 1]
    assert smallest_source(groups, now).tolist() == [[min(group) for group in naive[b][2]] for b in range(2)]


def test_tokens_that_nobody_joins_keep_their_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 9, 4, generator=generator, dtype=torch.float32)
    size = torch.full((1, 9), 3.0)
    matching = match(torch.randn(1, 9, 4, generator=generator), 1)
    merged, _ = merge(x, size, matching)
    source, destination = int(matching.source), int(matching.destination)
    stays = [i for i in [0, 2, 4, 6, 8, 1, 3, 5, 7] if i not in (source, destination)]
    rows = [i for i in range(8) if i != 4 + destination // 2]
    assert torch.equal(merged[0, rows], x[0, stays])


def test_proportional_attention_over_merged_copies_equals_attention_over_the_copies() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    copies = torch.tensor([1, 3, 1, 2, 6])
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    )
    bias = proportional_bias(copies[None].double(), torch.float64)
    merged = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(merged, plain, rtol=1e-14, atol=1e-14)


def test_a_zero_key_gives_no_nan_and_ties_go_left() -> None:
    metric = torch.zeros(1, 7, 2)
    matching = match(metric, 2)
    assert matching.source.tolist() == [[2, 4]]
    assert matching.destination.tolist() == [[1, 1]]
    assert matching.unmerged.tolist() == [[0, 6]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_fp32(dtype: torch.dtype) -> None:
    x = torch.full((1, 3, 1), 100.0, dtype=dtype)
    matching = match(torch.ones(1, 3, 2), 1)
    merged, size = merge(x, torch.tensor([[1.0, 2000.0, 3000.0]]), matching)  # 500000 does not fit into fp16
    assert merged.flatten().tolist() == [100.0, 100.0]
    assert size.tolist() == [[1.0, 5000.0]]


def test_schedules_read_r_as_the_paper_does() -> None:
    falling = [32, 30, 29, 27, 26, 24, 23, 21, 20, 18, 17, 16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert merge_schedule((16, -1), 23) == falling
    assert merge_schedule((16, 1), 23)[::-1] == [32, 30, 29, 27, 26, 24, 23, 21, 20, 18, 17, 16, *falling[12:]]
    assert merge_schedule((16, 0), 5) == [16] * 5
    assert merge_schedule((7, -0.5), 1) == [10]
    assert merge_schedule(13, 3) == [13, 13, 13]
    assert merge_schedule([5, 4], 4) == [5, 4, 0, 0]
    assert merge_schedule([5, 4, 3], 2) == [5, 4]


@pytest.mark.parametrize(
    ("keep", "high", "layers"), [(288, 13, 12), (192, 17, 16), (128, 20, 11), (64, 23, 6), (576, 0, 0)]
)
def test_exact_schedules_of_a_clip_tower_are_the_published_ones(keep: int, high: int, layers: int) -> None:
    assert exact_schedule(576, keep, 23) == [high] * layers + [max(0, high - 1)] * (23 - layers)


@pytest.mark.parametrize("patches", [1, 2, 9, 36, 49])
@pytest.mark.parametrize("layers", [1, 2, 5, 7])
def test_exact_schedules_reach_whatever_can_be_reached(patches: int, layers: int) -> None:
    reachable = {patches}
    for _ in range(layers):
        reachable = {p - r for p in reachable for r in range(p // 2 + 1)}
    for keep in range(patches + 2):
        if keep not in reachable:
            with pytest.raises(InputError, match=f"keep: got {keep}; .* give {min(reachable)} <= keep <= {patches}"):
                exact_schedule(patches, keep, layers)
            continue
        now = patches
        for r in exact_schedule(patches, keep, layers):
            assert 0 <= r <= now // 2
            now -= r
        assert now == keep


# In a model -----------------------------------------------------------------------------------------------------------
TOWERS = [{}, {"strategy": "full"}, {"feature_layer": -1}, {"siglip": True, "feature_layer": -1}]


def tower_by_loops(
    naive_tower: ModuleType, model: Any, pixels: torch.Tensor, counts: list[int], prop_attn: bool
) -> tuple[torch.Tensor, list[set[int]]]:
    """One image [3, h, w] through the tower, merging: tokens [t, C] of the feature layer, and what each stands for."""
    tower = model.model.vision_tower
    cls = model.config.vision_config.model_type == "clip_vision_model"
    with torch.no_grad():
        x = tower(pixels[None], output_hidden_states=True).hidden_states[0]
    size, sources = [1.0] * x.shape[1], [{i} for i in range(x.shape[1])]
    for layer, r in zip(naive_tower.layers_of(tower), counts, strict=False):  # later layers do not reach the features
        bias = torch.tensor(size, dtype=x.dtype).log()[None] if prop_attn else None
        seen = naive_tower.look_at(layer, x, bias)
        r = min(r, (x.shape[1] - cls) // 2)
        middle = seen.middle[0]
        if r:
            middle, size, sources = step_by_loops(middle, size, sources, seen.k[0].mean(0).detach(), r, cls)
        x = (middle + layer.mlp(layer.layer_norm2(middle)))[None]
    return x[0].detach(), sources


@pytest.mark.parametrize("options", TOWERS, ids=str)
@pytest.mark.parametrize(
    ("method", "counts"),
    [
        (ToMe(keep=9), [7, 7, 7, 6]),
        (ToMe(keep=10, order="official"), [7, 7, 6, 6]),
        (ToMe(keep=4), [8, 12, 8, 4]),
        (ToMe(r=5), [5, 5, 5, 5]),
        (ToMe(r=(5, -1.0), prop_attn=False), [10, 6, 3, 0]),
        (ToMe(r=[0, 30, 0, 3]), [0, 30, 0, 3]),
    ],
    ids=str,
)
def test_the_decoder_gets_the_merged_tokens(
    llava: Any, prompts: Any, naive_tower: ModuleType, options: dict[str, Any], method: ToMe, counts: list[int]
) -> None:
    model = llava(layers=5 if options.get("feature_layer") is None else 4, **options)
    inputs, lead = prompts(model, images=(1, 2)), int(options.get("strategy") == "full")
    cls = int("siglip" not in options)
    if lead and method.keep is not None:  # CLS counts in the budget
        counts = {9: [7, 7, 7, 7], 10: [7, 7, 7, 6], 4: [12, 12, 6, 3]}[method.keep]
    expected, firsts, groups = [], [], []
    for pixels in inputs["pixel_values"]:
        tokens, sources = tower_by_loops(naive_tower, model, pixels, counts, method.prop_attn)
        first = [min(source) - cls for source in sources[cls:]]
        order = list(range(len(first)))
        if method.order == "min_source":
            order = sorted(order, key=lambda i: first[i])
        with torch.no_grad():
            rows = torch.cat([tokens[:cls][:lead], tokens[cls:][order]])
            expected.append(model.model.multi_modal_projector(rows))
        firsts.append([first[i] for i in order])
        groups.append([next(n for n, i in enumerate(order) if p + cls in sources[cls + i]) for p in range(36)])
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    if method.keep is not None:
        assert [len(image) for image in expected] == [method.keep] * 3
    assert [row[row >= 0].tolist() for row in trace.kept] == firsts  # CLS is -1
    assert trace.notes["groups"].tolist() == groups
    merging = [layer for layer, r in enumerate(counts) if r]
    assert list(trace.kept_by_layer) == merging
    assert trace.kept_by_layer[merging[-1]].tolist() == [sorted(first) for first in firsts]


def test_no_merging_is_the_stock_model_bit_for_bit(llava: Any, prompts: Any) -> None:
    model = llava(layers=3)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        for method in (ToMe(r=0), ToMe(keep=36), ToMe(r=[]), ToMe(r=(0, -1.0))):
            with method(model) as trace:
                assert torch.equal(model(**inputs).logits, expected)
            assert trace.budget()["final"] == 1.5 * 36


def test_every_tile_merges_alone_and_its_tokens_stand_where_their_first_patch_was(
    families: ModuleType, naive_tower: ModuleType
) -> None:
    model, method = families.model("llava_next"), ToMe(keep=7)
    inputs, expected = families.inputs("llava_next", model, batch=2), []
    for pixels, tiles, size in zip(inputs["pixel_values"], (3, 5), inputs["image_sizes"], strict=True):
        numbers = torch.arange(tiles * 16, dtype=torch.float64).view(tiles, 16, 1)
        order, _ = model.model.pack_image_features([numbers], size[None], "default", numbers.new_full((1,), -1))
        at: dict[int, torch.Tensor] = {}
        for number, tile in enumerate(pixels[:tiles]):
            tokens, sources = tower_by_loops(naive_tower, model, tile, [5, 4], True)
            with torch.no_grad():
                rows = model.model.multi_modal_projector(tokens[1:])
            at |= {16 * number + min(source) - 1: row for source, row in zip(sources[1:], rows, strict=True)}
        expected.append(torch.stack([at[int(n)] for n in order[0][:, 0] if int(n) in at]))
    naive_tower.assert_decodes_as(model, inputs, method, expected)


def test_attention_that_takes_no_bias_is_refused_unless_none_is_needed(llava: Any) -> None:
    model = llava(layers=3)
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match=r"prop_attn: .* flash_attention_2 cannot"):
        ToMe(keep=9)(model).attach()
    ToMe(keep=9, prop_attn=False)(model).attach().detach()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ToMe(keep=37), "keep: got 37; .* give 9 <= keep <= 36"),
        (ToMe(keep=8), "keep: got 8; 2 layers that merge at most half of their patches take 36 visual tokens to 9"),
        (ToMe(r=[1, 2, 3]), "r: got numbers for 3 layers, but the image feature comes from layer 1"),
    ],
    ids=str,
)
def test_a_budget_that_the_tower_cannot_reach_is_refused(llava: Any, method: ToMe, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(llava(layers=3)).attach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "keep or r: got neither"),
        ({"keep": 9, "r": 3}, "keep or r: got keep and r"),
        ({"r": -1}, "r: got -1; give an integer of at least 0"),
        ({"r": (3, 2.0)}, "r: got 2.0; give a number from -1.0 to 1.0"),
        ({"r": (3, 0.0, 1)}, r"r: got \(3, 0.0, 1\)"),
        ({"r": [3, "x"]}, "r: got 'x'"),
        ({"keep": 9, "prop_attn": 1}, "prop_attn: got 1"),
        ({"keep": 9, "order": "raster"}, "order: got 'raster'; give 'min_source' or 'official'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ToMe(**settings)
