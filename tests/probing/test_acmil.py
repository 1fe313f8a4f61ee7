"""ACMIL and ABMIL: the published numbers, bags with padding, and what STKIM hides."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlattn.errors import InputError
from vlattn.probing.poolers.abmil import ABMILPool
from vlattn.probing.poolers.acmil import ACMIL, ACMILPool
from vlattn.probing.poolers.acmil_loss import acmil_loss
from vlattn.probing.poolers.acmil_mha import ACMILMHAPool, MHABagPool, OwnDropout
from vlattn.probing.poolers.bag import MaxBagPool, MeanBagPool

DIM = 24


def formula(k: int, *shape: int) -> torch.Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    y = 43758.5453 * torch.sin(12.9898 * (i + 1) + 78.233 * k)
    return (y - y.floor() - 0.5).reshape(shape)


def row(text: str) -> torch.Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def near(value: torch.Tensor, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float64), atol=6e-9, rtol=0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sharp(pooler: Any) -> Any:
    """Scores spread out: at first values all maps are all but uniform."""
    for name, parameter in pooler.named_parameters():
        if name.endswith(("score.w.weight", "latent", "key.weight")):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return pooler


def model(classes: int = 3, mha: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    pooler = ACMILMHAPool(DIM, d_inner=16, **settings) if mha else ACMILPool(DIM, d_inner=16, hidden=8, **settings)
    return sharp(ACMIL(pooler, classes)).double()


def padded(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Bags of 20, 7 and 1 tokens with garbage in their padding."""
    tokens, mask = draw(3, 20, DIM, seed=seed), torch.arange(20) < torch.tensor([20, 7, 1])[:, None]
    mask = mask[:, torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    tokens[~mask] = torch.nan
    tokens[1, (~mask[1]).nonzero()[0]] = torch.inf
    return tokens, mask


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


BAGS = {
    "abmil": lambda: ABMILPool(DIM, hidden=8),
    "plain": lambda: ABMILPool(DIM, hidden=8, gated=False),
    "acmil": lambda: ACMILPool(DIM, hidden=8),
    "mean": lambda: MeanBagPool(DIM),
    "max": lambda: MaxBagPool(DIM),
    "mha": lambda: MHABagPool(DIM, d_inner=16),
    "acmil_mha": lambda: ACMILMHAPool(DIM, d_inner=16),
}
every_bag = pytest.mark.parametrize("name", sorted(BAGS))
both = pytest.mark.parametrize("mha", [False, True])


def bag(name: str) -> Any:
    torch.manual_seed(0)
    return sharp(BAGS[name]()).double().eval()


# The vector of the specification: instances given directly.


def vector_model(**settings: Any) -> Any:
    whole: Any = ACMIL(ACMILPool(3, d_inner=3, hidden=2, n_token=2, **settings), 2).double()
    whole.pooler.reduce = nn.Identity()
    score = whole.pooler.score
    values = {
        score.v.weight: 2 * formula(12, 2, 3),
        score.v.bias: formula(13, 2),
        score.u.weight: 2 * formula(14, 2, 3),
        score.u.bias: formula(15, 2),
        score.w.weight: 4 * formula(16, 2, 2),
        score.w.bias: formula(17, 2),
        whole.classifier.weight: formula(20, 2, 3),
        whole.classifier.bias: formula(21, 2),
    }
    for m, linear in enumerate(whole.branch_classifiers):
        values[linear.weight], values[linear.bias] = formula(18, 2, 2, 3)[m], formula(19, 2, 2)[m]
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)
    return whole


def test_forward_and_losses_are_the_published_numbers() -> None:
    whole = vector_model(n_masked_patch=0)
    out = whole(formula(11, 5, 3)[None])
    near(out.scores[0, 0], row(".03553615 .10069378 .06122266 .03322608 -.01393349"))
    near(out.scores[0, 1], row(".23485200 .34042601 .34974014 .30608297 .41763303"))
    near(out.attention[0, 0], row(".19830359 .21165482 .20346330 .19784602 .18873227"))
    near(out.attention[0, 1], row(".18157134 .20178901 .20367728 .19497661 .21798575"))
    near(out.branch_logits[0], torch.stack([row("-.11235319 .30526918"), row(".30517184 -.31516659")]))
    near(out.attention[0].mean(0), row(".18993746 .20672192 .20357029 .19641132 .20335901"))
    near(out.feature[0], row(".02945405 .17832742 .20751211"))
    near(out.logits[0], row(".14435922 .12973423"))
    features = whole.pooler.branches(formula(11, 5, 3)[None]).features[0]
    near(features, torch.stack([row(".02518835 .17369902 .20450876"), row(".03371974 .18295581 .21051545")]))
    loss = acmil_loss(out, torch.tensor([1]))
    for name, value in {"branch": 0.77832362, "bag": 0.70048641, "div": 0.99690483, "total": 2.47571487}.items():
        near(loss[name], value)


