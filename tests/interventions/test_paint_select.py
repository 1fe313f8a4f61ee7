"""Which visual tokens are informed, and where they stand in prompts."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.paint_select import TileScores, at_tokens, choose_informed, outliers
from vlattn.interventions.paint_watch import sum_cells
from vlattn.models.layouts import place_layouts
from vlattn.runtime.tokens import ImageLayout


def scores(seed: int, *shape: int) -> torch.Tensor:
    """Positive, distinct, with a long tail."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(1.5).exp()


def places(chosen: torch.Tensor) -> list[int]:
    return chosen.nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [576, 729, 64, 9])
@pytest.mark.parametrize(("local", "iqr"), [(0.25, 1.5), (0.1, 0.5), (0.3, 3.0)])
def test_the_choice_is_that_of_sorting_and_numpy_percentiles(
    naive_boost: ModuleType, size: int, local: float, iqr: float
) -> None:
    early, late = scores(size, 3, size), scores(size + 1, 3, size)
    found = choose_informed(early, late, local_ratio=local, iqr=iqr)
    for tile in range(3):
        expected = naive_boost.informed(early[tile], late[tile], local, iqr)
        assert (places(found.local[tile]), places(found.summary[tile])) == expected
    assert bool(found.summary.any())


def test_summary_tokens_win_and_no_more_are_local_than_were_asked_for() -> None:
    early = scores(1, 4, 48)
    found = choose_informed(early, early, local_ratio=0.25, spatial_ratio=0.1, iqr=0.5)
    assert not bool((found.local & found.summary).any())
    assert bool(found.summary.any())
    assert bool((found.local.sum(1) + found.summary.sum(1) >= 12).all())
    assert bool((found.local.sum(1) <= 12 + 4).all())


@pytest.mark.parametrize(("n", "ratio", "count"), [(576, 0.25, 144), (576, 0.1, 57), (9, 0.25, 2), (100, 0.29, 29)])
def test_the_number_of_local_tokens_is_rounded_down(n: int, ratio: float, count: int) -> None:
    flat = torch.zeros(1, n, dtype=torch.float64)
    assert places(choose_informed(-torch.arange(float(n))[None], flat, local_ratio=ratio).local[0]) == list(
        range(count)
    )


def test_equal_scores_have_no_outliers_and_ties_go_to_the_lower_id() -> None:
    for value in (0.0, 0.1, 1 / 3, 7e-5):
        flat = torch.full((2, 33), value)
        found = choose_informed(flat, flat)
        assert not bool(found.summary.any())
        assert places(found.local[1]) == list(range(8))


def test_tokens_that_receive_most_join_the_local_ones() -> None:
    early, late, received = scores(2, 1, 40), torch.zeros(1, 40), scores(3, 1, 40)
    without = places(choose_informed(early, late)[0][0])
    found = places(choose_informed(early, late, received, spatial_ratio=0.1)[0][0])
    most = sorted(range(40), key=lambda i: -float(received[0, i]))[:4]
    assert found == sorted({*without, *most})
    assert len(found) > len(without)
    more = places(choose_informed(early, late, None, local_ratio=0.0, spatial_ratio=0.25)[0][0])
    assert more == without  # without a score of their own, those that are attended to most


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1000.0])
def test_the_choice_does_not_depend_on_the_scale_of_scores(scale: float) -> None:
    early, late = scores(4, 3, 50), scores(5, 3, 50)
    one, other = choose_informed(early, late), choose_informed(scale * early, late / scale)
    assert torch.equal(one.local, other.local)
    assert torch.equal(one.summary, other.summary)
    assert torch.equal(outliers(late), outliers(late + 2.0))


