"""DyVTE's labels: exit where the answer stays the same and hardly costs more."""

from __future__ import annotations

import math

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.dyvte_labels import answer_agreement, answer_loss, exit_labels

WORDS = 12


def confident(targets: torch.Tensor, loss: float | torch.Tensor) -> torch.Tensor:
    """Logits [B, A, V] whose argmax is the target and whose cross-entropy is `loss` at every position."""
    p = torch.exp(-torch.as_tensor(loss, dtype=torch.float64))
    rest = ((1 - p) / (WORDS - 1)).log()
    spread = rest.expand(*targets.shape, WORDS).clone()
    return spread.scatter(2, targets.clamp(min=0)[..., None], p.log().expand(*targets.shape, 1))


def answer(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


def test_identical_branches_are_labelled_exit() -> None:
    targets = torch.randint(1, WORDS, (4, 10))
    logits = torch.randn(4, 10, WORDS)
    assert exit_labels(logits, logits.clone(), targets).tolist() == [True] * 4


def test_one_other_argmax_in_ten_is_labelled_keep_though_the_loss_is_better() -> None:
    targets = torch.randint(1, WORDS, (1, 10))
    keep = confident(targets, 1.0)
    keep[0, 3] = confident(targets % (WORDS - 1) + 1, 1.0)[0, 3]  # the run with visual tokens is wrong here
    leave = confident(targets, 0.5)
    assert float(answer_loss(leave, targets)) < float(answer_loss(keep, targets))
    assert float(answer_agreement(keep, leave, targets)) == 0.9
    assert exit_labels(keep, leave, targets).tolist() == [False]


@pytest.mark.parametrize(("ratio", "label"), [(1.05, False), (1.031, False), (1.029, True), (0.5, True)])
def test_with_equal_argmaxes_the_ratio_of_the_losses_decides(ratio: float, label: bool) -> None:
    targets = torch.randint(1, WORDS, (1, 10))
    keep, leave = confident(targets, 0.4), confident(targets, 0.4 * ratio)
    assert float(answer_agreement(keep, leave, targets)) == 1
    assert exit_labels(keep, leave, targets).tolist() == [label]


@pytest.mark.parametrize(("length", "label"), [(99, False), (100, False), (101, True), (200, False), (300, False)])
def test_answers_up_to_a_hundred_tokens_must_agree_everywhere(length: int, label: bool) -> None:
    targets = torch.randint(1, WORDS, (1, length))
    keep = confident(targets, 1.0)
    leave = keep.clone()
    other = confident(targets % (WORDS - 1) + 1, 1.0)
    for place in range(math.ceil(length / 100) if length != 101 else 1):  # 1, 1, 1, 2 and 3 differ
        leave[0, place] = other[0, place]
    assert exit_labels(keep, leave, targets, loss_ratio=100.0).tolist() == [label]


def test_a_loss_of_exactly_zero_in_both_branches_is_labelled_exit() -> None:
    targets = torch.randint(1, WORDS, (1, 5))
    logits = torch.zeros(1, 5, WORDS).scatter(2, targets[..., None], 1e4)
    assert float(answer_loss(logits, targets)) == 0
    assert exit_labels(logits, logits.clone(), targets).tolist() == [True]
    assert exit_labels(logits, confident(targets, 0.1).float(), targets).tolist() == [False]


def test_token_id_0_adds_to_the_loss_and_counts_neither_as_a_token_nor_as_agreement() -> None:
    targets = answer(3, 0, 5)
    logits = confident(targets, torch.tensor([0.2, 1.5, 0.4], dtype=torch.float64)[None, :, None])
    assert float(answer_loss(logits, targets)) == pytest.approx((0.2 + 1.5 + 0.4) / 2)
    other = logits.clone()
    other[0, 1] = confident(answer(7, 7, 7), 0.1)[0, 1]
    assert float(answer_agreement(logits, other, targets)) == 1


def test_positions_that_predict_nothing_do_not_matter() -> None:
    targets = torch.tensor([[-100, -100, 4, 6], [1, 2, 4, 6]])
    keep, leave = torch.randn(2, 4, WORDS), torch.randn(2, 4, WORDS)
    alone = answer(4, 6)
    for logits in (keep, leave):
        assert float(answer_loss(logits, targets)[0]) == pytest.approx(float(answer_loss(logits[:1, 2:], alone)[0]))
    assert answer_agreement(keep, leave, targets)[0] == answer_agreement(keep[:1, 2:], leave[:1, 2:], alone)[0]


def test_losses_equal_a_loop_over_positions() -> None:
    targets = torch.tensor([[-100, 3, 0, 7], [2, 2, 9, 1]])
    logits = torch.randn(2, 4, WORDS, dtype=torch.float64)
    for row in range(2):
        total, count = 0.0, 0
        for t, token in enumerate(targets[row].tolist()):
            if token >= 0:
                total -= math.log(math.exp(logits[row, t, token]) / sum(math.exp(x) for x in logits[row, t].tolist()))
            count += token > 0
        assert float(answer_loss(logits, targets)[row]) == pytest.approx(total / count)


def test_half_precision_logits_are_compared_in_fp32() -> None:
    targets = torch.randint(1, WORDS, (2, 6))
    assert answer_loss(torch.randn(2, 6, WORDS).bfloat16(), targets).dtype == torch.float32


def test_an_answer_without_a_token_and_shapes_that_do_not_fit_are_refused() -> None:
    logits = torch.randn(2, 3, WORDS)
    with pytest.raises(InputError, match="targets: an answer has no token"):
        exit_labels(logits, logits, torch.tensor([[1, 2, 3], [-100, 0, -100]]))
    with pytest.raises(InputError, match="expected"):
        exit_labels(logits, logits[:, :2], torch.ones(2, 3, dtype=torch.long))
