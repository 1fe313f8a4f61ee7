"""The combination of two streams of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlattn.interventions.contrast import contrast
from vlattn.interventions.m3id import image_weight

Numbers = Callable[[str], torch.Tensor]
Formula = Callable[..., torch.Tensor]


@pytest.fixture
def streams(formula: Formula) -> tuple[torch.Tensor, torch.Tensor]:
    """l and l' of the published vectors [1, 8]."""
    return 6 * formula(2, 1, 8), 6 * formula(3, 1, 8)


def test_the_logits_of_the_vectors_are_the_published_ones(
    streams: tuple[torch.Tensor, torch.Tensor], numbers: Numbers
) -> None:
    main = "-2.55657538 -.81460631 -.98879039 2.64466164 .22715590 .41251246 .39911039 .44885348"
    second = "-.48059995 -1.22117063 2.41975488 .70654463 2.43881432 1.12850593 -2.27434843 2.06736716"
    for found, expected in zip(streams, (main, second), strict=True):
        torch.testing.assert_close(found[0], numbers(expected), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("a", "b", "beta", "log_probabilities", "survivors", "values"),
    [
        (2.0, -1.0, 0.1, False, [3, 5, 6, 7], "4.58277864 -.30348102 3.07256920 -1.16966020"),
        (2.0, -1.0, 0.5, False, [3], "4.58277864"),
        (1.1, -0.1, 0.1, True, [3, 5, 6, 7], "-.13925519 -2.63681542 -2.31127226 -2.69072641"),
        (math.exp(0.02), 1 - math.exp(0.02), 0.1, True, [3, 5, 6, 7], "-.33933839 -2.62510416 -2.57003475 -2.60699525"),
        (math.e, 1 - math.e, 0.1, True, [3, 5, 6, 7], "3.91834443 -2.87431456 2.93631765 -4.38875761"),
        (1.0, 2.0, 0.5, False, [3], "4.05775090"),
    ],
    ids=["vcd", "vcd-strict", "pai", "m3id-1", "m3id-50", "agla"],
)
def test_published_vectors_of_five_methods_are_met(
    streams: tuple[torch.Tensor, torch.Tensor],
    numbers: Numbers,
    a: float,
    b: float,
    beta: float,
    log_probabilities: bool,
    survivors: list[int],
    values: str,
) -> None:
    main, second = (x.log_softmax(-1) for x in streams) if log_probabilities else streams
    out = contrast(main, second, a, b, beta)[0]
    assert out.isfinite().nonzero().flatten().tolist() == survivors
    torch.testing.assert_close(out[survivors], numbers(values), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("a", "probabilities"),
    [
        (2.0, ".81195961 .00612998 .17933242 .00257799"),
        (1 + image_weight(1, 0.02), ".76178620 .07747073 .08185665 .07888642"),
        (1 + image_weight(50, 0.02), ".72678647 .00081544 .27221874 .00017934"),
    ],
    ids=["vcd", "m3id-1", "m3id-50"],
)
def test_published_probabilities_come_from_raw_logits_and_from_log_probabilities_alike(
    streams: tuple[torch.Tensor, torch.Tensor], numbers: Numbers, a: float, probabilities: str
) -> None:
    main, second = streams
    for one, two in ((main, second), (main.log_softmax(-1), second.log_softmax(-1)), (main + 3, second - 7)):
        found = contrast(one, two, a, 1 - a, 0.1).softmax(-1)[0]
        torch.testing.assert_close(found[[3, 5, 6, 7]], numbers(probabilities), atol=1e-8, rtol=0)


def test_renormalised_values_of_the_refinement_are_the_published_ones(
    streams: tuple[torch.Tensor, torch.Tensor], numbers: Numbers
) -> None:
    out = contrast(*streams, 1.1, 1 - 1.1, 0.1).log_softmax(-1)[0, [3, 5, 6, 7]]
    torch.testing.assert_close(out, numbers("-.24231848 -2.73987870 -2.41433555 -2.79378970"), atol=1e-7, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_neutral_weights_give_the_very_tensor_back_whatever_beta(beta: float) -> None:
    main = torch.randn(2, 9)
    assert contrast(main, torch.randn(2, 9), 1, 0, beta) is main
    assert contrast(main, torch.randn(2, 9), 1 + 0.0, -0.0, beta) is main


def random_streams(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 50, generator=generator) * 3, torch.randn(4, 50, generator=generator) * 3


def test_equal_streams_give_the_main_one_back_on_the_kept_set() -> None:
    main, _ = random_streams(0)
    out = contrast(main, main, 3.0, -2.0, 0.1)
    kept = main >= main.amax(-1, keepdim=True) + math.log(0.1)
    torch.testing.assert_close(out[kept], main[kept])
    assert bool((out[~kept] == -torch.inf).all())


def test_the_kept_set_depends_on_the_main_stream_alone_holds_its_argmax_and_shrinks_with_beta() -> None:
    main, second = random_streams(1)
    before = torch.ones_like(main, dtype=torch.bool)
    for beta in (0.0, 1e-4, 0.01, 0.1, 0.5, 1.0):
        kept = contrast(main, second, 2.0, -1.0, beta).isfinite()
        assert torch.equal(kept, contrast(main, -5 * second, 4.0, -3.0, beta).isfinite())
        assert torch.equal(kept, main.softmax(-1) >= beta * main.softmax(-1).amax(-1, keepdim=True) * (1 - 1e-6))
        assert bool(kept.gather(1, main.argmax(-1, keepdim=True)).all())
        assert bool((kept <= before).all())
        before = kept
    assert before.sum().item() == len(main)  # beta = 1 is greedy search


def test_banned_tokens_stay_banned_and_nothing_turns_into_nan() -> None:
    main, second = random_streams(2)
    main[:, ::3] = -torch.inf
    for a, b in ((2.0, -1.0), (0.0, 1.0), (1.0, 2.0)):
        for beta in (0.0, 0.1):
            out = contrast(main, second, a, b, beta)
            assert not bool(out.isnan().any())
            assert bool((out[:, ::3] == -torch.inf).all())
            assert bool(out.isfinite().any(-1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_combined_in_single_precision(dtype: torch.dtype) -> None:
    main, second = (x.to(dtype) for x in random_streams(3))
    out: Any = contrast(main, second, 2.0, -1.0, 0.0)
    assert out.dtype == torch.float32
    assert torch.equal(out, 2 * main.float() - second.float())