def test_hiding_the_first_of_the_top_three_gives_the_published_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vector_model(n_masked_patch=3, mask_drop=0.6)

    class First:
        """Draws that rank the best score first."""

        def random(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
            assert shape == (1, 2, 3)
            return np.broadcast_to(np.array([0.1, 0.2, 0.3], dtype), shape).copy()

    monkeypatch.setattr(whole.pooler.stkim, "generator", First())
    out = whole(formula(11, 5, 3)[None])
    near(out.attention[0, 0], row(".25154411 0 .25808910 .25096370 .23940309"))
    near(out.attention[0, 1], row(".23218419 .25803751 .26045213 .24932616 0"))
    near(out.attention[0].mean(0), row(".24186415 .12901876 .25927062 .25014493 .11970155"))
    near(out.feature[0], row("-.02364860 .11975191 .20784240"))
    near(out.logits[0], row(".17738429 .14134883"))
    loss = acmil_loss(out, torch.tensor([1]))
    for name, value in {"branch": 0.78458339, "bag": 0.71132722, "div": 0.75177359, "total": 2.24768420}.items():
        near(loss[name], value)


def test_abmil_plain_and_gated_are_the_published_numbers() -> None:
    source = vector_model().pooler.score
    for gated in (False, True):
        pooler: Any = ABMILPool(3, d_inner=3, hidden=2, gated=gated).double()
        pooler.reduce = nn.Identity()
        state = {k: v[:1] if k.startswith("w.") else v for k, v in source.state_dict().items()}
        pooler.score.load_state_dict({k: v for k, v in state.items() if gated or not k.startswith("u.")})
        tokens = formula(11, 5, 3)[None]
        if gated:
            near(pooler(tokens)[0], row(".02518835 .17369902 .20450876"))
            continue
        near(pooler.score(tokens)[0, 0], row("-.11139657 .08681431 .01109987 -.08898189 -.13918701"))
        near(pooler.attention(tokens)[0, 0], row(".18709793 .22811344 .21147962 .19133903 .18196998"))
        near(pooler(tokens)[0], row(".03647932 .18776598 .19856019"))


# Sizes.


@pytest.mark.parametrize(
    ("dim", "classes", "plain", "gated", "acmil", "mha", "acmil_mha"),
    [
        (384, 2, 66_051, 82_563, 84_369, 115_842, 416_140),
        (512, 2, 164_611, 197_507, 200_593, 395_522, 1_585_932),
        (768, 2, 345_091, 394_371, 398_737, 888_194, 3_558_540),
        (1024, 2, 591_107, 656_771, 662_417, 1_577_474, 6_317_580),
        (1536, 2, 1_279_747, 1_378_179, 1_386_385, 3_545_858, 14_194_956),
        (768, 100, 382_821, 432_101, 625_117, 925_924, 3_784_920),
        (768, 1000, 729_321, 778_601, 2_704_117, 1_272_424, 5_863_920),
        (1024, 1000, 1_103_081, 1_168_745, 3_734_261, 2_089_448, 9_389_424),
    ],
)
def test_parameter_counts_are_the_published_ones(
    dim: int, classes: int, plain: int, gated: int, acmil: int, mha: int, acmil_mha: int
) -> None:
    with torch.device("meta"):
        for pooler, expected in ((ABMILPool(dim, gated=False), plain), (ABMILPool(dim), gated), (MHABagPool(dim), mha)):
            assert count(pooler) + count(nn.Linear(pooler.width, classes)) == expected
        assert count(ACMIL(ACMILPool(dim), classes)) == acmil
        assert count(ACMIL(ACMILMHAPool(dim), classes)) == acmil_mha


def test_inference_needs_no_branch_classifier() -> None:
    whole = ACMIL(ACMILPool(768), 1000)
    assert whole.inference_parameters() == 779_117
    assert count(whole) - whole.inference_parameters() == 1_925_000
    shared = ACMIL(ACMILPool(768), 1000, share_branch_classifier=True)
    assert count(shared) == 779_117 + 385_000
    out = shared(torch.randn(2, 9, 768))
    features = shared.eval().pooler.branches(torch.randn(1, 9, 768)).features
    assert out.branch_logits.shape == (2, 5, 1000)
    assert features.shape == (1, 5, 384)


def test_widths_are_those_of_the_authors_or_half() -> None:
    widths = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768, 100: 50, 1: 1}
    assert {dim: MeanBagPool(dim).width for dim in widths} == widths
    assert ACMILPool(768, d_inner=10).width == 10


