"""Linear probes, MHCA, AIM, SimPool, eSimPool, AbMILP, GeM, LSE and GMP are the published formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.poolers.abmilp import AbMILP, sincos_2d
from vlattn.probing.poolers.aim import AIM
from vlattn.probing.poolers.base import Pooler, attention_maps
from vlattn.probing.poolers.ep import EP
from vlattn.probing.poolers.gem import GMP, LSE, GeM
from vlattn.probing.poolers.linear import CLS, GAP
from vlattn.probing.poolers.mhca import MHCA
from vlattn.probing.poolers.simpool import ESimPool, SimPool

DIM = 24
POOLERS: dict[str, tuple[type[Pooler], dict[str, Any]]] = {
    "gap": (GAP, {}),
    "ep": (EP, {"queries": 4}),
    "ep narrow": (EP, {"queries": 4, "d": 3}),
    "ep direct": (EP, {"queries": 4, "form": "direct"}),
    "mhca": (MHCA, {"heads": 4}),
    "mhca full": (MHCA, {"heads": 4, "q_proj": True, "out_proj": True, "bias": True}),
    "aim": (AIM, {"heads": 4}),
    "aim 3": (AIM, {"heads": 4, "queries": 3}),
    "simpool": (SimPool, {}),
    "simpool gamma": (SimPool, {"gamma": 1.25, "beta": True}),
    "esimpool": (ESimPool, {}),
    "esimpool gamma": (ESimPool, {"gamma": 2.0}),
    "abmilp": (AbMILP, {}),
    "abmilp map": (AbMILP, {"self_attention": "map", "activation": "relu", "depth": 3}),
    "abmilp none": (AbMILP, {"self_attention": "none"}),
    "abmilp patch": (AbMILP, {"content": "patch"}),
    "gem": (GeM, {}),
    "lse": (LSE, {}),
    "gmp": (GMP, {}),
}
WITH_MAPS = [name for name in POOLERS if name.split()[0] in ("ep", "mhca", "aim", "simpool", "esimpool", "abmilp")]


def make(name: str, dtype: torch.dtype = torch.float64) -> Pooler:
    """A pooler in eval mode, its parameters large enough that attention is far from uniform."""
    torch.manual_seed(0)
    cls, settings = POOLERS[name]
    pool = cls(DIM, **settings)
    for key, value in pool.named_parameters():
        if key in ("query", "norm.weight", "norm.bias", "beta"):
            nn.init.normal_(value)
        elif key.startswith(("query.", "key.", "qkv.", "predictor.")):
            value.data *= 4
    if isinstance(pool, AIM):
        pool.norm.running_mean.normal_()
        pool.norm.running_var.uniform_(0.5, 2)
    return pool.to(dtype).eval()


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def softmax(scores: list[float]) -> list[float]:
    exps = [math.exp(score - max(scores)) for score in scores]
    return [e / sum(exps) for e in exps]


def layer_norm(pool: Any, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * pool.norm.weight + pool.norm.bias


@torch.no_grad()
def gather(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int) -> torch.Tensor:
    """One image, one query, in loops over heads and tokens: [D], [N, D], [N, D] to [D]."""
    size = len(query) // heads
    out = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        weights = softmax([float(query[own] @ key[own]) / math.sqrt(size) for key in keys])
        out.append(sum(w * value[own] for w, value in zip(weights, values, strict=True)))
    return torch.cat(out)  # type: ignore[arg-type]


# What every pooler keeps


@pytest.mark.parametrize("name", POOLERS)
def test_features_have_the_width_for_any_number_of_images_and_tokens(name: str) -> None:
    pool = make(name)
    for batch, count in [(1, 9), (3, 2), (2, 50)]:
        out = pool(noise(batch, count, DIM))
        assert out.shape == (batch, pool.width)
        assert out.isfinite().all()
    assert pool.width == (DIM // 3 if name == "ep narrow" else DIM)


@pytest.mark.parametrize("name", POOLERS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(name: str) -> None:
    pool, x = make(name), noise(4, 9, DIM)
    torch.testing.assert_close(torch.cat([pool(x[i : i + 1]) for i in range(4)]), pool(x))


@pytest.mark.parametrize("name", POOLERS)
def test_the_order_of_tokens_changes_nothing(name: str) -> None:
    pool, x = make(name), noise(2, 9, DIM)
    order = torch.tensor([0, 4, 8, 1, 7, 2, 6, 3, 5])  # CLS, where there is one, stays in front
    torch.testing.assert_close(pool(x[:, order]), pool(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", POOLERS)
def test_fp32_and_half_precision_stay_near_fp64(name: str) -> None:
    x = noise(3, 9, DIM)
    expected = make(name)(x)
    torch.testing.assert_close(make(name, torch.float32)(x.float()).double(), expected, atol=1e-4, rtol=1e-4)
    low = make(name, torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", POOLERS)
def test_under_autocast_products_give_half_precision_near_the_full_one(name: str) -> None:
    pool, x = make(name, torch.float32), noise(3, 9, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = pool(x)
    assert out.dtype == (torch.bfloat16 if name in WITH_MAPS else torch.float32)
    full = pool(x)
    assert (out.float() - full).abs().max() < 0.1 * full.abs().max()
    if name != "gap":
        out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in pool.parameters())


@pytest.mark.parametrize("name", POOLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_stored_in_half_precision_go_in_under_autocast(name: str, dtype: torch.dtype) -> None:
    pool, x = make(name, torch.float32), noise(3, 9, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, maps = pool(x.to(dtype)), pool.attention(x.to(dtype))
    full = pool(x)
    assert (out.float() - full).abs().max() < 0.1 * full.abs().max()
    assert maps is None or maps.dtype == torch.float32
    if name != "gap":
        out.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in pool.parameters())


@pytest.mark.parametrize("name", WITH_MAPS)
def test_maps_are_distributions_over_tokens_in_fp32(name: str) -> None:
    pool, x = make(name, torch.float32), noise(2, 300, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        maps = pool.attention(x)
    assert maps.dtype == torch.float32
    assert maps.shape[::2] == (2, 300)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]), atol=1e-5, rtol=0)
    assert make(name).attention(noise(2, 9, DIM)).dtype == torch.float64


def test_poolers_without_attention_have_no_maps() -> None:
    for name in sorted(POOLERS.keys() - set(WITH_MAPS)):
        assert make(name).attention(noise(2, 9, DIM)) is None


@pytest.mark.parametrize("name", sorted(POOLERS.keys() - {"gap"}))
def test_all_parameters_learn_and_frozen_tokens_do_not(name: str) -> None:
    pool, x = make(name), noise(3, 9, DIM)
    (pool(x) * noise(3, pool.width, seed=2)).sum().backward()
    assert x.grad is None
    for key, value in pool.named_parameters():
        if key in ("proj.bias", "predictor.2.bias") or key.endswith("predictor.4.bias"):
            continue  # a constant added to all scores, or to all tokens before a weighted mean
        assert value.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", POOLERS)
def test_gradients_reach_tokens_that_are_trained(name: str) -> None:
    pool, x = make(name), noise(1, 3, DIM).requires_grad_()
    assert torch.autograd.gradcheck(pool, [x], fast_mode=True)


@pytest.mark.parametrize("name", POOLERS)
def test_saved_and_loaded_a_pooler_gives_the_same(name: str) -> None:
    pool, x = make(name), noise(2, 9, DIM)
    cls, settings = POOLERS[name]
    other = cls(DIM, **settings).double().eval()
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other(x), pool(x))


@pytest.mark.parametrize("name", POOLERS)
def test_what_is_no_batch_of_tokens_is_refused_with_its_numbers(name: str) -> None:
    pool = make(name)
    for shape in [(2, 9, 23), (9, DIM), (2, 0, DIM), (2, DIM, 3, 3)]:
        with pytest.raises(InputError, match=rf"tokens: got shape \[{', '.join(map(str, shape))}\]; give \[B, N, 24\]"):
            pool(noise(*shape))
    with pytest.raises(InputError, match=r"tokens: got torch\.int64"):
        pool(torch.ones(2, 9, DIM, dtype=torch.int64))
    if name != "gap":
        with pytest.raises(InputError, match=r"tokens: got torch\.float32 for a pooler in torch\.float64"):
            pool(noise(2, 9, DIM).float())


@pytest.mark.parametrize(
    ("pool", "parameters", "mega"),
    [
        (CLS(768), 0, 0.0),
        (GAP(768), 0, 0.2),
        (EP(768, form="direct"), 614_400, 120.6),
        (MHCA(768), 2 * 768**2 + 768, 231.5),
        (MHCA(768, q_proj=True, out_proj=True, bias=True), 4 * 768**2 + 5 * 768, 232.7),
        (AIM(768), 1_180_416, 231.5),
        (SimPool(768), 1_181_184, 116.5),
        (SimPool(768, gamma=1.25, beta=True), 1_181_185, 116.5),
        (ESimPool(768), 1_536, 0.3),
        (AbMILP(768), 2_951_425, 637.3),
        (AbMILP(768, self_attention="map"), 2_951_425, 637.3),
        (AbMILP(768, self_attention="none"), 591_361, 115.9),
        (AbMILP(768, self_attention="none", depth=3), 591_361 + 768**2 + 768, 231.5),
        (GeM(768), 1, 0.2),
        (LSE(768), 1, 0.2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pooler) else str(value),
)
def test_parameters_and_costs_are_those_of_the_table(pool: Pooler, parameters: int, mega: float) -> None:
    assert sum(p.numel() for p in pool.parameters() if p.requires_grad) == parameters
    assert round(pool.macs(196) / 1e6, 1) == mega


def test_the_benchmark_sets_the_heads() -> None:
    assert (MHCA(48).heads, AIM(48).heads, SimPool(48).heads, ESimPool(48).heads) == (16, 16, 1, 12)


# What each pooler computes


def test_linear_probes_are_the_cls_token_and_the_mean() -> None:
    x = noise(2, 9, DIM)
    assert torch.equal(CLS(DIM)(x[:, :1]), x[:, 0])
    np.testing.assert_allclose(GAP(DIM)(x), x.numpy().mean(1), atol=1e-12)


def test_cls_refuses_to_guess_which_of_several_tokens_it_is() -> None:
    with pytest.raises(InputError, match="tokens: got 9 tokens an image; give the CLS token alone"):
        CLS(DIM)(noise(2, 9, DIM))


@pytest.mark.parametrize("bias", [False, True])
def test_mhca_with_all_projections_is_torchs_multi_head_attention(bias: bool) -> None:
    pool, x = MHCA(DIM, heads=4, q_proj=True, out_proj=True, bias=bias).double(), noise(3, 9, DIM)
    library = nn.MultiheadAttention(DIM, 4, bias=bias, batch_first=True).double()
    with torch.no_grad():
        pool.query.normal_()
        library.in_proj_weight.copy_(torch.cat([pool.q_proj.weight, pool.key.weight, pool.value.weight]))
        library.out_proj.weight.copy_(pool.out_proj.weight)
        if bias:
            library.in_proj_bias.copy_(torch.cat([pool.q_proj.bias, pool.key.bias, pool.value.bias]))
            library.out_proj.bias.copy_(pool.out_proj.bias)
    out, maps = library(pool.query.expand(3, 1, -1), x, x, average_attn_weights=False)
    torch.testing.assert_close(pool(x), out[:, 0])
    torch.testing.assert_close(pool.attention(x), maps[:, :, 0])


def test_mhca_is_a_loop_over_heads() -> None:
    pool, x = make("mhca"), noise(2, 9, DIM)
    expected = [gather(pool.query[0], image @ pool.key.weight.T, image @ pool.value.weight.T, 4) for image in x]
    torch.testing.assert_close(pool(x), torch.stack(expected))


@pytest.mark.parametrize("training", [True, False])
def test_aim_normalises_over_images_and_tokens_and_averages_its_queries(training: bool) -> None:
    pool, x = make("aim 3").train(training), noise(4, 9, DIM) * 3 + 1
    mean, var = pool.norm.running_mean.clone(), pool.norm.running_var.clone()
    if training:
        mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    normed = (x - mean) / (var + 1e-6).sqrt()
    keys, values = normed @ pool.key.weight.T, normed @ pool.value.weight.T
    expected = [sum(gather(query, k, v, 4) for query in pool.query) / 3 for k, v in zip(keys, values, strict=True)]
    maps = pool.attention(x)
    torch.testing.assert_close(pool(x), torch.stack(expected))
    by_head = [maps[:, h, None] @ values[:, :, h * 6 : h * 6 + 6] for h in range(4)]
    torch.testing.assert_close(torch.cat(by_head, -1)[:, 0], torch.stack(expected))


def test_aim_keeps_running_statistics_for_evaluation_and_maps_leave_them_alone() -> None:
    pool, x = AIM(DIM, heads=4).double(), noise(4, 9, DIM) * 3 + 1
    pool.attention(x)
    assert torch.equal(pool.norm.running_mean, torch.zeros(DIM, dtype=torch.float64))
    pool(x)
    torch.testing.assert_close(pool.norm.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(pool.norm.running_var, 0.9 + 0.1 * x.var((0, 1)))
    assert not torch.allclose(pool(x), pool.eval()(x))


def test_simpool_looks_from_the_raw_mean_and_gathers_normed_tokens() -> None:
    pool, x = make("simpool"), noise(2, 9, DIM) + 0.5
    normed = layer_norm(pool, x)
    expected = [
        gather(pool.query.weight @ image.mean(0), n @ pool.key.weight.T, n, 1)
        for image, n in zip(x, normed, strict=True)
    ]
    torch.testing.assert_close(pool(x), torch.stack(expected))
    torch.testing.assert_close((pool.attention(x) @ normed)[:, 0], pool(x))


def test_esimpool_looks_from_the_normed_mean_and_gathers_raw_tokens() -> None:
    pool, x = make("esimpool"), noise(2, 9, DIM) + 0.5
    expected = [gather(layer_norm(pool, image.mean(0)), layer_norm(pool, image), image, 12) for image in x]
    torch.testing.assert_close(pool(x), torch.stack(expected))
    maps = pool.attention(x)
    assert maps.shape == (2, 12, 9)
    by_head = [maps[:, h, None] @ x[:, :, 2 * h : 2 * h + 2] for h in range(12)]
    torch.testing.assert_close(torch.cat(by_head, -1)[:, 0], pool(x))


def test_simpools_generalised_mean_shifts_by_the_minimum_of_the_image_itself() -> None:
    pool, x = make("simpool gamma"), noise(2, 9, DIM)
    normed = layer_norm(pool, x)
    maps = pool.attention(x)
    for i in range(2):
        lowest = min(normed[i].flatten().tolist())
        powered = [[(value - lowest + 1e-6) ** 1.25 for value in token] for token in normed[i].tolist()]
        expected = [
            sum(w * token[c] for w, token in zip(maps[i, 0].tolist(), powered, strict=True)) ** (1 / 1.25)
            for c in range(DIM)
        ]
        np.testing.assert_allclose(pool(x)[i].detach(), np.array(expected) + pool.beta.item())


def test_a_generalised_mean_with_exponent_one_is_the_mean_above_the_minimum() -> None:
    plain, x = make("esimpool"), noise(2, 9, DIM)
    shifted = ESimPool(DIM, gamma=1).double()
    shifted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(shifted(x), plain(x) - x.amin((1, 2))[:, None] + 1e-6)


@pytest.mark.parametrize("mode", ["both", "map", "none"])
@pytest.mark.parametrize(("activation", "depth"), [("tanh", 2), ("relu", 3), ("tanh", 1)])
def test_abmilp_scores_and_pools_what_its_mode_says(mode: Any, activation: Any, depth: int) -> None:
    torch.manual_seed(0)
    pool = AbMILP(DIM, self_attention=mode, activation=activation, depth=depth).double()
    x = noise(2, 5, DIM)
    for i in range(2):
        z = x[i]
        if mode != "none":
            q, k, v = (x[i] @ weight.T for weight in pool.qkv.weight.chunk(3))
            z = torch.stack([gather(query, k, v, 1) for query in q]) @ pool.proj.weight.T + pool.proj.bias
        scores = []
        for token in z:
            hidden = token
            linears = [layer for layer in pool.predictor if isinstance(layer, nn.Linear)]
            assert len(linears) == depth
            for layer in linears[:-1]:
                hidden = layer.weight @ hidden + layer.bias
                hidden = hidden.tanh() if activation == "tanh" else hidden.clamp(min=0)
            scores.append((linears[-1].weight[0] @ hidden + linears[-1].bias).item())
        weights = softmax(scores)
        pooled = z if mode == "both" else x[i]
        torch.testing.assert_close(pool(x)[i], sum(w * token for w, token in zip(weights, pooled, strict=True)))
        np.testing.assert_allclose(pool.attention(x)[i, 0].detach(), weights)


def test_abmilp_for_patches_leaves_out_the_token_in_front() -> None:
    pool, x = make("abmilp patch"), noise(2, 9, DIM)
    whole = make("abmilp")
    torch.testing.assert_close(pool(x), whole(x[:, 1:]))
    maps = pool.attention(x)
    assert torch.equal(maps[..., 0], torch.zeros(2, 1, dtype=torch.float64))
    torch.testing.assert_close(maps[..., 1:], whole.attention(x[:, 1:]))
    assert pool.macs(197) == whole.macs(196)
    with pytest.raises(InputError, match="got 1 token, which content='patch' leaves out"):
        pool(x[:, :1])


def test_the_position_embedding_is_sines_and_cosines_of_column_then_row() -> None:
    found = sincos_2d(8, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = [
                wave(index * 10000 ** (-i / 2))
                for index in (column, row)
                for wave in (math.sin, math.cos)
                for i in (0, 1)
            ]
            np.testing.assert_allclose(found[row * 3 + column], expected, atol=1e-7)


def test_positions_are_seen_by_the_scores_alone_and_cls_has_none() -> None:
    x = noise(2, 7, DIM)
    torch.manual_seed(0)
    pool = AbMILP(DIM, self_attention="none", depth=1, cond="pe", grid=(2, 3)).double()
    places = torch.cat([torch.zeros(1, DIM), sincos_2d(DIM, (2, 3))]).double()
    layer = pool.predictor[0]
    weights = ((x + places) @ layer.weight.T + layer.bias).softmax(1)
    torch.testing.assert_close(pool(x), (weights * x).sum(1))
    patches = ((x[:, 1:] + places[1:]) @ layer.weight.T + layer.bias).softmax(1)
    torch.testing.assert_close(pool(x[:, 1:]), (patches * x[:, 1:]).sum(1))
    assert not torch.allclose(pool(x[:, 1:].flip(1)), pool(x[:, 1:]))
    assert "position" not in pool.state_dict()
    with pytest.raises(InputError, match="tokens: got 5 to score, where grid has 6 places"):
        pool(x[:, :5])


def test_gem_goes_from_the_mean_to_the_maximum() -> None:
    x = noise(2, 9, DIM).abs() + 0.1
    powered = [[(sum(float(v) ** 3 for v in image[:, c]) / 9) ** (1 / 3) for c in range(DIM)] for image in x]
    np.testing.assert_allclose(GeM(DIM).double()(x).detach(), powered)
    torch.testing.assert_close(GeM(DIM, p=1).double()(x), x.mean(1))
    torch.testing.assert_close(GeM(DIM, p=400).double()(x), x.amax(1), rtol=0.01, atol=0)
    torch.testing.assert_close(GeM(DIM).double()(-x), torch.full((2, DIM), 1e-6, dtype=torch.float64))


def test_lse_is_the_log_of_the_mean_exponential() -> None:
    x = noise(2, 9, DIM) * 100  # exp(10 * 100) overflows
    expected = logsumexp(10 * x.numpy(), axis=1, b=1 / 9) / 10
    np.testing.assert_allclose(LSE(DIM).double()(x).detach(), expected)
    torch.testing.assert_close(LSE(DIM, r=1e4).double()(x), x.amax(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(LSE(DIM, r=1e-7).double()(x), x.mean(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [9, 24, 60])
def test_gmp_is_the_ridge_solution_that_matches_all_tokens_alike(count: int) -> None:
    x = noise(2, count, DIM)
    out = GMP(DIM, lam=2.5).double()(x).detach()
    for i in range(2):
        rows = np.concatenate([x[i].numpy(), math.sqrt(2.5) * np.eye(DIM)])
        wanted = np.concatenate([np.ones(count), np.zeros(DIM)])
        np.testing.assert_allclose(out[i], np.linalg.lstsq(rows, wanted, rcond=None)[0])
    assert GMP(DIM).lam.item() == 1000


def test_gmp_counts_the_smaller_of_its_two_systems() -> None:
    assert GMP(768).macs(196) == 196 * 196 * 768 + 196**3 // 3 + 196 * 768
    assert GMP(100).macs(900) == 900 * 100 * 100 + 100**3 // 3 + 900 * 100


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (MHCA, {"heads": 5}, "heads: got 5, which does not divide dim=768"),
        (MHCA, {"heads": 0}, "heads: got 0; give an integer of at least 1"),
        (AIM, {"heads": 7}, "heads: got 7, which does not divide dim=768"),
        (AIM, {"queries": 0}, "queries: got 0"),
        (ESimPool, {"heads": 10}, "heads: got 10, which does not divide dim=768"),
        (SimPool, {"gamma": -1}, "gamma: got -1; give a positive number"),
        (SimPool, {"beta": True}, "beta: got True without gamma"),
        (AbMILP, {"self_attention": "all"}, "self_attention: got 'all'; give 'both' or 'map' or 'none'"),
        (AbMILP, {"activation": "gelu"}, "activation: got 'gelu'"),
        (AbMILP, {"depth": 0}, "depth: got 0"),
        (AbMILP, {"cond": "rope"}, "cond: got 'rope'"),
        (AbMILP, {"cond": "pe"}, "grid: got None"),
        (AbMILP, {"cond": "pe", "grid": (0, 3)}, "grid: got 0"),
        (AbMILP, {"content": "cls"}, "content: got 'cls'"),
        (GeM, {"p": 0}, "p: got 0; give a positive number"),
        (LSE, {"r": "ten"}, "r: got 'ten'"),
        (GMP, {"lam": math.inf}, "lam: got inf"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_numbers(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cls(768, **settings)


def test_the_default_heads_of_esimpool_are_refused_where_they_do_not_divide() -> None:
    with pytest.raises(InputError, match="heads: got 12, which does not divide dim=1024"):
        ESimPool(1024)
    with pytest.raises(InputError, match="dim: got 30, of which cond='pe' makes four parts"):
        AbMILP(30, cond="pe", grid=(2, 2))


def test_half_precision_scores_are_turned_into_weights_in_fp32() -> None:
    query, key = noise(1, 8).bfloat16(), noise(2, 500, 8, seed=2).bfloat16()
    maps = attention_maps(query, key, 0.5)
    assert maps.dtype == torch.float32
    scores = ((query * 0.5) @ key.mT).float()
    torch.testing.assert_close(maps, scores.exp() / scores.exp().sum(-1, keepdim=True))
