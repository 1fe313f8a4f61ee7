"""EP is the published formula in both forms, for every shape, dtype and way of differentiating."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlattn.errors import InputError
from vlattn.probing.poolers import ep_frozen
from vlattn.probing.poolers.ep import EP
from vlattn.probing.poolers.ep_frozen import _FrozenEP, frozen_ep


def ep(dim: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: object) -> EP:
    """An EP with queries large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    made = EP(dim, **settings)  # type: ignore[arg-type]
    nn.init.normal_(made.query)
    return made.to(dtype)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def naive(queries: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> list[float]:
    """One image in plain loops: queries [M, D], weight [D / d, D], x [N, D]."""
    m, dim = queries.shape
    width = len(weight) // m
    out = []
    for j in range(m):
        scores = [sum(float(a * b) for a, b in zip(queries[j], token, strict=True)) / math.sqrt(dim) for token in x]
        exps = [math.exp(score - max(scores)) for score in scores]
        for c in range(j * width, (j + 1) * width):
            values = [sum(float(a * b) for a, b in zip(weight[c], token, strict=True)) for token in x]
            out.append(sum(e * v for e, v in zip(exps, values, strict=True)) / sum(exps))
    return out


@pytest.mark.parametrize("form", ["direct", "reassociated"])
@pytest.mark.parametrize(("queries", "d"), [(4, 1), (1, 1), (3, 2), (6, 4), (12, 2)])
def test_ep_equals_plain_loops_over_queries_and_channels(form: str, queries: int, d: int) -> None:
    pool, x = ep(queries=queries, d=d, form=form), noise(2, 5, 24)
    expected = torch.tensor([naive(pool.query, pool.value.weight, image) for image in x], dtype=torch.float64)
    torch.testing.assert_close(pool(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("queries", "d"), [(8, 1), (32, 1), (64, 1), (32, 4)])
def test_both_forms_agree_in_fp32_and_so_do_their_gradients(queries: int, d: int) -> None:
    x = noise(3, 50, 768, dtype=torch.float32)
    results = []
    for form in ("direct", "reassociated"):
        pool = ep(768, queries=queries, d=d, form=form, dtype=torch.float32)
        out = pool(x)
        (out * noise(*out.shape, seed=2, dtype=torch.float32)).sum().backward()
        results.append((out.detach(), pool.query.grad, pool.value.weight.grad))
    for direct, reassociated in zip(*results, strict=True):
        torch.testing.assert_close(direct, reassociated, atol=1e-5, rtol=1e-4)


def test_every_image_has_the_feature_that_it_has_alone() -> None:
    pool, x = ep(queries=4), noise(7, 9, 24)
    torch.testing.assert_close(pool(x), torch.cat([pool(x[i : i + 1]) for i in range(7)]))


def test_gradients_summed_over_parts_of_the_batch_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, pull, direct = noise(7, 9, 24), noise(7, 24, seed=3), ep(queries=4, form="direct")
    expected = torch.autograd.grad((direct(x) * pull).sum(), [*direct.parameters()])
    for images in (1, 2, 3, 7, 100):
        monkeypatch.setattr(ep_frozen, "_PART", images * 4 * 24 * 8)
        assert len(ep_frozen._parts(noise(7, 4, 24))) == math.ceil(7 / images)
        pool = ep(queries=4)
        torch.testing.assert_close(torch.autograd.grad((pool(x) * pull).sum(), [*pool.parameters()]), expected)


def test_auto_takes_the_cheaper_form() -> None:
    for dim, queries, d in [(768, 8, 1), (768, 128, 1), (768, 64, 4), (768, 768, 1), (768, 96, 8), (24, 1, 24)]:
        auto = EP(dim, queries=queries, d=d)
        costs = {form: EP(dim, queries=queries, d=d, form=form).macs(196) for form in ("direct", "reassociated")}
        assert auto.direct == (queries >= dim / d)
        if not auto.direct:
            assert auto.macs(196) == min(costs.values())


@pytest.mark.parametrize(
    ("dim", "queries", "total"),
    [
        (768, 8, 1_364_968),
        (768, 16, 1_371_112),
        (768, 32, 1_383_400),
        (768, 64, 1_407_976),
        (1024, 32, 2_106_344),
        (512, 32, 791_528),
        (1152, 128, 2_627_560),
        (1664, 32, 4_487_144),
    ],
)
def test_parameters_with_a_thousand_way_classifier_are_as_published(dim: int, queries: int, total: int) -> None:
    pool = EP(dim, queries=queries)
    head = nn.Linear(pool.width, 1000)
    assert sum(p.numel() for p in [*pool.parameters(), *head.parameters()]) == total


@pytest.mark.parametrize(("queries", "d"), [(32, 1), (32, 2), (16, 8), (128, 3)])
def test_parameters_are_a_value_projection_and_the_queries(queries: int, d: int) -> None:
    pool = EP(768, queries=queries, d=d)
    assert pool.width == 768 // d
    assert sum(p.numel() for p in pool.parameters()) == 768**2 // d + queries * 768


@pytest.mark.parametrize(("queries", "mega"), [(8, 117.0), (16, 118.2), (32, 120.6), (64, 125.4)])
def test_the_direct_form_costs_what_the_table_says(queries: int, mega: float) -> None:
    assert round(EP(768, queries=queries, form="direct").macs(196) / 1e6, 1) == mega


def test_the_reassociated_form_costs_a_twelfth_of_it() -> None:
    assert round(EP(768, queries=32).macs(196) / 1e6, 1) == 10.2
    assert EP(768, queries=32, d=4, form="direct").macs(196) == 196 * 768**2 // 4 + 32 * 196 * 768 + 196 * 192


def test_the_queries_start_small_and_the_projection_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    pool = EP(768, queries=64)
    assert pool.query.std().item() == pytest.approx(0.02, rel=0.02)
    assert pool.query.abs().max() > 0.04 * 1.9  # a plain normal: its tails are not cut at two deviations
    assert pool.value.weight.abs().max().item() == pytest.approx(768**-0.5, rel=1e-3)


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_zero_queries_project_the_mean_token_whatever_their_number(form: str) -> None:
    x = noise(2, 7, 24)
    for queries in (1, 3, 8):
        pool = ep(queries=queries, form=form)
        nn.init.zeros_(pool.query)
        torch.testing.assert_close(pool(x), x.mean(1) @ pool.value.weight.T)
        torch.testing.assert_close(pool.attention(x), torch.full((2, queries, 7), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_identical_tokens_give_the_projected_token(form: str) -> None:
    pool, token = ep(queries=4, form=form), noise(3, 1, 24)
    torch.testing.assert_close(pool(token.expand(-1, 11, -1)), token[:, 0] @ pool.value.weight.T)


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_order_of_tokens_and_doubled_tokens_change_nothing(form: str) -> None:
    pool, x = ep(queries=4, form=form), noise(2, 9, 24)
    torch.testing.assert_close(pool(x[:, torch.randperm(9)]), pool(x))
    torch.testing.assert_close(pool(torch.cat([x, x], 1)), pool(x))


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_a_query_changes_its_own_slice_of_channels_alone(form: str) -> None:
    pool, x = ep(queries=4, d=2, form=form), noise(2, 9, 24)
    before = pool(x)
    with torch.no_grad():
        pool.query[2] += 1
    changed = (pool(x) - before).abs().amax(0) > 1e-9
    assert changed.tolist() == [6 <= channel < 9 for channel in range(12)]


def test_ep_with_folded_projections_is_multi_head_attention() -> None:
    """Heads with their own query and key projections see <W_K^T W_Q u, x>: one free query each."""
    torch.manual_seed(0)
    dim, heads, x = 24, 4, noise(3, 10, 24)
    library = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True).double()
    nn.init.eye_(library.out_proj.weight)
    u = noise(1, dim, seed=5) * 4
    expected, maps = library(u.expand(3, 1, -1), x, x, average_attn_weights=False)
    w_q, w_k, w_v = library.in_proj_weight.detach().unflatten(0, (3, heads, -1))  # [heads, D / heads, D] each
    pool = ep(dim, queries=heads)
    with torch.no_grad():
        for j in range(heads):
            pool.query[j] = math.sqrt(heads) * w_k[j].T @ (w_q[j] @ u[0])
        pool.value.weight.copy_(w_v.flatten(0, 1))
    torch.testing.assert_close(pool(x), expected[:, 0])
    torch.testing.assert_close(pool.attention(x), maps[:, :, 0])


def test_attention_maps_are_those_that_the_feature_is_made_of() -> None:
    pool, x = ep(queries=4), noise(2, 9, 24)
    maps = pool.attention(x)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert maps.min() >= 0
    assert maps.max() > 0.3
    values = (x @ pool.value.weight.T).unflatten(-1, (4, 6))
    torch.testing.assert_close(
        torch.stack([maps[:, j, None] @ values[:, :, j] for j in range(4)], 1)[:, :, 0].flatten(1), pool(x)
    )


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_queries_from_outside_take_the_place_of_the_learned_ones_and_get_gradients(form: str) -> None:
    pool, x = ep(queries=4, form=form), noise(3, 9, 24)
    torch.testing.assert_close(pool(x, pool.query.expand(3, -1, -1)), pool(x))
    outside = noise(3, 4, 24, seed=4).requires_grad_()
    out = pool(x, outside)
    for i in range(3):
        with torch.no_grad():
            pool.query.copy_(outside[i])
        torch.testing.assert_close(out[i], pool(x[i : i + 1])[0])
        torch.testing.assert_close(pool.attention(x, outside)[i], pool.attention(x)[i])
    out.sum().backward()
    assert outside.grad is not None
    assert outside.grad.abs().amin(-1).amin() >= 0
    assert (outside.grad.abs().sum(-1) > 0).all()
    assert pool.query.grad is None
    assert torch.autograd.gradcheck(lambda q: pool(x, q), [outside])


def test_the_gradients_of_frozen_tokens_are_the_numeric_ones() -> None:
    tokens, query = noise(3, 5, 6), noise(4, 6, seed=2).requires_grad_()
    slices = noise(4, 2, 6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, s: frozen_ep(tokens, q, s, 0.7), [query, slices])
    assert torch.autograd.gradcheck(lambda q: frozen_ep(tokens, q, slices.detach(), 0.7), [query])
    assert torch.autograd.gradcheck(lambda s: frozen_ep(tokens, query.detach(), s, 0.7), [slices])


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    tokens, query, slices = noise(3, 5, 6), noise(4, 6, seed=2).requires_grad_(), noise(4, 2, 6, seed=3)
    (first,) = torch.autograd.grad(frozen_ep(tokens, query, slices, 0.7).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_tokens_that_are_trained_get_the_numeric_gradient_and_frozen_ones_none(form: str) -> None:
    pool, x = ep(queries=4, form=form), noise(2, 3, 24)
    pool(x).sum().backward()
    assert x.grad is None
    frozen = pool.query.grad.clone()
    pool.query.grad = None
    pool(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(pool.query.grad, frozen)
    assert torch.autograd.gradcheck(pool, [x], fast_mode=True)


def test_tokens_need_not_be_contiguous() -> None:
    pool, x = ep(queries=4), noise(2, 10, 24)
    torch.testing.assert_close(pool(x[:, 1:]), pool(x[:, 1:].clone()))
    across = x.transpose(0, 1)
    torch.testing.assert_close(pool(across), pool(across.contiguous()))


@pytest.mark.parametrize("form", ["direct", "reassociated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_full_one(form: str, dtype: torch.dtype) -> None:
    pool, x = ep(queries=4, form=form), noise(2, 9, 24)
    low = ep(queries=4, form=form, dtype=dtype)
    out = low(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), pool(x), atol=0.03, rtol=0.03)
    out.float().square().sum().backward()
    pool(x).square().sum().backward()
    assert low.query.grad.dtype == dtype
    torch.testing.assert_close(low.query.grad.double(), pool.query.grad, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_under_autocast_products_are_half_and_the_softmax_is_not(form: str) -> None:
    pool, x = ep(queries=4, form=form, dtype=torch.float32), noise(2, 300, 24, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, maps = pool(x), pool.attention(x)
    assert out.dtype == torch.bfloat16
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4), atol=1e-6, rtol=0)  # bf16 rounds each to 3 digits
    torch.testing.assert_close(out.float(), pool(x), atol=0.03, rtol=0.03)
    out.float().sum().backward()
    assert pool.query.grad.dtype == torch.float32


def test_the_weights_kept_for_backward_are_in_fp32_beside_tokens_in_half_precision() -> None:
    tokens, query, slices = (noise(*shape, dtype=torch.bfloat16) for shape in [(2, 9, 6), (4, 6), (4, 2, 6)])
    feature, weights, sums = _FrozenEP.apply(tokens, query, slices, 0.7)
    assert (feature.dtype, weights.dtype, sums.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_several_heads_under_vmap_equal_each_alone_and_so_do_their_gradients() -> None:
    pools, x = [ep(queries=4, d=2, seed=seed) for seed in range(3)], noise(5, 9, 24)
    params, buffers = stack_module_state(pools)  # type: ignore[arg-type]
    outs = vmap(lambda p, b: functional_call(pools[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(outs, torch.stack([pool(x) for pool in pools]))
    outs.square().sum().backward()
    torch.stack([pool(x) for pool in pools]).square().sum().backward()
    for name, stacked in params.items():
        torch.testing.assert_close(stacked.grad, torch.stack([pool.get_parameter(name).grad for pool in pools]))

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(pools[0], p, (x,)).square().sum()

    inner = vmap(grad(loss))({name: value.detach() for name, value in params.items()})
    for name, stacked in params.items():
        torch.testing.assert_close(inner[name], stacked.grad)


@pytest.mark.parametrize("batched", ["t", "q", "s", "tq", "ts", "qs", "tqs"])
def test_vmap_over_any_of_tokens_queries_and_projections_equals_a_loop(batched: str) -> None:
    given = {"t": noise(3, 2, 5, 6), "q": noise(3, 4, 6, seed=2), "s": noise(3, 4, 2, 6, seed=3)}
    args = [value if name in batched else value[0] for name, value in given.items()]
    dims = tuple(0 if name in batched else None for name in given)
    found = vmap(lambda t, q, s: frozen_ep(t, q, s, 0.7), in_dims=dims)(*args)
    for i in range(3):
        alone = [value[i if name in batched else 0] for name, value in given.items()]
        torch.testing.assert_close(found[i], frozen_ep(*alone, 0.7))
    moved = [value.movedim(0, -1) if name in batched else value[0] for name, value in given.items()]
    last = tuple(-1 if name in batched else None for name in given)
    torch.testing.assert_close(vmap(lambda t, q, s: frozen_ep(t, q, s, 0.7), in_dims=last)(*moved), found)


def test_a_step_makes_nothing_as_large_as_the_tokens_and_no_zeros() -> None:
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend((func.__name__, one) for one in tree_leaves(out) if isinstance(one, torch.Tensor))
            return out

    pool, x = ep(queries=4), noise(8, 50, 24)
    with Watch():
        pool(x).sum().backward()
    new = {name: out.numel() for name, out in made if out.untyped_storage().data_ptr() != x.data_ptr()}
    assert max(new.values()) == 8 * 50 * 4  # scores, where tokens are 8 * 50 * 24
    assert max(out.numel() for name, out in made if "zeros" in name) == 4 * 24  # where the queries' gradient is summed


def test_one_image_one_token_and_no_image_keep_their_shape() -> None:
    pool = ep(queries=4, d=2)
    assert pool(noise(1, 9, 24)).shape == (1, 12)
    assert pool(noise(2, 1, 24)).shape == (2, 12)
    nothing = pool(noise(0, 9, 24))
    assert nothing.shape == (0, 12)
    nothing.sum().backward()
    assert torch.equal(pool.query.grad, torch.zeros_like(pool.query))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 768, "d": 5}, "d: got 5, which does not divide dim=768"),
        ({"dim": 768, "queries": 10}, "queries: got 10, which does not divide dim / d=768"),
        ({"dim": 768, "queries": 512, "d": 2}, "queries: got 512, which does not divide dim / d=384"),
        ({"dim": 768, "queries": 0}, "queries: got 0; give an integer of at least 1"),
        ({"dim": 768, "queries": 8.0}, "queries: got 8.0"),
        ({"dim": 768, "d": True}, "d: got True"),
        ({"dim": 0}, "dim: got 0"),
        ({"dim": 768, "form": "fast"}, "form: got 'fast'; give 'auto' or 'direct' or 'reassociated'"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_numbers(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EP(**settings)  # type: ignore[arg-type]


def test_queries_from_outside_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"query: got shape \[2, 5, 24\]; give \[2, 4, 24\]"):
        ep(queries=4)(noise(2, 9, 24), noise(2, 5, 24))