@both
def test_macs_are_those_that_torch_counts(mha: bool) -> None:
    whole = model(mha=mha).eval()
    with FlopCounterMode(display=False) as counter:
        whole(draw(1, 12, DIM))
    assert counter.get_total_flops() == 2 * whole.macs(12)
    if not mha:
        assert whole.macs(12) == 12 * (DIM * 16 + 2 * 16 * 8 + 8 * 5 + 5 * 16) + 6 * 16 * 3


def test_a_prediction_needs_one_weighted_sum_and_training_one_for_each_branch() -> None:
    pooler = ACMILPool(768)
    assert pooler.branch_macs(196) - pooler.macs(196) == 4 * 196 * 384
    assert pooler.macs(196) - ABMILPool(768).macs(196) == 4 * 196 * 128  # scores of four more branches


# Bags.


@every_bag
def test_a_padded_batch_is_its_bags_one_by_one(name: str) -> None:
    pooler = bag(name)
    tokens, mask = padded()
    together = pooler(tokens, mask)
    assert together.shape == (3, pooler.width)
    alone = torch.cat([pooler(tokens[b, mask[b]][None]) for b in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    maps = pooler.attention(tokens, mask)
    if maps is not None:
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), atol=1e-12, rtol=0)
        assert not maps[(~mask)[:, None].expand_as(maps)].any()


@every_bag
def test_garbage_in_padding_reaches_no_gradient(name: str) -> None:
    pooler = bag(name).train()
    tokens, mask = padded()
    pooler(tokens, mask).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pooler.parameters())
    assert pooler.reduce[0].weight.grad.abs().max() > 0


@every_bag
def test_bags_have_no_order_and_copies_change_nothing(name: str) -> None:
    pooler = bag(name)
    tokens = draw(2, 9, DIM)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    feature, maps = pooler(tokens), pooler.attention(tokens)
    torch.testing.assert_close(pooler(tokens[:, order]), feature, atol=1e-12, rtol=0)
    torch.testing.assert_close(pooler(tokens.repeat(1, 2, 1)), feature, atol=1e-12, rtol=0)
    if maps is not None:
        torch.testing.assert_close(pooler.attention(tokens[:, order]), maps[..., order], atol=1e-12, rtol=0)
        torch.testing.assert_close(pooler.attention(tokens.repeat(1, 2, 1)), maps.repeat(1, 1, 2) / 2)


@every_bag
def test_bad_masks_are_refused(name: str) -> None:
    pooler = bag(name)
    tokens, mask = draw(2, 9, DIM), torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(InputError, match=re.escape("mask: got torch.bool [2, 8]; give bool [2, 9]")):
        pooler(tokens, mask[:, :8])
    with pytest.raises(InputError, match=re.escape("mask: got torch.int64 [2, 9]; give bool [2, 9]")):
        pooler(tokens, mask.long())
    mask[1] = False
    with pytest.raises(InputError, match=re.escape("mask: bags [1] have no real token")):
        pooler(tokens, mask)


def test_mean_and_max_are_of_the_real_instances() -> None:
    tokens, mask = padded()
    mean, most = bag("mean"), bag("max")
    for b in range(3):
        real = (tokens[b, mask[b]] @ mean.reduce[0].weight.T).clamp(min=0)
        torch.testing.assert_close(mean(tokens, mask)[b], real.sum(0) / len(real), atol=1e-12, rtol=0)
        real = (tokens[b, mask[b]] @ most.reduce[0].weight.T).clamp(min=0)
        torch.testing.assert_close(most(tokens, mask)[b], real.max(0).values, atol=1e-12, rtol=0)


