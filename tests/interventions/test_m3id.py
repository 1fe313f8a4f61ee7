"""M3ID's weight and its gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.m3id import M3ID, image_weight, unsure


@pytest.mark.parametrize(("step", "weight"), [(1, 0.020), (35, 1.014), (50, 1.718), (498, 2.1e4)])
def test_the_weight_grows_as_published(step: int, weight: float) -> None:
    assert image_weight(step, 0.02) == pytest.approx(weight, rel=0.02)


def test_the_weight_is_what_gamma_says_rises_with_each_token_and_is_zero_for_lambda_zero() -> None:
    weights = [image_weight(step, 0.02) for step in range(1, 600)]
    for step, weight in enumerate(weights, 1):
        gamma = math.exp(-0.02 * step)
        assert weight == pytest.approx((1 - gamma) / gamma, rel=1e-9)
    assert weights == sorted(set(weights))
    assert image_weight(9, 0.0) == 0


def test_the_weight_is_capped_where_asked_and_stays_a_number_of_single_precision() -> None:
    assert image_weight(200, 0.02, 10) == 10
    assert image_weight(1, 0.02, 10) == image_weight(1, 0.02)
    assert math.isfinite(torch.tensor(image_weight(100_000, 0.02) * 100, dtype=torch.float32).item())


def test_a_row_is_unsure_below_the_confidence(formula: Callable[..., torch.Tensor]) -> None:
    logits = torch.cat([6 * formula(2, 1, 8), torch.zeros(1, 8)])
    assert logits.softmax(-1)[0].max().item() == pytest.approx(0.67706349, abs=1e-8)
    assert unsure(logits, 0.68).tolist() == [[True], [True]]
    assert unsure(logits, 0.67).tolist() == [[False], [True]]
    assert unsure(logits, 0.1).tolist() == [[False], [False]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -1}, "lam: got -1"),
        ({"beta": 2}, "beta: got 2"),
        ({"confidence": 1.5}, "confidence: got 1.5; give a number from 0 to 1"),
        ({"max_weight": -3}, "max_weight: got -3; give a number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_to_give(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        M3ID(**settings)


def test_only_unsure_rows_are_corrected_and_without_any_the_logits_are_vanilla(llava: Any, prompts: Any) -> None:
    model = llava(dtype=torch.float32)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        vanilla = model(**inputs).logits[:, -1]
        sureness = vanilla.softmax(-1).amax(-1)
        between = sureness.mean().item()
        assert sureness.min().item() < between < sureness.max().item()
        with M3ID(lam=0.5, beta=0)(model):
            everywhere = model(**inputs).logits[:, -1]
        with M3ID(lam=0.5, beta=0, confidence=between)(model):
            gated = model(**inputs).logits[:, -1]
        with M3ID(lam=0.5, confidence=0)(model):
            never = model(**inputs).logits[:, -1]
    for row in range(2):
        expected = everywhere if sureness[row].item() < between else vanilla
        assert torch.equal(gated[row], expected[row])
    assert torch.equal(never, vanilla)
