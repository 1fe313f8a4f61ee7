"""Accuracy and average precision, against plain loops and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch

from vlattn.errors import InputError
from vlattn.probing.metrics import average_precision, mean_average_precision, topk_correct


@pytest.mark.parametrize("k", [1, 5, 9])
def test_topk_counts_images_whose_label_is_among_the_k_highest(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 7, generator=generator)
    labels = torch.randint(7, (40,), generator=generator)
    expected = [
        sum(int(labels[b]) in sorted(range(7), key=lambda c: -float(logits[r, b, c]))[:k] for b in range(40))
        for r in range(3)
    ]
    assert topk_correct(logits, labels, k).tolist() == expected
    assert topk_correct(logits[0], labels, k).item() == expected[0]


def test_a_head_that_diverged_gets_nothing_right() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, :, 0] = 1
    logits[1] = float("nan")
    labels = torch.zeros(3, dtype=torch.long)
    assert topk_correct(logits, labels, 1).tolist() == [3, 0]
    assert topk_correct(logits, labels, 4).tolist() == [3, 0]


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn(ties: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 60, 9, generator=generator)
    if ties:
        scores = (scores * 2).round()
    targets = (torch.rand(60, 9, generator=generator) < 0.2).float()
    targets[:, 0] = 1
    targets[:, 1] = 0
    targets[17, 1] = 1
    found = average_precision(scores, targets)
    assert found.shape == (2, 9)
    for r in range(2):
        for c in range(9):
            expected = sklearn.average_precision_score(targets[:, c].numpy(), scores[r, :, c].numpy())
            assert float(found[r, c]) == pytest.approx(expected, abs=1e-12)
    expected = sklearn.average_precision_score(targets.numpy(), scores[0].numpy(), average="macro")
    assert float(mean_average_precision(scores[0], targets)) == pytest.approx(expected, abs=1e-12)


def test_images_of_equal_score_pass_a_threshold_together() -> None:
    scores = torch.tensor([[2.0], [1.0], [1.0], [1.0], [0.0]])
    targets = torch.tensor([[0], [1], [0], [0], [1]])
    # recall 1/2 at precision 1/4, then recall 1 at precision 2/5
    assert float(average_precision(scores, targets)[0]) == pytest.approx(0.5 * 0.25 + 0.5 * 0.4)


def test_classes_that_no_image_has_are_left_out_of_the_mean() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = average_precision(scores, targets).tolist()
    assert math.isnan(found[1])
    assert (found[0], found[2]) == (1, 1)
    assert float(mean_average_precision(scores, targets)) == 1
    with pytest.raises(InputError, match="no image has any class"):
        mean_average_precision(scores, torch.zeros(2, 3))


def test_scores_that_are_no_numbers_have_no_average_precision() -> None:
    scores = torch.tensor([[0.9, 0.1], [float("nan"), 0.8]])
    targets = torch.ones(2, 2)
    found = average_precision(scores, targets).tolist()
    assert math.isnan(found[0])
    assert found[1] == 1
    assert math.isnan(float(mean_average_precision(scores, targets)))


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"targets: got \[2, 3\] for scores \[2, 4\]"):
        average_precision(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(InputError, match="other than 0 and 1"):
        average_precision(torch.zeros(2, 3), torch.full((2, 3), 0.5))