@both
def test_a_bag_of_one_token_gives_its_instance_and_hides_nothing(mha: bool) -> None:
    whole = model(mha=mha, mask_drop=1.0).train()
    whole.pooler.eval()
    tokens, mask = padded()
    whole.pooler.stkim.train()
    out = whole(tokens, mask)
    place = int(mask[2].nonzero())
    assert (out.attention[2, ..., place] == 1).all()
    if not mha:
        instance = (whole.pooler.reduce[0].weight @ tokens[2, place]).clamp(min=0)
        torch.testing.assert_close(out.feature[2], instance, atol=1e-12, rtol=0)


# ACMIL as a whole.


@both
def test_maps_sum_to_one_and_the_bag_reads_their_mean(mha: bool) -> None:
    whole = model(mha=mha).eval()
    tokens, mask = padded()
    out = whole(tokens, mask)
    torch.testing.assert_close(out.attention.sum(-1), torch.ones_like(out.attention[..., 0]), atol=1e-12, rtol=0)
    branches = whole.pooler.branches(tokens, mask)
    torch.testing.assert_close(out.feature, whole.pooler(tokens, mask), atol=1e-12, rtol=0)
    together = (branches.features.mean(1) - out.feature).abs().max()
    assert together > 1e-3 if mha else together < 1e-12
    assert out.logits.shape == (3, 3)
    assert out.branch_logits.shape == (3, 5, 3)
    logits = torch.stack(
        [linear(z) for linear, z in zip(whole.branch_classifiers, branches.features.unbind(1), strict=True)], 1
    )
    torch.testing.assert_close(out.branch_logits, logits, atol=1e-12, rtol=0)


