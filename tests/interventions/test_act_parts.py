"""The parts of attention calibration: column means, sinks, the edit of weights, and the edit of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from vlattn.interventions.act_edit import Roles, calibrate, calibrated_outputs
from vlattn.interventions.act_sinks import (
    HeadScores,
    LayerSinks,
    Received,
    Sight,
    count_behind_image,
    find_sinks,
    last_text,
    received,
)

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]
T = 6


def sight(alive: torch.Tensor, queries: int, window: int | None = None) -> Sight:
    return Sight(None, alive, queries, window)


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def exact(logits: torch.Tensor, alive: torch.Tensor | None = None) -> HeadScores:
    """Scores [B, H] whose logits are those given [B, H, T, T]: keys are unit vectors."""
    n = logits.shape[-1]
    key = torch.eye(n, dtype=logits.dtype).expand(*logits.shape[:2], n, n)
    alive = torch.ones(logits.shape[0], n, dtype=torch.bool) if alive is None else alive
    return HeadScores(logits, key, 1.0, sight(alive, n))


@pytest.fixture
def logits(formula: Formula) -> torch.Tensor:
    """[1, 1, 6, 6]"""
    s = 3 * formula(7, T, T)
    s[:, [0, 2]] += 1
    return s[None, None]


@pytest.fixture
def weights(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~causal(T), -torch.inf).softmax(-1)


def where(*columns: int, n: int = T) -> torch.Tensor:
    """Bool [1, 1, n]."""
    return torch.isin(torch.arange(n), torch.tensor(columns))[None, None]


def every(n: int = T) -> torch.Tensor:
    return torch.ones(1, n, dtype=torch.bool)


ALL = Received(torch.empty(0), torch.arange(T, 0, -1)[None], torch.tensor([T]), torch.empty(0))


def means_in_loops(weights: torch.Tensor, rows: list[int], sees: Callable[[int, int], bool]) -> list[float]:
    """Of one head's [T, T]: the mean over the rows that see a column."""
    found = []
    for j in range(weights.shape[1]):
        seen = [float(weights[i, j]) for i in rows if sees(i, j)]
        found.append(sum(seen) / len(seen) if seen else 0.0)
    return found


# Column means ---------------------------------------------------------------------------------------------------------


def test_column_means_of_the_vector_are_the_published_figures(logits: torch.Tensor, numbers: Numbers) -> None:
    found = received(exact(logits), every())
    expected = numbers(".48586482 .30660734 .24543834 .06777425 .15116485 .06436855")
    torch.testing.assert_close(found.mean[0, 0], expected, atol=5e-9, rtol=0)
    assert found.counts.tolist() == [[6, 5, 4, 3, 2, 1]]
    assert found.rows.tolist() == [6]


def test_column_means_over_the_text_alone_are_the_published_figures(logits: torch.Tensor, numbers: Numbers) -> None:
    found = received(exact(logits), torch.arange(T)[None] >= 4, first=4)
    expected = numbers(".36006544 .18173109 .18409053 .09076381 .15116485 .06436855")
    torch.testing.assert_close(found.mean[0, 0], expected, atol=5e-9, rtol=0)
    assert found.counts.tolist() == [[2, 2, 2, 2, 2, 1]]


@pytest.mark.parametrize("queries", [5, 128, 129, 300])
def test_column_means_are_at_most_1_and_all_rows_are_given_away(queries: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, queries, 4).double(), torch.randn(2, 3, queries, 4).double()
    alive = torch.ones(2, queries, dtype=torch.bool)
    found = received(HeadScores(query, key, 1.0, sight(alive, queries)), alive)
    assert bool((found.mean <= 1 + 1e-12).all())
    seen_by = torch.arange(queries, 0, -1).double()
    torch.testing.assert_close((found.mean * seen_by).sum(-1), torch.full((2, 3), float(queries)).double())
    dense = (query @ key.transpose(-1, -2)).masked_fill(~causal(queries), -torch.inf)
    torch.testing.assert_close(found.sums, dense.softmax(-1).sum(2))
    torch.testing.assert_close(found.lse, dense.logsumexp(-1))


