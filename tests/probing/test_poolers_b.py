"""Competing poolers: published sizes and costs, and what they compute, against other libraries and plain loops."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent
from timm.layers.cbam import CbamModule
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.cae import CAEPool
from vlattn.probing.poolers.cait import CaiTPool
from vlattn.probing.poolers.cbam import CBAMPool
from vlattn.probing.poolers.clip import CLIPPool
from vlattn.probing.poolers.coca import CoCaPool
from vlattn.probing.poolers.dinovit import DINOViTPool
from vlattn.probing.poolers.dolg import DOLGPool
from vlattn.probing.poolers.siglip import SigLIPPool
from vlattn.probing.poolers.vit import ViTPool
from vlattn.probing.poolers.vjepa import VJEPAPool

DIM, GRID = 32, (3, 4)

Make = Callable[[int, tuple[int, int]], Pooler]

MAKE: dict[str, Make] = {
    "cae": lambda dim, grid: CAEPool(dim),
    "cait": lambda dim, grid: CaiTPool(dim),
    "cbam": lambda dim, grid: CBAMPool(dim, grid=grid),
    "clip": lambda dim, grid: CLIPPool(dim, grid=grid),
    "coca": lambda dim, grid: CoCaPool(dim),
    "dinovit": lambda dim, grid: DINOViTPool(dim),
    "dolg": lambda dim, grid: DOLGPool(dim),
    "siglip": lambda dim, grid: SigLIPPool(dim),
    "vit": lambda dim, grid: ViTPool(dim),
    "vjepa": lambda dim, grid: VJEPAPool(dim),
}
every = pytest.mark.parametrize("name", sorted(MAKE))
WITH_MAPS = ["cae", "cait", "clip", "coca", "dolg", "siglip", "vit", "vjepa"]


def stir(pooler: nn.Module) -> Any:
    """Random parameters of size one: at their first values some poolers hardly look at the tokens."""
    generator = torch.Generator().manual_seed(7)
    for parameter in pooler.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return pooler


def made(name: str, dim: int = DIM, grid: tuple[int, int] = GRID, dtype: torch.dtype = torch.float64) -> Any:
    pooler = stir(MAKE[name](dim, grid)).to(dtype).eval()
    assert isinstance(pooler, Pooler)
    return pooler


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def heads_softmax(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """Plain loop: query [E] against key [N, E], maps [H, N]."""
    size = len(query) // heads
    rows = [key[:, s : s + size] @ query[s : s + size] / size**0.5 for s in range(0, len(query), size)]
    return torch.stack(rows).softmax(-1)


def heads_read(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Plain loop: what the maps gather from value [N, E], heads joined, [E]."""
    size = len(query) // heads
    maps = heads_softmax(query, key, heads)
    return torch.cat([maps[h] @ value[:, h * size : (h + 1) * size] for h in range(heads)])


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("clip", 2_515_200, 524.4),
        ("siglip", 7_085_568, 237.4),
        ("cbam", 73_828, 0.2),
        ("coca", 1_036_032, 212.7),
        ("cait", 7_091_712, 238.6),
        ("dinovit", 7_085_568, 1446.3),
        ("vjepa", 7_088_640, 237.4),
        ("dolg", 592_897, 115.9),
        ("cae", 2_366_976, 232.7),
    ],
)
def test_sizes_and_costs_are_the_published_ones(name: str, parameters: int, macs: float) -> None:
    pooler = MAKE[name](768, (14, 14))
    built = pooler.built_parameters() if isinstance(pooler, CoCaPool | CAEPool) else count(pooler)
    assert built == parameters
    published = pooler.built_macs(196) if isinstance(pooler, CLIPPool | CoCaPool) else pooler.macs(196)
    assert round(published / 1e6, 1) == macs
    assert pooler.width == 768