def test_the_choice_follows_the_patches_when_they_change_places() -> None:
    early, late = scores(6, 2, 50), scores(7, 2, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    one, other = choose_informed(early, late), choose_informed(early[:, order], late[:, order])
    assert torch.equal(one.local[:, order], other.local)
    assert torch.equal(one.summary[:, order], other.summary)


def test_a_token_that_is_not_there_is_never_chosen_and_moves_no_quartile() -> None:
    early, late = scores(8, 1, 24), scores(9, 1, 24)
    left = torch.arange(24) % 3 > 0
    gone = torch.full((1, 24), torch.nan, dtype=torch.float64)
    found = choose_informed(torch.where(left, early, gone), torch.where(left, late, gone), local_ratio=0.9)
    assert torch.equal(found.summary[0, left], outliers(late[:, left])[0])
    assert bool(found.summary.any())
    assert torch.equal(found.local | found.summary, left[None])
    nothing = choose_informed(gone, gone)
    assert not bool((nothing.local | nothing.summary).any())


def test_quartiles_are_taken_in_single_precision_or_better_as_numpy_takes_them() -> None:
    late = scores(10, 1, 576).float()
    low, high = np.percentile(late.numpy(), [25, 75])
    fence = high + 1.5 * (high - low)
    margin = np.abs(late[0].numpy() - fence).min()
    assert margin > 1e-6  # so that rounding cannot decide
    assert torch.equal(outliers(late)[0], torch.from_numpy(late[0].numpy() > fence))


def test_tiles_of_different_sizes_are_chosen_from_one_by_one() -> None:
    sizes = [12, 8, 12, 5, 8]
    early, late = scores(11, 45), scores(12, 45)
    local, summary = TileScores(early, late, None, sizes).choose(0.25, 0.0, 1.0)
    for number, (one, other) in enumerate(zip(early.split(sizes), late.split(sizes), strict=True)):
        expected = choose_informed(one[None], other[None], iqr=1.0)
        assert torch.equal(local.split(sizes)[number], expected.local[0])
        assert torch.equal(summary.split(sizes)[number], expected.summary[0])


def test_cells_add_up_the_patches_of_their_block() -> None:
    grid = scores(13, 2, 6, 8)
    grid[0, :2, :2] = torch.nan
    grid[0, 2, 2] = torch.nan
    found = sum_cells(grid, (3, 4)).view(2, 3, 4)
    for t, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        block = [float(x) for x in grid[t, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() if x == x]
        if block:
            assert abs(sum(block) - float(found[t, i, j])) < 1e-12
        else:
            assert bool(found[t, i, j].isnan())
    assert torch.equal(sum_cells(grid, (6, 8)).nan_to_num(-1), grid.flatten(1).nan_to_num(-1))


# Places in prompts ----------------------------------------------------------------------------------------------------
def kinds_of(*prompts: str) -> torch.Tensor:
    """0 where a prompt has a placeholder (v), -1 for text (t)."""
    return torch.tensor([[0 if letter == "v" else -1 for letter in prompt] for prompt in prompts])


def test_what_is_chosen_in_a_tile_is_found_at_its_token_beside_cls_and_newlines() -> None:
    layout = ImageLayout.of_grid(1, 3, leading=1, tiles=2)  # CLS 0 1 2 CLS 0 1 2
    visual = place_layouts(kinds_of("ttvvvvvvvvt", "tvvvvvvvvtt"), [[layout, layout]])
    chosen = torch.tensor([1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]).bool()
    found = at_tokens(chosen, [3, 3, 3, 3], visual)
    assert [places(row) for row in found] == [[3, 5, 8], [4, 6]]


def test_beams_of_a_prompt_share_its_tiles() -> None:
    one, two = ImageLayout.of_grid(1, 2), ImageLayout.of_grid(1, 3, tiles=2)
    visual = place_layouts(kinds_of(*["ttttvvt"] * 3, *["vvvvvvt"] * 3), [[one, two]])
    chosen = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1]).bool()
    found = at_tokens(chosen, [2, 3, 3], visual)
    assert [places(row) for row in found] == [[5]] * 3 + [[0, 5]] * 3


def test_a_prompt_without_images_in_a_batch_has_nothing_chosen() -> None:
    one = ImageLayout.of_grid(1, 2)
    visual = place_layouts(kinds_of("tttt", "tvvt", "tttt", "vvtt"), [[one, one]])
    found = at_tokens(torch.tensor([True, False, False, True]), [2, 2], visual)
    assert [places(row) for row in found] == [[], [1], [], [1]]


def test_features_of_other_images_are_refused() -> None:
    one = ImageLayout.of_grid(1, 2)
    visual = place_layouts(kinds_of("tvvt", "tvvt", "tvvt"), [[one] * 3])
    for sizes in ([2, 2], [2, 2, 2, 2], [2, 1, 2]):
        with pytest.raises(InputError, match="the prompts have 3 image tiles"):
            at_tokens(torch.ones(sum(sizes), dtype=torch.bool), sizes, visual)