@pytest.mark.parametrize("form", ["none", "bool", "additive"])
def test_column_means_follow_padding_windows_and_masks_as_a_loop_over_rows_does(form: str) -> None:
    torch.manual_seed(1)
    n, pad, window = 140, 3, 9
    query, key = torch.randn(2, 2, n, 4).double(), torch.randn(2, 2, n, 4).double()
    alive = torch.ones(2, n, dtype=torch.bool)
    alive[1, :pad] = False
    counted = alive & (torch.rand(2, n) < 0.6)

    def sees(b: int) -> Callable[[int, int], bool]:
        return lambda i, j: i - window < j <= i and bool(alive[b, j])

    mask = torch.tensor([[[[sees(b)(i, j) for j in range(n)] for i in range(n)]] for b in range(2)])  # [B, 1, n, n]
    given = {
        "none": None,
        "bool": mask,
        "additive": torch.zeros(2, 1, n, n).masked_fill(~mask, torch.finfo(torch.float32).min),
    }[form]
    scores = HeadScores(query, key, 0.7, Sight(given, alive, n, window if form == "none" else None), softcap=2.0)
    found = received(scores, counted)
    for b in range(2):
        for h in range(2):
            s = 2.0 * torch.tanh(0.7 * query[b, h] @ key[b, h].T / 2.0)
            rows = [i for i in range(n) if counted[b, i]]
            a = s.masked_fill(~mask[b, 0], -torch.inf).softmax(-1)
            expected = means_in_loops(a, rows, sees(b))
            torch.testing.assert_close(found.mean[b, h], torch.tensor(expected).double())
    assert not bool(found.sums[1, :, :pad].any())


def test_behind_the_end_of_a_static_cache_there_is_nothing_to_see() -> None:
    alive = torch.arange(9)[None] < 6
    assert torch.equal(Sight(None, alive, 4).rows(0, 4)[0], (torch.arange(9) <= torch.arange(2, 6)[:, None]))


def test_half_precision_queries_are_averaged_in_single_precision() -> None:
    torch.manual_seed(2)
    n = 700
    query, key = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    alive = torch.ones(1, n, dtype=torch.bool)
    half = received(HeadScores(query.half(), key.half(), 0.5, sight(alive, n)), alive)
    full = received(HeadScores(query.half().float(), key.half().float(), 0.5, sight(alive, n)), alive)
    assert half.sums.dtype == torch.float32
    torch.testing.assert_close(half.sums, full.sums, atol=1e-5, rtol=0)


# Sinks ----------------------------------------------------------------------------------------------------------------


def columns(found: torch.Tensor) -> list[int]:
    return found[0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("theta", "expected"), [(0.25, [1]), (0.2, [1, 2]), (0.1, [1, 2, 4]), (0.5, []), (1.01, [])])
def test_sinks_of_the_vector_are_those_published(theta: float, expected: list[int], logits: torch.Tensor) -> None:
    found = received(exact(logits), every())
    for spare in ("first_token", "first_detected"):
        assert columns(find_sinks(found.mean, found.counts, every(), theta, 1, spare)) == expected  # type: ignore[arg-type]


def test_without_a_first_token_above_the_threshold_the_released_rule_spares_the_next_sink() -> None:
    mean = torch.tensor([[[0.05, 0.3, 0.02, 0.2, 0.01, 0.4]]])
    assert columns(find_sinks(mean, ALL.counts, every(), 0.1, 1, "first_token")) == [1, 3, 5]
    assert columns(find_sinks(mean, ALL.counts, every(), 0.1, 1, "first_detected")) == [3, 5]


def test_columns_that_few_rows_see_are_no_sinks() -> None:
    mean = torch.full((1, 1, T), 0.5)
    assert columns(find_sinks(mean, ALL.counts, every(), 0.1, 3)) == [1, 2, 3]


def test_padding_is_no_sink_and_the_first_real_token_is_the_one_spared() -> None:
    mean = torch.full((1, 1, T), 0.5)
    alive = torch.arange(T)[None] >= 2
    assert columns(find_sinks(mean, ALL.counts, alive, 0.1, 1)) == [3, 4, 5]


def test_each_prompt_may_have_a_threshold_of_its_own() -> None:
    mean = torch.full((2, 1, T), 0.3)
    found = find_sinks(mean, ALL.counts.expand(2, -1), every().expand(2, -1), torch.tensor([0.2, 0.4]), 1)
    assert found.sum(-1).tolist() == [[5], [0]]


# Text behind the image ------------------------------------------------------------------------------------------------


