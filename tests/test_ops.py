"""The ops against dense formulas written out here, over odd sizes, shared key heads, masks and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vlattn import ops
from vlattn.errors import InputError
from vlattn.kernels.reference import CPU_BLOCK

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 3, 7, 5), (1, 6, 1, 5, 33, 8), (3, 3, 3, 2, 129, 16)]  # B, H, Hkv, R, N, D


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some(seed: int, *shape: int) -> torch.Tensor:
    """A mask with about two thirds True."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.66


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Inputs are rounded before either side sees them, so what is left is fp32 or fp64 rounding."""
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (2e-5, 2e-6)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


def dense(q: torch.Tensor, k: torch.Tensor, scale: float, seen: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, R, N] by loops over heads and rows, in fp64; `seen` [B, R, N] says who may look where."""
    q, k = q.double(), k.double()
    batch, heads, rows, _ = q.shape
    out = torch.zeros(batch, heads, rows, k.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1])]
            for r in range(rows):
                e = (keys @ q[b, h, r] * scale).exp() * seen[b, r]
                if seen[b, r].any():
                    out[b, h, r] = e / e.sum()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mask", ["none", "keys", "rows"])
def test_query_rows_equal_the_rows_of_the_dense_matrix(size: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    b, h, hkv, r, n, d = size
    q, k = draw(1, b, h, r, d, dtype=dtype), draw(2, b, hkv, n, d, dtype=dtype)
    given = {"none": None, "keys": some(3, b, n), "rows": some(4, b, r, n)}[mask]
    seen = torch.ones(b, r, n, dtype=torch.bool)
    if given is not None:
        seen = given if given.ndim == 3 else given[:, None].expand(-1, r, -1)
    found = ops.query_row_attention(q, k, scale=0.7, key_mask=given)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, dense(q, k, 0.7, seen), dtype)
    assert bool((found[~seen[:, None].expand_as(found)] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 7), (5, 9), (128, 128), (131, 200), (900, 950)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_received_attention_is_the_column_sum_of_the_dense_matrix(
    rows: int, keys: int, heads: int, kv_heads: int, causal: bool, masked: bool, dtype: torch.dtype
) -> None:
    q, k = draw(5, 2, heads, rows, 4, dtype=dtype), draw(6, 2, kv_heads, keys, 4, dtype=dtype)
    key_mask, query_mask = (some(7, 2, keys), some(8, 2, rows)) if masked else (None, None)
    seen = torch.ones(2, rows, keys, dtype=torch.bool)
    if causal:
        seen &= torch.tensor([[j <= i + keys - rows for j in range(keys)] for i in range(rows)])
    if key_mask is not None:
        seen &= key_mask[:, None]
    matrix = dense(q, k, 0.5, seen)
    if query_mask is not None:
        matrix = matrix * query_mask[:, None, :, None]
    found = ops.received_attention(q, k, scale=0.5, causal=causal, key_mask=key_mask, query_mask=query_mask)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, matrix.sum(2), dtype)


def test_more_queries_than_keys_may_look_back_only_without_a_causal_order() -> None:
    q, k = draw(9, 1, 2, 6, 3), draw(10, 1, 2, 4, 3)
    found = ops.received_attention(q, k, scale=1.0)
    torch.testing.assert_close(found.sum(-1), torch.full((1, 2), 6.0, dtype=torch.float64))
    with pytest.raises(InputError, match="causal: 6 queries but only 4 keys"):
        ops.received_attention(q, k, scale=1.0, causal=True)


def test_received_attention_never_holds_more_than_a_block_of_weights() -> None:
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    rows = 1500
    q, k = draw(11, 1, 2, rows, 2), draw(12, 1, 1, rows, 2)
    with Watch():
        ops.received_attention(q, k, scale=1.0, causal=True, key_mask=some(13, 1, rows))
    assert rows < largest <= CPU_BLOCK < 2 * rows * rows