def test_multi_head_branches_are_plain_loops() -> None:
    whole = model(mha=True, n_token=2).eval()
    pooler, tokens = whole.pooler, draw(1, 6, DIM)
    out = pooler.branches(tokens)
    h = (tokens[0] @ pooler.reduce[0].weight.T).clamp(min=0)
    maps = torch.empty(8, 2, 6, dtype=torch.float64)
    for m, (score, gather) in enumerate(zip(pooler.scores, pooler.gathers, strict=True)):
        other: Any = nn.MultiheadAttention(16, 8, batch_first=True).double()
        with torch.no_grad():
            other.in_proj_weight.copy_(torch.cat([score.query.weight, score.key.weight, gather.value.weight]))
            other.in_proj_bias.copy_(torch.cat([score.query.bias, score.key.bias, gather.value.bias]))
            other.out_proj.load_state_dict(gather.out.state_dict())
        read, weights = other(score.latent, h, h, average_attn_weights=False)
        expected = F.layer_norm(read[0], (16,), gather.norm.weight, gather.norm.bias, 1e-6)
        torch.testing.assert_close(out.features[0, m], expected, atol=1e-12, rtol=0)
        maps[:, m] = weights[:, 0]
    torch.testing.assert_close(out.attention[0], maps, atol=1e-12, rtol=0)
    value = h @ pooler.bag.value.weight.T + pooler.bag.value.bias
    joined = torch.cat([maps.mean(1)[i] @ value[:, 2 * i : 2 * i + 2] for i in range(8)])
    expected = F.layer_norm(pooler.bag.out(joined), (16,), eps=1e-6)
    torch.testing.assert_close(out.feature[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(pooler.attention(tokens)[0], maps.mean(0), atol=1e-12, rtol=0)
    one: Any = MHABagPool(DIM, d_inner=16).double().eval()
    one.reduce, one.score, one.gather = pooler.reduce, pooler.scores[0], pooler.gathers[0]
    torch.testing.assert_close(one(tokens), out.features[:, 0], atol=1e-12, rtol=0)
    fresh: Any = ACMILMHAPool(DIM, d_inner=64)
    assert fresh.scores[0].latent.std().item() == pytest.approx(1e-6, rel=0.4)


@both
def test_evaluation_ignores_hiding_and_hiding_nothing_is_evaluation(mha: bool) -> None:
    tokens, mask = padded()
    plain = model(mha=mha, n_masked_patch=0).eval()(tokens, mask)
    dropout: dict[str, Any] = {"dropout": 0.0} if mha else {}
    for settings, training in (
        ({"n_masked_patch": 10, "mask_drop": 0.6}, False),
        ({"n_masked_patch": 10, "mask_drop": 0.0}, True),
        ({"n_masked_patch": 0, "mask_drop": 0.6}, True),
    ):
        out = model(mha=mha, **dropout, **settings).train(training)(tokens, mask)  # type: ignore[arg-type]
        for name in ("feature", "logits", "branch_logits", "attention", "scores"):
            assert torch.equal(getattr(out, name), getattr(plain, name)), name


def test_attention_to_draw_hides_nothing_even_in_training() -> None:
    pooler = bag("acmil").train()
    tokens = draw(2, 20, DIM)
    assert (pooler.attention(tokens) > 0).all()
    assert torch.equal(pooler.attention(tokens), bag("acmil").attention(tokens))


def test_one_branch_without_hiding_is_gated_abmil() -> None:
    whole = model(n_token=1, n_masked_patch=0).train()
    abmil = ABMILPool(DIM, d_inner=16, hidden=8).double()
    abmil.load_state_dict(whole.pooler.state_dict())
    tokens, mask = padded()
    out = whole(tokens, mask)
    torch.testing.assert_close(out.feature, abmil(tokens, mask), atol=1e-12, rtol=0)
    loss = acmil_loss(out, torch.tensor([0, 1, 2]))
    assert loss["branch"] == 0
    assert loss["div"] == 0
    assert torch.equal(loss["total"], F.cross_entropy(whole.classifier(abmil(tokens, mask)), torch.tensor([0, 1, 2])))
    loss["total"].backward()
    assert all(p.grad is None for p in whole.branch_classifiers.parameters())
    assert whole.classifier.weight.grad is not None


def test_a_shift_of_all_scores_of_a_branch_gets_no_gradient() -> None:
    whole = model().train()
    loss = acmil_loss(whole(draw(4, 20, DIM)), torch.tensor([0, 1, 2, 0]))["total"]
    loss.backward()
    grads = {name: p.grad.abs().max().item() for name, p in whole.named_parameters() if p.grad is not None}
    assert grads.pop("pooler.score.w.bias") < 1e-9
    assert len(grads) == len(list(whole.parameters())) - 1
    assert min(grads.values()) > 1e-6


@pytest.mark.parametrize("chunk", [1, 3, 8, 20, 50])
def test_evaluation_in_chunks_is_evaluation(chunk: int) -> None:
    whole = model().eval()
    whole.pooler.score.w.weight.data.mul_(30)  # the largest score moves from chunk to chunk
    tokens, mask = padded()
    for real in (mask, None):
        given = tokens if real is not None else tokens.nan_to_num(0, 0, 0)
        dense, chunked = whole(given, real), whole.in_chunks(given, real, chunk=chunk)
        for name in ("feature", "logits", "branch_logits", "attention", "scores"):
            torch.testing.assert_close(getattr(chunked, name), getattr(dense, name), atol=1e-12, rtol=0)
    assert not chunked.logits.requires_grad


def test_chunks_are_refused_in_training_for_heads_and_below_one() -> None:
    tokens = draw(1, 5, DIM)
    with pytest.raises(InputError, match="chunk: this pooler is in training mode"):
        model().train().in_chunks(tokens)
    with pytest.raises(InputError, match="chunk: ACMILMHAPool takes whole bags only"):
        model(mha=True).eval().in_chunks(tokens)
    with pytest.raises(InputError, match="chunk: got 0"):
        model().eval().in_chunks(tokens, chunk=0)


def test_norm_is_the_batch_norm_of_the_common_probe_on_the_bag_alone() -> None:
    torch.manual_seed(0)
    whole = ACMIL(ACMILPool(DIM, n_masked_patch=0), 3, norm="bn").double().train()
    tokens = draw(6, 9, DIM)
    out = whole(tokens)
    z = out.feature
    normed = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(out.logits, whole.classifier(normed), atol=1e-10, rtol=0)
    plain = ACMIL(ACMILPool(DIM, n_masked_patch=0), 3).double().train()
    plain.load_state_dict(whole.state_dict(), strict=False)
    assert torch.equal(plain(tokens).branch_logits, out.branch_logits)
    with pytest.raises(InputError, match="norm: got 'ln'"):
        ACMIL(ACMILPool(DIM), 3, norm="ln")  # type: ignore[arg-type]


def test_autocast_keeps_scores_and_maps_in_fp32() -> None:
    for mha in (False, True):
        whole = model(mha=mha).float().train()
        tokens = draw(2, 12, DIM).float()
        with torch.autocast("cpu", torch.bfloat16):
            out = whole(tokens)
            loss = acmil_loss(out, torch.tensor([0, 1]))
            feature = whole.pooler(tokens)
        assert out.scores.dtype == out.attention.dtype == loss["total"].dtype == torch.float32
        assert out.logits.dtype == torch.bfloat16
        assert feature.shape == (2, 16)
        loss["total"].backward()
        half = whole.to(torch.bfloat16).eval()(tokens.bfloat16())
        assert half.attention.dtype == torch.float32
        assert half.logits.dtype == torch.bfloat16


@both
def test_the_rest_keeps_its_ratios_when_some_is_hidden(mha: bool) -> None:
    settings: dict[str, Any] = {"dropout": 0.0} if mha else {}
    whole = model(mha=mha, **settings).train()
    tokens = draw(2, 30, DIM)
    masked, plain = whole(tokens).attention, whole.eval()(tokens).attention
    gone = masked == 0
    assert (gone.sum(-1) == 6).all()
    left = torch.where(gone, 0, plain)
    torch.testing.assert_close(masked, left / left.sum(-1, keepdim=True), atol=1e-12, rtol=0)


def test_stkim_trains_stacked_heads_with_the_draws_of_single_ones() -> None:
    pooler = bag("acmil").train()
    tokens = draw(3, 20, DIM)
    other = copy.deepcopy(pooler)
    other.score.w.weight.data.neg_()
    stacked = {
        k: torch.stack([v.detach(), dict(other.named_parameters())[k].detach()]) for k, v in pooler.named_parameters()
    }
    blank = copy.deepcopy(pooler)
    together = torch.func.vmap(lambda one: torch.func.functional_call(blank, one, (tokens,)))(stacked)
    torch.testing.assert_close(together, torch.stack([pooler(tokens), other(tokens)]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_drop": 1.5}, "mask_drop: got 1.5"),
        ({"mask_drop": True}, "mask_drop: got True"),
        ({"n_masked_patch": -1}, "n_masked_patch: got -1"),
        ({"n_token": 0}, "n_token: got 0"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"d_inner": 0}, "d_inner: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"w_branch": -1}, "w_branch: got -1; give a number of at least 0"),
        ({"w_div": "much"}, "w_div: got 'much'"),
        ({"share_branch_classifier": 1}, "share_branch_classifier: got 1; give True or False"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ACMILPool(DIM, **settings)


def test_dropout_draws_from_the_poolers_own_generator() -> None:
    tokens = draw(2, 12, DIM)

    def twice(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        pooler = MHABagPool(DIM, d_inner=16, dropout=0.5, seed=seed).double().train()
        return pooler(tokens), pooler(tokens)

    (first, second), again = twice(0), twice(0)
    assert torch.equal(first, again[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, twice(1)[0])
    before = torch.get_rng_state()
    OwnDropout(0.5, 0)(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    out = OwnDropout(0.25, 3)(torch.ones(100_000))
    assert set(out.tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    with pytest.raises(InputError, match=r"dropout: got 1\.0; give a number from 0 to"):
        MHABagPool(DIM, d_inner=16, dropout=1.0)


def test_heads_have_to_divide_the_inner_width() -> None:
    for cls in (MHABagPool, ACMILMHAPool):
        with pytest.raises(InputError, match="heads: got 8, which does not divide d_inner=12"):
            cls(DIM)
    with pytest.raises(InputError, match="gated: got 1"):
        ABMILPool(DIM, gated=1)  # type: ignore[arg-type]


def test_training_on_a_separable_task_finds_the_marked_instance() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    target = torch.randint(0, 2, (64,), generator=generator)
    tokens = torch.randn(64, 30, DIM, generator=generator)
    place = torch.randint(0, 30, (64,), generator=generator)
    tokens[torch.arange(64), place, 0] = 6.0
    tokens[torch.arange(64), place, 1] = torch.where(target == 1, 6.0, -6.0)
    whole = ACMIL(ACMILPool(DIM, n_masked_patch=2), 2).train()
    optimiser = torch.optim.AdamW(whole.parameters(), lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        loss = acmil_loss(whole(tokens), target)
        loss["total"].backward()
        optimiser.step()
    out = whole.eval()(tokens)
    assert (out.logits.argmax(1) == target).float().mean() > 0.95
    assert (out.attention.mean(1).argmax(1) == place).float().mean() > 0.5
