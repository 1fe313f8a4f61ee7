"""Random and uniform pruning: what is drawn, and that both act through the same edit as any other method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats

from vlattn.errors import InputError
from vlattn.interventions.random_prune import RandomPrune
from vlattn.interventions.uniform_prune import UniformPrune, uniform_indices


def kept(model: Any, method: Any, pixels: torch.Tensor) -> torch.Tensor:
    image = [model.config.image_token_id] * 36
    ids = torch.tensor([[5, *image, 6]] * len(pixels))
    with torch.no_grad(), method(model) as trace:
        model(input_ids=ids, pixel_values=pixels)
    return trace.kept


@contextmanager
def door(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the decoder is given, call by call."""
    calls: list[torch.Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    yield calls
    hook.remove()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(tiny: ModuleType) -> Any:
    return tiny.llava(layers=2, feature_layer=-1)


@pytest.mark.parametrize("keep", [1, 9, 30])
def test_random_keeps_every_patch_equally_often(model: Any, keep: int) -> None:
    count = 600
    ids = kept(model, RandomPrune(keep=keep, seed=1), images(count))
    assert ids.shape == (count, keep)
    assert bool((ids.diff(dim=1) > 0).all())
    share = keep / 36
    found = torch.bincount(ids.flatten(), minlength=36).double()
    # Counts of draws without replacement: their spread is smaller by the factor (1 - share), 35 of them are free.
    statistic = float(((found - count * share) ** 2).sum()) / (count * share * (1 - share)) * 35 / 36
    assert 1e-4 < stats.chi2.sf(statistic, 35) < 1 - 1e-4


def test_random_keeps_neighbours_together_as_often_as_chance(model: Any) -> None:
    count, keep = 600, 9
    ids = kept(model, RandomPrune(keep=keep), images(count, seed=2))
    pairs = int((ids.diff(dim=1) == 1).sum())
    expected = 35 * keep * (keep - 1) / (36 * 35)  # of the 35 neighbouring pairs, in each image
    assert abs(pairs / count - expected) < 5 * (expected / count) ** 0.5


def test_random_keeps_the_same_patches_of_an_image_in_any_batch_and_place(model: Any) -> None:
    pixels = images(5)
    method = RandomPrune(keep=9)
    together = kept(model, method, pixels)
    assert torch.equal(kept(model, method, pixels[[3, 0, 3]]), together[[3, 0, 3]])
    for i in range(5):
        assert torch.equal(kept(model, method, pixels[i : i + 1]), together[i : i + 1])
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_random_does_not_touch_or_follow_the_global_generator(model: Any) -> None:
    pixels, found, after = images(2), [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(kept(model, RandomPrune(keep=9), pixels))
        after.append(torch.equal(torch.get_rng_state(), state))
    assert torch.equal(found[0], found[1])
    assert after == [True, True]


def test_seeds_differ(model: Any) -> None:
    rows = {tuple(kept(model, RandomPrune(keep=9, seed=seed), images(1))[0].tolist()) for seed in (0, 1, 2, 2**31 - 1)}
    assert len(rows) == 4


@pytest.mark.parametrize("seed", [-1, 2**31, 1.0, "a", None, True])
def test_a_seed_that_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(InputError, match="seed: got"):
        RandomPrune(keep=9, seed=seed)


@pytest.mark.parametrize("total", [1, 5, 36, 144, 576])
def test_uniform_takes_the_centres_of_equal_stretches(total: int) -> None:
    for keep in {1, 2, 3, total // 3, total // 2, total - 1, total} - {0}:
        if keep > total:
            continue
        expected = [int((i + Fraction(1, 2)) * Fraction(total, keep)) for i in range(keep)]
        found = uniform_indices(total, keep).tolist()
        assert found == expected
        assert len(set(found)) == keep
        gaps = {b - a for a, b in pairwise(found)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_keeps_the_same_patches_of_every_image(model: Any) -> None:
    found = kept(model, UniformPrune(keep=7), images(3))
    assert found.tolist() == [uniform_indices(36, 7).tolist()] * 3


@pytest.mark.parametrize("method", [RandomPrune(keep=5), UniformPrune(keep=5)], ids=["random", "uniform"])
@pytest.mark.parametrize(
    "options", [{}, {"strategy": "full"}, {"siglip": True, "feature_layer": -1}, {"feature_layer": [-1, -2]}], ids=str
)
def test_baselines_hand_over_the_untouched_features_of_what_they_keep_on_any_tower(
    llava: Any, prompts: Any, tiny: ModuleType, method: Any, options: dict[str, Any]
) -> None:
    model = llava(layers=2, **options)
    inputs = prompts(model, images=(2,))
    lead = int(options.get("strategy") == "full")
    with torch.no_grad():
        stock = tiny.features(model, inputs["pixel_values"])
        with method(model) as trace, door(model) as calls:
            logits = model(**inputs).logits
    assert trace.kept.shape == (2, 5 - lead)
    assert trace.visual_tokens == 36 + lead
    slots = [list(range(lead)) + (ids + lead).tolist() for ids in trace.kept]
    expected, _ = tiny.short_sequence(
        model, inputs, [tiny.with_slots(stock[i, s], torch.tensor(s)) for i, s in enumerate(slots)]
    )
    torch.testing.assert_close(calls[0], expected["inputs_embeds"], rtol=1e-12, atol=1e-12)
    assert logits.shape[1] == inputs["input_ids"].shape[1] - 2 * (36 + lead - 5)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("method", [RandomPrune, UniformPrune])
@pytest.mark.parametrize("keep", [36, 37, 0])
def test_baselines_keep_everything_exactly_and_no_more(llava: Any, prompts: Any, method: Any, keep: int) -> None:
    model = llava(layers=2)
    inputs = prompts(model, images=(1, 2))
    if keep == 36:
        with torch.no_grad():
            expected = model(**inputs).logits
            with method(keep=36)(model) as trace:
                assert torch.equal(model(**inputs).logits, expected)
        assert trace.summary()["kept_ratio"] == 1.0
    else:
        with pytest.raises(InputError, match=f"keep: got {keep}"):
            method(keep=keep)(model).attach()


def test_the_trace_sums_up_in_plain_numbers(llava: Any, prompts: Any) -> None:
    model = llava(layers=2)
    inputs = prompts(model, images=(1, 2), text=4)
    with torch.no_grad(), UniformPrune(keep=9)(model) as trace:
        assert trace.summary() == dict.fromkeys(trace.summary(), 0) | {"visual_tokens": 36}
        model(**inputs)
    assert trace.summary() == {
        "images": 3,
        "visual_tokens": 36,
        "kept": 9,
        "kept_ratio": 0.25,
        "encoder_prunings": 0,
        "decoder_prunings": 0,
        "prompt_length": 4 + 2 * 40 + 2,
        "kept_length": 4 + 2 * 13 + 2,
        "budget_final": 13.5,
        "budget_average": 13.5,
        "budget_counted": 13.5,
    }