def test_rows_that_see_nothing_give_zeros_and_leave_the_others_alone() -> None:
    q, k = draw(14, 2, 2, 3, 4), draw(15, 2, 2, 5, 4)
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0, 1] = False
    found = ops.query_row_attention(q, k, scale=1.0, key_mask=mask)
    assert bool((found[0, :, 1] == 0).all())
    torch.testing.assert_close(found[1], ops.query_row_attention(q[1:], k[1:], scale=1.0)[0])
    nothing = torch.tensor([[False] * 5, [True] * 5])
    total = ops.received_attention(q, k, scale=1.0, key_mask=nothing)
    assert bool((total[0] == 0).all())
    torch.testing.assert_close(total[1].sum(-1), torch.full((2,), 3.0, dtype=torch.float64))


def test_strided_views_give_what_their_copies_give() -> None:
    q = draw(16, 2, 9, 4, 6).transpose(1, 2)[..., ::2]  # [2, 4, 9, 3]
    k = draw(17, 2, 11, 2, 6).transpose(1, 2)[..., 1::2]
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    rows = ops.query_row_attention(q, k, scale=1.0)
    torch.testing.assert_close(rows, ops.query_row_attention(q.contiguous(), k.contiguous(), scale=1.0))
    received = ops.received_attention(q, k, scale=1.0)
    torch.testing.assert_close(received, ops.received_attention(q.contiguous(), k.contiguous(), scale=1.0))


def test_one_batch_row_does_not_see_another() -> None:
    q, k, mask = draw(18, 3, 4, 130, 4), draw(19, 3, 2, 130, 4), some(20, 3, 130)
    together = ops.received_attention(q, k, scale=1.0, causal=True, key_mask=mask, query_mask=mask)
    for b in range(3):
        one = slice(b, b + 1)
        alone = ops.received_attention(q[one], k[one], scale=1.0, causal=True, key_mask=mask[one], query_mask=mask[one])
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("op", [ops.query_row_attention, ops.received_attention])
@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 2, 3), (1, 2, 3, 4), r"q and k: expected \[B, H, R, D\] and \[B, Hkv, N, D\], got \(1, 2, 3\)"),
        ((1, 2, 3, 4), (2, 2, 3, 4), "q and k: expected"),
        ((1, 2, 3, 4), (1, 2, 3, 5), "q and k: expected"),
        ((1, 4, 3, 4), (1, 3, 3, 4), "k: its 3 heads do not divide the 4 of q"),
        ((1, 4, 3, 4), (1, 0, 3, 4), "k: its 0 heads do not divide the 4 of q"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    op: Any, q: tuple[int, ...], k: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        op(torch.zeros(q), torch.zeros(k), scale=1.0)


def test_dtypes_and_masks_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 5, 4)
    with pytest.raises(InputError, match=r"q and k: torch.float32 against torch.float64"):
        ops.query_row_attention(q, k.double(), scale=1.0)
    with pytest.raises(InputError, match=r"key_mask: got torch.int64 \(2, 5\); give bool \(2, 5\) or \(2, 3, 5\)"):
        ops.query_row_attention(q, k, scale=1.0, key_mask=torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(InputError, match=r"key_mask: got torch.bool \(2, 3, 5\); give bool \(2, 5\)"):
        ops.received_attention(q, k, scale=1.0, key_mask=torch.ones(2, 3, 5, dtype=torch.bool))
    with pytest.raises(InputError, match=r"query_mask: got torch.bool \(2, 5\); give bool \(2, 3\)"):
        ops.received_attention(q, k, scale=1.0, query_mask=torch.ones(2, 5, dtype=torch.bool))


def test_selected_tokens_are_the_best_in_their_old_order_with_ties_to_the_left() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    values = torch.arange(20).view(2, 5, 2)
    index, gathered = ops.select_tokens(score, 2, values)
    assert index.tolist() == [[1, 2], [0, 1]]
    assert gathered.tolist() == [[[2, 3], [4, 5]], [[10, 11], [12, 13]]]
    for k in (0, 6):
        with pytest.raises(InputError, match=f"k: got {k} for scores of shape"):
            ops.select_tokens(score, k)
