"""VCD, ICD and M3ID against their definition: a logits processor that runs each second prompt anew, alone and whole."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn import compose
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.dyvte import DyVTE
from vlattn.interventions.fastv import FastV
from vlattn.interventions.flowcut import FlowCut
from vlattn.interventions.icd import ICD
from vlattn.interventions.m3id import M3ID
from vlattn.interventions.pai import PAI
from vlattn.interventions.sid import SID
from vlattn.interventions.uniform_prune import UniformPrune
from vlattn.interventions.vcd import VCD
from vlattn.models.registry import adapter_for

Inputs = dict[str, Any]
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm", "gemma3",
)  # fmt: skip
NEW = 4
WORDS = (5, 6, 7)
SEED, STEP, LAM = 3, 900, 0.4
SYSTEM = (50, 51)
METHODS: dict[str, Intervention] = {
    "vcd": VCD(noise_step=STEP, seed=SEED),
    "icd": ICD(WORDS),
    "m3id": M3ID(lam=LAM),
}
ICD_VARIANTS: dict[str, Intervention] = {
    "icd-after": ICD(WORDS, at="after_image"),
    "icd-system": ICD(WORDS, system=SYSTEM),
}


@pytest.fixture(scope="module")
def naive_two() -> ModuleType:
    """`tests/naive_second_stream.py`."""
    path = Path(__file__).parents[1] / "naive_second_stream.py"
    spec = importlib.util.spec_from_file_location("naive_second_stream", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(families: ModuleType, tiny: ModuleType, naive_two: ModuleType) -> Callable[..., tuple[Any, list[Inputs]]]:
    """`build(family)`: a model and two prompts of one row each, of different lengths and numbers of images."""

    def made(family: str, **options: Any) -> tuple[Any, list[Inputs]]:
        if family == "llava":
            model = tiny.llava(decoder_layers=4, image_size=16, layers=4, **options)
            singles = [tiny.prompts(model, images=(count,), seed=count) for count in (1, 2)]
        else:
            model = families.model(family, **options)
            counts = (1, 1) if family in ("idefics3", "smolvlm") else (1, 2)
            singles = [
                families.inputs(family, model, batch=1, seed=seed, images=count) for seed, count in enumerate(counts)
            ]
        return model, [singles[0], naive_two.grown(singles[1], [9, 11])]

    return made


def second_of(name: str, family: str, naive_two: ModuleType) -> Callable[[Inputs], Inputs]:
    """The second prompt of a method, by hand."""
    if name == "vcd":
        return lambda single: naive_two.noised(single, STEP, SEED)
    if name == "icd":
        return lambda single: naive_two.put_in(single, 0, WORDS)
    if name == "icd-system":
        return lambda single: naive_two.put_in(single, 1, WORDS, removed=len(SYSTEM))
    if name == "icd-after":
        return lambda single: naive_two.put_in(single, behind_image(single, family), WORDS)
    gone = (63, 62, 61, 60) if family.startswith(("qwen", "gemma")) else (63, 62)
    return lambda single: naive_two.text_only(single, gone)


def behind_image(single: Inputs, family: str) -> int:
    """Where text goes that follows the last image; Qwen-VL and Gemma 3 close one with a token of their own."""
    ids = single["input_ids"][0].tolist()
    return len(ids) - ids[::-1].index(63) + family.startswith(("qwen", "gemma"))


def weights_of(name: str) -> Callable[[int], tuple[float, float]]:
    if name == "m3id":
        return lambda step: (math.exp(LAM * step), 1 - math.exp(LAM * step))
    return lambda step: (2.0, -1.0)


def compare(
    model: Any, singles: list[Inputs], name: str, family: str, naive_two: ModuleType, **how: Any
) -> tuple[Any, Any]:
    """What the method generates for the batch, and what its definition does."""
    inputs = naive_two.joined(singles)
    banned = model.generation_config.suppress_tokens
    reference = naive_two.Contrasting(model, singles, second_of(name, family, naive_two), weights_of(name), 0.1, banned)
    torch.manual_seed(0)
    expected = naive_two.generate(model, inputs, reference, max_new_tokens=NEW, **how)
    torch.manual_seed(0)
    with torch.no_grad(), {**METHODS, **ICD_VARIANTS}[name](model):
        found = model.generate(**inputs, max_new_tokens=NEW, **naive_two.DETAILS, **how)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine.log_softmax(-1), theirs.log_softmax(-1), atol=2e-4, rtol=1e-4)
    return found, expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_each_step_is_that_of_the_second_prompt_alone_and_whole(
    build: Any, naive_two: ModuleType, name: str, family: str
) -> None:
    model, singles = build(family)
    compare(model, singles, name, family, naive_two, do_sample=False)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("family", ["llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", METHODS)
def test_videos_are_noised_kept_and_taken_out_as_images_are(
    families: ModuleType, naive_two: ModuleType, name: str, family: str, images: int
) -> None:
    model = families.model(family)
    singles = [families.inputs(family, model, batch=1, seed=seed, images=images, video=True) for seed in (0, 1)]
    singles[1] = naive_two.grown(singles[1], [9, 11])
    compare(model, singles, name, family, naive_two, do_sample=False)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ICD_VARIANTS)
def test_a_disturbance_behind_the_image_or_in_place_of_the_system_message_is_read_there(
    build: Any, naive_two: ModuleType, name: str, family: str, num_beams: int
) -> None:
    model, singles = build(family)
    singles = [naive_two.put_in(single, 1, SYSTEM) for single in singles]
    compare(model, singles, name, family, naive_two, do_sample=False, num_beams=num_beams)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_the_second_stream_follows_the_beams(build: Any, naive_two: ModuleType, name: str, family: str) -> None:
    model, singles = build(family)
    compare(model, singles, name, family, naive_two, do_sample=False, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("name", METHODS)
def test_the_second_stream_follows_beams_that_change_places(build: Any, naive_two: ModuleType, name: str) -> None:
    model, singles = build("llava")
    how = {"do_sample": False, "num_beams": 4, "num_return_sequences": 4, "output_logits": True}
    found, _ = compare(model, singles, name, "llava", naive_two, **how)
    within = found.beam_indices.view(2, 4, -1) - torch.tensor([0, 4]).view(2, 1, 1)
    assert bool((within[..., 1:].diff() != 0).any())


@pytest.mark.parametrize("how", [{"num_return_sequences": 3}, {"num_beams": 2}, {"top_k": 5, "temperature": 0.7}])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("name", METHODS)
def test_sampling_draws_from_the_contrasted_distribution(
    build: Any, naive_two: ModuleType, name: str, family: str, how: dict[str, Any]
) -> None:
    model, singles = build(family)
    compare(model, singles, name, family, naive_two, do_sample=True, **how)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("name", METHODS)
def test_the_kind_of_the_main_cache_does_not_matter(
    build: Any, naive_two: ModuleType, name: str, family: str, cache: str
) -> None:
    model, singles = build(family)
    compare(model, singles, name, family, naive_two, do_sample=False, num_beams=2, cache_implementation=cache)


# Neutral settings, and what is left behind ----------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("method", [VCD(alpha=0), ICD(WORDS, alpha=0), SID(alpha=0), M3ID(lam=0)])
def test_the_neutral_setting_is_vanilla_bit_for_bit(
    build: Any, tiny: ModuleType, naive_two: ModuleType, method: Intervention, family: str
) -> None:
    model, singles = build(family)
    inputs, how = naive_two.joined(singles), {"max_new_tokens": NEW, "do_sample": True, **naive_two.DETAILS}
    with torch.no_grad():
        torch.manual_seed(0)
        vanilla = model.generate(**inputs, **how)
        with method(model):
            torch.manual_seed(0)
            found = model.generate(**inputs, **how)
    assert torch.equal(found.sequences, vanilla.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.scores, vanilla.scores, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*METHODS, "sid"])
def test_the_model_is_left_as_it_was_and_generating_twice_gives_the_same(
    build: Any, tiny: ModuleType, naive_two: ModuleType, name: str, family: str
) -> None:
    model, singles = build(family)
    inputs = naive_two.joined(singles)
    method = METHODS.get(name, SID(keep=2))
    with torch.no_grad():
        vanilla = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **naive_two.DETAILS)
        # Behind a first run, in which stock code adds hooks of its own.
        hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
        with method(model):
            first = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=2)
            again = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=2)
            other = model.generate(**singles[1], max_new_tokens=NEW, do_sample=False)
            assert torch.equal(model.generate(**singles[1], max_new_tokens=NEW, do_sample=False), other)
        after = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **naive_two.DETAILS)
    assert torch.equal(first, again)
    assert torch.equal(after.sequences, vanilla.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after.scores, vanilla.scores, strict=True))
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings


# inputs_embeds --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("method", [METHODS["vcd"], METHODS["m3id"], SID(keep=2)], ids=["vcd", "m3id", "sid"])
def test_embeddings_say_what_their_ids_say(
    build: Any, naive_two: ModuleType, method: Intervention, family: str
) -> None:
    model, singles = build(family)
    inputs = naive_two.joined(singles)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad(), method(model):
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
        without = {name: value for name, value in inputs.items() if name != "input_ids"}
        found = model.generate(inputs_embeds=embeds, **without, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, -NEW:], expected)


def test_icd_needs_the_ids_whose_text_it_rewrites(build: Any) -> None:
    model, singles = build("llava")
    embeds = model.get_input_embeddings()(singles[0]["input_ids"])
    with torch.no_grad(), ICD(WORDS)(model), pytest.raises(InputError, match="give input_ids instead of inputs_embeds"):
        model(inputs_embeds=embeds, pixel_values=singles[0]["pixel_values"])


# With pruning and edits of attention ----------------------------------------------------------------------------------
OTHERS: dict[str, Intervention] = {
    "flowcut": FlowCut(keep=2, count="per_image"),
    "uniform": UniformPrune(keep=2),
    "fastv": FastV(keep=3, layer=2),
    "dyvte": DyVTE(exit_layer=1),
    "pai": PAI(alpha=0.9, gamma=1, start_layer=0),
}


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", [*METHODS, "sid"])
def test_other_methods_act_on_the_main_stream_and_the_second_sees_the_image_whole(
    build: Any, naive_two: ModuleType, name: str, other: str, family: str
) -> None:
    model, singles = build(family)
    method, cut = METHODS.get(name, SID(keep=2)), OTHERS[other]
    if cut.refuses(type(adapter_for(model))) is not None:
        pytest.skip("this method does not claim this family")
    inputs, how = naive_two.joined(singles), {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        vanilla = _first(model.generate(**inputs, **how, return_dict_in_generate=True))
        with cut(model):
            pruned = _first(model.generate(**inputs, **how, return_dict_in_generate=True))
        with _unmasked(method)(model):
            contrasted = _first(model.generate(**inputs, **how, return_dict_in_generate=True))
        for both in (compose(cut, _unmasked(method)), compose(_unmasked(method), cut)):
            with both(model):
                found = _first(model.generate(**inputs, **how, return_dict_in_generate=True))
            a, b = weights_of(name)(1)
            second = (contrasted - a * vanilla) / b  # what the second stream says without any pruning
            torch.testing.assert_close(found, a * pruned + b * second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pruned, vanilla)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", [*METHODS, "sid"])
def test_with_another_method_a_contrasted_prompt_says_in_a_batch_what_it_says_alone(
    build: Any, naive_two: ModuleType, name: str, other: str, how: dict[str, Any]
) -> None:
    model, singles = build("llava")
    with torch.no_grad(), compose(OTHERS[other], METHODS.get(name, SID(keep=2)))(model):
        together = model.generate(**naive_two.joined(singles), max_new_tokens=NEW, do_sample=False, **how)[:, -NEW:]
        for b, single in enumerate(singles):
            found = model.generate(**single, max_new_tokens=NEW, do_sample=False, **how)[:, -NEW:]
            assert torch.equal(found, together[b : b + 1])


def _first(output: Any) -> torch.Tensor:
    return output.logits[0].double()


def _unmasked(method: Intervention) -> Intervention:
    return replace(method, beta=0.0)  # type: ignore[call-arg]


# Precision ------------------------------------------------------------------------------------------------------------
def test_step_by_step_in_double_precision_the_logits_are_those_of_two_whole_forwards(
    build: Any, tiny: ModuleType, naive_two: ModuleType
) -> None:
    model, singles = build("llava")
    single, taken = singles[0], []
    noised = naive_two.noised(single, STEP, SEED)
    with torch.no_grad(), VCD(beta=0, noise_step=STEP, seed=SEED)(model):
        out = model(**single)
        steps = [out.logits[:, -1]]
        for _ in range(5):
            token = tiny.next_token(steps[-1][:, None])
            taken.append(int(token))
            cache = out.cache if tiny.CACHE == "cache" else out.past_key_values
            out = model(input_ids=token, **{tiny.CACHE: cache})
            steps.append(out.logits[:, -1])
    with torch.no_grad():
        for s, step in enumerate(steps):
            one, two = (model(**naive_two.grown(prompt, taken[:s])).logits[:, -1] for prompt in (single, noised))
            torch.testing.assert_close(step, 2 * one - two, atol=1e-10, rtol=0)


def test_half_precision_logits_are_contrasted_in_single_precision_and_handed_on_so(
    build: Any, naive_two: ModuleType
) -> None:
    model, singles = build("llava", dtype=torch.bfloat16)
    single = singles[0]
    with torch.no_grad():
        one = model(**single, logits_to_keep=1).logits
        two = model(**naive_two.noised(single, STEP, SEED), logits_to_keep=1).logits
        with VCD(beta=0, noise_step=STEP, seed=SEED)(model):
            last = model(**single, logits_to_keep=1).logits
            whole = model(**single).logits
    assert last.dtype == torch.float32
    torch.testing.assert_close(last, 2 * one.float() - two.float(), atol=1e-6, rtol=0)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(whole[:, -1].float(), last[:, 0], atol=0.05, rtol=0)