def test_text_behind_the_image_is_counted_from_the_first_visual_token_and_found_when_they_are_gone() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    count = count_behind_image(visual)
    assert count.tolist() == [3, 1, 0]
    text = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()  # some visual tokens are left
    assert last_text(text, count).int().tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_sinks_are_told_by_class_by_mass_and_by_image() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()
    found = torch.tensor([[[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]]).bool()
    share = torch.tensor([[[0.4, 0.2, 0.1, 0.1, 0.15, 0.05], [0.3, 0.1, 0.5, 0.0, 0.1, 0.0]]])
    image = torch.tensor([[-1, 0, 0, -1, 1, -1]])
    first = torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()
    sinks = LayerSinks((2, 5), found, share, first, visual, image, image)
    assert {name: value.tolist() for name, value in sinks.counts().items()} == {"text": [[1, 0]], "visual": [[2, 1]]}
    mass = sinks.mass()
    torch.testing.assert_close(mass["first"], torch.tensor([[0.4, 0.3]]))
    torch.testing.assert_close(mass["text"], torch.tensor([[0.1, 0.0]]))
    torch.testing.assert_close(mass["visual"], torch.tensor([[0.35, 0.5]]))
    assert {image: count.tolist() for image, count in sinks.by_image().items()} == {0: [1, 1], 1: [1, 0]}


# The edit of weights --------------------------------------------------------------------------------------------------

NOBODY = torch.zeros(1, T, dtype=torch.bool)


def test_edited_weights_of_the_vector_are_the_published_figures(weights: torch.Tensor, numbers: Numbers) -> None:
    new, changed = calibrate(weights, Roles.of(where(1), NOBODY, "all", "all"), 0.4)
    expected = numbers("""
        .69276071 .01008760 .27501823 .02213346 0 0
        .66721582 .09330409 .11610505 .06518450 .05819053 0
        .16990813 .05208078 .29424772 .13775799 .27585555 .07014983
    """).view(3, T)
    torch.testing.assert_close(new[0, 0, 3:], expected, atol=5e-9, rtol=0)
    assert changed[0, 0].tolist() == [False, True, True, True, True, True]


def test_edited_outputs_of_the_vector_are_the_published_figures(
    weights: torch.Tensor, formula: Formula, numbers: Numbers
) -> None:
    new, _ = calibrate(weights, Roles.of(where(1), NOBODY, "all", "all"), 0.4)
    expected = numbers("""
        .47321649 -.29698814 .23802225 -.35583859 -.04175801 -.14933468
        .21451446 -.18587017 .24025047 -.22321296 -.14483041 -.01252500
    """).view(T, 2)
    torch.testing.assert_close(new[0, 0] @ formula(8, T, 2), expected, atol=5e-9, rtol=0)


def test_an_image_that_receives_alone_gives_the_published_figures(
    logits: torch.Tensor, weights: torch.Tensor, numbers: Numbers
) -> None:
    found = received(exact(logits), torch.arange(T)[None] >= 4, first=4)
    sinks = find_sinks(found.mean, found.counts, every(), 0.15, 2)
    assert columns(sinks) == [1, 2, 4]
    new, _ = calibrate(weights, Roles.of(sinks, where(1, 2, 3)[0], "all", "visual"), 0.4)
    expected = numbers("""
        .56422545 .09330409 .03927330 .28351382 .01968333 0
        .15590543 .05208078 .10799912 .51839757 .10124855 .06436855
    """).view(2, T)
    torch.testing.assert_close(new[0, 0, 4:], expected, atol=5e-9, rtol=0)


ROLES = [(donors, receivers) for donors in ("all", "text", "visual") for receivers in ("all", "text", "visual")]


def random_case(n: int = 40) -> tuple[torch.Tensor, HeadScores, torch.Tensor, torch.Tensor]:
    """(weights [2, 3, n, n], their scores, sinks [2, 3, n], visual [2, n]) of a batch with padding."""
    torch.manual_seed(3)
    alive = torch.ones(2, n, dtype=torch.bool)
    alive[1, :5] = False
    scores = HeadScores(torch.randn(2, 3, n, 6).double(), torch.randn(2, 3, n, 6).double(), 0.8, sight(alive, n))
    weights = scores.logits(0, n).softmax(-1).nan_to_num(0)
    sinks = torch.rand(2, 3, n) < 0.2
    sinks[:, :, 0] = sinks[1, :, 5] = False
    sinks[1, :, :5] = False
    sinks[0, 2] = False  # a head without any
    visual = torch.arange(n).expand(2, -1) % 3 == 1
    return weights, scores, sinks, visual & alive


@pytest.mark.parametrize(("donors", "receivers"), ROLES)
def test_the_edit_is_that_of_a_loop_over_rows(donors: str, receivers: str) -> None:
    weights, _, sinks, visual = random_case(24)
    new, changed = calibrate(weights, Roles.of(sinks, visual, donors, receivers), 0.3)  # type: ignore[arg-type]
    kinds = {"all": {0, 1}, "text": {0}, "visual": {1}}
    n, touched = weights.shape[-1], 0
    for b in range(2):
        for h in range(3):
            gives = [j for j in range(n) if sinks[b, h, j] and int(visual[b, j]) in kinds[donors]]
            takes = [j for j in range(n) if not sinks[b, h, j] and int(visual[b, j]) in kinds[receivers]]
            for i in range(n):
                row = weights[b, h, i].tolist()
                given, held = sum(row[j] for j in gives), sum(row[j] for j in takes)
                edited = given > 0 and held >= 1e-6
                touched += edited
                if edited:
                    for j in gives:
                        row[j] *= 0.3
                    for j in takes:
                        row[j] += 0.7 * given * row[j] / held
                assert bool(changed[b, h, i]) == edited
                torch.testing.assert_close(new[b, h, i], torch.tensor(row).double())
    assert touched > 20


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_rows_keep_their_sums_sinks_keep_beta_and_others_their_ratios(beta: float) -> None:
    weights, _, sinks, visual = random_case()
    new, changed = calibrate(weights, Roles.of(sinks, visual, "all", "all"), beta)
    torch.testing.assert_close(new.sum(-1), weights.sum(-1))
    held = sinks[:, :, None] & changed[..., None]
    assert torch.equal(new[held.expand_as(new)], (beta * weights)[held.expand_as(new)])
    others = ~sinks[:, :, None] & changed[..., None] & (weights > 0)
    ratio = torch.where(others, new / weights, torch.nan)
    least, most = ratio.nan_to_num(math.inf).amin(-1), ratio.nan_to_num(-math.inf).amax(-1)
    torch.testing.assert_close(least[changed], most[changed])
    assert bool((least[changed] >= 1).all())
    assert bool((new[..., 0] >= weights[..., 0] - 1e-12).all())
    assert torch.equal(new[~changed], weights[~changed])
    assert not bool(changed[0, 2].any())


def test_a_row_with_nothing_but_sinks_is_left_alone() -> None:
    weights = torch.tensor([[[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]]])
    new, changed = calibrate(weights, Roles.of(where(1, n=3), NOBODY[:, :3], "all", "all"), 0.4)
    assert changed.tolist() == [[[False, True]]]
    assert torch.equal(new[0, 0, 0], weights[0, 0, 0])
    torch.testing.assert_close(new[0, 0, 1], torch.tensor([0.8, 0.2, 0.0]))


# The edit of outputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize(("donors", "receivers"), ROLES)
def test_the_edit_of_outputs_agrees_with_that_of_weights(
    donors: str, receivers: str, beta: float, dtype: torch.dtype
) -> None:
    _, scores, sinks, visual = random_case(150)
    sinks[1, 0, 6:120] = True  # rows of this head have next to nothing but sinks
    roles = Roles.of(sinks, visual, donors, receivers)  # type: ignore[arg-type]
    scores = HeadScores(scores.query.to(dtype), scores.key.to(dtype), scores.scale / 2, scores.sight)
    weights = scores.logits(0, 150).softmax(-1).nan_to_num(0)
    value = torch.randn(2, 3, 150, 5).to(dtype)
    new, changed = calibrate(weights, roles, beta)
    lse = received(scores, scores.sight.alive).lse
    output, moved = calibrated_outputs(weights @ value, value, scores, lse, roles, beta)
    assert output.dtype == dtype
    alive = scores.sight.alive[:, None, :, None]
    close = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(output * alive, new @ value * alive, atol=close, rtol=0)
    assert torch.equal(moved, changed)
    assert bool(changed.any())
    assert not bool(changed.all())


def test_next_to_all_attention_on_sinks_does_not_cancel_the_outputs_digits_away() -> None:
    n = 8
    logits = torch.zeros(1, 1, n, n)
    logits[..., 1] = 9.0  # 0.9992 of the last row
    scores = exact(logits)
    value = torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(0))
    roles = Roles.of(where(1, n=n), torch.zeros(1, n, dtype=torch.bool), "all", "all")
    weights = scores.logits(0, n).softmax(-1)
    output, _ = calibrated_outputs(weights @ value, value, scores, received(scores, every(n)).lse, roles, 0.4)
    exactly, _ = calibrate(weights.double(), roles, 0.4)
    torch.testing.assert_close(output, (exactly @ value.double()).float(), atol=1e-6, rtol=0)
