"""Raising attention logits: what it does to a row, and how layers are named."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.modulate import layers_between, modulate, require_layers, require_strength

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]

ALL = torch.ones((), dtype=torch.bool)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_raised_rows_are_the_published_ones(formula: Formula, numbers: Numbers) -> None:
    s = 4 * formula(1, 2, 6)
    image = torch.tensor([0, 1, 1, 1, 0, 0], dtype=torch.float64)
    after = modulate(s, 0.5 * image, ALL).softmax(-1)
    expected = numbers(
        ".21720897 .12235068 .07594574 .05273725 .30317658 .22858078"
        " .15162613 .17191883 .17021401 .05717887 .21610251 .23295964"
    ).view(2, 6)
    torch.testing.assert_close(after, expected, atol=6e-9, rtol=0)
    before, after = ((x * image).sum(-1) for x in (s.softmax(-1), after))
    torch.testing.assert_close(before, numbers(".21930524 .36741862"), atol=6e-9, rtol=0)
    torch.testing.assert_close(after, numbers(".25103367 .39931171"), atol=6e-9, rtol=0)


def test_each_logit_moves_up_by_gamma_times_its_size() -> None:
    s = rows(0, 2, 4, 3, 9)
    gamma = torch.rand(2, 1, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = modulate(s, gamma, ALL)
    for b, h, r, k in torch.cartesian_prod(*map(torch.arange, s.shape)).tolist():
        value, g = float(s[b, h, r, k]), float(gamma[b, 0, 0, k])
        assert math.isclose(float(found[b, h, r, k]), (1 + g) * value if value > 0 else (1 - g) * value, abs_tol=1e-15)


def test_a_logit_of_zero_and_a_strength_of_zero_change_nothing() -> None:
    s = rows(1, 3, 8)
    assert torch.equal(modulate(s, 0.0, ALL), s)
    assert torch.equal(modulate(torch.zeros(3, 8), 0.9, ALL), torch.zeros(3, 8))


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.99])
def test_rows_still_sum_to_one_and_other_keys_keep_their_ratios(gamma: float) -> None:
    s, chosen = rows(2, 2, 4, 1, 12), torch.arange(12) % 3 == 0
    before, after = s.softmax(-1), modulate(s, gamma * chosen, ALL).softmax(-1)
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 4, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    ratio = (after / before)[..., ~chosen]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


def test_the_mass_of_each_set_grows_with_its_own_strength_and_that_of_the_rest_falls() -> None:
    s = rows(3, 2, 4, 1, 15)
    local, summary = torch.arange(15) % 5 == 0, torch.arange(15) % 5 == 1
    steps = [0.0, 0.2, 0.4, 0.7, 0.95]
    for fixed in (0.0, 0.4):
        for mine, other in ((local, summary), (summary, local)):
            weights = [modulate(s, step * mine + fixed * other, ALL).softmax(-1) for step in steps]
            own = torch.stack([w[..., mine].sum(-1) for w in weights])
            rest = torch.stack([w[..., ~mine & ~other].sum(-1) for w in weights])
            assert bool((own.diff(dim=0) > 0).all())
            assert bool((rest.diff(dim=0) < 0).all())
            both = torch.stack([w[..., mine | other].sum(-1) for w in weights])
            assert bool((both >= s.softmax(-1)[..., mine | other].sum(-1)).all())


@pytest.mark.parametrize("scale", [0.125, 1.7, 40.0])
def test_scaling_all_logits_scales_the_result(scale: float) -> None:
    s, gamma = rows(4, 2, 7), torch.linspace(0, 0.9, 7, dtype=torch.float64)
    torch.testing.assert_close(modulate(scale * s, gamma, ALL), scale * modulate(s, gamma, ALL))


def test_keys_that_may_not_be_looked_at_stay_at_minus_infinity_and_weigh_nothing() -> None:
    s = rows(5, 2, 3, 2, 10)
    allowed = torch.ones(2, 1, 2, 10, dtype=torch.bool)
    allowed[1, ..., :4] = False
    masked = s.masked_fill(~allowed, -torch.inf)
    found = modulate(masked, 0.7, allowed)
    assert torch.equal(found == -torch.inf, ~allowed.expand_as(found))
    assert not bool(found.isnan().any())
    assert bool((found.softmax(-1)[1, ..., :4] == 0).all())
    assert torch.equal(found[0], modulate(s, 0.7, ALL)[0])


def test_a_lowest_number_behind_the_mask_stays_finite() -> None:
    low = torch.finfo(torch.float32).min
    s = torch.tensor([[1.0, low, -2.0]])
    found = modulate(s, 0.99, torch.tensor([[True, False, True]]))
    assert found[0, 1] == low


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 2, True, "0.5", None, float("nan")])
def test_a_strength_outside_its_range_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"alpha: got .*; give a number from 0"):
        require_strength("alpha", value)


def test_a_strength_inside_its_range_is_taken() -> None:
    for value in (0, 0.0, 0.5, 0.999):
        require_strength("alpha", value)


def test_layers_are_a_range_of_the_decoder() -> None:
    assert layers_between(2, None, 5) == [2, 3, 4]
    assert layers_between(0, 5, 5) == [0, 1, 2, 3, 4]
    assert layers_between(1, 2, 5) == [1]
    for start, end in ((5, None), (0, 6), (4, 7)):
        with pytest.raises(InputError, match="this decoder has layers 0 to 4"):
            layers_between(start, end, 5)


@pytest.mark.parametrize(("start", "end"), [(-1, None), (1.5, None), (2, 2), (2, 1), (0, "x"), (True, None)])
def test_layers_that_are_no_range_are_refused(start: object, end: object) -> None:
    with pytest.raises(InputError, match=r"(start|end)_layer: got"):
        require_layers(start, end)
