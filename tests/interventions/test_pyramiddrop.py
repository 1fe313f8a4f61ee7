"""PyramidDrop: its probe and counts, and what it does to live models."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from vlattn.errors import InputError
from vlattn.interventions import pyramiddrop
from vlattn.interventions.decoder_pruner import keep_best, top_visual
from vlattn.interventions.fastv import last_query_score
from vlattn.interventions.pyramiddrop import PyramidDrop, probe_projections, stage_counts
from vlattn.runtime.decoder import Cut
from vlattn.runtime.layer_state import LayerState

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]


def rotary(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[:, None] / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


def heads(x: torch.Tensor) -> torch.Tensor:
    """[1, N, 8] as two heads [1, 2, N, 4]."""
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def test_the_next_layers_probe_gives_the_published_score(formula: Formula, numbers: Numbers) -> None:
    linear = {}
    for name, number in (("q_proj", 61), ("k_proj", 62)):
        linear[name] = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        with torch.no_grad():
            linear[name].weight.copy_(3 * formula(number, 8, 8))
    norm = LlamaRMSNorm(8, eps=1e-5).double()
    layer = SimpleNamespace(input_layernorm=norm, self_attn=SimpleNamespace(**linear))
    fired: list[str] = []
    for module in (norm, *linear.values()):
        module.register_forward_hook(lambda module, args, output: fired.append("hook"))
    with torch.no_grad():
        q, k = probe_projections(layer, 2 * formula(64, 1, 14, 8))
    assert (q.shape, k.shape, fired) == ((1, 1, 8), (1, 14, 8), [])
    cos, sin = rotary(torch.arange(14).double(), 4)
    query, _ = apply_rotary_pos_emb(heads(q), heads(q), cos[:, -1:], sin[:, -1:])
    _, key = apply_rotary_pos_emb(heads(k), heads(k), cos, sin)
    score = last_query_score(query, key, scale=0.5)
    expected = numbers("0.010068 0.000108 0.023613 0.000018 0.027182 0.002998 0.499984 0.270485")
    torch.testing.assert_close(score[0, 2:10], expected, atol=6e-7, rtol=0)
    visual = ((torch.arange(14) >= 2) & (torch.arange(14) < 10))[None]
    assert top_visual(score, visual, torch.tensor([4]))[0].nonzero().flatten().tolist() == [4, 6, 8, 9]


def test_stages_keep_shares_of_the_original_count() -> None:
    assert stage_counts(576, (0.5, 0.25, 0.125)) == [288, 144, 72]
    assert stage_counts(2928, (0.5, 0.25, 0.125)) == [1464, 732, 366]
    assert stage_counts(100, (1.0, 0.29, 0.001)) == [100, 29, 1]


# Live models ----------------------------------------------------------------------------------------------------------
def test_shares_of_the_depth_and_of_the_tokens_give_nested_sets_and_the_published_average(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=8)
    inputs = tiny.prompts(model, (1, 2))
    with torch.no_grad(), PyramidDrop(layers=(0.25, 0.5, 0.75))(model) as trace:
        out = model(**inputs, use_cache=True)
    assert trace.visual_by_layer == [[36, 72]] * 2 + [[18, 36]] * 2 + [[9, 18]] * 2 + [[4, 9]] * 3
    assert trace.budget()["average"] == pytest.approx(54 * 270 / 576, abs=0.2)  # 576 tokens would be 270
    text = inputs["attention_mask"].sum(1) - torch.tensor([36, 72])
    for layer, counts in enumerate(trace.visual_by_layer[:-1]):
        longest = int((text + torch.tensor(counts)).max())
        if layer >= 2:
            assert out.past_key_values.get_seq_length(layer) == longest
        assert trace.decoder_lengths[layer] == longest
    stages = [trace.kept_in_decoder[layer] for layer in (1, 3, 5)]
    for b in range(2):
        first, second, third = ({slot for slot in ids[b].tolist() if slot >= 0} for ids in stages)
        assert first > second > third


def test_probing_a_layer_does_not_fire_its_hooks_twice(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=4)
    inputs, fired = tiny.prompts(model), []
    block = model.model.language_model.layers[2]
    for module in (block, block.input_layernorm, block.self_attn.q_proj, block.self_attn.k_proj):
        module.register_forward_hook(lambda module, args, output: fired.append(type(module).__name__))
    with torch.no_grad(), PyramidDrop(layers=(2,), ratios=(0.5,))(model):
        model(**inputs)
    assert sorted(fired) == sorted(["Linear", "Linear", "LlamaRMSNorm", "LlamaDecoderLayer"])


def test_a_sliding_window_is_as_far_as_the_probed_layer_would_look(
    families: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[torch.Tensor] = []

    def watched(score: torch.Tensor, state: LayerState, keep: list[int]) -> Cut:
        scores.append(score)
        return keep_best(score, state, keep)

    monkeypatch.setattr(pyramiddrop, "keep_best", watched)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = families._text(4, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=kinds)
    model = families.model("gemma3", attn="eager", text_config=Gemma3TextConfig(**text))
    inputs = families.inputs("gemma3", model, batch=1)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        for layer in (1, 2):
            with PyramidDrop(layers=(layer,), ratios=(0.5,))(model):
                model(**inputs)
            expected = attentions[layer][:, :, -1].mean(1)
            torch.testing.assert_close(scores.pop(), expected, atol=1e-6, rtol=0)
            assert bool((expected[0, :-8] == 0).all()) == (layer == 1)


def test_the_default_needs_a_deep_decoder_and_says_so(tiny: ModuleType) -> None:
    model = tiny.llava(layers=2, decoder_layers=6)
    with pytest.raises(InputError, match=r"layers: got \(8, 16, 24\).*this decoder has layers 0 to 5; .*from 1 to 5"):
        PyramidDrop()(model).attach()
    with pytest.raises(InputError, match="layers: got"):
        PyramidDrop(layers=(2, 6), ratios=(0.5, 0.25))(model).attach()
    lists: dict[str, Any] = {"layers": [1, 5], "ratios": [0.5, 0.25]}
    assert PyramidDrop(**lists) == PyramidDrop(layers=(1, 5), ratios=(0.5, 0.25))
    PyramidDrop(**lists)(model).attach().detach()


def test_compact_positions_are_refused_where_they_have_three_dimensions(families: ModuleType) -> None:
    model = families.model("qwen2_vl")
    with pytest.raises(InputError, match="positions: 'compact' has no meaning for PyramidDrop"):
        PyramidDrop(layers=(1,), ratios=(0.5,), positions="compact")(model).attach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": (0.5, 0.25)}, "ratios: got 2 for 3 layers; give one for each of layers=(8, 16, 24)"),
        ({"counts": (9,)}, "counts: got 1 for 3 layers"),
        ({"ratios": (0.5, 0.6, 0.1)}, "ratios: got (0.5, 0.6, 0.1); give shares in (0, 1], none larger"),
        ({"ratios": (0.5, 0.25, 0.0)}, "ratios: got (0.5, 0.25, 0.0); give shares"),
        ({"ratios": 0.5}, "ratios: got 0.5; give a sequence"),
        ({"counts": (300, 200.0, 100)}, "counts: got (300, 200.0, 100); give numbers of visual tokens"),
        ({"counts": (100, 200, 300)}, "none larger than the one before"),
        ({"layers": (8, 16, -1)}, "layers: got -1"),
        ({"positions": "raster"}, "positions: got 'raster'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PyramidDrop(**settings)