@pytest.mark.parametrize("dim", [64, 96])
def test_parameters_follow_the_formulas_in_the_width(dim: int) -> None:
    square = dim**2
    expected = {
        "cae": 4 * square + 8 * dim,
        "cait": 12 * square + 18 * dim,
        "cbam": 2 * dim * max(1, int(dim / 16 + 0.5)) + 100,
        "clip": 4 * square + (12 + 7) * dim,
        "coca": 1154 * dim,
        "dinovit": 12 * square + 10 * dim,
        "dolg": square + 4 * dim + 1,
        "siglip": 12 * square + 10 * dim,
        "vit": 3 * square + 4 * dim,
        "vjepa": 12 * square + 14 * dim,
    }
    assert {name: count(make(dim, GRID)) for name, make in MAKE.items()} == expected
    assert count(SigLIPPool(dim, norm=True)) == expected["siglip"] + 2 * dim
    assert count(CoCaPool(dim, queries=196)) == CoCaPool(dim).built_parameters() == 1349 * dim


def test_rows_that_the_originals_compute_and_drop_are_counted_apart() -> None:
    clip, coca, vit = CLIPPool(768, grid=(14, 14)), CoCaPool(768), ViTPool(768)
    square = 768**2
    assert clip.macs(196) == 2 * 197 * square + 2 * square + 2 * 197 * 768
    assert coca.macs(196) == 1024 * 768 + 128 * 196 * 768 + 1024 * 196
    assert CoCaPool(768, queries=196).macs(196) == coca.macs(196) < coca.built_macs(196)
    assert vit.built_macs(196) == 3 * 197 * square + 2 * 197**2 * 768
    external = CLIPPool(768, grid=(14, 14), external_cls=True)
    assert (external.macs(197), external.built_macs(197)) == (clip.macs(196), clip.built_macs(196))


@every
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4)])
def test_one_feature_per_image_for_any_batch_and_grid(name: str, batch: int, grid: tuple[int, int]) -> None:
    pooler = made(name, grid=grid)
    tokens = draw(batch, grid[0] * grid[1], DIM)
    feature = pooler(tokens)
    assert feature.shape == (batch, DIM)
    assert feature.dtype == torch.float64
    alone = torch.cat([pooler(image[None]) for image in tokens])
    torch.testing.assert_close(feature, alone, atol=1e-12, rtol=0)


@every
def test_half_precision_and_autocast_keep_their_dtype_and_come_near_fp32(name: str) -> None:
    pooler = made(name, dtype=torch.float32)
    tokens = draw(2, 12, DIM, dtype=torch.float32)
    exact = pooler(tokens)
    half = copy.deepcopy(pooler).bfloat16()(tokens.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.1 * exact.abs().max().item(), rtol=0)
    for given in (tokens, tokens.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = pooler(given)
        assert mixed.dtype in (torch.bfloat16, torch.float32)
        torch.testing.assert_close(mixed.float(), exact, atol=0.1 * exact.abs().max().item(), rtol=0)
        if name in WITH_MAPS:
            with torch.autocast("cpu", torch.bfloat16):
                assert pooler.attention(given).dtype == torch.float32


@every
def test_only_poolers_with_places_notice_a_permutation(name: str) -> None:
    pooler = made(name)
    tokens = draw(2, 12, DIM)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    change = (pooler(tokens) - pooler(tokens[:, order])).abs().max()
    if name in ("cbam", "clip"):
        assert change > 1e-3
    else:
        assert change < 1e-10
    assert pooler.needs_grid == (name in ("cbam", "clip"))


@every
def test_every_parameter_gets_a_gradient(name: str) -> None:
    pooler = made(name)
    pooler(draw(3, 12, DIM)).square().sum().backward()
    silent = [key for key, p in pooler.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    # What moves all scores of a softmax alike is not seen.
    assert silent == {"cae": ["key_norm.bias"], "cait": ["key.bias"], "vit": ["key.bias"]}.get(name, [])


@every
def test_stacked_heads_run_under_vmap_as_they_do_alone(name: str) -> None:
    heads = [made(name).train() for _ in range(2)]
    for parameter in heads[1].parameters():
        parameter.data.mul_(1.5)
    tokens = draw(3, 12, DIM)
    state = [{**dict(h.named_parameters()), **dict(h.named_buffers())} for h in heads]
    stacked = {key: torch.stack([one[key].detach() for one in state]) for key in state[0]}
    blank = copy.deepcopy(heads[0])
    together = torch.func.vmap(lambda one: torch.func.functional_call(blank, one, (tokens,)))(stacked)
    alone = torch.stack([head(tokens) for head in heads])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", WITH_MAPS)
def test_rows_of_attention_sum_to_one(name: str) -> None:
    pooler = made(name)
    maps = pooler.attention(draw(2, 12, DIM))
    assert maps is not None
    assert maps.shape == (2, 1 if name == "dolg" else pooler.heads, 12)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), atol=1e-12, rtol=0)
    assert maps.std(-1).min() > 1e-4
    half = copy.deepcopy(pooler).bfloat16().attention(draw(2, 12, DIM).bfloat16())
    assert half is not None
    assert half.dtype == torch.float32


