"""VisionZip: the published vector, the merge in plain loops, and what a live model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.visionzip import Merge, VisionZip, fold, visionzip

Numbers = Callable[..., torch.Tensor]


def close(found: torch.Tensor, expected: list[list[float]] | list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


def fold_by_loops(hidden: torch.Tensor, key: torch.Tensor, count: int, mean: bool) -> torch.Tensor:
    """One image: [M, C], [M, D] -> [count, C]."""
    total = len(hidden)
    targets = [i * max(1, total // count) for i in range(count)]
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for j in set(range(total)) - set(targets):
        cosines = [float(key[j] @ key[t] / (key[j].norm() * key[t].norm())) for t in targets]
        groups[targets[cosines.index(max(cosines))]].append(j)
    rows = []
    for t, members in groups.items():
        others = sum((hidden[j] for j in members), torch.zeros_like(hidden[t]))
        rows.append((hidden[t] + others) / (len(members) + 1) if mean else hidden[t] + others / max(len(members), 1))
    return torch.stack(rows)


def test_the_published_vector_is_reproduced(formula: Numbers) -> None:
    q, k = 3 * formula(31, 1, 2, 21, 4), 3 * formula(32, 1, 2, 21, 4)
    hidden = formula(33, 1, 21, 6)
    score = ops.query_row_attention(q[:, :, :1], k, scale=0.5)[:, :, 0, 1:].sum(1)
    expected = [0.093405, 0.043883, 0.071269, 0.128002, 0.064712, 0.233407, 0.090096, 0.184597, 0.126014]
    close(score[0, :9], expected)
    found = visionzip(hidden[:, 1:], score, k.mean(1)[:, 1:], dominant=4, contextual=3)
    assert (found.dominant[0] + 1).tolist() == [4, 6, 8, 9]
    assert (found.target[0] + 1).tolist() == [1, 10, 15]
    close(
        found.contextual[0],
        [
            [0.191053, -0.053309, -0.211044, 0.293251, 0.093392, 0.213907],
            [0.267839, 0.395044, -0.128403, -0.563094, 0.505028, 0.106660],
            [-0.377254, -0.528059, -0.368347, 0.216058, 0.037168, 0.297772],
        ],
    )


@pytest.mark.parametrize("merge", ["official", "mean"])
@pytest.mark.parametrize(("total", "count"), [(1, 1), (5, 5), (7, 2), (16, 3), (23, 10)])
def test_folding_equals_plain_loops(merge: Merge, total: int, count: int) -> None:
    generator = torch.Generator().manual_seed(total)
    hidden = torch.randn(3, total, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(3, total, 4, generator=generator, dtype=torch.float64)
    found, target = fold(hidden, key, count, merge)
    assert target.tolist() == [i * max(1, total // count) for i in range(count)]
    for b in range(3):
        torch.testing.assert_close(found[b], fold_by_loops(hidden[b], key[b], count, merge == "mean"))


@pytest.mark.parametrize(
    ("dominant", "rest", "step", "last"), [(161, 415, 13, 377), (107, 469, 23, 437), (53, 523, 52, 468)]
)
def test_targets_stand_where_the_published_splits_put_them(dominant: int, rest: int, step: int, last: int) -> None:
    contextual = {161: 30, 107: 20, 53: 10}[dominant]
    score = -torch.arange(576.0)[None]  # the first patches are dominant
    found = visionzip(torch.ones(1, 576, 1), score, torch.ones(1, 576, 2), dominant, contextual)
    index = found.target[0] - dominant
    assert 576 - dominant == rest
    assert index.diff().tolist() == [step] * (contextual - 1)
    assert int(index[-1]) == last


def test_a_target_whose_members_equal_it_is_doubled_or_kept() -> None:
    hidden = torch.arange(1.0, 4.0).repeat_interleave(4)[None, :, None].expand(1, 12, 2)
    key = torch.eye(3)[torch.arange(3).repeat_interleave(4)][None]
    assert torch.equal(fold(hidden, key, 3, "official")[0], 2 * hidden[:, ::4])
    assert torch.equal(fold(hidden, key, 3, "mean")[0], hidden[:, ::4])


def test_what_the_targets_gained_sums_to_what_was_folded_in() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 31, 3, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 31, 4, generator=generator, dtype=torch.float64)
    found, target = fold(hidden, key, 5)
    ones = fold(torch.ones_like(hidden), key, 5, "mean")[0]
    assert bool((ones == 1).all())
    others = torch.tensor([j for j in range(31) if j not in target.tolist()])
    unit = key / key.norm(dim=-1, keepdim=True)
    counts = (unit[:, others] @ unit[:, target].transpose(1, 2)).argmax(-1)
    for b in range(2):
        number = torch.bincount(counts[b], minlength=5)[:, None]
        torch.testing.assert_close(((found[b] - hidden[b, target]) * number).sum(0), hidden[b, others].sum(0))


def test_a_zero_key_joins_the_first_target_and_gives_no_nan() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    key = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    assert fold(hidden, key, 2)[0].flatten().tolist() == [3.0, 12.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    hidden = torch.full((1, 2050, 1), 0.1, dtype=dtype)
    hidden[0, 0] = 0
    found = fold(hidden, torch.ones(1, 2050, 2, dtype=dtype), 1)[0]
    assert found.dtype == dtype
    assert torch.equal(found, hidden[:, 1:2])  # the mean of equal numbers is the number, however many there are


def test_a_batch_row_equals_the_image_alone_and_ties_go_left() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, key = (torch.randn(3, 20, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    score = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    score[2] = 0
    together = visionzip(hidden, score, key, 6, 4)
    assert together.dominant[2].tolist() == [0, 1, 2, 3, 4, 5]
    for b in range(3):
        one = slice(b, b + 1)
        for a, c in zip(together, visionzip(hidden[one], score[one], key[one], 6, 4), strict=True):
            torch.testing.assert_close(a[one], c)


# In a model -----------------------------------------------------------------------------------------------------------
def zip_by_loops(seen: Any, features: torch.Tensor, method: VisionZip, cls: bool) -> tuple[torch.Tensor, list[int]]:
    """One image: a layer's `Seen`, its patch features [P, C] -> tokens [K, C], ids of the dominant patches."""
    attention, key, output = seen.attention[0], seen.k[0].mean(0), seen.output[0]
    if cls:
        score, key = attention.sum(0)[0, 1:], key[1:]
    else:
        score = attention.mean(0).sum(0)
    best = sorted(range(len(score)), key=lambda i: -float(score[i]))[: method.dominant - int(cls and method.cls)]
    rest = [i for i in range(len(score)) if i not in best]
    folded = fold_by_loops(features[rest], key[rest], method.contextual, method.merge == "mean")
    front = [output[:1]] if cls and method.cls else []
    return torch.cat([*front, features[sorted(best)], folded]), sorted(best)


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "full"}, {"feature_layer": -1}, {"siglip": True, "feature_layer": -1}], ids=str
)
@pytest.mark.parametrize(
    "method", [VisionZip(6, 4), VisionZip(2, 1, merge="mean"), VisionZip(9, 3, cls=False), VisionZip(30, 6)], ids=str
)
def test_the_decoder_gets_cls_dominant_and_contextual_tokens(
    llava: Any, prompts: Any, naive_tower: ModuleType, options: dict[str, Any], method: VisionZip
) -> None:
    model = llava(layers=4, **options)
    inputs, cls = prompts(model, images=(1, 2)), "siglip" not in options
    layer = model.config.vision_feature_layer % 5 - 1
    expected, dominant = [], []
    for pixels in inputs["pixel_values"]:
        features = naive_tower.features_of(model, pixels[None])[0, int(cls) :]
        with torch.no_grad():
            seen = naive_tower.look(model.model.vision_tower, pixels[None], layer)
            tokens, ids = zip_by_loops(seen, features, method, cls)
            expected.append(model.model.multi_modal_projector(tokens))
        dominant.append(ids)
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    assert trace.budget()["final"] == 1.5 * (method.dominant + method.contextual)
    assert [row[row >= 0].tolist() for row in trace.kept] == dominant  # CLS is -1
    assert trace.kept.eq(-2).sum(1).tolist() == [method.contextual] * 3


