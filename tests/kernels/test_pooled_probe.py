"""Pooled tokens equal a loop over queries and tokens, and their gradients those in fp64, on both backends."""

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
from vlattn.kernels import pooled_probe as kernel
from vlattn.kernels import pooled_sizes
from vlattn.probing.head import make_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.poolers import base as pooler_base
from vlattn.probing.poolers import ep as ep_module
from vlattn.probing.poolers.aim import AIM
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.ep import EP
from vlattn.probing.poolers.mhca import MHCA
from vlattn.probing.poolers.simpool import ESimPool, SimPool

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error over the largest value."""


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.66


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Loops over images, heads and queries in fp64; q [B, H, M, D], k and v [B, Hkv, N, D]."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        seen = list(range(k.shape[2])) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for m in range(q.shape[2]):
                logits = [scale * float(q[b, h, m].double() @ k[b, g, n].double()) for n in seen]
                weights = [math.exp(x - max(logits)) for x in logits]
                for n, w in zip(seen, weights, strict=True):
                    out[b, h, m] += w / sum(weights) * v[b, g, n].double()
    return out


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert bool(found.isfinite().all())
    error = (found.double() - expected.double()).abs().max()
    assert float(error) <= TOLERANCE[dtype] * max(float(expected.abs().max()), 1e-3), float(error)


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, pull: torch.Tensor, **how: Any
) -> tuple[torch.Tensor, ...]:
    """The pool, and the gradients of all that it was made of."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v) if x is not None]
    out = ops.pooled_probe(*inputs, **how)
    return out.detach(), *torch.autograd.grad((out * pull.to(out.dtype)).sum(), inputs)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(
    ("queries", "tokens", "width", "heads", "kv_heads"), [(1, 1, 1, 1, 1), (3, 17, 20, 4, 2), (2, 33, 70, 3, 1)]
)
def test_pools_equal_loops_over_queries_and_tokens(
    queries: int, tokens: int, width: int, heads: int, kv_heads: int, values: bool, backend: ops.Backend
) -> None:
    q, k = draw(1, 2, heads, queries, width), draw(2, 2, kv_heads, tokens, width)
    v = draw(3, 2, kv_heads, tokens, width) if values else None
    mask = some(4, 2, tokens)
    mask[0] = False
    for seen in (None, mask):
        found = ops.pooled_probe(q, k, v, scale=0.4, key_mask=seen, backend=backend)
        assert_near(found, naive(q, k, k if v is None else v, 0.4, seen), torch.float32)
        shared = ops.pooled_probe(q[1], k, v, scale=0.4, key_mask=seen, backend=backend)
        assert_near(shared, naive(q[1:].expand_as(q), k, k if v is None else v, 0.4, seen), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "queries", "tokens", "width", "own"),
    [(1, 1, 1, 1, False), (2, 3, 17, 20, True), (2, 17, 63, 64, False), (1, 33, 65, 130, False), (1, 2, 64, 130, True)],
)
def test_triton_and_its_gradients_agree_with_fp64(
    batch: int, queries: int, tokens: int, width: int, own: bool, dtype: torch.dtype
) -> None:
    q, k = draw(5, queries, width, dtype=dtype), draw(6, batch, tokens, width, dtype=dtype)
    v = draw(7, batch, tokens, width, dtype=dtype) if own else None
    pull, scale = draw(8, batch, queries, width, dtype=dtype), width**-0.5
    found = gradients(q, k, v, pull, scale=scale, backend="triton")
    exact = [x if x is None else x.double() for x in (q, k, v)]
    expected = gradients(*exact, pull.double(), scale=scale)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, dtype)


