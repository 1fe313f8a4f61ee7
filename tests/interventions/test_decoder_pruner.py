"""What pruners inside the decoder share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions import fastv, pyramiddrop
from vlattn.interventions.base import Intervention
from vlattn.interventions.decoder_pruner import check_layers, keep_best, layers_of, share_of, top_visual
from vlattn.interventions.fastv import FastV
from vlattn.interventions.flowcut_decoder import DECODER_LAYER, decoder_flow_cut
from vlattn.interventions.pyramiddrop import PyramidDrop
from vlattn.interventions.sparsevlm import SparseVLM
from vlattn.interventions.uniform_prune import UniformPrune
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

FAMILIES = (
    "llava_next",
    "llava_onevision",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
)


@pytest.mark.parametrize("seed", range(4))
def test_top_visual_keeps_the_best_of_each_prompt_and_breaks_ties_by_position(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (6, 23), generator=generator).double()  # many ties
    visual = torch.rand(6, 23, generator=generator) < 0.6
    keep = torch.randint(0, 20, (6,), generator=generator)
    found = top_visual(score, visual, keep)
    for b in range(6):
        places = [i for i in range(23) if visual[b, i]]
        best = sorted(places, key=lambda i: (-float(score[b, i]), i))[: int(keep[b])]
        assert found[b].nonzero().flatten().tolist() == sorted(best)


def test_a_share_is_the_decimal_number_it_is_written_as() -> None:
    assert int(0.29 * 100) == 28  # what binary fractions would give
    assert share_of(100, 0.29) == 29
    assert [share_of(576, r) for r in (1.0, 0.5, 0.25, 0.125, 0.3)] == [576, 288, 144, 72, 172]
    assert all(share_of(1000, i / 1000) == i for i in range(1001))


# What every pruner inside the decoder does to a live model ------------------------------------------------------------
@dataclass(frozen=True)
class FlowStage(Intervention):
    """FlowCut's cut inside the decoder alone."""

    place = "decoder"

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        cut = Request(DECODER_LAYER, lambda state: decoder_flow_cut(state, 9), positions="compact", projections="qkv")
        session.cuts.after(cut, hooks)


CASES: dict[str, tuple[Intervention, Callable[[Any, Any, Any], dict[int, Any]]]] = {
    "fastv": (FastV(keep=9), lambda naive, model, row: naive.fastv(2, 9)),
    "fastv-mean-compact": (
        FastV(keep=9, layer=3, query="mean", positions="compact"),
        lambda naive, model, row: naive.fastv(3, 9, "mean", True),
    ),
    "pyramiddrop": (
        PyramidDrop(layers=(1, 3, 5), counts=(18, 9, 4)),
        lambda naive, model, row: naive.pyramiddrop(model, [1, 3, 5], [18, 9, 4]),
    ),
    "pyramiddrop-preserve": (
        PyramidDrop(layers=(1, 3), counts=(20, 5), positions="preserve"),
        lambda naive, model, row: naive.pyramiddrop(model, [1, 3], [20, 5], compact=False),
    ),
    "sparsevlm": (
        SparseVLM(layers=(0, 2, 4), counts=(20, 10, 5)),
        lambda naive, model, row: naive.sparsevlm(row, [0, 2, 4], [20, 10, 5]),
    ),
    "sparsevlm-preserve": (
        SparseVLM(layers=(1, 2), counts=(15, 10), positions="preserve"),
        lambda naive, model, row: naive.sparsevlm(row, [1, 2], [15, 10], compact=False),
    ),
    "sparsevlm-plus": (
        SparseVLM(layers=(0, 2, 4), counts=(20, 10, 5), version="+"),
        lambda naive, model, row: naive.sparsevlm(row, [0, 2, 4], [20, 10, 5], plus=True, compact=False),
    ),
    "flowcut": (FlowStage(), lambda naive, model, row: naive.flow(model, 9)),
}
SHORT: dict[str, Intervention] = {
    "fastv": FastV(keep=9),
    "fastv-mask": FastV(keep=9, mode="mask"),
    "pyramiddrop": PyramidDrop(layers=(1, 3), counts=(12, 5)),
    "sparsevlm": SparseVLM(layers=(0, 2), counts=(12, 5)),
    "sparsevlm-plus": SparseVLM(layers=(0, 2), counts=(12, 5), version="+"),
    "sparsevlm-rank": SparseVLM(layers=(0, 2), version="1", rank_scale=2.0),
}
"""For decoders of four layers, and families whose images have few tokens."""


def slots(kept: torch.Tensor, b: int) -> list[int]:
    """Row b of a trace's kept tokens without its padding."""
    return [slot for slot in kept[b].tolist() if slot != -1]


