"""The intervals and tests agree with naive loops, with scipy, and with published values."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from vlattn.errors import InputError
from vlattn.eval.stats import cluster_bootstrap, holm, interval, mcnemar, paired_bootstrap, resample_totals, wilson


def ratio(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[..., 0] / totals[..., 1]


def items(seed: int, n: int = 40, images: int = 12) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, n)
    return np.stack([rng.binomial(sizes, 0.4), sizes], axis=1), rng.integers(0, images, n) * 1000 + 5


def test_the_bootstrap_equals_a_naive_loop_over_images() -> None:
    counts, clusters = items(1)
    found = cluster_bootstrap(counts, clusters, ratio, n_boot=400, seed=3)

    rng = np.random.Generator(np.random.PCG64(3))
    ids = sorted(set(clusters.tolist()))
    values = []
    for _ in range(400):
        hit = total = 0
        for pick in rng.integers(0, len(ids), size=len(ids)):
            for row, cluster in zip(counts, clusters, strict=True):
                if cluster == ids[pick]:
                    hit += int(row[0])
                    total += int(row[1])
        values.append(hit / total)
    low, high = np.percentile(values, [2.5, 97.5])
    assert found.value == pytest.approx(counts[:, 0].sum() / counts[:, 1].sum())
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.n_clusters == len(ids)


def test_large_sets_are_resampled_in_blocks_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, clusters = items(2, n=200, images=50)
    whole = resample_totals(counts, clusters, n_boot=100, seed=1)
    monkeypatch.setattr("vlattn.eval.stats._BLOCK", 170)
    np.testing.assert_array_equal(resample_totals(counts, clusters, n_boot=100, seed=1), whole)


def test_questions_of_one_image_are_not_taken_as_independent() -> None:
    """Copies of the questions change nothing under resampling by image, and would narrow resampling by question."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 100)
    once = np.stack([right, np.ones(100, dtype=int)], axis=1)
    copies = np.repeat(once, 6, axis=0)
    by_image = cluster_bootstrap(copies, np.repeat(np.arange(100), 6), ratio, 2000)
    single = cluster_bootstrap(once, np.arange(100), ratio, 2000)
    by_question = cluster_bootstrap(copies, np.arange(600), ratio, 2000)
    assert (by_image.low, by_image.high) == (single.low, single.high)
    assert by_question.high - by_question.low < 0.6 * (single.high - single.low)  # type: ignore[operator]


def test_the_interval_of_a_proportion_is_near_wilsons() -> None:
    n, k = 500, 245
    counts = np.stack([np.arange(n) < k, np.ones(n)], axis=1)
    found = cluster_bootstrap(counts, np.arange(n), ratio)
    assert (found.low, found.high) == pytest.approx(wilson(k, n), abs=0.004)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    counts, clusters = items(4)
    first = cluster_bootstrap(counts, clusters, ratio, 500, seed=1)
    assert first == cluster_bootstrap(counts, clusters, ratio, 500, seed=1)
    assert first != cluster_bootstrap(counts, clusters, ratio, 500, seed=2)


def test_a_metric_that_is_0_over_0_is_none_and_draws_of_it_are_counted() -> None:
    none = cluster_bootstrap([[0, 0], [0, 0]], [1, 2], ratio, 50)
    assert (none.value, none.low, none.high, none.n_undefined) == (None, None, None, 50)
    some = cluster_bootstrap([[1, 1], [0, 0]], [1, 2], ratio, 1000)
    assert some.value == some.low == some.high == 1
    assert 200 < some.n_undefined < 300  # both draws hit the empty image a quarter of the time


def test_a_run_against_itself_differs_by_exactly_nothing() -> None:
    counts, clusters = items(5)
    found = paired_bootstrap(counts, counts, clusters, ratio, 500)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_the_paired_difference_equals_a_naive_loop_with_shared_draws() -> None:
    a, clusters = items(6)
    b = a.copy()
    b[:, 0] = np.maximum(b[:, 0] - (np.arange(len(b)) % 3 == 0), 0)
    found = paired_bootstrap(a, b, clusters, ratio, 300, seed=9)
    rng = np.random.Generator(np.random.PCG64(9))
    ids = np.unique(clusters)
    gaps = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(clusters == ids[i]) for i in rng.integers(0, len(ids), len(ids))])
        gaps.append(b[rows, 0].sum() / b[rows, 1].sum() - a[rows, 0].sum() / a[rows, 1].sum())
    share = min(np.mean(np.array(gaps) <= 0), np.mean(np.array(gaps) >= 0))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))
    assert found.p_value == pytest.approx(max(2 * share, 1 / 301))
    swapped = paired_bootstrap(b, a, clusters, ratio, 300, seed=9)
    assert swapped.difference == -found.difference  # type: ignore[operator]
    assert swapped.p_value == found.p_value


def test_a_difference_that_never_changes_sign_has_the_smallest_p_value() -> None:
    a = np.stack([np.zeros(50), np.ones(50)], axis=1)
    found = paired_bootstrap(a, a + np.array([1, 0]), np.arange(50), ratio, 999)
    assert found.p_value == 1 / 1000


def test_nine_thousand_questions_take_seconds_at_most() -> None:
    rng = np.random.default_rng(0)
    counts, clusters = rng.integers(0, 2, (9000, 18)), np.repeat(np.arange(500), 18)
    start = time.perf_counter()
    totals = resample_totals(counts, clusters, 10_000)
    print(f"10000 resamples of 9000 questions: {time.perf_counter() - start:.2f} s")
    assert totals.shape == (10_000, 18)
    np.testing.assert_allclose(totals.mean(axis=0), counts.sum(axis=0), rtol=0.01)


@pytest.mark.parametrize(("b", "c", "p"), [(10, 2, 0.038574), (6, 0, 0.03125), (5, 5, 1), (0, 0, 1)])
def test_mcnemar_gives_the_published_values(b: int, c: int, p: float) -> None:
    assert mcnemar(b, c) == pytest.approx(p, abs=5e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test_and_symmetric(b: int, c: int) -> None:
    expected = scipy_stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_holds_for_thousands_of_items() -> None:
    assert mcnemar(4000, 4400) == pytest.approx(scipy_stats.binomtest(4000, 8400, 0.5).pvalue, rel=1e-6)


@pytest.mark.parametrize(("k", "n", "bounds"), [(2640, 3000, (0.867883, 0.891145)), (245, 500, (0.446426, 0.533727))])
def test_wilson_gives_the_published_values(k: int, n: int, bounds: tuple[float, float]) -> None:
    assert wilson(k, n) == pytest.approx(bounds, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(case: tuple[int, int]) -> None:
    k, n = case
    expected = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_holm_steps_down_and_keeps_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], alpha: float) -> None:
    rejected = set()
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(i)
    assert {i for i, value in enumerate(holm(p)) if value <= alpha} == rejected


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="counts has shape"):
        resample_totals([[1, 2]], [1, 2])
    with pytest.raises(InputError, match="n_items > 0"):
        resample_totals(np.empty((0, 2)), [])
    with pytest.raises(InputError, match="n_boot=0"):
        resample_totals([[1, 2]], [1], n_boot=0)
    with pytest.raises(InputError, match="level=95"):
        interval(0.5, np.array([0.5]), 1, level=95)
    with pytest.raises(InputError, match="same items"):
        paired_bootstrap([[1, 2]], [[1, 2], [3, 4]], [1], ratio)
    with pytest.raises(InputError, match="successes=3 of n=2"):
        wilson(3, 2)
    with pytest.raises(InputError, match="b=-1"):
        mcnemar(-1, 0)
    assert wilson(0, 0) is None