def test_poolers_without_one_map_over_tokens_give_none() -> None:
    for name in ("cbam", "dinovit"):
        assert made(name).attention(draw(1, 12, DIM)) is None


@pytest.mark.parametrize("name", ["cae", "cait", "clip", "dinovit", "siglip", "vit", "vjepa"])
def test_heads_have_to_divide_the_width(name: str) -> None:
    cls = type(made(name))
    settings = {"grid": GRID} if name == "clip" else {}
    with pytest.raises(InputError, match=re.escape("heads: got 5, which does not divide dim=32")):
        cls(DIM, heads=5, **settings)


@every
def test_tokens_of_another_width_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=re.escape("tokens: got shape [2, 12, 16]; give [B, N, 32]")):
        made(name)(draw(2, 12, 16))


# Each pooler against something independent.


@pytest.mark.parametrize("external", [False, True])
def test_clip_is_the_first_row_of_full_self_attention(external: bool) -> None:
    pooler = stir(CLIPPool(DIM, grid=GRID, external_cls=external)).double()
    other: Any = AttentionPool2d(DIM, feat_size=GRID, num_heads=4).double()
    with torch.no_grad():
        other.qkv.weight.copy_(torch.cat([pooler.query.weight, pooler.key_value.weight]))
        other.qkv.bias.copy_(torch.cat([pooler.query.bias, pooler.key_value.bias]))
        other.proj.load_state_dict(pooler.out.state_dict())
        other.pos_embed.copy_(pooler.position)
    tokens = draw(2, 12, DIM)
    normed = F.layer_norm(tokens, (DIM,), pooler.norm.weight, pooler.norm.bias, 1e-6)
    if external:  # the mean stands where a CLS token would; its norm is one of its own, so undo it by hand
        stray = draw(2, 1, DIM, seed=5)
        given = torch.cat([stray, tokens], 1)
        sequence = pooler.norm(given) + pooler.position
        rows = [F.linear(sequence, w) for w in other.qkv.weight.chunk(3)]
        q, k, v = (row + b for row, b in zip(rows, other.qkv.bias.chunk(3), strict=True))
        expected = torch.stack([heads_read(q[b, 0], k[b], v[b], 4) for b in range(2)]) @ other.proj.weight.T
        torch.testing.assert_close(pooler(given), expected + other.proj.bias, atol=1e-12, rtol=0)
        return
    image = normed.transpose(1, 2).unflatten(2, GRID)
    torch.testing.assert_close(pooler(tokens), other(image), atol=1e-12, rtol=0)


def test_clip_and_class_token_maps_are_shares_of_what_goes_to_tokens() -> None:
    tokens = draw(1, 12, DIM)
    clip = made("clip")
    normed = clip.norm(tokens[0])
    sequence = torch.cat([normed.mean(0, keepdim=True), normed]) + clip.position
    full = heads_softmax(clip.query(sequence[0]), clip.key_value(sequence)[:, :DIM], 4)
    torch.testing.assert_close(clip.attention(tokens)[0], full[:, 1:] / full[:, 1:].sum(-1, keepdim=True))
    cait = made("cait")
    sequence = cait.norm1(torch.cat([cait.cls, tokens[0]]))
    full = heads_softmax(cait.query(sequence[0]), cait.key(sequence), 4)
    torch.testing.assert_close(cait.attention(tokens)[0], full[:, 1:] / full[:, 1:].sum(-1, keepdim=True))
    vit = made("vit")
    full = heads_softmax(vit.query(vit.cls[0]), vit.key(torch.cat([vit.cls, tokens[0]])), 8)
    torch.testing.assert_close(vit.attention(tokens)[0], full[:, 1:] / full[:, 1:].sum(-1, keepdim=True))