@pytest.mark.parametrize(("width", "dtype"), [(768, torch.bfloat16), (1024, torch.float32), (384, torch.float32)])
def test_tokens_as_wide_as_a_model_are_pooled(width: int, dtype: torch.dtype) -> None:
    q, k, pull = draw(9, 5, width, dtype=dtype), draw(10, 1, 20, width, dtype=dtype), draw(11, 1, 5, width)
    found = gradients(q, k, None, pull, scale=width**-0.5, backend="triton")
    expected = gradients(q.double(), k.double(), None, pull.double(), scale=width**-0.5)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, dtype)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_heads_masks_and_queries_of_each_image_agree_with_fp64(data: st.DataObject) -> None:
    batch, queries, tokens, width, kv_heads, share = (data.draw(st.integers(1, most)) for most in (2, 4, 34, 20, 2, 2))
    each, own, masked = (data.draw(st.booleans()) for _ in range(3))
    heads = kv_heads * share
    q = draw(12, *((batch,) if each else ()), heads, queries, width)
    k = draw(13, batch, kv_heads, tokens, width)
    v = draw(14, batch, kv_heads, tokens, width) if own else None
    pull, mask = draw(15, batch, heads, queries, width), some(16, batch, tokens) if masked else None
    found = gradients(q, k, v, pull, scale=0.5, key_mask=mask, backend="triton")
    exact = [x if x is None else x.double() for x in (q, k, v)]
    expected = gradients(*exact, pull.double(), scale=0.5, key_mask=mask)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert_near(a, b, torch.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_splits_and_groups_of_images_change_nothing_but_rounding(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, pull = draw(17, 2, 20), draw(18, 3, 577, 20), draw(19, 3, 2, 20)
    mask = some(20, 3, 577) if masked else None
    if mask is not None:
        mask[0], mask[1, :300] = False, False  # no token at all; none in the first split
    exact = gradients(q.double(), k.double(), None, pull.double(), scale=0.3, key_mask=mask)
    for cores in (2, 12):  # two images to a program; splits of 256 tokens
        monkeypatch.setattr(kernel, "_cores", lambda device, cores=cores: cores)
        found = gradients(q, k, None, pull, scale=0.3, key_mask=mask, backend="triton")
        for a, b in zip(found, exact, strict=True):
            assert_near(a, b, torch.float32)


def test_the_same_inputs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_cores", lambda device: 4)
    inputs = draw(44, 2, 20), draw(45, 1, 300, 20), None, draw(46, 1, 2, 20)
    first = gradients(*inputs, scale=0.3, backend="triton")
    for a, b in zip(first, gradients(*inputs, scale=0.3, backend="triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_huge_logits_pick_one_token_and_stay_finite(backend: ops.Backend) -> None:
    k = draw(21, 1, 33, 16)
    q = k[0, 7:8] * 1e4
    out, q_grad, k_grad = gradients(q, k, None, draw(22, 1, 1, 16), scale=1.0, backend=backend)
    best = int((k[0] @ q[0]).argmax())
    torch.testing.assert_close(out[0, 0], k[0, best])
    assert bool(q_grad.isfinite().all())
    assert bool(k_grad.isfinite().all())


def test_an_image_without_a_token_gives_zeros_and_no_gradient() -> None:
    q, k, mask = draw(23, 3, 8), draw(24, 2, 5, 8), torch.tensor([[False] * 5, [True] * 5])
    pull = draw(25, 2, 3, 8)
    found = gradients(q, k, None, pull, scale=1.0, key_mask=mask, backend="triton")
    alone = gradients(q, k[1:], None, pull[1:], scale=1.0, backend="triton")
    assert bool((found[0][0] == 0).all())
    assert bool((found[2][0] == 0).all())
    torch.testing.assert_close(found[0][1:], alone[0])
    torch.testing.assert_close(found[1], alone[1])


def test_strided_views_give_what_their_copies_give() -> None:
    q, k = draw(26, 16, 4).t(), draw(27, 33, 2, 32)[..., ::2].transpose(0, 1)  # [4, 16], [2, 33, 16]
    pull = draw(28, 2, 16, 4).mT
    found = gradients(q, k, None, pull, scale=0.5, backend="triton")
    copies = gradients(q.contiguous(), k.contiguous(), None, pull.contiguous(), scale=0.5, backend="triton")
    for a, b in zip(found, copies, strict=True):
        assert torch.equal(a, b)


def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    for key, tuned in kernel._TUNED.items():

        def run(*args: Any, name: str = key[0], original: Any = tuned, **constants: Any) -> None:
            started.append(name)
            original(*args, **constants)

        monkeypatch.setitem(kernel._TUNED, key, _Watched(run, tuned))
    q, k = draw(29, 2, 8).requires_grad_(), draw(30, 1, 5, 8)
    ops.pooled_probe(q, k, scale=1.0, backend="triton").sum().backward()
    assert started == ["forward", "backward_query"]
    started.clear()
    ops.pooled_probe(q.detach(), k.requires_grad_(), scale=1.0, backend="triton").sum().backward()
    assert started == ["forward", "backward_tokens"]


class _Watched:
    def __init__(self, run: Any, tuned: Any) -> None:
        self._run, self.configs = run, tuned.configs

    def __call__(self, *args: Any, **constants: Any) -> None:
        self._run(*args, **constants)


def test_vmap_over_sets_of_queries_is_one_call_with_all_of_them() -> None:
    q, k = draw(31, 3, 2, 8), draw(32, 2, 17, 8)

    def pool(one: torch.Tensor) -> torch.Tensor:
        return ops.pooled_probe(one, k, scale=0.5, backend="triton")

    found = torch.func.vmap(pool)(q)
    torch.testing.assert_close(found, torch.stack([pool(one) for one in q]))
    each = torch.func.vmap(lambda one, x: ops.pooled_probe(one, x[None], scale=0.5, backend="triton"))(q[:2], k)
    torch.testing.assert_close(each, torch.stack([pool(q[i])[i : i + 1] for i in range(2)]))


def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poolers as they run on a GPU."""
    original = ops.pooled_probe

    def covered(key: torch.Tensor, value: torch.Tensor | None = None) -> bool:
        return pooled_sizes.unsupported(key, value) is None

    monkeypatch.setattr(ep_module, "on_kernel", covered)
    monkeypatch.setattr(pooler_base, "on_kernel", covered)
    monkeypatch.setattr(ops, "pooled_probe", lambda *a, **k: original(*a, **k, backend="triton"))


def test_efficient_probing_on_the_kernel_has_the_features_and_gradients_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    pool, tokens, pull = EP(24, queries=4), draw(33, 2, 17, 24), draw(34, 2, 24)
    expected = (pool(tokens), *torch.autograd.grad((pool(tokens) * pull).sum(), [*pool.parameters()]))
    through_triton(monkeypatch)
    found = (pool(tokens), *torch.autograd.grad((pool(tokens) * pull).sum(), [*pool.parameters()]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    own = pool.query.detach().expand(2, -1, -1)
    torch.testing.assert_close(pool(tokens, own), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pool",
    [MHCA(24, heads=4), AIM(24, heads=4, queries=2), SimPool(24), ESimPool(24, heads=2)],
    ids=lambda pool: type(pool).__name__,
)
def test_other_poolers_on_the_kernel_have_the_features_and_gradients_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, pool: Pooler
) -> None:
    tokens, pull = draw(33, 2, 17, 24).requires_grad_(), draw(34, 2, 24)
    wanted = [tokens, *pool.parameters()]
    expected = (pool(tokens), *torch.autograd.grad((pool(tokens) * pull).sum(), wanted))
    through_triton(monkeypatch)
    found = (pool(tokens), *torch.autograd.grad((pool(tokens) * pull).sum(), wanted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ep:queries=4", "mhca:heads=4"])
def test_a_bank_of_heads_on_the_kernel_trains_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bank, tokens = HeadBank(make_head(name, 24, 5, seed=0), 3), draw(35, 2, 9, 24)
    bank.eval()
    with torch.no_grad():
        query = bank.stacked.pooler.query
        query.add_(draw(36, *query.shape))
    weights = [*bank.stacked.pooler.parameters()]
    expected = (bank(tokens), *torch.autograd.grad(bank(tokens).square().sum(), weights))
    through_triton(monkeypatch)
    found = (bank(tokens), *torch.autograd.grad(bank(tokens).square().sum(), weights))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiled_function_is_one_graph_with_the_same_gradients() -> None:
    def pool(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ops.pooled_probe(q, k, scale=0.5, backend="triton") * 2

    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    results = []
    for function in (pool, compiled):
        q, k = draw(37, 3, 8).requires_grad_(), draw(38, 2, 9, 8).requires_grad_()
        out = function(q, k)
        results.append((out, *torch.autograd.grad(out.square().sum(), [q, k])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_are_registered_as_pytorch_wants_them() -> None:
    q, k = draw(39, 1, 2, 3, 8).requires_grad_(), draw(40, 2, 2, 9, 8).requires_grad_()
    torch.library.opcheck(torch.ops.vlattn.pooled_probe, (q, k, None, None, 0.5))
    torch.library.opcheck(torch.ops.vlattn.pooled_probe, (q, k, k.detach() * 2, some(41, 2, 9), 0.5))
    q, k = q.detach(), k.detach()
    out, lse = torch.ops.vlattn.pooled_probe(q, k, None, None, 0.5)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.vlattn.pooled_probe_backward, (out, q, k, None, None, lse, lse.clone(), 0.5, *wanted)
        )


def test_two_products_are_counted_forward_and_three_for_the_gradient_of_the_queries() -> None:
    q, k = draw(42, 3, 8).requires_grad_(), draw(43, 2, 9, 8)
    one = 2 * 2 * 3 * 9 * 8  # of images, queries, tokens, channels
    with FlopCounterMode(display=False) as counter:
        out = ops.pooled_probe(q, k, scale=0.5, backend="triton")
    assert counter.get_total_flops() == 2 * one
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * one


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 8), (9, 8)), "query and key: got query"),
        (((3, 8), (2, 9, 7)), "query and key: got query"),
        (((3, 8), (2, 2, 9, 8)), "query and key: got query"),
        (((3, 4, 8), (2, 9, 8)), "query: got query .* give queries of each image"),
        (((3, 8), (2, 0, 8)), "key: got .* give at least one token"),
        (((3, 4, 8), (2, 2, 9, 8)), "key: its 2 heads do not divide the 3"),
        (((3, 8), (2, 9, 8), (2, 9, 7)), "value: got torch.float32"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.pooled_probe(*(torch.zeros(shape) for shape in shapes), scale=1.0)


def test_dtypes_masks_and_widths_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(3, 8), torch.zeros(2, 9, 8)
    with pytest.raises(InputError, match=r"query and key: got torch.float64 and torch.float32"):
        ops.pooled_probe(q.double(), k, scale=1.0)
    with pytest.raises(InputError, match=r"query and key: got torch.int64 and torch.int64"):
        ops.pooled_probe(q.long(), k.long(), scale=1.0)
    with pytest.raises(InputError, match=r"key_mask: got torch.bool \(9,\); give bool \(2, 9\)"):
        ops.pooled_probe(q, k, scale=1.0, key_mask=torch.ones(9, dtype=torch.bool))
    with pytest.raises(InputError, match=r"the Triton kernel has no torch.float64; give backend='reference'"):
        ops.pooled_probe(q.double(), k.double(), scale=1.0, backend="triton")
    with pytest.raises(InputError, match="takes tokens of at most 1024 channels, not 1025"):
        ops.pooled_probe(torch.zeros(1, 1025), torch.zeros(1, 2, 1025), scale=1.0, backend="triton")
    wide = torch.zeros(1, 2, 300)
    with pytest.raises(InputError, match="takes values of at most 256 channels, not 300"):
        ops.pooled_probe(torch.zeros(1, 300), wide, wide, scale=1.0, backend="triton")
