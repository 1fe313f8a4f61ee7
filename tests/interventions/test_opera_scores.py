"""What OPERA computes from attention rows, against its published figures and against plain loops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from vlattn.interventions.opera_scores import (
    MOST,
    extend_columns,
    most_common,
    over_trust,
    repeated_column,
    rollback_place,
    summary_rows,
)

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]


def weights_of(logits: torch.Tensor) -> torch.Tensor:
    """Causal softmax over logits [..., S, S]."""
    size = logits.shape[-1]
    return logits.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf).softmax(-1)


def columns_of(rows: torch.Tensor, prompt: int, scale: float) -> torch.Tensor:
    """Logarithms of column products from all rows [S, S], the first `prompt` of them the prompt's."""
    columns = rows.new_empty(0)
    for i in range(prompt, len(rows)):
        columns = extend_columns(columns, rows[i, prompt : i + 1], scale)
    return columns


def products_of(rows: torch.Tensor, prompt: int, scale: float) -> list[float]:
    """Column products, factor by factor."""
    return [math.prod(scale * float(rows[i, j]) for i in range(j, len(rows))) for j in range(prompt, len(rows))]


def test_scaled_rows_products_penalty_and_reward_are_the_published_ones(formula: Formula, numbers: Numbers) -> None:
    rows = summary_rows(weights_of(3 * formula(6, 2, 7, 7))[None])[0]  # [7, 7], 3 of the prompt and 4 generated
    expected = numbers(
        "5.12093695 18.16784188 6.79010142 11.39417160 1.74120263 1.43795529 "
        "1.72479587 2.10040634 11.55881938 8.20265624"
    )
    scaled = torch.cat([50 * rows[i, 3 : i + 1] for i in range(3, 7)])
    torch.testing.assert_close(scaled, expected, atol=6e-9, rtol=0)
    columns = columns_of(rows, 3, 50)
    torch.testing.assert_close(
        columns.exp(), numbers("1828.40849348 24.83298324 16.62106550 8.20265624"), rtol=1e-10, atol=6e-9
    )
    torch.testing.assert_close(columns, numbers("7.51120119 3.21217274 2.81067090 2.10445803"), atol=6e-9, rtol=0)
    trust, place = over_trust(columns, 1e-7, 512)
    torch.testing.assert_close(trust, numbers("1.82840849e-4")[0], atol=6e-13, rtol=0)
    assert int(place) == 0
    torch.testing.assert_close(rows[-1, 1:3].sum(), numbers(".45848187")[0], atol=6e-9, rtol=0)


@pytest.mark.parametrize("heads", [1, 4])
def test_rows_sum_to_one_and_keep_what_a_row_may_not_see_at_zero(heads: int) -> None:
    weights = weights_of(torch.randn(2, heads, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    rows = summary_rows(weights)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    assert not rows[:, torch.ones(9, 9).triu(1).bool()].any()
    loop = [
        [[max(float(weights[b, h, i, j]) for h in range(heads)) for j in range(9)] for i in range(9)] for b in (0, 1)
    ]
    expected = torch.tensor(loop, dtype=torch.float64)
    torch.testing.assert_close(rows, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("seed", range(8))
def test_the_winner_by_logarithms_is_the_winner_by_products(seed: int) -> None:
    logits = 2 * torch.randn(4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = summary_rows(weights_of(logits)[None])[0]
    products = products_of(rows, 2, 9.0)
    trust, place = over_trust(columns_of(rows, 2, 9.0), 1e-3, 512)
    assert int(place) == products.index(max(products))
    assert float(trust) == pytest.approx(1e-3 * max(products), rel=1e-9)
    assert float(trust) >= 0


def test_doubling_the_scale_doubles_each_factor_of_a_column() -> None:
    logits = torch.randn(2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = summary_rows(weights_of(logits)[None])[0]
    once, twice = columns_of(rows, 0, 7.0).exp(), columns_of(rows, 0, 14.0).exp()
    torch.testing.assert_close(twice / once, 2.0 ** torch.arange(9, 0, -1, dtype=torch.float64))


def test_with_uniform_attention_over_more_keys_than_the_scale_the_newest_column_wins() -> None:
    rows = summary_rows(weights_of(torch.zeros(1, 1, 70, 70, dtype=torch.float64)))[0]
    for length in (1, 4, 9):
        columns = columns_of(rows[: 60 + length], 60, 50.0)
        assert int(over_trust(columns, 1e-7, 512)[1]) == length - 1


def test_only_the_last_tokens_of_a_window_have_columns() -> None:
    columns = torch.tensor([9.0, 1.0, 5.0, 2.0])
    for window, place in ((512, 0), (4, 0), (3, 2), (1, 3)):
        trust, found = over_trust(columns, 1e-2, window)
        assert int(found) == place
        assert float(trust) == pytest.approx(1e-2 * math.exp(float(columns[place])), rel=1e-6)


def test_a_penalty_stays_finite_and_a_weight_of_zero_ends_its_column() -> None:
    columns = extend_columns(torch.tensor([300.0, 4.0]), torch.tensor([0.5, 0.0, 0.25]), 8.0)
    assert columns[1] == -torch.inf
    assert over_trust(columns, 1e-7, 512)[0] == MOST == 65504
    assert over_trust(columns[1:2], 1e-7, 512)[0] == 0
    assert over_trust(columns[1:], 1.0, 512)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_most_common_number_is_the_smallest_of_the_most_frequent(seed: int) -> None:
    values = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(seed))
    for row, found in zip(values.tolist(), most_common(values).tolist(), strict=True):
        counts = Counter(row)
        assert found == min(value for value, count in counts.items() if count == max(counts.values()))


@pytest.mark.parametrize(
    ("history", "threshold", "earliest", "column"),
    [
        ([[3, 3, 3], [3, 3, 3]], 2, 0, 3),
        ([[3, 3, 3], [3, 3, 3]], 3, 0, None),  # three wins are not more than three
        ([[3, 3, 3], [3, 3, 3]], 2, 3, 3),
        ([[3, 3, 3], [3, 3, 3]], 2, 4, None),  # too early in the answer
        ([[3, 3, 3], [4, 3, 3]], 2, 0, None),  # one beam has seen it twice only
        ([[3, 3, 3], [3, 3, 4], [3, 3, 3]], 1, 0, 3),  # what most beams have now, counted over all steps
        ([[3, 3, 4], [3, 3, 4]], 1, 0, None),  # the one that wins now counts
        ([[5]], math.inf, 0, None),
    ],
)
def test_a_column_must_win_more_often_than_the_threshold_on_every_beam(
    history: list[list[int]], threshold: float, earliest: int, column: int | None
) -> None:
    assert repeated_column(torch.tensor(history), threshold, earliest) == column


@pytest.mark.parametrize(
    ("column", "length", "taken", "place"),
    [
        (10, 20, (), 11),
        (10, 20, (11,), 10),
        (10, 20, (11, 10), None),
        (10, 12, (), 11),
        (10, 11, (), None),  # the search is right behind that token
        (0, 5, (), 1),
        (0, 5, (1,), None),  # nothing stands before the first token
    ],
)
def test_a_rollback_goes_behind_the_summary_token_or_before_it_or_nowhere(
    column: int, length: int, taken: tuple[int, ...], place: int | None
) -> None:
    assert rollback_place(column, length, lambda tokens: tokens not in taken) == place
