"""A second stream beside the one that generates: what it leaves alone, what it refuses, and when it is forgotten."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from vlattn import compose
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.flowcut import FlowCut
from vlattn.interventions.m3id import M3ID
from vlattn.interventions.vcd import VCD
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet, cache_argument
from vlattn.runtime.second_prompt import with_image, without_image
from vlattn.runtime.second_stream import SecondStream
from vlattn.runtime.session import Session, session_of

NEW = 4
Combine = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
PRECOMPUTES = pytest.mark.skipif(
    "mm_encoder_outputs"
    not in inspect.signature(__import__("transformers").LlavaForConditionalGeneration.forward).parameters,
    reason="this version of transformers computes image features in the forward",
)


@contextmanager
def second_stream(model: Any, make: Any, combine: Combine) -> Iterator[Session]:
    """A second stream on a model without any method."""
    session = Session(model, adapter_for(model))
    hooks = HookSet(session.gate)
    try:
        SecondStream(session, make, combine).attach(hooks)
        yield session
    finally:
        hooks.remove()
        session.close()


def greedy(model: Any, inputs: dict[str, Any], **how: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **how
        )


def cache_in(output: Any) -> Any:
    return output.cache if hasattr(output, "cache") else output.past_key_values


# What it sees ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_with_the_same_prompt_both_streams_say_the_same_at_every_step(families: Any, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    seen = []

    def keep(main: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((main, second, step))
        return main

    for how in ({}, {"num_beams": 3}):
        seen.clear()
        vanilla = greedy(model, inputs, **how)
        with second_stream(model, with_image, keep):
            found = greedy(model, inputs, **how)
        assert torch.equal(found.sequences, vanilla.sequences)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.logits, vanilla.logits, strict=True))
        assert [step for _, _, step in seen] == [1, 2, 3, 4]
        for main, second, _ in seen:
            torch.testing.assert_close(second, main, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_main_streams_rope_deltas_stand_whatever_the_second_one_needs(families: Any, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, batch=1)

    def steps() -> list[torch.Tensor]:
        with torch.no_grad():
            out = model(**inputs)
            found = [out.logits[:, -1]]
            for token in (5, 9, 12):  # positions left to the model, which knows them from its rope_deltas
                out = model(input_ids=torch.tensor([[token]]), **{cache_argument(model): cache_in(out)})
                found.append(out.logits[:, -1])
        return found

    vanilla, deltas = steps(), model.model.rope_deltas.clone()
    with second_stream(model, without_image, lambda main, second, step: main):
        found = steps()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, vanilla, strict=True))
    assert torch.equal(model.model.rope_deltas, deltas)
    assert bool((deltas != 0).all())


def test_a_text_only_second_prompt_runs_once_for_all_beams_of_a_prompt(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs, rows = prompts(model, images=(1, 2)), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    with M3ID()(model):
        greedy(model, inputs, num_beams=3)
    length = inputs["input_ids"].shape[1]
    text = [shape for shape in rows if 1 < shape[1] < length]
    assert [shape[0] for shape in text] == [2]
    assert rows.count(torch.Size([6, 1])) == 2 * (NEW - 1)  # both streams, all beams


@PRECOMPUTES
def test_a_noised_image_is_encoded_once_for_all_beams_of_a_prompt(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs, images = prompts(model, images=(1, 2)), []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: images.append(output[0].shape[0]))
    with VCD()(model):
        greedy(model, inputs, num_beams=3)
    assert images == [3, 3]


def test_a_tuple_for_an_output_is_contrasted_as_well(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with torch.no_grad(), VCD()(model):
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def test_only_the_last_positions_logits_change(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with VCD()(model):
            found = model(**inputs).logits
    assert torch.equal(found[:, :-1], vanilla[:, :-1])
    assert not torch.equal(found[:, -1], vanilla[:, -1])


# A ban on what is plausible -------------------------------------------------------------------------------------------
def test_where_all_plausible_tokens_are_banned_afterwards_the_main_stream_chooses_among_the_rest(
    llava: Any, prompts: Any
) -> None:
    model = llava()
    inputs = prompts(model)
    with torch.no_grad():
        order = model(**inputs).logits[0, -1].argsort(descending=True).tolist()
    best = [token for token in order if token != model.config.image_token_id]
    how = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad(), VCD(beta=1.0)(model):
        free = model.generate(**inputs, do_sample=False, **how)
        banned = model.generate(**inputs, do_sample=False, bad_words_ids=[[best[0]]], **how)
        drawn = model.generate(**inputs, do_sample=True, bad_words_ids=[[best[0]]], **how)
    assert free.sequences[0, -1].item() == best[0]
    assert free.scores[0].softmax(-1).count_nonzero().item() == 1
    assert banned.sequences[0, -1].item() == best[1]
    assert drawn.scores[0].softmax(-1).sum().item() == pytest.approx(1)


# When it is forgotten -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_nothing_of_a_generation_is_left_when_it_ends(llava: Any, prompts: Any, how: dict[str, Any]) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))

    def caches() -> int:
        return sum(type(thing) is DynamicCache for thing in gc.get_objects())

    with VCD()(model):
        gc.collect()
        before = caches()
        gc.disable()  # references alone must let go
        try:
            output = greedy(model, inputs, **how)
            assert cache_in(output) is not None
            assert caches() == before + 2
            del output
            assert caches() == before
        finally:
            gc.enable()


def test_two_generations_with_caches_of_their_own_may_take_turns(llava: Any, prompts: Any, tiny: Any) -> None:
    model = llava()
    both = [prompts(model, seed=seed) for seed in (0, 1)]

    def start(inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    def go_on(output: Any) -> Any:
        return model(input_ids=tiny.next_token(output.logits), **{tiny.CACHE: cache_in(output)})

    with torch.no_grad(), VCD()(model):
        alone = [go_on(go_on(start(inputs))).logits for inputs in both]
        one, two = start(both[0]), start(both[1])
        one, two = go_on(one), go_on(two)
        turns = [go_on(one).logits, go_on(two).logits]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(turns, alone, strict=True))


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [VCD(), compose(FlowCut(keep=4), VCD()), compose(VCD(), FlowCut(keep=4))])
def test_labels_are_refused(llava: Any, prompts: Any, method: Intervention) -> None:
    model = llava()
    inputs = prompts(model)
    with method(model), pytest.raises(InputError, match="labels: contrasting two streams is for generation"):
        model(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("how", [{"assistant": True}, {"prompt_lookup_num_tokens": 2, "eos_token_id": 62}])
def test_assisted_generation_is_refused(llava: Any, prompts: Any, how: dict[str, Any]) -> None:
    model = llava()
    inputs = prompts(model)
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, :2]  # something to look up
    if how.pop("assistant", False):
        how = {"assistant_model": llava(seed=1)}
    with torch.no_grad(), VCD()(model), pytest.raises(InputError, match="ssisted generation"):
        model.generate(**inputs, max_new_tokens=8, do_sample=False, **how)


def test_a_prefill_in_chunks_is_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    # One stream must hold the whole image for the session to find it.
    chunk = inputs["input_ids"].shape[1] - 2
    with torch.no_grad(), M3ID()(model), pytest.raises((InputError, ValueError), match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, prefill_chunk_size=chunk)


def test_generation_without_a_cache_is_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    with torch.no_grad(), VCD()(model), pytest.raises(InputError, match="leave use_cache at True"):
        model.generate(**prompts(model), max_new_tokens=4, do_sample=False, use_cache=False)


def test_logits_of_several_last_positions_are_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    with torch.no_grad(), VCD()(model), pytest.raises(InputError, match="logits_to_keep: got 5"):
        model(**prompts(model), logits_to_keep=5)


def test_a_model_without_its_head_is_refused(llava: Any) -> None:
    model = llava()
    with pytest.raises(InputError, match="LlavaModel has no head"):
        VCD()(model.model).attach()


@pytest.mark.parametrize("first", [VCD(), M3ID()])
def test_two_contrasts_on_one_model_are_refused_and_the_first_goes_on(llava: Any, prompts: Any, first: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with pytest.raises(InputError, match="contrasted with a second stream already"):
        compose(first, M3ID())(model).attach()
    with torch.no_grad(), first(model):
        before = model(**inputs).logits
        with pytest.raises(InputError, match="contrasted with a second stream already"):
            VCD()(model).attach()
        assert torch.equal(model(**inputs).logits, before)


def test_a_step_that_does_not_continue_the_last_one_is_refused(llava: Any, prompts: Any, tiny: Any) -> None:
    model = llava()
    inputs = prompts(model)
    token = torch.tensor([[5]])
    with torch.no_grad():
        outside = model(**inputs)
        with VCD()(model):
            with pytest.raises(InputError, match="start each generation with an empty cache"):
                model(input_ids=token, **{tiny.CACHE: cache_in(outside)})
            out = model(**inputs)
            cache = cache_in(out)
            with pytest.raises(InputError, match="follows one token at a time, got 2"):
                model(input_ids=token.expand(1, 2), **{tiny.CACHE: cache})
            out = model(**inputs)
            cache = cache_in(out)
            cache.batch_repeat_interleave(2)
            with pytest.raises(InputError, match="does not continue the last prompt"):
                model(input_ids=token.expand(2, 1), **{tiny.CACHE: cache})
            out = model(**inputs)
            cache = cache_in(out)
            _shorten(cache)
            with pytest.raises(InputError, match="do not crop or copy the cache"):
                model(input_ids=token, **{tiny.CACHE: cache})


def _shorten(cache: Any) -> None:
    """Take the last position out of every layer; what `crop` wants for that changed with the versions."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]


