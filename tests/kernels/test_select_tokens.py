"""Selected tokens are the best of each row in their old order, with all that is theirs, the same on both backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlattn import ops
from vlattn.errors import InputError

BACKENDS = ["reference", "triton"]
NAN = math.nan


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(scores: list[float], k: int) -> list[int]:
    """Sorted by score, NaN first, then by place; the first k of them in order of place."""

    def before(i: int) -> tuple[float, bool, int]:
        x = scores[i]
        return (-math.inf, False, i) if math.isnan(x) else (-x + 0.0, True, i)  # + 0.0 makes -0.0 of no effect

    order = sorted(range(len(scores)), key=before)
    return sorted(order[:k])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1.0, 3.0, 3.0, 0.0, 3.0], 2, [1, 2]),
        ([5.0] * 5, 3, [0, 1, 2]),
        ([0.0, -0.0, 0.0, -1.0], 2, [0, 1]),
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([1.0, NAN, math.inf, NAN], 2, [1, 3]),
        ([1.0, NAN, math.inf, -NAN], 3, [1, 2, 3]),
        ([-math.inf, -math.inf, -1e38, 1e-45], 2, [2, 3]),
        ([-3.0, -1.0, -2.0], 1, [1]),
    ],
)
def test_ties_go_left_and_nan_is_above_infinity(
    scores: list[float], k: int, expected: list[int], backend: ops.Backend
) -> None:
    (index,) = ops.select_tokens(torch.tensor([scores]), k, backend=backend)
    assert index.tolist() == [expected]
    assert index.dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_backends_choose_what_a_sort_by_score_and_place_chooses(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, NAN, math.inf, -math.inf])
    number = few | st.floats(width=32, allow_nan=True)
    rows = data.draw(st.lists(st.lists(number, min_size=tokens, max_size=tokens), min_size=1, max_size=3))
    counts = data.draw(st.lists(st.integers(0, tokens), min_size=len(rows), max_size=len(rows)))
    score = torch.tensor(rows)
    expected = [naive(row, k) for row, k in zip(score.tolist(), counts, strict=True)]
    padded = [row + [-1] * (max(counts) - len(row)) for row in expected]
    for backend in BACKENDS:
        (index,) = ops.select_tokens(score, torch.tensor(counts), backend=backend)  # type: ignore[arg-type]
        assert index.tolist() == padded
        if len(set(counts)) == 1 and counts[0]:
            (index,) = ops.select_tokens(score, counts[0], backend=backend)  # type: ignore[arg-type]
            assert index.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (17, 16), (63, 7), (64, 64), (65, 64), (577, 64), (1025, 3)])
def test_triton_gathers_bit_for_bit_what_the_reference_gathers(tokens: int, k: int, dtype: torch.dtype) -> None:
    score = (draw(1, 2, tokens) * 4).round().to(dtype) * 1e4  # many ties
    tensors = (
        draw(2, 2, tokens, 70, dtype=dtype),
        torch.arange(tokens)[None],
        draw(3, 1, tokens, 2, 5),
        draw(4, 2, tokens) > 0,
        draw(5, 2, tokens, dtype=torch.float64),
    )
    found = ops.select_tokens(score, k, *tensors, backend="triton")
    expected = ops.select_tokens(score, k, *tensors, backend="reference")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for b in range(2):
        assert torch.equal(found[1][b], tensors[0][b, found[0][b]])
        assert torch.equal(found[2][b], tensors[1][0, found[0][b]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_rows_are_padded_with_zeros_and_minus_one(backend: ops.Backend) -> None:
    score = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    values, mask = torch.arange(1, 10).view(3, 3), torch.ones(3, 3, dtype=torch.bool)
    index, taken, there = ops.select_tokens(score, torch.tensor([2, 0, 3]), values, mask, backend=backend)
    assert index.tolist() == [[0, 2, -1], [-1, -1, -1], [0, 1, 2]]
    assert taken.tolist() == [[1, 3, 0], [0, 0, 0], [7, 8, 9]]
    assert torch.equal(there, index >= 0)
    assert (index >= 0).sum(1).tolist() == [2, 0, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_width_cuts_rows_that_ask_for_more_and_pads_the_others(backend: ops.Backend) -> None:
    score = torch.tensor([[3.0, 1.0, 2.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    (index,) = ops.select_tokens(score, torch.tensor([3, 1], dtype=torch.int32), width=2, backend=backend)
    assert index.tolist() == [[0, 3], [3, -1]]
    (none,) = ops.select_tokens(score, torch.tensor([0, 0]), backend=backend)
    assert none.shape == (2, 0)


def test_strided_views_give_what_their_copies_give() -> None:
    score = draw(6, 65, 6)[:, ::2].t()  # [3, 65], with steps along the row
    views = [
        draw(7, 65, 3, 8).transpose(0, 1),
        draw(8, 3, 65, 8)[..., ::2],
        draw(9, 3, 65, 4, 6).transpose(2, 3),
        draw(10, 3, 130, 4)[:, ::2],
        draw(11, 1, 65, 4).expand(3, -1, -1),
    ]
    found = ops.select_tokens(score, 9, *views, backend="triton")
    for view, taken in zip(views, found[1:], strict=True):
        for b in range(3):
            assert torch.equal(taken[b], view[b, found[0][b]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_return_to_the_places_they_came_from(backend: ops.Backend) -> None:
    score, hidden = draw(12, 2, 7), draw(13, 2, 7, 3, dtype=torch.float64).requires_grad_()
    index, taken = ops.select_tokens(score, torch.tensor([2, 5]), hidden, backend=backend)
    pull = draw(14, *taken.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((taken * pull).sum(), hidden)
    expected = torch.zeros_like(hidden)
    for b in range(2):
        for k, place in enumerate(index[b].tolist()):
            if place >= 0:
                expected[b, place] = pull[b, k]
    assert torch.equal(grad, expected)


def test_the_same_scores_give_the_same_tokens_each_time() -> None:
    score = torch.randint(0, 3, (2, 200), generator=torch.Generator().manual_seed(15)).float()
    first = ops.select_tokens(score, 50, backend="triton")[0]
    assert torch.equal(first, ops.select_tokens(score.clone(), 50, backend="triton")[0])


def test_gradients_pass_through_a_compiled_function() -> None:
    score = draw(23, 2, 9)

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        return ops.select_tokens(score, 3, hidden, backend="triton")[1].square().sum()

    grads = []
    for function in (keep, torch.compile(keep, fullgraph=True, backend="aot_eager")):
        hidden = draw(24, 2, 9, 3).requires_grad_()
        grads.append(torch.autograd.grad(function(hidden), hidden)[0])
    assert torch.equal(*grads)


def test_a_compiled_function_is_one_graph_and_gives_the_same() -> None:
    def keep(score: torch.Tensor, hidden: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        index, taken = ops.select_tokens(score, 5, hidden, backend="triton")
        ragged = ops.select_tokens(score, k, hidden, width=3, backend="triton")
        return index + 0, taken * 2, *ragged

    given = draw(16, 2, 20), draw(17, 2, 20, 4), torch.tensor([1, 3])
    compiled = torch.compile(keep, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given), keep(*given), strict=True):
        assert torch.equal(a, b)


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    ops.select_tokens(draw(18, 1, 4), 2, backend="triton")
    hidden = draw(20, 2, 9, 3)
    for counts in (None, torch.tensor([1, 3])):
        torch.library.opcheck(torch.ops.vlattn.select_tokens, (draw(19, 2, 9), 3, counts, [hidden]))
    # With gradients, the check of compiled code adds up outputs, which an int64 index in front does not let it.
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (draw(19, 2, 9), 3, None, [hidden.requires_grad_()])
    torch.library.opcheck(torch.ops.vlattn.select_tokens, arguments, test_utils=some)


def test_no_floating_point_operation_is_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.select_tokens(draw(21, 2, 9), 3, draw(22, 2, 9, 4), backend="triton")
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: got 0 for scores of shape"),
        ({"k": 6}, "k: got 6 for scores of shape"),
        ({"k": 2, "width": 2}, "width: got 2 for k=2"),
        ({"k": torch.tensor([1])}, r"k: got torch.int64 \(1,\); give a number, or int64 \(2,\)"),
        ({"k": torch.tensor([1.0, 2.0])}, "k: got torch.float32"),
        ({"k": torch.tensor([-1, 2])}, "k: got -1 to 2 for rows of 5 tokens"),
        ({"k": torch.tensor([1, 6])}, "k: got 1 to 6 for rows of 5 tokens"),
        ({"k": torch.tensor([1, 2]), "width": 6}, "width: got 6"),
        ({"k": 2, "backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.select_tokens(torch.zeros(2, 5), **arguments)


def test_tensors_and_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"score: got shape \(5,\)"):
        ops.select_tokens(torch.zeros(5), 2)
    with pytest.raises(InputError, match=r"tensors: number 1 has shape \(2, 4\); give \[2, 5, ...\]"):
        ops.select_tokens(torch.zeros(2, 5), 2, torch.zeros(2, 5), torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"the Triton kernel has no torch.float64 scores; give backend='reference'"):
        ops.select_tokens(torch.zeros(2, 5, dtype=torch.float64), 2, backend="triton")
    with pytest.raises(InputError, match="takes rows of at most 8192 tokens, not 9000"):
        ops.select_tokens(torch.zeros(1, 9000), 2, backend="triton")