def test_permuting_the_heads_changes_nothing(llava: Any, prompts: Any, naive_tower: ModuleType) -> None:
    model = llava(layers=3, heads=4)
    inputs = prompts(model)
    with torch.no_grad(), VisionZip(6, 4)(model):
        before = model(**inputs).logits
        attention = naive_tower.layers_of(model.model.vision_tower)[1].self_attn
        swap = torch.tensor([2, 0, 3, 1])
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(attention, name)
            projection.weight.copy_(projection.weight.unflatten(0, (4, -1))[swap].flatten(0, 1))
            projection.bias.copy_(projection.bias.unflatten(0, (4, -1))[swap].flatten())
        out = attention.out_proj
        out.weight.copy_(out.weight.unflatten(1, (4, -1))[:, swap].flatten(1))
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-9, atol=1e-9)


def test_tiles_are_ordered_as_the_released_code_orders_them(families: ModuleType, naive_tower: ModuleType) -> None:
    model, method, side = families.model("llava_next"), VisionZip(5, 2), 4
    inputs = families.inputs("llava_next", model, batch=2, images=2)
    # (height, width) of the stitched tiles for the sizes of the four images, by hand.
    grids = [(1, 2), (2, 2), (1, 2), (2, 1)]
    layer, expected = model.config.vision_feature_layer % 4 - 1, []
    for pixels, (height, width) in zip(inputs["pixel_values"], grids, strict=True):
        parts = []
        for tile in pixels[: 1 + height * width]:
            features = naive_tower.features_of(model, tile[None])[0, 1:]
            seen = naive_tower.look(model.model.vision_tower, tile[None], layer)
            parts.append(zip_by_loops(seen, features, method, True))
        tokens = [parts[0][0]]
        for row in range(height * side):
            for column in range(width * side):
                rows, ids = parts[1 + row // side * width + column // side]
                patch = row % side * side + column % side
                if patch in ids:
                    tokens.append(rows[1 + ids.index(patch)][None])
        tokens += [rows[:1] for rows, _ in parts[1:]]
        tokens += [rows[-2:] for rows, _ in parts[1:]]
        with torch.no_grad():
            expected.append(model.model.multi_modal_projector(torch.cat(tokens)))
    assert [len(image) for image in expected] == [7 * (1 + height * width) for height, width in grids]
    naive_tower.assert_decodes_as(model, inputs, method, expected)


def test_an_image_in_one_view_keeps_its_newline(families: ModuleType, naive_tower: ModuleType) -> None:
    model, method = families.model("llava_onevision"), VisionZip(3, 2)
    inputs = families.inputs("llava_onevision", model, batch=2, images=2)  # several images are not cut into tiles
    layer, expected = model.config.vision_feature_layer % 4 - 1, []
    for pixels in inputs["pixel_values"]:
        view = pixels[:1]
        features = naive_tower.features_of(model, view)[0]
        seen = naive_tower.look(model.model.vision_tower, view, layer)
        with torch.no_grad():
            tokens = model.model.multi_modal_projector(zip_by_loops(seen, features, method, False)[0])
        expected.append(torch.cat([tokens, model.model.image_newline[None]]))
    naive_tower.assert_decodes_as(model, inputs, method, expected)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            VisionZip(1, 3),
            {},
            r"dominant, contextual: got 1, 3; an image has 36 patches and CLS is one of the dominant",
        ),
        (VisionZip(30, 7), {}, r"got 30, 7; .* give dominant >= 2 and dominant \+ contextual <= 36"),
        (VisionZip(30, 7, cls=False), {}, r"give dominant >= 1 and dominant \+ contextual <= 36"),
        (VisionZip(6, 4), {"feature_layer": [-1, -2]}, "vision_feature_layer: .* joins several layers"),
    ],
    ids=str,
)
def test_a_budget_that_the_model_cannot_have_is_refused(
    llava: Any, method: VisionZip, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        method(llava(layers=3, **options)).attach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dominant": 0}, "dominant: got 0; give an integer of at least 1"),
        ({"contextual": 0}, "contextual: got 0"),
        ({"contextual": 2.0}, "contextual: got 2.0"),
        ({"merge": "sum"}, "merge: got 'sum'; give 'official' or 'mean'"),
        ({"cls": 1}, "cls: got 1; give True or False"),
        ({"positions": "old"}, "positions: got 'old'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisionZip(**settings)
