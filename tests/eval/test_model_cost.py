"""The cost of a live model in every family: by formula, by measured lengths, and by PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.eval.bench_flops import count_flops, is_counted
from vlattn.eval.bench_shapes import random_model
from vlattn.eval.cost import decode_macs, decoder_macs, flops, kv_bytes_formula, projector_macs
from vlattn.eval.layer_lengths import LayerLengths
from vlattn.eval.model_cost import measured_parts, model_cost, prefill_parts
from vlattn.models.registry import adapter_for
from vlattn.runtime.trace import Trace

FAMILIES = (
    *("llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"),
    *("smolvlm", "gemma3"),
)


# LLaVA-1.5-7B, without its weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava_7b() -> Any:
    return random_model("llava-1.5-7b", device="meta", dtype=torch.float16)


def fastv(layer: int, kept: int, text: int) -> Trace:
    """What FastV leaves behind: `kept` of 576 image tokens from decoder layer `layer` on."""
    return Trace(
        visual_tokens=576,
        prompt_length=576 + text,
        kept_length=576 + text,
        decoder_lengths=[576 + text] * layer + [kept + text] * (32 - layer),
        visual_by_layer=[[576]] * layer + [[kept]] * (33 - layer),
        visual_full=[576],
    )


@pytest.mark.parametrize(("layer", "kept", "image_only", "with_text"), [(2, 288, 0.526, 0.570), (32, 288, 1, 1)])
def test_fastv_on_llava_7b_has_the_ratios_of_the_literature(
    llava_7b: Any, layer: int, kept: int, image_only: float, with_text: float
) -> None:
    """arXiv 2403.06764, with the three FFN matrices of LLaMA; 60 text tokens."""
    cost = model_cost(llava_7b, fastv(layer, kept, 60))
    assert cost["image_only_ratio"] == pytest.approx(image_only, abs=6e-4)
    assert cost["decoder_ratio"] == pytest.approx(with_text, abs=6e-4)
    assert cost["tower_ratio"] == 1
    assert cost["ratio"] >= cost["decoder_ratio"]  # the tower is spared nothing


def test_the_parts_of_llava_7b_are_what_the_papers_print(llava_7b: Any) -> None:
    cost = model_cost(llava_7b, fastv(32, 576, 0), new_tokens=100)
    assert cost["decoder_macs"] / 1e12 == pytest.approx(3.817, abs=5e-4)
    assert cost["tower_macs"] / 1e12 == pytest.approx(0.1906, abs=5e-5)
    assert cost["projector_macs"] == projector_macs(576, (1024, 4096, 4096))
    assert cost["kv_bytes"] == 288 * 2**20
    assert cost["decode_macs"] == decode_macs([576] * 32, 100, 4096, 11008)


def test_inside_the_decoder_every_layer_counts_what_enters_it(llava_7b: Any) -> None:
    trace = fastv(2, 144, 60)
    cost = model_cost(llava_7b, trace, new_tokens=7)
    lengths = [636] * 2 + [204] * 30
    assert cost["decoder_lengths"] == lengths
    assert cost["decoder_macs"] == decoder_macs(lengths, 4096, 11008)
    assert cost["decode_macs"] == decode_macs(lengths, 7, 4096, 11008)
    assert cost["kv_bytes"] == kv_bytes_formula(1, lengths, 32, 128, 2)
    assert cost["kv_ratio"] == sum(lengths) / (32 * 636)
    assert cost["vanilla"]["kv_bytes"] == kv_bytes_formula(1, [636] * 32, 32, 128, 2)
    assert cost["decode_ratio"] == cost["decode_macs"] / cost["vanilla"]["decode_macs"]
    average, counted = (2 * 576 + 30 * 144) / 32, (576 + 31 * 144) / 32
    assert cost["budget"] == {"final": 144, "average": average, "counted": counted}


def test_the_image_only_ratio_sums_over_the_prompts_of_a_batch(llava_7b: Any) -> None:
    trace = fastv(0, 0, 60)
    trace.visual_full = [576, 1152]
    trace.visual_by_layer = [[576, 1152]] * 16 + [[100, 300]] * 17
    expected = sum(decoder_macs([full] * 16 + [left] * 16, 4096, 11008) for full, left in ((576, 100), (1152, 300)))
    full = sum(decoder_macs([n] * 32, 4096, 11008) for n in (576, 1152))
    assert model_cost(llava_7b, trace)["image_only_ratio"] == expected / full


def test_without_visual_counts_the_image_only_ratio_follows_from_the_drop(llava_7b: Any) -> None:
    trace = Trace(visual_tokens=576, prompt_length=636, kept_length=124)
    assert model_cost(llava_7b, trace)["image_only_ratio"] == pytest.approx(0.4155 / 3.817, rel=1e-3)
    unknown = Trace(prompt_length=636, kept_length=124)
    assert model_cost(llava_7b, unknown)["image_only_ratio"] is None


# Lengths measured -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(llava: Callable[..., Any]) -> Any:
    return llava(image_size=32, decoder_layers=3, dtype=torch.float32)


@pytest.mark.parametrize("keep", [64, 20, 5])
def test_measured_lengths_give_what_the_formula_gives(
    model: Any, prompts: Callable[..., dict[str, Any]], keep: int
) -> None:
    inputs = prompts(model)
    with LayerLengths(model) as full:
        model(**inputs)
    with vlattn.FlowCut(keep=keep)(model) as trace, LayerLengths(model) as seen:
        model(**inputs)
    by_formula, measured = model_cost(model, trace), model_cost(model, trace, lengths=seen, vanilla=full)
    assert measured == by_formula
    assert measured["tower_lengths"][0] == 65


def test_a_batch_is_counted_with_all_its_prompts(model: Any, prompts: Callable[..., dict[str, Any]]) -> None:
    with LayerLengths(model) as one:
        model(**prompts(model))
    with LayerLengths(model) as both:
        model(**prompts(model, images=(1, 1)))  # the second prompt is 2 tokens longer, the first padded to it
    adapter = adapter_for(model)
    single, double = measured_parts(adapter, one), measured_parts(adapter, both)
    assert (double.tower, double.projector) == (2 * single.tower, 2 * single.projector)
    assert double.batch == 2
    assert double.decoder_lengths == tuple(n + 2 for n in single.decoder_lengths)
    assert double.decoder == 2 * prefill_parts(adapter, double.decoder_lengths).decoder


def test_generate_is_seen_as_its_prefill_and_the_next_one_overwrites_it(
    model: Any, prompts: Callable[..., dict[str, Any]]
) -> None:
    inputs, longer = prompts(model), prompts(model, images=(2,))
    found = []
    with LayerLengths(model) as seen:
        for run in (
            lambda: model(**inputs),
            lambda: model.generate(**longer, max_new_tokens=3),
            lambda: model.generate(**inputs, max_new_tokens=3),
        ):
            run()
            found.append((seen.batch, list(seen.decoder), [list(n) for n in seen.tower], seen.projector))
    assert found[0] == found[2] == (1, [70] * 3, [[65]] * 6, projector_macs(64, (16, 32, 32)))
    assert found[1] == (1, [137] * 3, [[65, 65]] * 6, projector_macs(128, (16, 32, 32)))


def test_the_hooks_leave_with_the_context(model: Any, tiny: ModuleType, prompts: Callable[..., dict[str, Any]]) -> None:
    model(**prompts(model))  # transformers adds hooks of its own at the first call
    before = tiny.hooks_of(model)
    with LayerLengths(model):
        model(**prompts(model))
        assert tiny.hooks_of(model) != before
    assert tiny.hooks_of(model) == before


# PyTorch's counter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_lengths_agree_with_what_pytorch_counts_in_every_family(families: ModuleType, family: str) -> None:
    """Towers that merge, tile, pool, pack and window: all matrix products but the patch embedding, to the last one.

    Before transformers 5.24 the rotary tables are batched products too (attention is not, under sdpa).
    """
    model = families.model(family, dtype=torch.float32)
    inputs = families.inputs(family, model)
    with LayerLengths(model) as seen:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
    parts = measured_parts(adapter_for(model), seen)
    head = model.lm_head.weight.numel() * parts.batch
    rotary = counted.by_op.get("aten.bmm", 0)
    assert rotary < 1e-3 * counted.total
    assert counted.total - rotary == flops(parts.total + head) + counted.by_op["aten.convolution"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_on_a_cpu_counts_as_much_as_eager(
    llava: Callable[..., Any], prompts: Callable[..., dict[str, Any]], dtype: torch.dtype
) -> None:
    """PyTorch's own counter leaves these kernels out: their share is the whole of attention."""
    totals = []
    for attn in ("eager", "sdpa"):
        model = llava(attn=attn, dtype=dtype)
        inputs = prompts(model, images=(1, 2))
        totals.append(count_flops(lambda model=model, inputs=inputs: model(**inputs)).total)
    assert totals[0] == totals[1]