def test_clip_interpolates_its_table_for_other_square_grids() -> None:
    pooler = stir(CLIPPool(DIM, grid=(4, 4))).double()
    small, large = draw(2, 9, DIM), draw(2, 36, DIM)
    # A table that is linear in the places stays so away from the border, and the first row never changes.
    ramp = torch.arange(4.0).double()
    with torch.no_grad():
        pooler.position[1:] = ramp.repeat_interleave(4)[:, None] + 10 * ramp.repeat(4)[:, None]
    table = pooler._positions(64)
    assert torch.equal(table[0], pooler.position[0])
    image = table[1:].unflatten(0, (8, 8))[..., 0]
    inner = (torch.arange(8).double() + 0.5) / 2 - 0.5
    expected = inner[:, None] + 10 * inner[None]
    torch.testing.assert_close(image[3:5, 3:5], expected[3:5, 3:5], atol=1e-6, rtol=0)
    torch.testing.assert_close(image.mean(), expected.mean(), atol=0.2, rtol=0)
    for tokens in (small, large):
        assert pooler(tokens).shape == (2, DIM)
        assert pooler.attention(tokens).shape == (2, 4, tokens.shape[1])
    with torch.no_grad():  # a flat table is the same for every grid
        pooler.position[1:] = pooler.position[1]
    flat = stir(CLIPPool(DIM, grid=(3, 3))).double()
    flat.load_state_dict({**pooler.state_dict(), "position": pooler.position[:10]})
    torch.testing.assert_close(pooler(small), flat(small), atol=1e-6, rtol=0)


def test_clip_refuses_what_has_no_place() -> None:
    pooler = CLIPPool(DIM, grid=GRID).double()
    with pytest.raises(InputError, match="tokens: got 13 of them, no square and no 3 x 4 grid"):
        pooler(draw(1, 13, DIM))
    with pytest.raises(InputError, match="grid: got None"):
        CLIPPool(DIM, grid=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="grid: got 0"):
        CLIPPool(DIM, grid=(0, 4))


