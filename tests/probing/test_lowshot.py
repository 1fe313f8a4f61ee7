"""Subsets by class, and how much longer they are trained."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from vlattn.errors import InputError
from vlattn.probing.lowshot import SHARES, SHOTS, comparable_settings, shots_subset, stratified_subset
from vlattn.probing.settings import ProbeSettings

SIZES = {0: 250, 3: 1000, 4: 30, 9: 120}  # a class that does not occur is no trouble


@pytest.fixture
def labels() -> torch.Tensor:
    every = torch.cat([torch.full((size,), label) for label, size in SIZES.items()])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(5))]


@pytest.mark.parametrize("share", [*SHARES, 1.0])
def test_a_share_is_taken_of_each_class_and_at_least_one(labels: torch.Tensor, share: float) -> None:
    chosen = stratified_subset(labels, share)
    counts = dict(zip(*(x.tolist() for x in labels[chosen].unique(return_counts=True)), strict=True))
    expected = {0.01: {0: 3, 3: 10, 4: 1, 9: 1}, 0.1: {0: 25, 3: 100, 4: 3, 9: 12}, 1.0: SIZES}
    assert counts == expected[share]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


@pytest.mark.parametrize("shots", SHOTS)
def test_as_many_images_of_each_class_as_asked_for(labels: torch.Tensor, shots: int) -> None:
    chosen = shots_subset(labels, shots)
    assert labels[chosen].unique(return_counts=True)[1].tolist() == [shots] * 4


def test_smaller_subsets_of_a_seed_are_part_of_larger_ones(labels: torch.Tensor) -> None:
    for seed in range(3):
        nested = [set(shots_subset(labels, shots, seed).tolist()) for shots in SHOTS]
        nested.append(set(stratified_subset(labels, 1.0, seed).tolist()))
        assert all(a < b for a, b in pairwise(nested))
    assert set(stratified_subset(labels, 0.01).tolist()) < set(stratified_subset(labels, 0.1).tolist())


def test_a_seed_decides_the_subset_and_no_other_draw_does(labels: torch.Tensor) -> None:
    torch.manual_seed(0)
    first = shots_subset(labels, 4, seed=7)
    torch.manual_seed(1)
    assert torch.equal(shots_subset(labels, 4, seed=7), first)
    assert not torch.equal(shots_subset(labels, 4, seed=8), first)
    drawn = torch.stack([shots_subset(labels, 1, seed=s) for s in range(40)])
    assert len(drawn.unique()) > 60  # 4 images each, hardly ever the same


@pytest.mark.parametrize(("subset", "batch"), [(128_117, 4096), (12_812, 4096), (16_000, 4096), (1000, 1000)])
def test_a_subset_gets_as_many_updates_as_all_images(subset: int, batch: int) -> None:
    settings = ProbeSettings(patience=5)
    found, small = comparable_settings(settings, 1_281_167, subset, 4096)
    assert small == batch
    updates = 90 * (1_281_167 // 4096)
    assert found.epochs * (subset // small) == pytest.approx(updates, rel=0.02)
    assert found.warmup_epochs / found.epochs == pytest.approx(10 / 90)
    assert found.stop_from / found.epochs == pytest.approx(15 / 90, rel=0.02)
    assert found.epochs / found.eval_every == pytest.approx(90, rel=0.04)
    assert (found.blr, found.optimizer, found.patience) == (None, "lars", 5)


def test_all_images_keep_their_settings() -> None:
    settings = ProbeSettings(epochs=30, warmup_epochs=3, accumulate=4)
    assert comparable_settings(settings, 1000, 1000, 100) == (settings, 100)


def test_a_batch_that_shrinks_to_the_subset_needs_no_accumulation() -> None:
    found, small = comparable_settings(ProbeSettings(accumulate=4), 1000, 60, 200)
    assert (small, found.accumulate) == (60, 1)


def test_what_cannot_be_drawn_is_refused(labels: torch.Tensor) -> None:
    with pytest.raises(InputError, match="shots: got 31, but class 4 has 30"):
        shots_subset(labels, 31)
    with pytest.raises(InputError, match="shots: got 0"):
        shots_subset(labels, 0)
    with pytest.raises(InputError, match=r"share: got 1\.5"):
        stratified_subset(labels, 1.5)
    with pytest.raises(InputError, match="subsets by class need int64 labels"):
        stratified_subset(torch.zeros(5, 3), 0.1)
    with pytest.raises(InputError, match="subset, batch: got 11 and 4 of 10"):
        comparable_settings(ProbeSettings(), 10, 11, 4)
