"""FlowCut against an independent implementation in plain loops, its invariants, and the places where it could break."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.flowcut_score import adaptive_count, flowcut_score, running_average, select


def encode(model: Any, method: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, Any, list[int]]:
    """(features [images, placeholders, D] with NaN where dropped, trace, the lengths each vision layer saw)."""
    lengths: list[int] = []
    watch = [
        layer.layer_norm1.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
        for layer in model.model.vision_tower.encoder.layers
    ]
    with torch.no_grad(), method(model) as trace:
        output = model.model.get_image_features(pixels, return_dict=True)
    for handle in watch:
        handle.remove()
    return torch.stack(list(output.pooler_output)), trace, lengths


def images(model: Any, count: int, seed: int = 0) -> torch.Tensor:
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(77 + seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64).to(model.dtype)


def replace_embeddings(model: Any, change: Any) -> None:
    model.model.vision_tower.pre_layrnorm.register_forward_hook(lambda module, args, output: change(output))


CASES = [
    # layers, image, width, heads, feature layer, strategy, keep, batch, seed
    (6, 24, 16, 2, -2, "default", 9, 1, 0),
    (6, 24, 16, 2, -2, "default", 5, 3, 1),
    (7, 24, 16, 4, -2, "default", 12, 2, 2),
    (5, 20, 24, 3, -1, "default", 1, 2, 3),
    (8, 24, 16, 2, -3, "default", 20, 3, 4),
    (4, 32, 32, 4, 3, "default", 40, 2, 5),
    (8, 16, 16, 1, 6, "default", 15, 1, 6),
    (6, 24, 16, 2, -2, "full", 9, 2, 7),
    (3, 24, 16, 2, -1, "full", 2, 3, 8),
    (2, 24, 16, 2, -1, "default", 7, 2, 9),
]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(("layers", "side", "width", "heads", "layer", "strategy", "keep", "batch", "seed"), CASES)
def test_ids_counts_lengths_and_features_equal_the_plain_loops(
    llava: Any, naive: ModuleType, layers: int, side: int, width: int, heads: int, layer: int, strategy: str,
    keep: int, batch: int, seed: int, attn: str,
) -> None:  # fmt: skip
    model = llava(
        layers=layers, image_size=side, width=width, heads=heads, feature_layer=layer, strategy=strategy,
        attn=attn, seed=seed, dtype=torch.float64 if attn == "sdpa" else torch.float32,
    )  # fmt: skip
    pixels, lead = images(model, batch, seed), int(strategy == "full")
    tower = model.model.vision_tower
    feature_layer = layer - 1 if layer >= 0 else layers + layer
    with torch.no_grad():
        x = naive.embeddings(tower, pixels)
        expected = naive.naive_flowcut(tower, x, keep - lead, feature_layer)
        projected = model.model.multi_modal_projector(expected["feature"][:, 1 - lead :])
    found, trace, lengths = encode(model, vlattn.FlowCut(keep=keep), pixels)

    assert trace.kept.tolist() == expected["kept"]
    assert {index: ids.tolist() for index, ids in trace.kept_by_layer.items()} == expected["by_layer"]
    assert lengths == expected["lengths"]
    total = (side // 4) ** 2
    assert trace.visual_tokens == total + lead == found.shape[1]
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-4
    for image, ids in enumerate(expected["kept"]):
        slots = list(range(lead)) + [lead + i for i in ids]
        torch.testing.assert_close(found[image, slots], projected[image], rtol=tolerance, atol=tolerance)
        dropped = sorted(set(range(total + lead)) - set(slots))
        assert bool(found[image, dropped].isnan().all())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_cosine_option_equals_the_plain_loops(llava: Any, naive: ModuleType, batch: int, seed: int) -> None:
    model = llava(seed=seed)
    pixels = images(model, batch, seed)
    with torch.no_grad():
        _, kept = naive.naive_features(model, pixels, 8, semantic="cosine")
        _, other = naive.naive_features(model, pixels, 8)
    _, trace, _ = encode(model, vlattn.FlowCut(keep=8, semantic="cosine"), pixels)
    assert trace.kept.tolist() == kept
    assert kept != other


# Invariants -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("count", ["batch_max", "per_image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_everything_gives_the_vanilla_logits_bit_for_bit(
    llava: Any, prompts: Any, dtype: torch.dtype, count: str, strategy: str
) -> None:
    model = llava(strategy=strategy, dtype=dtype)
    inputs = prompts(model, images=(1, 2))
    everything = 36 + int(strategy == "full")
    with torch.no_grad():
        vanilla = model(**inputs)
        with vlattn.FlowCut(keep=everything, count=count)(model) as trace:
            pruned = model(**inputs)
    assert torch.equal(vanilla.logits, pruned.logits)
    assert trace.kept.tolist() == [list(range(36))] * 3
    assert trace.kept_by_layer == {}
    assert trace.prompt_length == trace.kept_length


@pytest.mark.parametrize("count", ["batch_max", "per_image"])
@pytest.mark.parametrize(("layers", "layer"), [(6, -2), (7, -2), (7, -1), (8, -3), (6, 4), (5, 2), (3, -1)])
def test_prunings_fall_on_every_second_layer_counted_from_the_one_before_the_feature_layer(
    llava: Any, layers: int, layer: int, count: str
) -> None:
    model = llava(layers=layers, feature_layer=layer)
    feature = layer - 1 if layer >= 0 else layers + layer
    _, trace, lengths = encode(model, vlattn.FlowCut(keep=6, count=count), images(model, 3))
    expected = {i for i in range(feature) if (feature - 1 - i) % 2 == 0}
    # A pruning that lands on the budget early leaves nothing for the later ones.
    seen = set(trace.kept_by_layer)
    assert seen <= expected
    assert all(trace.kept_by_layer[max(seen)].shape[1] == 6 for _ in expected - seen)
    assert min(seen) == min(expected)
    assert trace.kept_by_layer[max(seen)].tolist() == trace.kept.tolist()
    assert trace.kept.shape == (3, 6)
    assert lengths[feature:] == [7] * (layers - feature)
    before = [set(range(36))] * 3
    for index in sorted(seen):
        rows = [[i for i in row if i >= 0] for row in trace.kept_by_layer[index].tolist()]
        assert all(row == sorted(set(row)) for row in rows)
        assert all(set(row) <= old for row, old in zip(rows, before, strict=True))
        assert all(6 <= len(row) <= len(old) for row, old in zip(rows, before, strict=True))
        before = [set(row) for row in rows]


def test_cls_stays_in_slot_0_and_leads_the_features_of_a_full_strategy(llava: Any, naive: ModuleType) -> None:
    model = llava(strategy="full")
    pixels = images(model, 2)
    entered: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: entered.update({index: args[0]}))
    found, trace, _ = encode(model, vlattn.FlowCut(keep=10), pixels)
    with torch.no_grad():
        projected = model.model.multi_modal_projector(entered[5][:, :1])
    assert trace.kept.shape == (2, 9)  # CLS counts inside the budget of 10
    torch.testing.assert_close(found[:, :1], projected)
    assert int((~found[..., 0].isnan()).sum()) == 20


def test_uniform_attention_removes_everything_in_the_last_pruning_only(llava: Any) -> None:
    model = llava(layers=8)
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    _, trace, lengths = encode(model, vlattn.FlowCut(keep=9), images(model, 2))
    assert {index: ids.shape[1] for index, ids in trace.kept_by_layer.items()} == {1: 36, 3: 36, 5: 9}
    assert lengths == [37] * 6 + [10, 10]


@pytest.mark.parametrize(("patches", "target", "remaining"), [(36, 9, 4), (144, 20, 20), (36, 9, 2), (10, 9, 18)])
def test_one_hot_attention_drops_the_surplus_over_the_root_of_what_remains(
    patches: int, target: int, remaining: int
) -> None:
    attention = torch.nn.functional.one_hot(torch.tensor([3]), patches).float()
    n = adaptive_count(attention, torch.tensor([patches]), target, remaining)
    assert n.tolist() == [round((patches - target) / math.sqrt(remaining))]


@pytest.mark.parametrize(("surplus", "expected"), [(1, 0), (3, 2), (5, 2), (7, 4), (9, 4)])
def test_a_count_half_way_rounds_to_the_even_number(surplus: int, expected: int) -> None:
    attention = torch.nn.functional.one_hot(torch.tensor([0]), surplus + 2).double()
    assert adaptive_count(attention, torch.tensor([surplus + 2]), 2, 4).tolist() == [expected]


@pytest.mark.parametrize("seed", range(4))
def test_the_count_follows_the_formula_and_never_passes_the_surplus(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(4, 30, generator=generator, dtype=torch.float64) ** (1 + 4 * seed)
    for target, remaining in ((1, 2), (7, 3), (29, 1), (30, 5)):
        expected = []
        for row in attention.tolist():
            p = [value / sum(row) for value in row]
            h = -sum(value * math.log(value) for value in p) / math.log(30)
            expected.append(round((30 - target) / math.sqrt(remaining) * (1 - h * h)))
        found = adaptive_count(attention, torch.full((4,), 30), target, remaining)
        assert found.tolist() == expected
        assert adaptive_count(attention, torch.full((4,), 30), target, 0).tolist() == [30 - target] * 4


def test_permuting_the_patches_permutes_the_kept_ids(llava: Any) -> None:
    model = llava(layers=6)
    pixels = images(model, 2)
    _, straight, _ = encode(model, vlattn.FlowCut(keep=9), pixels)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(5))
    replace_embeddings(model, lambda x: torch.cat([x[:, :1], x[:, 1:][:, order]], 1))
    _, shuffled, _ = encode(model, vlattn.FlowCut(keep=9), pixels)
    assert [sorted(order[row].tolist()) for row in shuffled.kept] == straight.kept.tolist()
    assert shuffled.kept.tolist() != straight.kept.tolist()


@pytest.mark.parametrize("count", ["batch_max", "per_image"])
def test_an_image_among_copies_of_itself_keeps_what_it_keeps_alone(llava: Any, count: str) -> None:
    model = llava()
    pixels = images(model, 1)
    alone, first, _ = encode(model, vlattn.FlowCut(keep=7, count=count), pixels)
    copies, second, _ = encode(model, vlattn.FlowCut(keep=7, count=count), pixels.expand(3, -1, -1, -1))
    assert second.kept.tolist() == first.kept.tolist() * 3
    torch.testing.assert_close(copies, alone.expand(3, -1, -1), equal_nan=True, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_per_image_gives_each_image_its_own_set_where_the_batch_maximum_does_not(llava: Any, attn: str) -> None:
    differed = 0
    for seed in range(4):
        model = llava(layers=8, attn=attn, seed=seed, sharpness=3.0)
        pixels = images(model, 3, seed)
        alone = [encode(model, vlattn.FlowCut(keep=9), image[None]) for image in pixels]
        ragged, trace, _ = encode(model, vlattn.FlowCut(keep=9, count="per_image"), pixels)
        assert trace.kept.tolist() == [one.kept[0].tolist() for _, one, _ in alone]
        expected = torch.cat([features for features, _, _ in alone])
        tolerance = 1e-10 if attn == "sdpa" else 1e-6  # eager attention rounds its weights to fp32 on the way
        torch.testing.assert_close(ragged, expected, equal_nan=True, rtol=tolerance, atol=tolerance)
        for index, rows in trace.kept_by_layer.items():
            for row, (_, one, _) in zip(rows.tolist(), alone, strict=True):
                own = one.kept_by_layer[index][0].tolist() if index in one.kept_by_layer else one.kept[0].tolist()
                assert row == own + [-1] * (len(row) - len(own))
        _, shared, _ = encode(model, vlattn.FlowCut(keep=9), pixels)
        differed += shared.kept.tolist() != trace.kept.tolist()
    assert differed > 0


def test_batch_max_drops_the_largest_count_of_the_batch_from_every_image(llava: Any) -> None:
    model = llava(layers=8, sharpness=3.0)
    pixels = images(model, 3)
    alone = [encode(model, vlattn.FlowCut(keep=9), image[None])[1].kept_by_layer[1].shape[1] for image in pixels]
    _, shared, _ = encode(model, vlattn.FlowCut(keep=9), pixels)
    assert len(set(alone)) > 1
    assert shared.kept_by_layer[1].shape[1] == min(alone)


# The pure functions ---------------------------------------------------------------------------------------------------
def test_the_score_averages_heads_before_the_norm_and_leaves_value_logits_unscaled() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64)
    cls = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    score, attention = flowcut_score(cls, v)
    for b in range(2):
        a = [sum(float(cls[b, h, j]) for h in range(3)) / 3 for j in range(1, 6)]
        s = [0.0] * 5
        for h in range(3):
            logits = [float(v[b, h, 0] @ v[b, h, j]) for j in range(6)]
            total = sum(map(math.exp, logits))
            s = [old + math.exp(logits[j + 1]) / total / 3 for j, old in enumerate(s)]
        size = [sum(abs(float(v[b, :, j, d].sum()) / 3) for d in range(4)) for j in range(1, 6)]
        expected = [(a[j] / sum(a) + s[j] / sum(s)) * size[j] for j in range(5)]
        torch.testing.assert_close(score[b], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(attention[b], torch.tensor(a, dtype=torch.float64))


def test_the_running_average_takes_the_first_layer_whole() -> None:
    scores = [torch.tensor([[float(2**i)]]) for i in range(4)]
    average = None
    for score in scores:
        average = running_average(average, score)
    assert average is not None
    assert average.item() == 1 / 8 + 2 / 8 + 4 / 4 + 8 / 2


def test_select_keeps_raster_order_and_marks_the_filler_of_ragged_rows() -> None:
    average = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0]])
    index, alive = select(average, torch.tensor([2, 2]))
    assert (index.tolist(), alive) == ([[1, 3], [0, 1]], None)
    index, alive = select(average, torch.tensor([1, 4]))
    assert alive is not None
    assert [row[kept].tolist() for row, kept in zip(index, alive, strict=True)] == [[1], [0, 1, 2, 3]]
    assert bool((index.diff(dim=1) > 0).all())


# Numbers at the edge --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("semantic", ["softmax", "cosine"])
def test_attention_and_similarity_that_vanish_give_no_nan(dtype: torch.dtype, semantic: str) -> None:
    cls = torch.zeros(1, 2, 6, dtype=dtype)
    cls[..., 0] = 1  # CLS looks at itself alone
    value = torch.full((1, 2, 6, 4), -1.0, dtype=dtype)
    value[:, :, 0] = 20  # and its value is unlike any other: every similarity underflows
    value[:, :, 3] *= 2
    score, attention = flowcut_score(cls, value, semantic=semantic)
    assert bool(score.isfinite().all())
    assert adaptive_count(attention, torch.tensor([5]), 1, 4).tolist() == [2]
    cls[..., 2] = 1
    score, attention = flowcut_score(cls, value, semantic=semantic)
    assert score.argmax().item() == 1  # what attention there is still decides
    assert adaptive_count(attention, torch.tensor([5]), 1, 4).tolist() == [2]


@pytest.mark.parametrize("sharpness", [40.0, 400.0])
def test_attention_so_sharp_that_entries_are_zero_follows_zero_times_log_zero_is_zero(
    llava: Any, naive: ModuleType, sharpness: float
) -> None:
    model = llava(layers=8, sharpness=sharpness)
    pixels = images(model, 2)
    with torch.no_grad():
        expected = naive.naive_flowcut(
            model.model.vision_tower, naive.embeddings(model.model.vision_tower, pixels), 9, 6
        )
    _, trace, _ = encode(model, vlattn.FlowCut(keep=9), pixels)
    assert {index: ids.tolist() for index, ids in trace.kept_by_layer.items()} == expected["by_layer"]


@pytest.mark.parametrize("count", ["batch_max", "per_image"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [2.0, 60.0])
def test_half_precision_runs_to_finite_logits(
    llava: Any, prompts: Any, dtype: torch.dtype, attn: str, count: str, sharpness: float
) -> None:
    model = llava(layers=8, dtype=dtype, attn=attn, sharpness=sharpness)
    inputs = prompts(model, images=(2, 1))
    with torch.no_grad(), vlattn.FlowCut(keep=9, count=count)(model) as trace:
        logits = model(**inputs).logits
    assert bool(logits[:, -3:].isfinite().all())
    assert logits.dtype == dtype
    assert trace.kept.shape == (3, 9)
    assert bool((trace.kept.diff(dim=1) > 0).all())
    assert trace.kept.min() >= 0
    assert trace.kept.max() < 36


# Errors ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"keep": 0}, "keep: got 0"),
        ({"keep": -3}, "keep: got -3"),
        ({"keep": True}, "keep: got True"),
        ({"keep": 2.0}, "keep: got 2.0"),
        ({"keep": 8, "semantic": "dot"}, "semantic: got 'dot'"),
        ({"keep": 8, "count": "mean"}, "count: got 'mean'"),
        ({"keep": 8, "positions": "gaps"}, "positions: got 'gaps'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        vlattn.FlowCut(**fields)


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        ({}, {"keep": 37}, "give 1 <= keep <= 36"),
        ({"strategy": "full"}, {"keep": 38}, "give 2 <= keep <= 37"),
        ({"strategy": "full"}, {"keep": 1}, "give 2 <= keep <= 37"),
        ({"feature_layer": [-2, -3]}, {"keep": 9}, "vision_feature_layer"),
        ({"feature_layer": 1}, {"keep": 9}, "first vision layer"),
    ],
)
def test_a_model_it_cannot_prune_is_refused_and_left_untouched(
    llava: Any, tiny: ModuleType, options: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    model = llava(**options)
    before = tiny.hooks_of(model)
    with pytest.raises(InputError, match=message):
        vlattn.attach(model, vlattn.FlowCut(**method))
    assert tiny.hooks_of(model) == before


def test_per_image_counts_are_refused_under_flash_attention_and_shared_counts_are_not(llava: Any) -> None:
    model = llava()
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2"):
        vlattn.attach(model, vlattn.FlowCut(keep=9, count="per_image"))
    vlattn.attach(model, vlattn.FlowCut(keep=9)).detach()
