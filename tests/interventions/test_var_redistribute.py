"""VAR's arithmetic on random weights: against plain loops, and against itself over sets of keys."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.interventions.var import VAR
from vlattn.interventions.var_redistribute import KeySets, Masses, Parts, Rule, image_centric, merge, redistribute

B, H, HKV, R, K, D = 2, 4, 2, 5, 40, 8
DIMS = (0,)
ALWAYS = torch.ones(1, 1, 1, dtype=torch.bool)


@pytest.fixture(scope="module")
def naive_var() -> ModuleType:
    """`tests/naive_var.py`: the method in plain loops."""
    spec = importlib.util.spec_from_file_location("naive_var", Path(__file__).parents[1] / "naive_var.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case:
    """Random attention rows over 6 words, 24 visual tokens, and 10 words: sinks among both; the last keys masked."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.allowed = torch.ones(B, 1, R, K, dtype=torch.bool)
        for i in range(R):
            self.allowed[:, :, i, K - R + i + 1 :] = False
        self.allowed[1, :, :, :3] = False  # padding
        self.sink = torch.zeros(B, K, dtype=torch.bool)
        self.sink[0, [0, 7, 11, 36]] = True
        self.sink[1, [3, 8, 9, 25, 39]] = True
        self.image = torch.zeros(B, K, dtype=torch.bool)
        self.image[0, 6:30], self.image[1, 5:28] = True, True
        self.sets = KeySets(self.sink, self.image)
        logits = sharpness * noise(B, H, R, K)
        logits += 2.5 * noise(B, H, R, 1) * self.image[:, None, None]  # rows that look at the image, and others
        logits += 2.5 * noise(B, H, R, 1) * (self.sink & self.image)[:, None, None]
        self.logits = logits.to(dtype).masked_fill(~self.allowed, -torch.inf)
        self.weights = self.logits.softmax(-1)
        self.value = noise(B, HKV, K, D).to(dtype)

    def under(self, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(new weights, chosen) under settings of VAR."""
        rule = rule_of(**settings)
        masses = Masses.of(self.weights, self.sets)
        chosen = image_centric(masses, self.sets, rule)
        return redistribute(self.weights, self.sets, masses, chosen, rule.move), chosen

    def merged(self, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return merge(Parts.of(self.logits, self.value, self.sets), self.sets, rule_of(**settings), ALWAYS)


def rule_of(**settings: Any) -> Rule:
    return VAR(**settings).rule


def output_of(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return weights @ value.repeat_interleave(H // HKV, 1)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"rho_nonsink": 0.8, "min_visual_mass": 0.1},
    {"move": 1.0, "rho_nonsink": 0.2},
    {"min_visual_mass": 0.0, "rho_nonsink": 0.0},
    {"eps": 1e-2, "rho_nonsink": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_plain_loops(naive_var: ModuleType, settings: dict[str, Any], seed: int) -> None:
    case = Case(seed)
    new, chosen = case.under(**settings)
    assert bool(chosen.any())
    for b in range(B):
        sinks, image = (x[b].nonzero().flatten().tolist() for x in (case.sink, case.image))
        for h in range(H):
            for i in range(R):
                row, changed = naive_var.row_after(case.weights[b, h, i].tolist(), sinks, image, VAR(**settings))
                assert changed == bool(chosen[b, h, i])
                assert new[b, h, i].tolist() == pytest.approx(row, abs=1e-14)


def test_default_settings_choose_some_rows_and_not_others() -> None:
    _, chosen = Case().under()
    assert 0.1 < float(chosen.double().mean()) < 0.9


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_sum_to_what_they_summed_to_and_masked_keys_stay_at_zero(settings: dict[str, Any]) -> None:
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        case = Case(1, dtype)
        new, chosen = case.under(**settings)
        assert bool(chosen.any())
        assert float((new.sum(-1) - case.weights.sum(-1)).abs().max()) < limit
        assert bool((new.masked_select(~case.allowed.expand_as(new)) == 0).all())


def test_a_chosen_row_keeps_its_share_of_sinks_its_text_and_the_ratios_inside_the_image() -> None:
    case = Case()
    new, chosen = case.under(move=0.4)
    for b, h, i in chosen.nonzero().tolist():
        before, after = case.weights[b, h, i], new[b, h, i]
        sink, free = case.sink[b], case.sets.free[b]
        assert torch.allclose(after[sink], 0.6 * before[sink], rtol=1e-14, atol=0)
        assert torch.equal(after[~sink & ~free], before[~sink & ~free])
        assert bool((after[free] >= before[free]).all())
        assert torch.allclose(after[free] / after[free].sum(), before[free] / before[free].sum(), rtol=1e-12, atol=0)


def test_a_row_that_is_not_chosen_keeps_its_bits() -> None:
    case = Case()
    new, chosen = case.under()
    assert torch.equal(new[~chosen], case.weights[~chosen])
    assert not torch.equal(new[chosen], case.weights[chosen])


def test_the_image_gains_what_text_sinks_lose() -> None:
    case = Case()
    new, chosen = case.under(move=0.3)
    image, text_sink = case.image[:, None, None], case.sets.text_sink[:, None, None]
    expected = (case.weights * image).sum(-1) + 0.3 * (case.weights * text_sink).sum(-1)
    assert torch.allclose((new * image).sum(-1)[chosen], expected[chosen], atol=1e-14)


def test_moving_everything_empties_the_sinks_and_moving_nothing_changes_no_bit() -> None:
    case = Case()
    new, chosen = case.under(move=1.0)
    emptied = new.masked_select(case.sink[:, None, None] & chosen[..., None])
    assert len(emptied) > 10
    assert bool((emptied == 0).all())
    new, chosen = case.under(move=0.0)
    assert bool(chosen.any())
    assert torch.equal(new, case.weights)


@pytest.mark.parametrize("settings", [{"min_visual_mass": 1.01}, {"rho_nonsink": 1.01}, {"rho_nonsink": 2, "eps": 1.0}])
def test_thresholds_that_no_row_reaches_change_nothing(settings: dict[str, Any]) -> None:
    case = Case()
    new, chosen = case.under(**settings)
    assert not bool(chosen.any())
    assert torch.equal(new, case.weights)


def test_without_thresholds_every_row_with_free_visual_mass_is_chosen() -> None:
    case = Case()
    case.logits[0, 1, 2, case.sets.free[0]] = -torch.inf
    case.weights = case.logits.softmax(-1)
    new, chosen = case.under(rho_nonsink=0, min_visual_mass=0)
    expected = torch.ones(B, H, R, dtype=torch.bool)
    expected[0, 1, 2] = False
    assert torch.equal(chosen, expected)
    assert bool(new.isfinite().all())


def test_a_prompt_without_visual_sinks_stays_as_it_is_unless_asked_otherwise() -> None:
    case = Case()
    case.sink[0, case.image[0]] = False
    new, chosen = case.under()
    assert torch.equal(new[0], case.weights[0])
    assert not bool(chosen[0].any())
    assert bool(chosen[1].any())
    new, chosen = case.under(require_visual_sink=False)
    assert bool(chosen[0].any())
    lost = case.weights[0, :, :, 0] - new[0, :, :, 0]
    assert torch.allclose(lost[chosen[0]], 0.4 * case.weights[0, :, :, 0][chosen[0]])


def test_the_order_of_visual_tokens_does_not_matter() -> None:
    case = Case()
    order = torch.arange(K)
    order[6:28] = order[6:28][torch.randperm(22, generator=torch.Generator().manual_seed(3))]
    new, _ = case.under()
    before = output_of(new, case.value)
    case.logits, case.weights, case.value = case.logits[..., order], case.weights[..., order], case.value[:, :, order]
    case.sets = KeySets(case.sink[:, order], case.image[:, order])
    new, chosen = case.under()
    assert bool(chosen.any())
    assert torch.allclose(output_of(new, case.value), before, atol=1e-13)


def test_gradients_are_finite_where_rows_without_visual_mass_are_left_alone() -> None:
    case = Case()
    case.logits[0, 1, :, case.image[0]] = -torch.inf
    logits = case.logits.clone().requires_grad_()
    case.weights = logits.softmax(-1)
    new, chosen = case.under()
    assert bool(chosen.any())
    (new * torch.arange(K)).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


# Without weights ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [*SETTINGS, {"move": 0.0}, {"require_visual_sink": False}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_softmaxes_over_sets_of_keys_with_mass_transferred_are_the_same_method(
    settings: dict[str, Any], seed: int
) -> None:
    case = Case(seed)
    new, chosen = case.under(**settings)
    output, chosen_too = case.merged(**settings)
    assert torch.equal(chosen, chosen_too)
    assert float((output - output_of(new, case.value)).abs().max()) < 1e-14


@pytest.mark.parametrize("left", ["visual_sink", "text_sink", "free", "rest"])
def test_empty_sets_and_rows_that_see_nothing_merge_to_numbers(left: str) -> None:
    case = Case()
    masks = {
        "visual_sink": case.sets.visual_sink,
        "text_sink": case.sets.text_sink,
        "free": case.sets.free,
        "rest": ~case.sink & ~case.image,
    }
    case.logits.masked_fill_(masks[left][:, None, None], -torch.inf)
    case.logits[1, 2, 3] = -torch.inf
    case.weights = case.logits.softmax(-1).nan_to_num(0)
    new, chosen = case.under(require_visual_sink=False)
    output, chosen_too = case.merged(require_visual_sink=False)
    assert torch.equal(chosen, chosen_too)
    assert torch.allclose(output, output_of(new, case.value), atol=1e-14)
    assert bool((output[1, 2, 3] == 0).all())


def test_a_merge_leaves_rows_that_are_not_eligible_alone() -> None:
    case = Case()
    parts = Parts.of(case.logits, case.value, case.sets)
    eligible = torch.arange(R)[None, None] > 2
    output, chosen = merge(parts, case.sets, rule_of(min_visual_mass=0.0), eligible)
    assert not bool(chosen[:, :, :3].any())
    assert bool(chosen[:, :, 3:].any())
    assert torch.allclose(output[:, :, :3], output_of(case.weights, case.value)[:, :, :3], atol=1e-14)


def test_keeping_six_tenths_is_moving_four() -> None:
    code, default = VAR.released_code(), VAR()
    assert code.move == default.move == 0.4
    assert (code.rho_nonsink, code.min_visual_mass) == (default.rho_nonsink, default.min_visual_mass) == (0.5, 0.2)
    assert VAR.paper() == VAR(move=0.6)