def test_a_prompt_of_nothing_but_an_image_has_no_text_to_contrast_with(llava: Any, prompts: Any, tiny: Any) -> None:
    model = llava()
    inputs = prompts(model)
    ids = torch.full((1, tiny.per_image(model)), tiny.IMAGE)
    with torch.no_grad(), M3ID()(model), pytest.raises(InputError, match="nothing left for the second stream"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])


@PRECOMPUTES
def test_features_computed_outside_the_context_have_no_pixels_to_noise(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        features = {"image": model.model.get_image_features(pixels, return_dict=True)}
        with VCD()(model), pytest.raises(InputError, match="computed outside this context"):
            model(**inputs, mm_encoder_outputs=features)
        with VCD()(model):
            inside = {"image": model.model.get_image_features(pixels, return_dict=True)}
            found = model(**inputs, mm_encoder_outputs=inside).logits
            assert torch.equal(found, model(**inputs, pixel_values=pixels).logits)


def test_an_error_in_the_second_stream_leaves_the_model_as_it_was(llava: Any, prompts: Any, tiny: Any) -> None:
    model = llava()
    inputs = prompts(model)

    def broken(call: dict[str, Any], session: Session) -> dict[str, Any]:
        raise RuntimeError("no second prompt")

    with torch.no_grad():
        vanilla = model(**inputs).logits
        hooks = tiny.hooks_of(model)
        with (
            pytest.raises(RuntimeError, match="no second prompt"),
            second_stream(model, broken, lambda main, second, step: second) as session,
        ):
            model(**inputs)
        assert not session.gate.closed
        assert tiny.hooks_of(model) == hooks
        assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_without_its_image_a_prompt_is_the_same_by_ids_and_by_embeddings(families: Any, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    session = session_of(model, adapter_for)
    session.visual = session.adapter.visual_tokens(inputs)
    embed = model.get_input_embeddings()
    by_ids = without_image(inputs, session)
    ids = inputs["input_ids"]
    gone = [*session.adapter.placeholder_ids, *session.adapter.wrapper_ids]
    assert not torch.isin(by_ids["input_ids"], torch.tensor(gone)).any()
    assert family == "llava_next" or torch.isin(ids, torch.tensor(session.adapter.wrapper_ids)).any()
    call = {"inputs_embeds": embed(ids), "attention_mask": inputs["attention_mask"]}
    by_embeds = without_image(call, session)
    assert by_embeds["attention_mask"].equal(by_ids["attention_mask"])
    seen = by_ids["attention_mask"].bool()
    assert by_embeds["inputs_embeds"][seen].equal(embed(by_ids["input_ids"])[seen])