def decoded(
    tiny: ModuleType, model: Any, inputs: dict[str, torch.Tensor], steps: int
) -> tuple[list, torch.Tensor, Any]:
    """Greedy decoding with a cache by hand: (logits of each call, tokens [B, steps], cache)."""
    out = model(**inputs, use_cache=True)
    cache, mask, logits, tokens = out.past_key_values, inputs["attention_mask"], [out.logits], []
    for _ in range(steps):
        tokens.append(tiny.next_token(logits[-1]))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.sum(1, keepdim=True) - 1
        step = {"input_ids": tokens[-1], "attention_mask": mask, "position_ids": positions, tiny.CACHE: cache}
        logits.append(model(**step, use_cache=True).logits)
    return logits, torch.cat(tokens, 1), cache


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_prefill_and_cached_decode_are_the_uncached_recomputation_of_each_prompt_alone(
    tiny: ModuleType, naive_pruners: ModuleType, name: str, kv_heads: int
) -> None:
    method, stages = CASES[name]
    model = tiny.llava(layers=3, decoder_layers=6, kv_heads=kv_heads)
    inputs = tiny.prompts(model, (1, 1, 2))  # padded on the left by 43, 41 and 0
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), method(model) as trace:
        logits, tokens, cache = decoded(tiny, model, {**inputs, "position_ids": positions}, 3)
    longest = [0] * 6
    for b in range(3):
        for step in range(4):
            row = naive_pruners.start(tiny, model, inputs, b, tokens[b, :step].tolist())
            with torch.no_grad():
                expected, row, left = naive_pruners.run(model, row, stages(naive_pruners, model, row))
            torch.testing.assert_close(logits[step][b, -1], expected[-1], atol=1e-10, rtol=0)
            if step == 0:
                survivors = logits[0][b, -len(expected) :]
                torch.testing.assert_close(survivors, expected, atol=1e-10, rtol=0)
                assert all(slots(kept, b) == left[layer] for layer, kept in trace.kept_in_decoder.items())
                longest = [max(pair) for pair in zip(longest, row.lengths, strict=True)]
    assert trace.decoder_lengths == longest
    assert [cache.get_seq_length(layer) for layer in range(1, 6)] == [n + 3 for n in longest[1:]]
    assert len(trace.kept_in_decoder) == len(CASES[name][1](naive_pruners, model, row)) - (name == "flowcut")


def test_published_budgets_hold_on_576_tokens_and_32_layers(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, image_size=96, decoder_layers=32, dtype=torch.float32)
    inputs = tiny.prompts(model)
    budgets = {
        FastV(ratio=0.5): (288, 306.0, 297.0),
        FastV(average_keep=192): (166, 191.6, 178.8),
        FastV(average_keep=128): (98, 127.9, 112.9),
        FastV(average_keep=64): (30, 64.1, 47.1),
        PyramidDrop(): (72, 270.0, 254.2),
        PyramidDrop(layers=(2, 8, 16), counts=(356, 178, 89)): (89, 191.75, 176.5),
        SparseVLM(): (113, 206.5, 192.0),
        SparseVLM(keep=128): (39, 145.4, 128.6),
        SparseVLM(keep=64): (18, 82.3, 64.8),
        SparseVLM(keep=192, version="+"): (118, 206.8, 192.4),
        SparseVLM(keep=64, version="+"): (20, 81.8, 64.4),
    }
    for method, (final, average, counted) in budgets.items():
        with torch.no_grad(), method(model) as trace:
            model(**inputs)
        expected = {"final": final, "average": average, "counted": counted}
        assert trace.budget() == pytest.approx(expected, abs=0.051), method


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method",
    [
        FastV(keep=72),
        FastV(ratio=0.0, layer=1, query="mean"),
        FastV(average_keep=36, layer=5),
        FastV(keep=72, mode="mask"),
        FastV(ratio=0.0, positions="compact"),
        PyramidDrop(layers=(1, 5), ratios=(1.0, 1.0)),
        PyramidDrop(layers=(1, 5), counts=(72, 72), positions="preserve"),
        SparseVLM(layers=(0, 4), counts=(72, 72)),
        SparseVLM(layers=(0.1, 0.5), counts=(1.0, 1.0), version="+"),
    ],
    ids=str,
)
def test_keeping_everything_is_the_vanilla_model_bit_for_bit(tiny: ModuleType, method: Intervention, attn: str) -> None:
    model = tiny.llava(layers=2, decoder_layers=6, attn=attn, dtype=torch.float32)
    images = (1, 1) if isinstance(method, FastV) and method.average_keep else (1, 2)
    inputs = tiny.prompts(model, images)
    with torch.no_grad():
        expected = model(**inputs).logits
        greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with method(model) as trace:
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), greedy)
    assert trace.kept_in_decoder == {}
    assert trace.budget() == dict.fromkeys(("final", "average", "counted"), 36.0 * sum(images) / 2)


