"""FastV: its scores and counts, and what it does to live models."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.decoder_pruner import top_visual
from vlattn.interventions.fastv import FastV, keep_by_average, keep_by_ratio, last_query_score, mean_query_score

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]


def causal_softmax(q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Dense attention [B, H, N, N] with the key heads repeated; rows of padding are 0."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    size = q.shape[2]
    seen = torch.ones(size, size, dtype=torch.bool).tril()[None]
    if valid is not None:
        seen = seen & valid[:, None] & valid[..., None]
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0)


def test_the_last_row_and_the_mean_row_are_the_published_ones(formula: Formula, numbers: Numbers) -> None:
    q, k = 4 * formula(1, 1, 2, 16, 4), 4 * formula(2, 1, 2, 16, 4)
    visual = torch.zeros(1, 16, dtype=torch.bool)
    visual[:, 3:12] = True
    last = last_query_score(q[:, :, -1:], k, scale=0.5)
    expected = numbers("0.105811 0.167106 0.015802 0.066594 0.068732 0.147153 0.025435 0.063732 0.029508")
    torch.testing.assert_close(last[0, 3:12], expected, atol=6e-7, rtol=0)
    for ratio, places in ((0.5, [3, 4, 7, 8]), (0.6667, [3, 4, 8])):
        kept = top_visual(last, visual, torch.tensor([keep_by_ratio(9, ratio)]))
        assert kept[0].nonzero().flatten().tolist() == places
    mean = mean_query_score(q, k, scale=0.5)
    expected = numbers("0.111317 0.099875 0.055693 0.092803 0.046297 0.059763 0.037594 0.027200 0.013978")
    torch.testing.assert_close(mean[0, 3:12], expected, atol=6e-7, rtol=0)
    assert top_visual(mean, visual, torch.tensor([4]))[0].nonzero().flatten().tolist() == [3, 4, 6, 8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 9), (4, 2, 150), (6, 1, 130)])
def test_scores_are_rows_of_dense_attention_with_grouped_heads_and_left_padding(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    q = torch.randn(3, heads, size, 8, generator=generator).to(dtype)
    k = torch.randn(3, kv_heads, size, 8, generator=generator).to(dtype)
    valid = torch.arange(size) >= torch.tensor([0, 3, size - 2])[:, None]
    dense = causal_softmax(q.double(), k.double(), valid)
    last = last_query_score(q[:, :, -1:], k, scale=8**-0.5, key_mask=valid)
    mean = mean_query_score(q, k, scale=8**-0.5, key_mask=valid)
    exact = dtype == torch.float64
    assert last.dtype == mean.dtype == (torch.float64 if exact else torch.float32)
    tolerance = 1e-12 if exact else 1e-5
    torch.testing.assert_close(last.double(), dense[:, :, -1].mean(1), atol=tolerance, rtol=0)
    expected = dense.mean(1).sum(1) / valid.sum(1, keepdim=True)
    torch.testing.assert_close(mean.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(mean.sum(1).double(), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_ratio_is_the_share_dropped_and_rounds_half_to_even() -> None:
    assert [keep_by_ratio(576, r) for r in (0.0, 0.25, 0.5, 0.75, 1.0)] == [576, 432, 288, 144, 0]
    assert [keep_by_ratio(n, 0.5) for n in (5, 7, 9, 11)] == [2, 4, 4, 6]


@pytest.mark.parametrize(
    ("layer", "average", "keep"),
    [(2, 192, 166), (2, 128, 98), (2, 64, 30), (3, 192, 152), (3, 128, 82), (3, 64, 11), (2, 576, 576)],
)
def test_an_average_budget_is_solved_for_the_count_after_the_cut(layer: int, average: float, keep: int) -> None:
    assert keep_by_average(576, average, layer, 32) == keep
    assert abs((layer * 576 + (32 - layer) * keep) / 32 - average) <= (32 - layer) / 64  # half a token a layer


@pytest.mark.parametrize("average", [30.0, 36.0, 577.0])
def test_an_average_that_the_layers_before_the_cut_exceed_is_refused_with_the_range(average: float) -> None:
    with pytest.raises(InputError, match=r"average_keep: got .* averages from 36\.94 to 576 can be had"):
        keep_by_average(576, average, 2, 32)


# Live models ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [1, 2, 5])
def test_dropped_and_hidden_tokens_are_alike_to_the_prompt(tiny: ModuleType, layer: int) -> None:
    model = tiny.llava(layers=2, decoder_layers=6)
    inputs = tiny.prompts(model, (1, 2))
    with torch.no_grad():
        with FastV(keep=7, layer=layer)(model) as dropped:
            short = model(**inputs).logits
        with FastV(keep=7, layer=layer, mode="mask")(model) as hidden:
            full = model(**inputs).logits
    assert (dropped.masked, hidden.masked) == (False, True)
    assert full.shape[1] == inputs["input_ids"].shape[1]
    kept = dropped.kept_in_decoder[layer - 1]
    assert torch.equal(hidden.kept_in_decoder[layer - 1], kept)
    visual = inputs["input_ids"] == tiny.IMAGE
    for b in range(2):
        left = inputs["attention_mask"][b].bool() & ~visual[b]
        left[visual[b].nonzero().flatten()[kept[b]]] = True
        torch.testing.assert_close(short[b, -int(left.sum()) :], full[b, left], atol=1e-10, rtol=0)


def test_masked_decoding_chooses_anew_by_each_new_token(tiny: ModuleType, naive_pruners: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=5)
    inputs = tiny.prompts(model, (1, 2))
    with torch.no_grad(), FastV(keep=5, layer=2, mode="mask")(model):
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert [out.past_key_values.get_seq_length(layer) for layer in range(5)] == [inputs["input_ids"].shape[1] + 4] * 5
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    for b in range(2):
        row = naive_pruners.start(tiny, model, inputs, b, tokens[b, :4].tolist())
        with torch.no_grad():
            logits, chosen = naive_pruners.masked_fastv(model, row, 2, 5)
        assert len(set(map(tuple, chosen))) > 1  # the test would show nothing otherwise
        for step in range(5):
            # generate hands logits on in single precision.
            expected = logits[row.prompt - 1 + step]
            torch.testing.assert_close(out.logits[step][b].double(), expected, atol=1e-5, rtol=0)


def test_without_a_cache_every_step_ranks_anew_by_the_newest_token(tiny: ModuleType, naive_pruners: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=5)
    inputs, chosen = tiny.prompts(model, (1, 2)), set()
    with torch.no_grad(), FastV(keep=5, layer=2)(model):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    for step in range(4):
        row = naive_pruners.start(tiny, model, inputs, 0, tokens[0, :step].tolist())
        row.prompt = len(row.x)
        with torch.no_grad():
            expected, _, left = naive_pruners.run(model, row, naive_pruners.fastv(2, 5))
        torch.testing.assert_close(out.logits[step][0].double(), expected[-1], atol=1e-5, rtol=0)
        chosen.add(tuple(left[1]))
    assert len(chosen) > 1


def test_budgets_count_each_prompt_by_itself(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=6)
    inputs = tiny.prompts(model, (1, 2))
    with torch.no_grad():
        for method, left in (
            (FastV(keep=40), [36, 40]),
            (FastV(ratio=0.5), [18, 36]),
            (FastV(ratio=0.9), [4, 7]),  # 3.6 and 7.2
            (FastV(average_keep=30.0), [27, 9]),
        ):
            with method(model) as trace:
                model(**inputs)
            assert trace.visual_by_layer == [[36, 72]] * 2 + [left] * 5
        assert trace.budget()["average"] == pytest.approx(30.0)
        with FastV(average_keep=12)(model), pytest.raises(InputError, match="average_keep: got 12; with 36 visual"):
            model(**tiny.prompts(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "keep, ratio, average_keep: got none of them; give exactly one"),
        ({"keep": 3, "ratio": 0.5}, "got keep, ratio; give exactly one"),
        ({"keep": 0}, "keep: got 0"),
        ({"keep": 2.0}, "keep: got 2.0"),
        ({"keep": True}, "keep: got True"),
        ({"ratio": 1}, "ratio: got 1; give the share of visual tokens to drop"),
        ({"ratio": -0.1}, "ratio: got -0.1"),
        ({"ratio": "half"}, "ratio: got 'half'"),
        ({"average_keep": 0}, "average_keep: got 0"),
        ({"keep": 3, "layer": 0}, "layer: got 0; give the first layer with fewer tokens, at least 1"),
        ({"keep": 3, "query": "all"}, "query: got 'all'"),
        ({"keep": 3, "mode": "hide"}, "mode: got 'hide'"),
        ({"keep": 3, "positions": "none"}, "positions: got 'none'"),
        ({"keep": 3, "query": "mean", "mode": "mask"}, "query: 'mean' needs the queries of all positions"),
        ({"keep": 3, "positions": "compact", "mode": "mask"}, "positions: 'compact' does not go with mode='mask'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        FastV(**settings)


def test_a_layer_that_the_decoder_lacks_is_refused_with_those_it_has(tiny: ModuleType, families: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=3)
    FastV(keep=3, layer=2)(model).attach().detach()
    with pytest.raises(InputError, match="layer: got 3, but this decoder has layers 0 to 2; give 1 <= layer <= 2"):
        FastV(keep=3, layer=3)(model).attach()
    qwen = families.model("qwen2_vl")
    with pytest.raises(InputError, match="positions: 'compact' has no meaning for FastV"):
        FastV(keep=3, positions="compact")(qwen).attach()
