"""The losses of ACMIL, and how spread attention is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.poolers.acmil import PoolOut
from vlattn.probing.poolers.acmil_loss import acmil_loss, attention_entropy, branch_similarity, top_mass


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(value: torch.Tensor, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def fake(attention: torch.Tensor, classes: int = 3) -> PoolOut:
    batch, branches = attention.shape[0], attention.shape[-2]
    logits, branch_logits = draw(batch, classes, seed=1), draw(batch, branches, classes, seed=2)
    return PoolOut(draw(batch, 4), logits, branch_logits, attention, attention.log())


def test_similarity_is_one_for_equal_maps_and_zero_for_disjoint_ones() -> None:
    equal = draw(2, 1, 12).softmax(-1).expand(2, 5, 12)
    near(branch_similarity(equal), 1.0)
    disjoint = torch.eye(4).repeat_interleave(3, 1).double()[None] / 3
    near(branch_similarity(disjoint), 0.0)
    near(branch_similarity(torch.full((1, 5, 9), 1 / 9).double()), 1.0)
    assert branch_similarity(equal[:, :1]) == 0


@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 8, 4, 12)])
def test_similarity_is_the_mean_cosine_of_pairs_in_any_order(shape: tuple[int, ...]) -> None:
    maps = (3 * draw(*shape)).softmax(-1)
    pairs = itertools.combinations(range(shape[-2]), 2)
    expected = torch.stack([F.cosine_similarity(maps[..., m, :], maps[..., n, :], dim=-1) for m, n in pairs]).mean()
    near(branch_similarity(maps), expected)
    near(branch_similarity(maps.flip(-2)), expected)
    assert 0 <= branch_similarity(maps) <= 1


def test_the_total_is_the_weighted_sum_and_branches_answer_for_their_own_bag() -> None:
    out = fake((3 * draw(4, 5, 12)).softmax(-1))
    target = torch.tensor([0, 2, 1, 1])
    loss = acmil_loss(out, target, w_branch=0.5, w_div=2.0)
    branch = torch.stack([F.cross_entropy(out.branch_logits[:, m], target) for m in range(5)]).mean()
    near(loss["branch"], branch)
    near(loss["bag"], F.cross_entropy(out.logits, target))
    near(loss["total"], loss["bag"] + 0.5 * branch + 2 * branch_similarity(out.attention))
    several = (draw(4, 3, seed=9) > 0).double()
    loss = acmil_loss(out, several, criterion=F.binary_cross_entropy_with_logits)
    each = [F.binary_cross_entropy_with_logits(out.branch_logits[:, m], several) for m in range(5)]
    near(loss["branch"], torch.stack(each).mean())
    with pytest.raises(InputError, match="target: got 3 labels for 4 bags"):
        acmil_loss(out, target[:3])


def test_entropy_and_top_mass_tell_how_far_attention_spreads() -> None:
    maps = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.3, 0.2]]).double()
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    torch.testing.assert_close(attention_entropy(maps), torch.tensor([math.log(4), 0.0, entropy]).double())
    torch.testing.assert_close(top_mass(maps, 2), torch.tensor([0.5, 1.0, 0.8]).double())
    torch.testing.assert_close(top_mass(maps), torch.ones(3).double())
