"""PruMerge: the published vectors, the merge in plain loops, and what a live model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.prumerge import PruMerge, adaptive_choice, exact_choice, merge, outlier_count

Numbers = Callable[..., torch.Tensor]


def close(found: torch.Tensor, expected: list[list[float]] | list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


def vector(
    formula: Numbers, patches: int, width: int, base: int, sharp: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features [N, C], CLS attention [N], keys [N, C]) of a layer whose weights are the formula's."""
    x = 2 * formula(base + 5, 1, patches + 1, width)
    q = x @ (sharp * formula(base + 1, width, width)).T + formula(base + 2, width)
    k = x @ (sharp * formula(base + 3, width, width)).T + formula(base + 4, width)
    row = ops.query_row_attention(q[:, None, :1], k[:, None], scale=width**-0.5)  # [1, 1, 1, 1 + N]
    return x[0, 1:], row[0, 0, 0, 1:], k[0, 1:]


def merge_by_loops(
    features: torch.Tensor, a: torch.Tensor, key: torch.Tensor, chosen: list[int], neighbors: int
) -> torch.Tensor:
    total = len(features)
    rows = []
    for i in chosen:
        cosine = {j: float(key[i] @ key[j] / (key[i].norm() * key[j].norm())) for j in range(total) if j != i}
        near = sorted(cosine, key=lambda j: -cosine[j])[:neighbors]
        rows.append(features[i] + sum((a[j] * features[j] for j in near), torch.zeros_like(features[i])))
    rest = [j for j in range(total) if j not in chosen]
    return torch.stack([*rows, sum((a[j] * features[j] for j in rest), torch.zeros_like(features[0]))])


def test_the_published_vector_is_reproduced(formula: Numbers) -> None:
    features, a, key = vector(formula, 49, 6, 70, 2.0)
    chosen = adaptive_choice(a)
    assert chosen.tolist() == [4, 29, 9]
    assert abs(float(a.max()) - 0.094420) < 6e-7
    close(
        merge(features, a, key, chosen),
        [
            [-0.666829, -0.901904, 0.607609, -0.323434, -1.042200, -1.080791],
            [0.371778, -0.747878, 0.756261, -0.600037, -1.063690, -0.720926],
            [0.049537, -1.198150, -0.126369, 0.423741, -0.865374, 0.268476],
            [-0.021076, -0.079130, -0.037983, 0.074881, -0.037754, -0.039440],
        ],
    )


def test_the_published_vector_with_the_grid_is_reproduced(formula: Numbers) -> None:
    features, a, key = vector(formula, 576, 4, 80, 4.0)
    scored = [5, 393, 135, 248, 292, 121, 46, 535, 141, 446]
    assert adaptive_choice(a).tolist() == scored
    chosen = adaptive_choice(a, plus=True)
    assert chosen.tolist() == scored + list(range(0, 575, 19))
    found = merge(features, a, key, chosen)
    assert len(found) == 42
    close(found[0], [-0.576966, 0.973244, 0.988707, -0.885602])
    close(found[40], [0.577284, 0.055502, -0.241820, 0.601101])
    close(found[41], [0.002023, 0.072961, 0.067669, -0.124216])


