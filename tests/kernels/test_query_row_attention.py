"""Attention of a few rows: the reference against the dense formula, Triton against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlattn import ops
from vlattn.errors import InputError

triton_installed = pytest.importorskip("triton")
from vlattn.kernels import query_row_attention as kernel  # noqa: E402  (needs triton)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 3, 7, 5), (1, 6, 1, 5, 33, 8), (3, 3, 3, 2, 129, 16)]  # B, H, Hkv, R, N, D


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some(seed: int, *shape: int) -> torch.Tensor:
    """A mask with about two thirds True."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.66


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Inputs are rounded before either side sees them, so what is left is fp32 or fp64 rounding."""
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (2e-5, 2e-6)
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


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


class Case:
    """Random arguments of the op. mask: "none", "keys" [B, N] or "rows" [B, R, N]."""

    def __init__(
        self, size: Any, seed: int = 0, dtype: torch.dtype = torch.float32, mask: str = "none", sharpness: float = 1.0
    ) -> None:
        b, h, hkv, r, n, d = size
        self.q, self.k = sharpness * draw(seed, b, h, r, d, dtype=dtype), draw(seed + 1, b, hkv, n, d, dtype=dtype)
        self.scale = 1.5 * d**-0.5
        self.mask = {"none": None, "keys": some(seed + 2, b, n), "rows": some(seed + 3, b, r, n)}[mask]

    def run(self, backend: Any = "triton") -> torch.Tensor:
        return ops.query_row_attention(self.q, self.k, scale=self.scale, key_mask=self.mask, backend=backend)

    def check(self) -> None:
        found = self.run()
        assert found.dtype == torch.float32
        assert_close(found, self.run("reference"))


# The reference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mask", ["none", "keys", "rows"])
def test_query_rows_equal_the_rows_of_the_dense_matrix(size: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    case = Case(size, 1, dtype, mask)
    b, _, _, r, n, _ = size
    seen = torch.ones(b, r, n, dtype=torch.bool)
    if case.mask is not None:
        seen = case.mask if case.mask.ndim == 3 else case.mask[:, None].expand(-1, r, -1)
    found = ops.query_row_attention(case.q, case.k, scale=case.scale, key_mask=case.mask)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, dense(case.q, case.k, case.scale, seen), dtype)
    assert bool((found[~seen[:, None].expand_as(found)] == 0).all())


# Triton ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", ["none", "keys", "rows"])
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1, 1, 1), (2, 4, 2, 1, 65, 20), (1, 3, 1, 17, 63, 16), (1, 2, 2, 64, 64, 8)], ids=str
)
def test_triton_is_the_reference(size: Any, mask: str) -> None:
    Case(size, mask=mask).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_is_the_reference_for_one_row_over_577_keys(dtype: torch.dtype) -> None:
    Case((1, 2, 2, 1, 577, 64), dtype=dtype).check()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 20), st.integers(0, 70),
                   st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    mask=st.sampled_from(["none", "keys", "rows"]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_triton_is_the_reference_whatever_is_given(
    size: tuple[int, ...], dtype: torch.dtype, mask: str, seed: int
) -> None:
    b, hkv, share, r, n, d = size
    Case((b, hkv * share, hkv, r, n, d), seed, dtype, mask).check()


@pytest.mark.parametrize("mask", ["keys", "rows"])
def test_keys_split_over_programs_give_what_one_program_gives(mask: str) -> None:
    case = Case((2, 4, 2, 3, 300, 8), mask=mask)
    assert case.mask is not None
    case.mask[..., 128:256] = False  # a split in which nothing is seen
    case.mask[0, ...] &= mask == "keys"  # and rows that see nothing anywhere
    split = kernel.query_row_attention(case.q, case.k, case.scale, case.mask, chunk=128)
    assert_close(split, case.run())
    assert_close(split, case.run("reference"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mask", ["keys", "rows"])
def test_views_with_any_strides_give_what_their_copies_give(backend: str, mask: str) -> None:
    case = Case((2, 4, 2, 9, 30, 8), mask=mask)
    whole = case.run(backend)
    assert case.mask is not None
    case.q = case.q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    case.k = case.k.transpose(1, 2).repeat_interleave(2, -1).transpose(1, 2)[..., ::2]
    case.mask = case.mask.transpose(0, -1).contiguous().transpose(0, -1)
    assert case.k.stride(-1) == 2
    assert not case.mask.is_contiguous()
    assert_close(case.run(backend), whole)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_see_nothing_give_zeros_and_leave_the_others_alone(backend: str) -> None:
    case = Case((2, 2, 2, 3, 5, 4))
    whole = case.run(backend)
    case.mask = torch.ones(2, 3, 5, dtype=torch.bool)
    case.mask[0, 1] = False
    found = case.run(backend)
    assert bool((found[0, :, 1] == 0).all())
    assert_close(found[1], whole[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sharpness", [1e4, -1e4])
def test_huge_logits_do_not_overflow(backend: str, sharpness: float) -> None:
    case = Case((1, 2, 1, 5, 33, 8), mask="keys", sharpness=sharpness)
    found = case.run(backend)
    case.q, case.k = case.q.double(), case.k.double()
    # fp32 carries logits of 1e4 to about 1e-3, and so their softmax.
    torch.testing.assert_close(found.double(), case.run("reference"), rtol=1e-2, atol=1e-2)


def test_two_runs_give_the_same_bits() -> None:
    case = Case((2, 4, 2, 3, 300, 8), mask="keys")
    once, again = (kernel.query_row_attention(case.q, case.k, case.scale, case.mask, chunk=128) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("mask", ["none", "keys", "rows"])
def test_gradients_are_those_of_the_reference_in_fp64(mask: str) -> None:
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        case = Case((2, 4, 2, 3, 9, 8), dtype=dtype, mask=mask)
        if case.mask is not None:
            case.mask[0] = False
        given = [case.q.requires_grad_(), case.k.requires_grad_()]
        weights = case.run(backend)
        found.append(torch.autograd.grad((weights * draw(9, *weights.shape, dtype=dtype)).sum(), given))
    for exact, approximate in zip(*found, strict=True):
        torch.testing.assert_close(approximate.double(), exact, rtol=1e-4, atol=1e-6)


# As an operator -------------------------------------------------------------------------------------------------------
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    case = Case((1, 2, 1, 3, 6, 4), mask="rows")
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    for mask in (None, case.mask):
        torch.library.opcheck(torch.ops.vlattn.query_row_attention, (q, k, 0.5, mask, 0))


def test_a_compiled_function_gives_what_it_gives_without_compilation() -> None:
    case = Case((1, 2, 1, 3, 9, 4), mask="keys")

    def function(q: torch.Tensor) -> torch.Tensor:
        made = ops.query_row_attention(2 * q, case.k, scale=0.5, key_mask=case.mask, backend="triton")
        return (made + 1).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (function, compiled):
        q = case.q.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(q), q)[0])
    assert torch.equal(function(case.q), compiled(case.q))
    assert torch.equal(*grads)


def test_the_flop_counter_counts_one_product() -> None:
    with FlopCounterMode(display=False) as counter:
        Case((2, 4, 2, 3, 9, 8)).run()
    assert counter.get_total_flops() == 2 * (2 * 4 * 3 * 9 * 8)


# What is refused ------------------------------------------------------------------------------------------------------
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
def test_shapes_that_do_not_belong_together_are_refused(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.query_row_attention(torch.zeros(q), torch.zeros(k), scale=1.0)


def test_dtypes_and_masks_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 5, 4)
    with pytest.raises(InputError, match=r"q and k: torch.float32 against torch.float64"):
        ops.query_row_attention(q, k.double(), scale=1.0)
    with pytest.raises(InputError, match=r"torch.int64 against torch.int64; give both in one floating-point dtype"):
        ops.query_row_attention(q.long(), k.long(), scale=1.0)
    with pytest.raises(InputError, match=r"key_mask: got torch.int64 \(2, 5\); give bool \(2, 5\) or \(2, 3, 5\)"):
        ops.query_row_attention(q, k, scale=1.0, key_mask=torch.ones(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [(torch.float64, 4, "has no torch.float64"), (torch.float32, 300, "takes heads of at most 256 channels, not 300")],
)
def test_what_the_kernel_does_not_cover_is_refused_where_it_was_asked_for(
    dtype: torch.dtype, width: int, message: str
) -> None:
    x = torch.zeros(1, 1, 2, width, dtype=dtype)
    with pytest.raises(InputError, match=f"backend: the Triton kernel {message}; give backend='reference'"):
        ops.query_row_attention(x, x, scale=1.0, backend="triton")
