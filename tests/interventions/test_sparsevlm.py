"""SparseVLM: raters, votes and counts, and what it does to live models."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.decoder_pruner import top_visual
from vlattn.interventions.sparsevlm import (
    BUDGETS,
    SparseVLM,
    choose_raters,
    packed,
    rank_count,
    rater_relevance,
    recycle_counts,
    rotary_gain,
    text_similarity,
)

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]


def places(*spans: tuple[int, int], size: int) -> torch.Tensor:
    """bool [1, size], True in the half-open spans."""
    mask = torch.zeros(1, size, dtype=torch.bool)
    for start, stop in spans:
        mask[:, start:stop] = True
    return mask


def test_raters_and_their_votes_are_the_ones_the_released_code_gives(formula: Formula, numbers: Numbers) -> None:
    visual, text = places((3, 15), size=20), places((15, 20), size=20)
    similarity = text_similarity(2 * formula(43, 1, 20, 6), visual, text)
    torch.testing.assert_close(
        similarity[0, 15:], numbers("0.203100 0.234174 0.229650 0.170058 0.163019"), atol=6e-7, rtol=0
    )
    raters = choose_raters(similarity, text, torch.ones_like(text))
    assert raters[0].nonzero().flatten().tolist() == [15, 16, 17]

    q, k = 4 * formula(41, 1, 2, 20, 4), 4 * formula(42, 1, 2, 20, 4)
    index, real = packed(raters)
    rows = q[:, :, index[0]]
    causal = torch.arange(20) <= index[..., None]  # [1, R, 20]
    options: dict[str, Any] = {"scale": 0.5, "raters": real, "visual": visual, "key_mask": causal}
    found = rater_relevance(rows, k, **options)
    expected = numbers(
        "0.027598 0.057880 0.055072 0.086337 0.057104 0.077738 0.056415 0.016686 0.054312 0.106260 0.021155 0.043979"
    )
    torch.testing.assert_close(found[0, 3:15], expected, atol=6e-7, rtol=0)
    assert (top_visual(found, visual, torch.tensor([5]))[0].nonzero().flatten() - 3).tolist() == [1, 3, 4, 5, 9]
    # The rank is 3: int(3 * 2 + 1) stay, or all but one, or all where the rank is their number.
    assert rank_count(rows, k, **options, rank_scale=2.0, rank_bias=1.0).tolist() == [7]
    assert rank_count(rows, k, **options).tolist() == [11]
    assert rank_count(rows, k, **{**options, "visual": places((3, 6), size=20)}).tolist() == [3]


def test_raters_are_the_text_tokens_above_the_mean_in_a_padded_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 30, 12, generator=generator, dtype=torch.float64)
    visual = torch.cat([places((2, 14), size=30), places((5, 9), (12, 20), size=30), places((10, 12), size=30)])
    text = torch.cat([places((14, 30), size=30), places((9, 12), (20, 30), size=30), places((12, 30), size=30)])
    found = text_similarity(embeds, visual, text)
    raters = choose_raters(found, text, torch.ones_like(text))
    for b in range(3):
        v, x = embeds[b, visual[b]], embeds[b, text[b]]
        m = torch.stack([(x @ one).softmax(0) for one in v]).mean(0)
        torch.testing.assert_close(found[b, text[b]], m, atol=1e-12, rtol=0)
        assert torch.equal(raters[b, text[b]], m > 1 / len(x))
        assert not bool((raters[b] & ~text[b]).any())
        assert bool((found[b, ~text[b]] == 0).all())


def test_a_prompt_without_a_rater_is_rated_by_its_last_token() -> None:
    embeds = torch.ones(4, 9, 3)
    visual, valid = places((1, 4), size=9).expand(4, -1), torch.ones(4, 9, dtype=torch.bool)
    valid[3, 7:] = False
    text = torch.cat([places((4, 9), size=9), places((8, 9), size=9), places(size=9), places((4, 7), size=9)])
    similarity = text_similarity(embeds, visual, text)
    raters = choose_raters(similarity, text, valid)
    assert [row.nonzero().flatten().tolist() for row in raters] == [[8], [8], [8], [6]]


def test_similarities_of_half_precision_are_sharp_but_finite() -> None:
    embeds = 40 * torch.randn(1, 12, 512, generator=torch.Generator().manual_seed(1))
    similarity = text_similarity(embeds.half(), places((0, 6), size=12), places((6, 12), size=12))
    assert similarity.dtype == torch.float32
    assert bool(similarity.isfinite().all())  # products above 65504 would be inf in fp16
    assert float(similarity.sum()) == pytest.approx(1)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_votes_are_a_loop_over_raters_and_heads(kv_heads: int, corrected: bool, heads: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    size, batch = 300, 2
    q = torch.randn(batch, 4, size, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, size, 8, generator=generator, dtype=torch.float64)
    visual = torch.cat([places((5, 40), size=size), places((30, 45), size=size)])
    chosen = torch.zeros(batch, size, dtype=torch.bool)
    chosen[0, 60:230], chosen[1, [50, 299]] = True, True  # more raters than one block holds, and few
    gain = 1 + torch.rand(batch, size, size, generator=generator, dtype=torch.float64)
    index, real = packed(chosen)
    found = rater_relevance(
        q.gather(2, index[:, None, :, None].expand(-1, 4, -1, 8)),
        k,
        scale=8**-0.5,
        raters=real,
        visual=visual,
        key_mask=torch.arange(size) <= index[..., None],
        gain=gain.gather(1, index[..., None].expand(-1, -1, size)) if corrected else None,
        heads=heads,
    )
    for b in range(batch):
        voters, seen = chosen[b].nonzero().flatten(), visual[b].nonzero().flatten()
        table = torch.zeros(4, len(voters), len(seen), dtype=torch.float64)
        for h in range(4):
            for r, i in enumerate(voters.tolist()):
                row = (k[b, h * kv_heads // 4, : i + 1] @ q[b, h, i] / 8**0.5).softmax(0)[seen]
                table[h, r] = row / gain[b, i, seen] if corrected else row
        best = table.sum((1, 2)).argsort(descending=True)[: heads or 4]
        torch.testing.assert_close(found[b, seen], table[best].mean((0, 1)), atol=1e-12, rtol=0)
        assert bool((found[b, ~visual[b]] == 0).all())


def test_the_gain_is_the_cosine_sum_of_rotary_distances_and_never_below_a_tenth_of_its_peak() -> None:
    width, positions = 128, torch.arange(0, 2000, dtype=torch.float64)
    theta = 10000 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions[:, None] * torch.cat([theta, theta])
    ones = torch.ones(len(positions), width, dtype=torch.float64)
    turned = ones * angles.cos() + torch.cat([-ones[:, width // 2 :], ones[:, : width // 2]], 1) * angles.sin()
    gain = rotary_gain(turned[None, [699]], turned[None, :700])[0, 0].flip(0)
    direct = [2 / math.sqrt(width) * sum(math.cos(d * float(t)) for t in theta) for d in range(700)]
    torch.testing.assert_close(gain, torch.tensor(direct, dtype=torch.float64), atol=1e-9, rtol=0)
    assert [round(float(gain[d]), 2) for d in (0, 100, 699)] == [11.31, 5.40, 2.18]
    assert float(gain.min()) == pytest.approx(1.19, abs=5e-3)
    narrow = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])  # opposite after half a turn
    assert rotary_gain(narrow[:, :1], narrow)[0, 0].tolist() == pytest.approx([2**0.5, 0.1 * 2**0.5])


@pytest.mark.parametrize(
    ("version", "budget", "clusters", "processed", "counted"),
    [
        ("1.5", 192, [9, 4, 3], 206.5, 192.0),
        ("1.5", 128, [9, 7, 3], 145.4, 128.6),
        ("1.5", 96, [11, 7, 1], 114.1, 96.9),
        ("1.5", 64, [16, 2, 1], 82.3, 64.8),
        ("+", 192, [0, 0, 0], 206.8, 192.4),
        ("+", 128, [0, 0, 0], 144.1, 128.0),
        ("+", 96, [0, 0, 0], 113.9, 96.8),
        ("+", 64, [0, 0, 0], 81.8, 64.4),
    ],
)
def test_budgets_have_the_published_counts_and_averages(
    version: str, budget: int, clusters: list[int], processed: float, counted: float
) -> None:
    entering, found, n = [576] * 3, [], 576  # layers 0, 1, 2
    for keep, stop in zip(BUDGETS[version][budget], (7, 16, 32), strict=True):
        merged = recycle_counts(n - keep)[1] if version == "1.5" else 0
        found.append(merged)
        n = keep + merged
        entering += [n] * (stop - len(entering))
    assert found == clusters
    assert len(entering) == 32
    assert sum(entering) / 32 == pytest.approx(processed, abs=0.051)
    assert sum([*entering[1:], n]) / 32 == pytest.approx(counted, abs=0.051)


def test_recycling_takes_a_share_and_one_more_but_never_more_than_there_are() -> None:
    assert recycle_counts(276) == (83, 9)
    assert recycle_counts(1) == (1, 1)
    assert recycle_counts(10, recycle=1.0, cluster=1.0) == (10, 10)
    assert recycle_counts(10, recycle=0.0) == (0, 0)
    assert recycle_counts(0) == (0, 0)


# Live models ----------------------------------------------------------------------------------------------------------
def test_raters_are_chosen_from_what_enters_the_decoder(tiny: ModuleType, naive_pruners: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs = tiny.prompts(model, (1, 2), text=8)
    with torch.no_grad(), SparseVLM(layers=(1,), counts=(9,))(model) as trace:
        model(**inputs)
        for b in range(2):
            row = naive_pruners.start(tiny, model, inputs, b, [])
            padding = inputs["input_ids"].shape[1] - len(row.x)
            expected = [padding + place for place in naive_pruners.raters(row)]
            assert trace.notes["raters"][b] == expected  # type: ignore[index]
            assert 0 < len(expected) < 16


def test_the_last_token_rates_where_the_only_text_is_in_front_of_the_image(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs = tiny.prompts(model)
    size = inputs["input_ids"].shape[1]
    for behind in (0, 1):
        cut = {name: inputs[name][:, : size - 3 + behind] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), SparseVLM(layers=(1,), counts=(9,))(model) as trace:
            logits = model(**cut, pixel_values=inputs["pixel_values"]).logits
        assert trace.notes["raters"] == [[size - 4 + behind]]
        # An image's last token that speaks for the prompt stays beside the 9.
        merged = recycle_counts(36 - 9 - (behind == 0))[1]
        assert trace.visual_by_layer[-1] == [9 + merged + (behind == 0)]
        assert logits.shape[1] == 3 + 9 + merged + (behind == 0) + behind


@pytest.mark.parametrize("version", ["1", "1.5"])
def test_counts_by_rank_follow_the_raters_attention(tiny: ModuleType, naive_pruners: ModuleType, version: str) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs = tiny.prompts(model, (1, 2), text=10)
    settings: dict[str, Any] = {"version": version, "rank_scale": 2.5, "rank_bias": 1.0, "recycle": 0}
    method = SparseVLM(layers=(1,), counts="rank", **settings)
    with torch.no_grad(), method(model) as trace:
        model(**inputs)
    for b in range(2):
        row = naive_pruners.start(tiny, model, inputs, b, [])
        voters: list[int] = naive_pruners.raters(row)
        kept: list[int] = []

        def count(row: Any, weights: torch.Tensor, voters: list[int] = voters, kept: list[int] = kept) -> Any:
            votes = weights.mean(0)[voters][:, row.visual]
            rank = np.linalg.matrix_rank(votes.float().numpy())
            kept.append(min(int(rank * 2.5 + 1), len(row.visual) - 1))
            return row

        with torch.no_grad():
            naive_pruners.run(model, row, {1: count})
        assert trace.visual_by_layer[-1][b] == kept[0]
        assert 1 < kept[0] < 35


def test_noise_is_seeded_the_same_for_every_row_and_decides_only_between_near_equals(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs = {name: x.repeat(3, *[1] * (x.ndim - 1)) for name, x in tiny.prompts(model).items()}

    def logits(noise: float) -> torch.Tensor:
        with torch.no_grad(), SparseVLM(layers=(1,), counts=(9,), cluster=0.5, noise=noise)(model):
            return model(**inputs).logits

    quiet, faint, loud = logits(0.0), logits(1e-12), logits(10.0)
    assert torch.equal(faint, quiet)
    assert not torch.allclose(loud, quiet)
    assert torch.equal(logits(10.0), loud)
    torch.testing.assert_close(loud[1:], loud[:1].expand(2, -1, -1), atol=1e-12, rtol=0)


def test_versions_bring_their_layers_and_counts(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=32, dtype=torch.float32)
    inputs = tiny.prompts(model, text=12)

    def cuts(method: SparseVLM) -> list[int]:
        with torch.no_grad(), method(model) as trace:
            model(**inputs)
        return list(trace.kept_in_decoder)

    few: dict[str, Any] = {"rank_scale": 4.0, "recycle": 0}
    assert cuts(SparseVLM(keep=64)) == [6, 15]  # 66 tokens to keep are more than the image has
    assert cuts(SparseVLM(version="1", **few)) == [2, 6, 15, 19]
    assert cuts(SparseVLM(counts="rank", **few)) == [2, 6, 15]
    assert cuts(SparseVLM(layers=(1, 0.5), counts=(0.5, 9))) == [1, 16]
    number: dict[str, Any] = {"version": 1.5, "layers": [1, 2], "counts": [9, 0.1]}
    assert SparseVLM(**number) == SparseVLM(layers=(1, 2), counts=(9, 0.1))
    plus: dict[str, Any] = {"version": "plus"}
    assert dataclasses.replace(SparseVLM(), **plus) == SparseVLM(version="+")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 100}, "keep: got 100; version 1.5 has lists for 64, 96, 128, 192 (of 576 visual tokens): give one"),
        ({"version": "2"}, "version: got '2'; give '1', '1.5' or '+'"),
        ({"counts": (9, 3)}, "counts: 2 for 3 layers; give one for each entry of layers=(2, 6, 15)"),
        ({"counts": (9, 3, 0)}, "counts: got (9, 3, 0); give numbers of visual tokens, shares in (0, 1], or 'rank'"),
        ({"counts": (9, 3, 1.5)}, "counts: got (9, 3, 1.5)"),
        ({"counts": "half"}, "counts: got 'half'"),
        ({"recycle": -0.1}, "recycle: got -0.1; give a share from 0 to 1"),
        ({"cluster": 2}, "cluster: got 2"),
        ({"heads": 0}, "heads: got 0; give the share of heads that vote"),
        ({"noise": -1}, "noise: got -1"),
        ({"positions": "x"}, "positions: got 'x'"),
        ({"layers": ("a",)}, "layers: got 'a'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        SparseVLM(**settings)


def test_the_default_needs_a_deep_decoder_and_says_so(tiny: ModuleType, families: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=6)
    with pytest.raises(InputError, match=r"layers: got \(2, 6, 15\).*this decoder has layers 0 to 5; .*from 0 to 4"):
        SparseVLM()(model).attach()
    SparseVLM(layers=(0, 4), counts=(20, 5))(model).attach().detach()
    with pytest.raises(InputError, match="positions: 'compact' has no meaning for SparseVLM"):
        SparseVLM(layers=(0,), counts=(5,), positions="compact")(families.model("qwen2_vl")).attach()
