"""STKIM: how many of the best scores are hidden, which, and by whose draws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from vlattn.probing.poolers.stkim import STKIM


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("k", "p", "hidden"), [(10, 0.6, 6), (3, 0.6, 1), (10, 0.0, 0), (0, 0.6, 0), (10, 1.0, 10)])
def test_a_fixed_count_of_the_best_is_hidden_in_each_row(k: int, p: float, hidden: int) -> None:
    stkim = STKIM(k, p, 0)
    scores = draw(8, 5, 40)
    best = scores.argsort(-1, descending=True)[..., : max(k, 1)]
    seen = torch.zeros(8, 5, 40)
    for _ in range(60):
        gone = stkim(scores) == -torch.inf
        assert (gone.sum(-1) == hidden).all()
        seen += gone
        assert not gone.scatter(-1, best, False).any()
    if 0 < p < 1 and k:
        rate = seen.gather(-1, best) / 60
        assert rate.std() < 0.1
        assert rate.mean().item() == pytest.approx(hidden / k)
    torch.testing.assert_close(torch.where(seen == 0, stkim(scores), 0), torch.where(seen == 0, scores, 0))


def test_the_share_is_floored_without_the_error_of_its_product() -> None:
    assert int(100 * 0.29) == 28
    assert (STKIM(100, 0.29, 0)(draw(1, 1, 200)) == -torch.inf).sum() == 29


def test_branches_and_heads_are_drawn_apart() -> None:
    scores = draw(1, 1, 1, 40).expand(50, 4, 5, 40)
    gone = STKIM(10, 0.6, 0)(scores) == -torch.inf
    assert (gone.sum(-1) == 6).all()
    rows = gone.flatten(0, 2)
    assert len(rows.unique(dim=0)) > 180  # of 210 subsets, 1000 draws


def test_padding_is_never_hidden_and_small_bags_hide_a_share_of_what_they_have() -> None:
    real = torch.tensor([40, 12, 10, 7, 4, 2, 1])
    mask = (torch.arange(40) < real[:, None]).flip(1)
    scores = draw(7, 5, 40).masked_fill(~mask[:, None], -torch.inf)
    for p, hidden in ((0.6, [6, 6, 6, 4, 2, 1, 0]), (1.0, [10, 10, 9, 6, 3, 1, 0])):
        stkim = STKIM(10, p, 0)
        for _ in range(20):
            gone = stkim.draw(scores, mask)
            assert not (gone & ~mask[:, None]).any()
            assert gone.sum(-1).tolist() == [[n] * 5 for n in hidden]
            best = scores.argsort(-1, descending=True)[..., :10]
            assert not gone.scatter(-1, best, False).any()
    short = STKIM(10, 1.0, 0)(draw(2, 3, 8))  # no mask, fewer tokens than K
    assert ((short == -torch.inf).sum(-1) == 7).all()


def test_draws_repeat_by_seed_and_ignore_other_generators() -> None:
    scores = draw(4, 5, 40)
    first = STKIM(10, 0.6, 3).draw(scores)
    torch.manual_seed(123)
    np.random.seed(5)
    stkim = STKIM(10, 0.6, 3)
    twin = copy.deepcopy(stkim)
    assert torch.equal(stkim.draw(scores), first)
    second = stkim.draw(scores)
    assert not torch.equal(second, first)
    assert torch.equal(twin.draw(scores), first)
    assert torch.equal(twin.draw(scores), second)
    assert not torch.equal(STKIM(10, 0.6, 4).draw(scores), first)
    state = torch.random.get_rng_state()
    stkim.draw(scores)
    assert torch.equal(torch.random.get_rng_state(), state)