@pytest.mark.parametrize("neighbors", [1, 5, 32])
@pytest.mark.parametrize("total", [2, 9, 40])
def test_the_merge_equals_plain_loops(neighbors: int, total: int) -> None:
    generator = torch.Generator().manual_seed(total)
    features, key = (torch.randn(total, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    a = torch.rand(total, generator=generator, dtype=torch.float64)
    for count in {1, total // 2, total - 1}:
        chosen = torch.randperm(total, generator=generator)[:count]
        expected = merge_by_loops(features, a, key, chosen.tolist(), neighbors)
        torch.testing.assert_close(merge(features, a, key, chosen, neighbors), expected)


def test_equal_features_grow_by_the_attention_they_absorb() -> None:
    generator = torch.Generator().manual_seed(1)
    f, key = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.randn(50, 4, generator=generator).double()
    a = torch.rand(50, generator=generator, dtype=torch.float64)
    chosen = torch.tensor([7, 3, 30])
    found = merge(f.expand(50, 3), a, key, chosen, neighbors=49)
    for row, i in enumerate(chosen.tolist()):
        torch.testing.assert_close(found[row], f * (1 + a.sum() - a[i]))
    torch.testing.assert_close(found[-1], f * (a.sum() - a[chosen].sum()))


@pytest.mark.parametrize("iqr", [0.0, 1.0, 1.5, 3.0])
def test_outliers_are_counted_as_numpy_percentiles_count_them(iqr: float) -> None:
    generator = torch.Generator().manual_seed(2)
    for total in (5, 36, 49, 576):
        a = (3 * torch.randn(total, generator=generator, dtype=torch.float64)).softmax(0)
        low, high = np.percentile(a.numpy(), [25, 75])
        assert outlier_count(a, iqr) == int((a.numpy() > high + iqr * (high - low)).sum())


def peaked(total: int, outliers: int) -> torch.Tensor:
    """Attention with exactly so many outliers, at the end of the image, and an even rest."""
    a = torch.ones(total, dtype=torch.float64)
    a[total - outliers - 1 : total - 1] = 9 + torch.arange(outliers, dtype=torch.float64)
    return a


@pytest.mark.parametrize(
    ("outliers", "step", "points"),
    [(16, 12, 48), (32, 6, 96), (36, 5, 115), (40, 4, 144), (64, 3, 192), (96, 2, 288), (97, 1, 575), (140, 1, 575)],
)
def test_the_grid_has_the_published_steps_and_never_the_last_patch(outliers: int, step: int, points: int) -> None:
    a = peaked(576, outliers)
    assert outlier_count(a) == outliers
    chosen = adaptive_choice(a, plus=True)
    grid = list(range(0, 575, step))
    assert len(grid) == points
    assert chosen[:outliers].tolist() == list(range(574, 574 - outliers, -1))
    assert set(chosen.tolist()) == set(grid) | set(range(575 - outliers, 575))
    assert len(set(chosen.tolist())) == len(chosen)
    assert 575 not in chosen.tolist()


def test_even_attention_without_outliers_keeps_the_first_patch() -> None:
    a = torch.ones(36)
    assert outlier_count(a) == 0
    assert adaptive_choice(a).tolist() == [0]
    # One patch of 36: the grid is every twelfth.
    assert adaptive_choice(a, plus=True).tolist() == [0, 12, 24]


def test_many_outliers_do_not_stop_the_grid() -> None:
    a = torch.arange(36.0)
    assert outlier_count(a, iqr=-1.0) >= 13  # more than a third of the patches: the released code's step becomes 0
    assert len(adaptive_choice(a, iqr=-1.0, plus=True)) == 36


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("total", "keep"), [(576, 192), (576, 128), (576, 64), (36, 9), (36, 36), (9, 2), (1, 2)])
def test_exact_budgets_are_exact(total: int, keep: int, plus: bool) -> None:
    generator = torch.Generator().manual_seed(keep)
    features, key = (torch.randn(total, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a = torch.rand(total, generator=generator, dtype=torch.float64)
    chosen = exact_choice(a, keep - 1, plus)
    assert len(set(chosen.tolist())) == keep - 1
    scored = keep - 1 if not plus else max(1, round(keep / 4))
    assert chosen[:scored].tolist() == sorted(range(total), key=lambda i: -float(a[i]))[:scored]
    assert chosen[scored:].tolist() == sorted(chosen[scored:].tolist())
    assert len(merge(features, a, key, chosen)) == keep - int(keep - 1 == total)


def test_a_uniform_grid_spreads_over_what_the_scores_left() -> None:
    a = torch.zeros(100)
    a[[0, 99]] = 1.0
    assert exact_choice(a, 7, plus=True).tolist() == [0, 99, 1, 25, 49, 73, 98]


def test_with_every_patch_chosen_there_is_no_token_of_the_rest() -> None:
    features, a = torch.randn(4, 2, generator=torch.Generator().manual_seed(6)), torch.ones(4)
    assert merge(features, a, features, torch.arange(4)).shape == (4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    features = torch.full((4000, 1), 0.1, dtype=dtype)
    found = merge(features, torch.full((4000,), 1 / 4000), features, torch.tensor([0]))
    assert found.dtype == dtype
    torch.testing.assert_close(found[-1].float(), features[0].float() * 3999 / 4000, rtol=1e-2, atol=0)


# In a model -----------------------------------------------------------------------------------------------------------
TOWERS = [{}, {"strategy": "full"}, {"feature_layer": -1}, {"siglip": True, "feature_layer": -1}]


def tokens_by_loops(seen: Any, features: torch.Tensor, method: PruMerge, cls: bool, lead: int) -> torch.Tensor:
    """One image: the last layer's `Seen`, the projector's input [lead + P, C] -> tokens [K, C]."""
    q, k = (x[0].transpose(0, 1).flatten(1) for x in (seen.q, seen.k))  # [cls + P, C]
    attention = (
        seen.attention[0].mean(0) if method.per_head else (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
    )  # [cls + P, cls + P]
    a = attention[0, 1:] if cls else attention.mean(0)
    order = sorted(range(len(a)), key=lambda i: -float(a[i]))
    if method.keep is None:
        low, high = np.percentile(a.numpy(), [25, 75])
        count = max(1, int((a.numpy() > high + method.iqr * (high - low)).sum()))
        grid = range(0, len(a) - 1, max(1, len(a) // count // 3)) if method.plus else ()
        chosen = order[:count] + [i for i in grid if i not in order[:count]]
    else:
        chosen = exact_choice(a, method.keep - 1 - lead, method.plus).tolist()
    chosen = sorted(chosen) if method.order == "raster" else chosen
    merged = merge_by_loops(features[lead:], a, k[int(cls) :], chosen, method.neighbors)
    return torch.cat([features[:lead], merged])


@pytest.mark.parametrize("options", TOWERS, ids=str)
@pytest.mark.parametrize(
    "method",
    [
        PruMerge(),
        PruMerge(plus=True, iqr=0.5),
        PruMerge(keep=9),
        PruMerge(plus=True, keep=12, neighbors=3),
        PruMerge(iqr=0.2, order="raster", per_head=True),
    ],
    ids=str,
)
def test_the_decoder_gets_the_merged_tokens_of_each_image_alone(
    llava: Any, prompts: Any, naive_tower: ModuleType, options: dict[str, Any], method: PruMerge
) -> None:
    model = llava(layers=4, **options)
    inputs = prompts(model, images=(1, 2))
    cls, lead = "siglip" not in options, int(options.get("strategy") == "full")
    expected = []
    for pixels in inputs["pixel_values"]:
        features = naive_tower.features_of(model, pixels[None])[0, int(cls) - lead :]
        with torch.no_grad():
            seen = naive_tower.look(model.model.vision_tower, pixels[None], 3)
            expected.append(model.model.multi_modal_projector(tokens_by_loops(seen, features, method, cls, lead)))
    lengths = [len(image) for image in expected]
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    assert trace.visual_by_layer[0] == [lengths[0], lengths[1] + lengths[2]]
    if method.keep is not None:
        assert lengths == [method.keep] * 3


def test_images_of_one_batch_keep_different_numbers(llava: Any, prompts: Any) -> None:
    model = llava(layers=4)
    with torch.no_grad(), PruMerge()(model) as trace:
        model(**prompts(model, images=(1, 1, 1)))
    assert len(set(trace.visual_by_layer[0])) > 1
    assert trace.kept is not None
    assert trace.kept.shape == (3, max(trace.visual_by_layer[0]))
    assert trace.kept.eq(-2).sum(1).tolist() == [1, 1, 1]


def test_every_tile_of_an_image_is_merged_alone(families: ModuleType, naive_tower: ModuleType) -> None:
    model, method = families.model("llava_next"), PruMerge(keep=5)
    inputs = families.inputs("llava_next", model, batch=2)
    expected = []
    for pixels, tiles in zip(inputs["pixel_values"], (3, 5), strict=True):
        parts = []
        for tile in pixels[:tiles]:
            features = naive_tower.features_of(model, tile[None])[0, 1:]
            seen = naive_tower.look(model.model.vision_tower, tile[None], 2)
            parts.append(tokens_by_loops(seen, features, method, True, 0))
        with torch.no_grad():
            expected.append(model.model.multi_modal_projector(torch.cat(parts)))
    naive_tower.assert_decodes_as(model, inputs, method, expected)


@pytest.mark.parametrize("keep", [37, 40])
def test_a_budget_that_leaves_no_rest_is_refused(llava: Any, keep: int) -> None:
    with pytest.raises(InputError, match=f"keep: got {keep}; .* give 2 <= keep <= 36"):
        PruMerge(keep=keep)(llava(layers=3)).attach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1}, "keep: got 1; give an integer of at least 2"),
        ({"keep": True}, "keep: got True"),
        ({"plus": 1}, "plus: got 1; give True or False"),
        ({"iqr": -1}, "iqr: got -1; give a number of at least 0"),
        ({"iqr": "wide"}, "iqr: got 'wide'"),
        ({"neighbors": 0}, "neighbors: got 0"),
        ({"order": "score"}, "order: got 'score'; give 'official' or 'raster'"),
        ({"per_head": None}, "per_head: got None"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruMerge(**settings)
