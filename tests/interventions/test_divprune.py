"""DivPrune: the published vector, the greedy choice over a full distance matrix, and what a live model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.divprune import DivPrune, max_min_picks, nearest_distance

Numbers = Callable[..., torch.Tensor]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def picks_by_matrix(x: torch.Tensor, keep: int) -> list[int]:
    """One image [N, D], with the whole matrix of distances."""
    distance = 1 - unit(x) @ unit(x).T
    others = distance + torch.diag(torch.full((len(x),), torch.inf, dtype=x.dtype))
    picks = [int(others.min(1).values.argmax())]
    while len(picks) < keep:
        score = {j: float(distance[picks, j].min()) for j in range(len(x)) if j not in picks}
        picks.append(max(score, key=lambda j: score[j]))
    return picks


def test_the_published_vector_is_reproduced(formula: Numbers) -> None:
    x = formula(91, 1, 16, 5)
    assert max_min_picks(x, 6).tolist() == [[12, 1, 11, 6, 13, 4]]
    expected = [
        [0.084528, 0.311803, 0.225072, 0.104770, 0.225072, 0.104770, 0.577666, 0.298738],
        [0.311803, 0.084528, 0.298738, 0.183034, 0.603675, 0.113338, 0.183034, 0.113338],
    ]
    torch.testing.assert_close(
        nearest_distance(unit(x)).view(2, 8), torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0
    )


@pytest.mark.parametrize("total", [1, 2, 17, 300])
def test_the_lean_choice_equals_the_choice_over_the_full_matrix(total: int) -> None:
    x = torch.randn(2, total, 6, generator=torch.Generator().manual_seed(total), dtype=torch.float64)
    keep = min(total, 40)
    expected = [picks_by_matrix(image, keep) for image in x]
    assert max_min_picks(x, keep).tolist() == expected
    assert max_min_picks(x, keep, table=0).tolist() == expected  # a row of distances at a time


def test_a_smaller_budget_is_a_prefix_and_the_closest_pair_only_draws_nearer() -> None:
    x = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    picks = max_min_picks(x, 30)[0]
    for keep in (1, 7, 29):
        assert torch.equal(max_min_picks(x, keep)[0], picks[:keep])
    distance = 1 - unit(x[0]) @ unit(x[0]).T
    closest = [min(float(distance[a, b]) for a in picks[:n] for b in picks[:n] if a != b) for n in range(3, 30)]
    assert all(b <= a for a, b in pairwise(closest))


def test_the_length_of_a_vector_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    length = torch.rand(2, 50, 1, generator=generator, dtype=torch.float64) * 100 + 0.01
    assert torch.equal(max_min_picks(x, 20), max_min_picks(x * length, 20))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_waits_until_every_distinct_token_is_taken_and_none_is_taken_twice(dtype: torch.dtype) -> None:
    distinct = torch.randn(10, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    x = torch.cat([distinct, distinct, distinct])[None]
    picks = max_min_picks(x, 30)[0].tolist()
    assert sorted(p % 10 for p in picks[:10]) == list(range(10))
    assert sorted(picks) == list(range(30))


def test_a_zero_vector_is_at_distance_one_and_gives_no_nan() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.1], [1.0, -0.1]]])
    assert nearest_distance(torch.nn.functional.normalize(x, dim=-1))[0, 1] == 1
    assert max_min_picks(x, 4)[0, 0] == 1


def test_ties_go_to_the_lower_id() -> None:
    assert max_min_picks(torch.eye(5)[None], 5).tolist() == [[0, 1, 2, 3, 4]]


# In a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strategy": "full"}, {"siglip": True, "feature_layer": -1}], ids=str)
@pytest.mark.parametrize("method", [DivPrune(keep=9), DivPrune(ratio=0.25), DivPrune(ratio=0.098)], ids=str)
def test_the_decoder_gets_the_most_diverse_features_in_raster_order(
    llava: Any, prompts: Any, tiny: ModuleType, naive_tower: ModuleType, options: dict[str, Any], method: DivPrune
) -> None:
    model = llava(layers=3, **options)
    inputs, lead, expected, ids = prompts(model, images=(1, 2)), int(options.get("strategy") == "full"), [], []
    for image in tiny.features(model, inputs["pixel_values"]).detach():
        count = method.keep or round((method.ratio or 0) * len(image))
        ids.append(sorted(picks_by_matrix(image[lead:], count - lead)))
        expected.append(image[list(range(lead)) + [i + lead for i in ids[-1]]])
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    assert trace.kept.tolist() == ids


def test_tiles_and_newlines_of_an_image_compete_together(families: ModuleType, naive_tower: ModuleType) -> None:
    model, method = families.model("llava_next"), DivPrune(keep=11)
    inputs = families.inputs("llava_next", model, batch=2)
    with torch.no_grad():
        stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    chosen = [image[sorted(picks_by_matrix(image, 11))] for image in stock]
    newline = model.model.image_newline.detach()
    assert all(int((image == newline).all(-1).sum()) <= 1 for image in chosen)  # they are copies of each other
    naive_tower.assert_decodes_as(model, inputs, method, chosen)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl", "idefics3", "gemma3", "llava_onevision"])
def test_every_family_keeps_as_many_of_each_image_as_it_should(families: ModuleType, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    with torch.no_grad(), DivPrune(ratio=0.5)(model) as trace:
        logits = model(**inputs).logits
        images = trace.visual_full
        assert bool(logits[:, -1].isfinite().all())
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    if family in ("qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "llava_onevision"):  # one image each
        assert trace.visual_by_layer[0] == [round(0.5 * n) for n in images]


@pytest.mark.parametrize("keep", [1, 36, 100])
def test_an_image_never_keeps_more_than_it_has(llava: Any, prompts: Any, keep: int) -> None:
    model = llava(layers=2)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        with DivPrune(keep=keep)(model) as trace:
            found = model(**inputs).logits
    assert trace.visual_by_layer[0] == [min(keep, 36), 2 * min(keep, 36)]
    assert torch.equal(found, expected) == (keep >= 36)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "keep or ratio: got neither; give exactly one of them"),
        ({"keep": 3, "ratio": 0.5}, "keep or ratio: got keep and ratio"),
        ({"keep": 0}, "keep: got 0"),
        ({"ratio": 1.2}, "ratio: got 1.2; give a number from 0.0 to 1.0"),
        ({"ratio": float("nan")}, "ratio: got nan"),
        ({"keep": 3, "positions": None}, "positions: got None"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DivPrune(**settings)