@pytest.mark.parametrize("norm", [False, True])
def test_siglip_is_the_pool_of_timm(norm: bool) -> None:
    pooler = stir(SigLIPPool(DIM, norm=norm)).double()
    layer: Any = partial(nn.LayerNorm, eps=1e-6) if norm else None
    other = AttentionPoolLatent(DIM, num_heads=8, norm_layer=layer).double()
    names = {"q": "query", "kv": "key_value", "proj": "out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "norm": "norm"}
    state = {"latent": pooler.latent[None]}
    for theirs, ours in names.items():
        module = pooler.get_submodule(ours)
        state.update({f"{theirs}.{key}": value for key, value in module.state_dict().items()})
    other.load_state_dict(state)
    tokens = draw(3, 12, DIM)
    torch.testing.assert_close(pooler(tokens), other(tokens), atol=1e-12, rtol=0)


def test_cait_is_the_block_of_timm() -> None:
    pooler = made("cait")
    assert isinstance(pooler, CaiTPool)
    layer: Any = partial(nn.LayerNorm, eps=1e-6)
    other = LayerScaleBlockClassAttn(DIM, 4, qkv_bias=True, norm_layer=layer, init_values=1.0).double()
    names = {"attn.q": "query", "attn.k": "key", "attn.v": "value", "attn.proj": "out"}
    names |= {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    state = {"gamma_1": pooler.gamma1, "gamma_2": pooler.gamma2}
    for theirs, ours in names.items():
        state.update({f"{theirs}.{k}": value for k, value in pooler.get_submodule(ours).state_dict().items()})
    other.load_state_dict(state)
    tokens = draw(3, 12, DIM)
    cls = other(tokens, pooler.cls.expand(3, 1, -1))[:, 0]
    expected = F.layer_norm(cls, (DIM,), pooler.norm.weight, pooler.norm.bias, 1e-5)
    torch.testing.assert_close(pooler(tokens), expected, atol=1e-12, rtol=0)


def test_dinovit_is_the_block_of_timm_and_a_mean() -> None:
    pooler = made("dinovit")
    other = Block(DIM, 8, qkv_bias=False, norm_layer=nn.LayerNorm).double()
    names = {"attn.qkv": "query_key_value", "attn.proj": "out", "norm1": "norm1", "norm2": "norm2"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    state = {}
    for theirs, ours in names.items():
        state.update({f"{theirs}.{k}": value for k, value in pooler.get_submodule(ours).state_dict().items()})
    other.load_state_dict(state)
    tokens = draw(3, 12, DIM)
    torch.testing.assert_close(pooler(tokens), other(tokens).mean(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_cbam_is_the_module_of_timm_with_a_residual(training: bool) -> None:
    pooler = made("cbam").train(training)
    assert isinstance(pooler, CBAMPool)
    other = CbamModule(DIM).double().train(training)
    with torch.no_grad():
        other.channel.fc1.weight.copy_(pooler.squeeze.weight[..., None, None])
        other.channel.fc2.weight.copy_(pooler.excite.weight[..., None, None])
        other.spatial.conv.conv.weight.copy_(pooler.conv.weight)
        other.spatial.conv.bn.load_state_dict(pooler.norm.state_dict())
    tokens = draw(3, 12, DIM)
    image = tokens.transpose(1, 2).unflatten(2, GRID)
    expected = F.relu(other(image) + image).mean((2, 3))
    torch.testing.assert_close(pooler(tokens), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(pooler.norm.running_var, other.spatial.conv.bn.running_var)


def test_cbam_takes_squares_without_a_grid_and_refuses_other_counts() -> None:
    pooler = stir(CBAMPool(DIM)).double().eval()
    square = stir(CBAMPool(DIM, grid=(4, 4))).double().eval()
    tokens = draw(2, 16, DIM)
    assert torch.equal(pooler(tokens), square(tokens))
    assert CBAMPool(4).hidden == 1
    assert CBAMPool(24).hidden == 2
    with pytest.raises(InputError, match="tokens: got 12 of them, no square;"):
        pooler(draw(2, 12, DIM))
    flat = stir(CBAMPool(DIM, grid=(2, 8))).double().eval()
    assert (flat(tokens) - square(tokens)).abs().max() > 1e-6


def test_coca_is_the_first_of_many_queries_in_a_plain_loop_and_the_others_get_no_gradient() -> None:
    pooler = stir(CoCaPool(DIM, heads=4, head_dim=6, queries=5)).double()
    assert isinstance(pooler, CoCaPool)
    tokens = draw(2, 12, DIM)
    rows = []
    for image in tokens:
        key, value = image @ pooler.key_value.weight.T[:, :6], image @ pooler.key_value.weight.T[:, 6:]
        for latent in pooler.latent:
            centred = latent - latent.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt() * pooler.norm.weight
            query = (pooler.query.weight @ normed).view(4, 6)
            read = [(key @ query[h] / 6**0.5).softmax(0) @ value for h in range(4)]
            rows.append(pooler.out.weight @ torch.cat(read))
    expected = torch.stack(rows).view(2, 5, DIM)
    torch.testing.assert_close(pooler(tokens), expected[:, 0], atol=1e-12, rtol=0)
    pooler(tokens).square().sum().backward()
    assert pooler.latent.grad is not None
    assert pooler.latent.grad[0].abs().max() > 1e-6
    assert torch.equal(pooler.latent.grad[1:], torch.zeros(4, DIM, dtype=torch.float64))
    one = CoCaPool(DIM, heads=4, head_dim=6).double()
    one.load_state_dict({**pooler.state_dict(), "latent": pooler.latent[:1]})
    assert torch.equal(one(tokens), pooler(tokens))


def test_vjepa_cae_and_vit_are_plain_loops() -> None:
    tokens = draw(2, 12, DIM)
    vjepa, cae, vit = made("vjepa"), made("cae"), made("vit")
    for b, image in enumerate(tokens):
        normed = F.layer_norm(image, (DIM,), vjepa.norm1.weight, vjepa.norm1.bias)
        key_value = vjepa.key_value(normed)
        read = heads_read(vjepa.query(vjepa.latent[0]), key_value[:, :DIM], key_value[:, DIM:], 16)
        hidden = vjepa.latent[0] + vjepa.out(read)
        inner = vjepa.mlp[0](F.layer_norm(hidden, (DIM,), vjepa.norm2.weight, vjepa.norm2.bias))
        gelu = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        torch.testing.assert_close(vjepa(tokens)[b], hidden + vjepa.mlp[2](gelu), atol=1e-12, rtol=0)

        query, key, value = (
            F.layer_norm(x, (DIM,), norm.weight, norm.bias) @ linear.weight.T
            for x, norm, linear in (
                (cae.latent[0], cae.query_norm, cae.query),
                (image, cae.key_norm, cae.key),
                (image, cae.value_norm, cae.value),
            )
        )
        torch.testing.assert_close(cae(tokens)[b], cae.out(heads_read(query, key, value, 8)), atol=1e-12, rtol=0)

        sequence = torch.cat([vit.cls, image])
        read = heads_read(vit.query(vit.cls[0]), vit.key(sequence), vit.value(sequence), 8)
        torch.testing.assert_close(vit(tokens)[b], read, atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_dolg_is_made_of_convolutions(training: bool) -> None:
    pooler = made("dolg").train(training)
    conv: Any = nn.Conv2d(DIM, DIM, 1)
    score: Any = nn.Conv2d(DIM, 1, 1)
    norm = nn.BatchNorm2d(DIM)
    conv.weight.data, conv.bias.data = pooler.local.weight.data[..., None, None], pooler.local.bias.data
    score.weight.data, score.bias.data = pooler.score.weight.data[..., None, None], pooler.score.bias.data
    norm = norm.double().train(training)
    norm.load_state_dict(pooler.norm.state_dict())
    tokens = draw(3, 12, DIM)
    before = copy.deepcopy(pooler.norm.state_dict())
    maps = pooler.attention(tokens)
    assert all(torch.equal(value, pooler.norm.state_dict()[key]) for key, value in before.items())
    local = norm(conv(tokens.transpose(1, 2).unflatten(2, GRID)))
    scores = F.softplus(score(F.relu(local)))
    expected = (scores * local / local.norm(dim=1, keepdim=True)).mean((2, 3))
    torch.testing.assert_close(pooler(tokens), expected, atol=1e-12, rtol=0)
    flat = scores.flatten(2)
    torch.testing.assert_close(maps, flat / flat.sum(-1, keepdim=True), atol=1e-12, rtol=0)
    torch.testing.assert_close(pooler.norm.running_mean, norm.running_mean)


def test_first_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    dim = 256
    vjepa: Any = VJEPAPool(dim)
    clip, siglip, coca = CLIPPool(dim, grid=(14, 14)), SigLIPPool(dim), CoCaPool(dim, queries=196)
    cait, dolg, cae, vit = CaiTPool(dim), DOLGPool(dim), CAEPool(dim), ViTPool(dim)
    for weight, std in [
        (clip.position, dim**-0.5),
        (clip.query.weight, dim**-0.5),
        (clip.key_value.weight, dim**-0.5),
        (coca.latent, 1.0),
        (cait.cls, 0.02),
        (vjepa.latent, 0.02),
        (vjepa.key_value.weight, 0.02),
        (vjepa.mlp[0].weight, 0.02),
        (vjepa.out.weight, 0.02 / 2**0.5),
        (vjepa.mlp[2].weight, 0.02 / 2**0.5),
        (dolg.local.weight, (2 / dim) ** 0.5),
        (dolg.score.weight, 2**0.5),
        # A normal cut at two standard deviations has 0.8796 of its deviation left.
        (siglip.latent, 0.8796 * dim**-0.5),
    ]:
        tolerance = 4 * (2 * weight.numel()) ** -0.5  # four standard errors
        assert weight.std().item() == pytest.approx(std, rel=tolerance)
    assert siglip.latent.abs().max() <= 2 * dim**-0.5
    for zero in (clip.query.bias, clip.key_value.bias, cae.latent, vit.cls, vjepa.query.bias, vjepa.mlp[2].bias):
        assert not zero.any()
    assert (cait.gamma1 == 1e-5).all()
    assert (cait.gamma2 == 1e-5).all()
    assert not torch.equal(dolg.score.bias, torch.zeros(1))


def test_cae_starts_with_uniform_attention() -> None:
    pooler = CAEPool(DIM).double()
    tokens = draw(2, 12, DIM)
    maps = pooler.attention(tokens)
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 12), atol=1e-12, rtol=0)
    mean = pooler.value(pooler.value_norm(tokens)).mean(1)
    torch.testing.assert_close(pooler(tokens), pooler.out(mean), atol=1e-12, rtol=0)