@pytest.mark.parametrize("name", SHORT)
def test_leaving_restores_the_model_and_the_next_prompt_starts_anew(tiny: ModuleType, name: str) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    first, second = tiny.prompts(model, (1, 2)), tiny.prompts(model, (2, 1, 1), seed=1)
    with torch.no_grad():
        model(**first)  # transformers' own recording hooks are there before ours
        expected = model(**first).logits
        hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
        with SHORT[name](model):
            fresh = model(**second).logits
        with SHORT[name](model):
            model.generate(**first, max_new_tokens=3)
            assert torch.equal(model(**second).logits, fresh)
        with pytest.raises(RuntimeError, match="stop"), SHORT[name](model):  # noqa: PT012
            model(**first)
            raise RuntimeError("stop")
        assert tiny.hooks_of(model) == hooks
        assert tiny.settings_of(model) == settings
        assert torch.equal(model(**first).logits, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "flowcut"])
def test_beams_have_the_scores_of_their_tokens_recomputed(
    tiny: ModuleType, naive_pruners: ModuleType, name: str
) -> None:
    method, stages = CASES[name]
    model = tiny.llava(layers=2, decoder_layers=6)
    inputs = tiny.prompts(model, (1, 1))  # older versions of transformers mix up several images of a prompt in beams
    with torch.no_grad(), method(model):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert len({tuple(row) for row in tokens.tolist()}) == 6
    for number, beam in enumerate(tokens.tolist()):
        total = 0.0
        for step, token in enumerate(beam):
            row = naive_pruners.start(tiny, model, inputs, number // 3, beam[:step])
            with torch.no_grad():
                logits = naive_pruners.run(model, row, stages(naive_pruners, model, row))[0][-1]
            total += float(logits.log_softmax(-1)[token])
        assert float(out.sequences_scores[number]) == pytest.approx(total / 4, abs=1e-5)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_as_many_tokens_and_stays_finite(tiny: ModuleType, name: str, dtype: torch.dtype) -> None:
    full = tiny.llava(layers=2, decoder_layers=4)
    inputs = tiny.prompts(full, (1, 2))
    with torch.no_grad(), SHORT[name](full) as expected:
        full(**inputs)
    model = tiny.llava(layers=2, decoder_layers=4, dtype=dtype)
    with torch.no_grad(), SHORT[name](model) as trace:
        out = model.generate(
            **tiny.prompts(model, (1, 2)),
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert trace.visual_by_layer == expected.visual_by_layer
    assert bool(torch.stack(out.logits).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_attention_that_every_family_reports_itself(
    families: ModuleType, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[torch.Tensor] = []

    def watched(score: torch.Tensor, state: LayerState, keep: list[int]) -> Cut:
        scores.append(score)
        return keep_best(score, state, keep)

    for module in (fastv, pyramiddrop):
        monkeypatch.setattr(module, "keep_best", watched)
    model = families.model(family, attn="eager")
    inputs = families.inputs(family, model, batch=1)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions  # [1, H, n, n] each
        for method, layer in (
            (FastV(keep=3), 1),
            (FastV(keep=3, layer=3), 2),
            (PyramidDrop(layers=(1,), counts=(3,)), 1),
            (PyramidDrop(layers=(2,), counts=(3,)), 2),
        ):
            with method(model) as trace:
                model(**inputs)
            # Eager attention takes its softmax in single precision.
            torch.testing.assert_close(scores.pop(), attentions[layer][:, :, -1].mean(1), atol=1e-6, rtol=0)
            assert trace.visual_by_layer[-1] == [3]
        if family != "gemma3":  # whose image tokens see each other in both directions, while this score is a causal one
            with FastV(keep=3, layer=1, query="mean")(model):
                model(**inputs)
            torch.testing.assert_close(scores.pop(), attentions[0].mean((1, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHORT)
def test_every_family_decodes_with_what_is_left(tiny: ModuleType, families: ModuleType, name: str, family: str) -> None:
    model, method = families.model(family), SHORT[name]
    inputs = families.inputs(family, model, batch=2)
    with torch.no_grad(), method(model) as trace:
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert bool(torch.stack(out.logits).isfinite().all())
    full = torch.isin(inputs["input_ids"], torch.tensor([families.IMAGE, families.VIDEO])).sum(1).tolist()
    assert trace.visual_by_layer[0] == full
    for b, n in enumerate(full):
        by_layer = [counts[b] for counts in trace.visual_by_layer]
        if isinstance(method, FastV):
            assert by_layer == [n, n, *[min(n, 9)] * 3]
        elif isinstance(method, PyramidDrop):
            assert by_layer == [n, min(n, 12), min(n, 12), min(n, 5), min(n, 5)]
        elif isinstance(method, SparseVLM) and method.version != "1":
            first = _left(n, 12, method)
            second = _left(first, 5, method)
            assert by_layer == [n, first, first, second, second]
    lengths = [out.past_key_values.get_seq_length(layer) for layer in range(1, 4)]
    masked = isinstance(method, FastV) and method.mode == "mask"
    assert masked or lengths == [n + 2 for n in trace.decoder_lengths[1:]]


def _left(n: int, keep: int, method: SparseVLM) -> int:
    """Visual tokens after a stage of SparseVLM, clusters counted."""
    if n <= keep:
        return n
    return keep if method.version == "+" else keep + int((int((n - keep) * 0.3) + 1) * 0.1) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_and_hidden_tokens_are_alike_to_the_others_in_every_family(families: ModuleType, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, batch=2)
    with torch.no_grad():
        with FastV(keep=5)(model) as trace:
            short = model(**inputs).logits
        with FastV(keep=5, mode="mask")(model) as masked:
            full = model(**inputs).logits
    assert masked.masked
    assert torch.equal(masked.kept_in_decoder[1], trace.kept_in_decoder[1])
    visual = torch.isin(inputs["input_ids"], torch.tensor([families.IMAGE, families.VIDEO]))
    for b in range(2):
        left = inputs["attention_mask"][b].bool() & ~visual[b]
        left[visual[b].nonzero().flatten()[slots(trace.kept_in_decoder[1], b)]] = True
        expected = full[b, left]
        torch.testing.assert_close(short[b, -len(expected) :], expected, atol=1e-10, rtol=0)


def test_text_only_prompts_of_a_batch_are_untouched(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs = tiny.prompts(model, (1, 0))
    alone = {name: inputs[name][1:, -5:] for name in ("input_ids", "attention_mask")}
    assert bool(alone["attention_mask"].all())
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**alone).logits
        for method in SHORT.values():
            with method(model):
                found = model(**inputs, position_ids=positions).logits
            torch.testing.assert_close(found[1:, -5:], expected, atol=1e-10, rtol=0)


def test_a_pruner_in_front_leaves_candidates_for_one_inside(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs = tiny.prompts(model, (1, 1))
    for method in SHORT.values():
        with torch.no_grad(), vlattn.compose(method, UniformPrune(keep=18))(model) as trace:
            model.generate(**inputs, max_new_tokens=2)
        assert trace.kept is not None
        offered = set(trace.kept[0].tolist())
        assert trace.visual_full == [36, 36]
        assert trace.visual_by_layer[0] == [18, 18]
        for kept in trace.kept_in_decoder.values():
            assert all(set(slots(kept, b)) - {-2} < offered for b in range(2))


def test_pruners_inside_the_decoder_exclude_each_other(tiny: ModuleType) -> None:
    with pytest.raises(InputError, match="PyramidDrop: FastV already ranks visual tokens"):
        vlattn.compose(FastV(keep=9), PyramidDrop())
    model = tiny.llava(layers=2, decoder_layers=4)
    with FastV(keep=9)(model), pytest.raises(InputError, match="SparseVLM: FastV already ranks"):
        SHORT["sparsevlm"](model).attach()


def test_layers_are_indices_or_shares_of_the_depth_and_errors_say_what_there_is() -> None:
    assert layers_of("layers", (8, 16, 24), 32, 1, 31) == [8, 16, 24]
    assert layers_of("layers", (0.25, 0.5, 0.75), 32, 1, 31) == [8, 16, 24]
    assert layers_of("layers", (2 / 32, 6 / 32, 15 / 32), 32, 0, 30) == [2, 6, 15]
    message = r"layers: got \(8, 16, 24\), which .* decoder has layers 0 to 5; .* from 1 to 5, such as \(([\d, ]+)\)"
    with pytest.raises(InputError, match=message) as caught:
        layers_of("layers", (8, 16, 24), 6, 1, 5)
    example = re.search(message, str(caught.value))
    assert example is not None
    assert layers_of("layers", tuple(map(int, example[1].split(", "))), 6, 1, 5) == [2, 3, 4]
    for wrong in ((3, 3), (4, 2), (0.1, 0.11), (0,), (6,)):
        with pytest.raises(InputError, match="layers: got"):
            layers_of("layers", wrong, 6, 1, 5)
    for nothing in ((1.5,), (-1,), (True,), ("a",), (0.0,), (1.0,), (), "12", 3):
        with pytest.raises(InputError, match="layers: got"):
            check_layers("layers", nothing)
