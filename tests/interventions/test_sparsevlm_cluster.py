"""Merging by density peaks."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from vlattn.interventions.sparsevlm_cluster import arrange, cluster_merge

Formula = Callable[..., torch.Tensor]


def test_clusters_are_the_ones_the_released_code_gives(formula: Formula) -> None:
    merged, member, centre = cluster_merge(formula(44, 1, 12, 5), torch.tensor([3]))
    assert centre.tolist() == [[11, 1, 6]]
    assert member.tolist() == [[1, 1, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0]]
    expected = torch.tensor(
        [
            [0.243926, 0.163505, 0.097208, 0.051224, 0.159547],
            [0.250922, 0.083638, -0.121838, -0.220027, -0.301397],
            [-0.364475, -0.119902, 0.166605, 0.052190, 0.124474],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(merged[0], expected, atol=1e-6, rtol=0)


def test_ragged_rows_have_the_clusters_they_have_alone(naive_pruners: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 40, 6, generator=generator, dtype=torch.float64)
    sizes, count = [40, 17, 5, 1], torch.tensor([5, 3, 5, 1])
    valid = torch.stack([torch.randperm(40, generator=generator) < size for size in sizes])
    x[~valid] = torch.nan  # filler must not matter
    merged, member, centre = cluster_merge(x, count, valid)
    for b in range(4):
        places = valid[b].nonzero().flatten()
        rows, expected_member, expected_centre = naive_pruners.clusters(x[b, places], int(count[b]))
        torch.testing.assert_close(merged[b, : count[b]], rows, atol=1e-12, rtol=0)
        assert member[b, places].tolist() == expected_member
        assert bool((member[b, ~valid[b]] == -1).all())
        assert centre[b, : count[b]].tolist() == places[expected_centre].tolist()
        assert bool((merged[b, count[b] :] == 0).all())


def test_one_cluster_is_the_mean_and_as_many_as_tokens_are_the_tokens() -> None:
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    merged, member, _ = cluster_merge(x, torch.tensor([1, 9]))
    torch.testing.assert_close(merged[0, 0], x[0].mean(0), atol=1e-14, rtol=0)
    torch.testing.assert_close(merged[1, member[1]], x[1], atol=0, rtol=0)


def test_clusters_as_a_set_do_not_depend_on_the_order_of_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 30, 8, generator=generator, dtype=torch.float64)
    order = torch.randperm(30, generator=generator)
    here, _, _ = cluster_merge(x, torch.tensor([4]))
    there, _, _ = cluster_merge(x[:, order], torch.tensor([4]))
    torch.testing.assert_close(there, here, atol=1e-12, rtol=0)


def test_doubles_are_each_their_own_centre_and_ties_go_by_position() -> None:
    x = torch.zeros(1, 6, 3, dtype=torch.float64)
    x[0, 3:] = 1
    _, member, centre = cluster_merge(x, torch.tensor([6]))
    assert centre.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert member.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_noise_comes_from_the_generator_that_is_given() -> None:
    x = torch.zeros(1, 50, 3)
    x[0, 25:] = 1  # all densities equal

    def centres(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return cluster_merge(x, torch.tensor([4]), noise=1e-3, generator=generator)[2][0].tolist()

    assert centres(0) == centres(0)
    assert centres(0) != centres(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_merged_in_fp32(dtype: torch.dtype) -> None:
    x = (100 + torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(3))).to(dtype)
    merged, _, _ = cluster_merge(x, torch.tensor([1]))
    assert merged.dtype == dtype
    assert torch.equal(merged[0, 0], x[0].float().mean(0).to(dtype))


def test_clusters_follow_the_kept_tokens_of_the_last_image_and_spill_into_those_before() -> None:
    #             text  image 0     text  image 1   text
    image = torch.tensor([[-1, 0, 0, 0, 0, -1, 1, 1, 1, -1]]).expand(3, -1)
    visual = image >= 0
    kept = torch.zeros_like(visual)
    kept[0, [2, 7]], kept[1, [2, 7]], kept[2, [1, 6, 7, 8]] = True, True, True
    keep, source = arrange(visual, kept, image, torch.tensor([2, 3, 1]))

    def contents(b: int) -> list[int]:
        return [int(source[b, i]) for i in range(10) if keep[b, i]]

    assert contents(0) == [0, 2, 5, 7, 10, 11, 9]
    assert contents(1) == [0, 2, 10, 5, 7, 11, 12, 9]  # image 1 has two places to give
    assert contents(2) == [0, 1, 10, 5, 6, 7, 8, 9]  # image 1 has none


def test_clusters_stand_at_the_place_of_their_centre_where_positions_are_preserved() -> None:
    image = torch.tensor([[-1, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, -1]])
    visual = image >= 0
    kept = torch.zeros_like(visual)
    kept[0, [2]], kept[1, [0, 4]] = True, True
    keep, source = arrange(visual, kept, image, torch.tensor([2, 1]), torch.tensor([[4, 1], [3, 0]]))
    assert [i for i in range(6) if keep[0, i]] == [0, 1, 2, 4, 5]
    assert source[0].tolist() == [0, 7, 2, 3, 6, 5]
    assert [i for i in range(6) if keep[1, i]] == [0, 3, 4, 5]
    assert source[1].tolist() == [0, 1, 2, 6, 4, 5]
