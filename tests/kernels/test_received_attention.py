"""Attention that keys receive: the reference against the dense matrix, Triton against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vlattn import ops
from vlattn.errors import InputError
from vlattn.kernels.reference import CPU_BLOCK

triton_installed = pytest.importorskip("triton")
from vlattn.kernels import received_attention as kernel  # noqa: E402  (needs triton)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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
    """Attention [B, H, R, N] as its formula says, in fp64; `seen` [B, R, N] says who may look where."""
    keys = torch.stack([k[:, h // (q.shape[1] // k.shape[1])] for h in range(q.shape[1])], 1).double()
    e = torch.einsum("bhrd,bhnd->bhrn", q.double(), keys).mul(scale).exp() * seen[:, None]
    return torch.where(seen.any(-1)[:, None, :, None], e / e.sum(-1, keepdim=True), 0)


class Case:
    """Random arguments of the op, with everything asked for."""

    def __init__(
        self,
        size: tuple[int, int, int, int, int, int],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        causal: bool = False,
        masked: bool = True,
        sharpness: float = 1.0,
    ) -> None:
        b, h, hkv, r, n, d = size
        self.q, self.k = sharpness * draw(seed, b, h, r, d, dtype=dtype), draw(seed + 1, b, hkv, n, d, dtype=dtype)
        self.options: dict[str, Any] = {"scale": 1.5 * d**-0.5, "causal": causal}
        if masked:
            self.options |= {"key_mask": some(seed + 2, b, n), "query_mask": some(seed + 3, b, r)}

    def run(self, backend: Any = "triton", **more: Any) -> tuple[torch.Tensor, ...]:
        options = {"return_max": True, "return_lse": True, **self.options, **more}
        return ops.received_attention(self.q, self.k, **options, backend=backend)

    def check(self, **more: Any) -> None:
        for found, expected in zip(self.run("triton", **more), self.run("reference", **more), strict=True):
            assert_close(found, expected)


# The reference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 7), (5, 9), (900, 950)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_is_sums_and_maxima_of_columns_of_the_dense_matrix(
    rows: int, keys: int, heads: int, kv_heads: int, causal: bool, masked: bool, dtype: torch.dtype
) -> None:
    batch = 2 if rows < 900 else 1
    q, k = draw(5, batch, heads, rows, 4, dtype=dtype), draw(6, batch, kv_heads, keys, 4, dtype=dtype)
    key_mask, query_mask = (some(7, batch, keys), some(8, batch, rows)) if masked else (None, None)
    seen = torch.ones(batch, rows, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - rows)
    if key_mask is not None:
        seen &= key_mask[:, None]
    matrix = dense(q, k, 0.5, seen)
    if query_mask is not None:
        matrix = matrix * query_mask[:, None, :, None]
    options: dict[str, Any] = {"scale": 0.5, "causal": causal, "key_mask": key_mask, "query_mask": query_mask}
    sums = ops.received_attention(q, k, **options)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(sums, matrix.sum(2), dtype)
    same, best, lse = ops.received_attention(q, k, **options, return_max=True, return_lse=True)
    assert torch.equal(same, sums)
    assert_close(best, matrix.amax(2), dtype)
    logits = q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).transpose(2, 3) * 0.5
    assert_close(lse, logits.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1), dtype)
    again, best_again = ops.received_attention(q, k, **options, lse=lse, return_max=True)
    assert_close(again, sums, dtype)
    assert_close(best_again, best, dtype)


def test_more_queries_than_keys_may_look_back_only_without_a_causal_order() -> None:
    q, k = draw(9, 1, 2, 6, 3), draw(10, 1, 2, 4, 3)
    found = ops.received_attention(q, k, scale=1.0)
    torch.testing.assert_close(found.sum(-1), torch.full((1, 2), 6.0, dtype=torch.float64))
    with pytest.raises(InputError, match="causal: 6 queries but only 4 keys"):
        ops.received_attention(q, k, scale=1.0, causal=True)


def test_the_reference_never_holds_more_than_a_block_of_weights() -> None:
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
        ops.received_attention(
            q, k, scale=1.0, causal=True, key_mask=some(13, 1, rows), return_max=True, return_lse=True
        )
    assert rows < largest <= CPU_BLOCK < 2 * rows * rows


def test_gradients_of_the_reference_are_those_of_finite_differences() -> None:
    case = Case((1, 2, 1, 4, 5, 3), dtype=torch.float64, causal=True)
    case.options["key_mask"][0, :2] = torch.tensor([False, True])  # the first row of a causal order may see nothing
    given = [x.clone().requires_grad_() for x in (case.q, case.k)]
    level = case.run("reference")[2].clamp(min=-1).requires_grad_()

    def run(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None = None) -> Any:
        made = ops.received_attention(q, k, **case.options, lse=lse, return_max=True, return_lse=True)
        return made[:2] if lse is not None else made

    assert torch.autograd.gradcheck(lambda q, k: run(q, k)[:2], given)
    assert torch.autograd.gradcheck(run, [*given, level])


# Triton ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1, 1, 1), (2, 4, 2, 17, 63, 20), (1, 2, 1, 64, 65, 16), (1, 3, 1, 65, 130, 8)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_triton_is_the_reference(size: Any, causal: bool, masked: bool) -> None:
    Case(size, causal=causal, masked=masked).check()


def test_triton_is_the_reference_over_577_tokens() -> None:
    case = Case((1, 1, 1, 577, 577, 64), dtype=torch.bfloat16, masked=False)
    case.check()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 40), st.integers(0, 50),
                   st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    masked=st.booleans(),
    known=st.booleans(),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_triton_is_the_reference_whatever_is_given(
    size: tuple[int, ...], dtype: torch.dtype, causal: bool, masked: bool, known: bool, seed: int
) -> None:
    b, hkv, share, r, more, d = size
    case = Case((b, hkv * share, hkv, r, r + more, d), seed, dtype, causal, masked)
    case.check(**({"lse": case.run("reference")[2]} if known else {}))


def test_more_queries_than_keys_are_many_tiles_of_one_column_sum() -> None:
    Case((1, 2, 2, 150, 7, 8)).check()


@pytest.mark.parametrize("causal", [False, True])
def test_keys_split_over_programs_give_what_one_program_gives(causal: bool) -> None:
    case = Case((1, 4, 2, 40, 300, 8), causal=causal)
    case.options["key_mask"][:, 128:256] = False  # a split in which nothing is seen
    sums, best, lse = kernel.received_attention(case.q, case.k, **case.options, maxima=True, chunk=128)
    assert best is not None
    for found, expected in zip((sums, best, lse), case.run("reference"), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_views_with_any_strides_give_what_their_copies_give(backend: str) -> None:
    case = Case((2, 4, 2, 9, 30, 8), causal=True)
    case.options["lse"] = case.run()[2]
    whole = case.run(backend)
    case.q = case.q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    case.k = case.k.transpose(1, 2).repeat_interleave(2, -1).transpose(1, 2)[..., ::2]
    for name in ("key_mask", "query_mask"):
        case.options[name] = case.options[name].t().contiguous().t()
    case.options["lse"] = case.options["lse"].transpose(1, 2).contiguous().transpose(1, 2)
    assert case.k.stride(-1) == 2
    for found, expected in zip(case.run(backend), whole, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_see_nothing_add_nothing(backend: str) -> None:
    case = Case((2, 2, 2, 3, 5, 4), masked=False)
    before = case.run(backend)
    case.options["key_mask"] = torch.tensor([[False] * 5, [True] * 5])
    sums, best, lse = case.run(backend)
    assert bool((sums[0] == 0).all())
    assert bool((best[0] == 0).all())
    assert bool(lse[0].isneginf().all())
    for found, expected in zip((sums, best, lse), before, strict=True):
        assert torch.equal(found[1], expected[1])
    again = case.run(backend, lse=lse)
    assert bool((again[0][0] == 0).all())
    assert_close(again[0], sums)
    case.options["query_mask"] = torch.zeros(2, 3, dtype=torch.bool)
    assert bool((case.run(backend)[0] == 0).all())


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (3, 0), (0, 0)])
def test_no_rows_or_no_keys_give_zeros(backend: str, rows: int, keys: int) -> None:
    sums, best, lse = Case((2, 2, 1, rows, keys, 4)).run(backend)
    assert sums.shape == best.shape == (2, 2, keys)
    assert lse.shape == (2, 2, rows)
    assert not bool(sums.any())
    assert bool(lse.isneginf().all())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of masked keys, whose sums nobody reads
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sharpness", [1e4, -1e4])
def test_huge_logits_do_not_overflow(backend: str, sharpness: float) -> None:
    case = Case((1, 2, 1, 20, 33, 8), sharpness=sharpness, causal=True)
    exact = Case((1, 2, 1, 20, 33, 8), sharpness=sharpness, causal=True, dtype=torch.float64)
    exact.q, exact.k = case.q.double(), case.k.double()
    # fp32 carries logits of 1e4 to about 1e-3, and so their softmax.
    for found, expected in zip(case.run(backend), exact.run("reference"), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_one_batch_row_does_not_see_another() -> None:
    q, k, mask = draw(18, 3, 4, 130, 4), draw(19, 3, 2, 130, 4), some(20, 3, 130)
    together = ops.received_attention(q, k, scale=1.0, causal=True, key_mask=mask, query_mask=mask)
    for b in range(3):
        one = slice(b, b + 1)
        alone = ops.received_attention(q[one], k[one], scale=1.0, causal=True, key_mask=mask[one], query_mask=mask[one])
        torch.testing.assert_close(together[one], alone)


def test_two_runs_give_the_same_bits() -> None:
    case = Case((1, 2, 1, 65, 65, 8), dtype=torch.float16, causal=True)
    for once, again in zip(case.run(), case.run(), strict=True):
        assert torch.equal(once, again)


# Gradients ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rows_of_a_block", [2, 100])
def test_gradients_are_those_of_the_reference_in_fp64(
    causal: bool, known: bool, rows_of_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (2, 4, 2, 9, 14, 8)
    monkeypatch.setattr(kernel, "BLOCK", 2 * 4 * 14 * rows_of_a_block)
    found: list[list[torch.Tensor]] = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        case = Case(size, causal=causal, dtype=dtype)
        given = [case.q.requires_grad_(), case.k.requires_grad_()]
        if known:
            given.append(case.run("reference")[2].detach().requires_grad_())
        sums, lse = case.run(backend, return_max=False, **({"lse": given[2]} if known else {}))
        loss = (sums * draw(30, *sums.shape, dtype=dtype)).sum()
        if not known:
            loss = loss + (lse.clamp(min=-100) * draw(31, *lse.shape, dtype=dtype)).sum()
        found.append(list(torch.autograd.grad(loss, given)))
    for exact, approximate in zip(*found, strict=True):
        torch.testing.assert_close(approximate.double(), exact, rtol=1e-4, atol=1e-5)


def test_gradients_with_maxima_are_refused_where_triton_was_asked_for() -> None:
    case = Case((1, 2, 1, 3, 4, 8))
    case.q.requires_grad_()
    with pytest.raises(InputError, match="backend: the Triton kernel has no gradients"):
        case.run()
    with torch.no_grad():
        case.run()


# As an operator -------------------------------------------------------------------------------------------------------
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    case = Case((1, 2, 1, 5, 6, 4), causal=True)
    q, k, o = case.q.requires_grad_(), case.k.requires_grad_(), case.options
    lse = torch.zeros(1, 2, 5)
    for masks, level in (((o["key_mask"], o["query_mask"]), None), ((None, None), lse)):
        torch.library.opcheck(
            torch.ops.vlattn.received_attention, (q, k, 0.5, True, *masks, level, level is not None, 0)
        )
    back = (torch.ones(1, 2, 6), lse, q.detach(), k.detach(), lse, 0.5, True, None, None, False)
    torch.library.opcheck(torch.ops.vlattn.received_attention_backward, back)


def test_a_compiled_function_gives_what_it_gives_without_compilation() -> None:
    case = Case((1, 2, 1, 5, 9, 4), causal=True)

    def function(q: torch.Tensor) -> torch.Tensor:
        return ops.received_attention(2 * q, case.k, **case.options, backend="triton") + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(case.q), compiled(case.q))
    grads = []
    for f in (function, compiled):
        q = case.q.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(q).square().sum(), q)[0])
    assert torch.equal(*grads)


def test_the_flop_counter_counts_a_product_for_each_sweep() -> None:
    case = Case((2, 4, 2, 3, 9, 8))
    lse = case.run()[2]
    for options, products in (({}, 2), ({"lse": lse}, 1)):
        with FlopCounterMode(display=False) as counter:
            case.run(**options)
        assert counter.get_total_flops() == products * 2 * (2 * 4 * 3 * 9 * 8)


# What is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 2, 3), (1, 2, 3, 4), r"q and k: expected \[B, H, R, D\] and \[B, Hkv, N, D\], got \(1, 2, 3\)"),
        ((1, 2, 3, 4), (2, 2, 3, 4), "q and k: expected"),
        ((1, 4, 3, 4), (1, 3, 3, 4), "k: its 3 heads do not divide the 4 of q"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.received_attention(torch.zeros(q), torch.zeros(k), scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_mask": torch.ones(2, 3, 5, dtype=torch.bool)}, r"key_mask: got torch.bool \(2, 3, 5\); give bool"),
        (
            {"query_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"query_mask: got torch.bool \(2, 5\); give bool \(2, 3\)",
        ),
        ({"lse": torch.zeros(2, 3)}, r"lse: got torch.float32 \(2, 3\); give floating-point numbers \(2, 2, 3\)"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.received_attention(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 5, 4), scale=1.0, **options)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [(torch.float64, 4, "has no torch.float64"), (torch.float32, 300, "takes heads of at most 256 channels, not 300")],
)
def test_what_the_kernel_does_not_cover_is_refused_where_it_was_asked_for(
    dtype: torch.dtype, width: int, message: str
) -> None:
    x = torch.zeros(1, 1, 2, width, dtype=dtype)
    with pytest.raises(InputError, match=f"backend: the Triton kernel {message}; give backend='reference'"):
        ops.received_attention(x, x, scale=1.0, backend="triton")