def test_a_matrix_product_counts_two_operations_per_mac() -> None:
    found = count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7))
    assert found.total == found.by_op["aten.mm"] == 2 * 3 * 5 * 7


def test_attention_kernels_from_outside_are_known_not_to_be_counted() -> None:
    assert is_counted("sdpa")
    assert is_counted("vlattn_eager")
    assert not is_counted("flash_attention_2")


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_tower_that_merges_patches_needs_lengths(families: ModuleType) -> None:
    model = families.model("qwen2_vl", dtype=torch.float32)
    inputs = families.inputs("qwen2_vl", model)
    with LayerLengths(model) as full:
        model(**inputs)
    with vlattn.RandomPrune(keep=2)(model) as trace, LayerLengths(model) as seen:
        model(**inputs)
    with pytest.raises(InputError, match="merges patches"):
        model_cost(model, trace)
    cost = model_cost(model, trace, lengths=seen, vanilla=full)
    assert cost["tower_ratio"] == 1
    assert 0 < cost["decoder_ratio"] < 1
    assert cost["decoder_lengths"] == trace.decoder_lengths


def test_senseless_requests_are_refused(model: Any, prompts: Callable[..., dict[str, Any]]) -> None:
    with vlattn.FlowCut(keep=5)(model) as trace, LayerLengths(model) as seen:
        with pytest.raises(InputError, match="no prefill was seen"):
            seen.require()
        model(**prompts(model))
    with pytest.raises(InputError, match="both or neither"):
        model_cost(model, trace, lengths=seen)
    with pytest.raises(InputError, match="new_tokens"):
        model_cost(model, trace, new_tokens=0)
