"""The edit at place 0: a pruned model says what the stock model says to the short sequence, however it is asked."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.random_prune import RandomPrune
from vlattn.interventions.uniform_prune import UniformPrune

FLOWCUT, RANDOM, UNIFORM = vlattn.FlowCut(keep=8), RandomPrune(keep=9, seed=3), UniformPrune(keep=7)
METHODS = pytest.mark.parametrize("method", [FLOWCUT, RANDOM, UNIFORM], ids=["flowcut", "random", "uniform"])
BATCHES = pytest.mark.parametrize("images", [(1,), (1, 1), (2, 1), (1, 0, 3)], ids=str)


@pytest.fixture
def short(tiny: ModuleType, naive: ModuleType) -> Callable[..., Any]:
    """`short(model, inputs, method)`: (what the stock model is fed instead, the old positions of what survives)."""

    def make(model: Any, inputs: dict[str, Any], method: Any) -> tuple[dict[str, Any], torch.Tensor]:
        lead = int(model.config.vision_feature_select_strategy == "full")
        with torch.no_grad():
            if isinstance(method, vlattn.FlowCut):
                values, kept = naive.naive_features(model, inputs["pixel_values"], method.keep)
            else:
                stock = tiny.features(model, inputs["pixel_values"])
                with method(model) as trace:
                    model(**inputs)
                kept = trace.kept.tolist()
                slots = [list(range(lead)) + [lead + i for i in row] for row in kept]
                values = torch.stack([stock[i, row] for i, row in enumerate(slots)])
            places = [torch.tensor(list(range(lead)) + [lead + i for i in row]) for row in kept]
            rows = [tiny.with_slots(value, place) for value, place in zip(values, places, strict=True)]
            return tiny.short_sequence(model, inputs, rows)

    return make


def run(model: Any, method: Any, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad(), method(model):
        return model(**inputs, **more)


def say(model: Any, inputs: dict[str, Any], tokens: int = 6, **more: Any) -> torch.Tensor:
    """The generated tokens alone [B, n]."""
    found = model.generate(**inputs, max_new_tokens=tokens, **{"do_sample": False, **more})
    return found[:, -tokens:]


def same_logits(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert bool(expected[mask.bool()].isfinite().all())
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=tolerance, atol=tolerance)


# Rotary angles are fp32 in a model of any dtype, so shifting all positions of a row alike moves fp64 logits by 1e-6.
SHIFTED = 1e-5


# The short sequence ---------------------------------------------------------------------------------------------------
@METHODS
@BATCHES
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-10),
        ({"kv_heads": 1, "strategy": "full"}, 1e-10),
        ({"kv_heads": 4, "dtype": torch.float32}, 2e-5),
        ({"attn": "eager", "dtype": torch.float32}, 2e-5),
    ],
    ids=["sdpa-fp64", "gqa-full", "mha-fp32", "eager-fp32"],
)
def test_prefill_and_greedy_generation_equal_the_stock_model_fed_the_short_sequence(
    llava: Any,
    prompts: Any,
    short: Any,
    method: Any,
    images: tuple[int, ...],
    options: dict[str, Any],
    tolerance: float,
) -> None:
    model = llava(**options)
    inputs = prompts(model, images=images)
    stock, _ = short(model, inputs, method)
    with torch.no_grad():
        expected, spoken, vanilla = model(**stock).logits, say(model, stock), model(**inputs).logits
    with method(model) as trace:
        found = run_inside(model, inputs)
        assert torch.equal(say(model, inputs), spoken)
    same_logits(found, expected, stock["attention_mask"], tolerance)
    assert trace.prompt_length == int(inputs["attention_mask"].sum(1).max())
    assert trace.kept_length == stock["inputs_embeds"].shape[1] < trace.prompt_length
    assert not torch.allclose(vanilla[0, -1], found[0, -1], atol=1e-3)  # the drop is felt at all


def run_inside(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


@METHODS
def test_bf16_generation_equals_the_stock_model_fed_the_short_sequence(
    llava: Any, tiny: ModuleType, prompts: Any, method: Any
) -> None:
    model = llava(dtype=torch.bfloat16)
    inputs = prompts(model, images=(2, 1))
    with torch.no_grad(), method(model) as trace:
        model(**inputs)
        pruned = isinstance(method, vlattn.FlowCut)
        values = tiny.features(model, inputs["pixel_values"]) if pruned else None
    with torch.no_grad():
        values = tiny.features(model, inputs["pixel_values"]) if values is None else values
        rows = [tiny.with_slots(value[ids], ids) for value, ids in zip(values, trace.kept, strict=True)]
    stock, _ = tiny.short_sequence(model, inputs, rows)
    expected, spoken = run_inside(model, stock), say(model, stock)
    with method(model):
        found = run_inside(model, inputs)
        assert torch.equal(say(model, inputs), spoken)
    same_logits(found, expected, stock["attention_mask"], 1e-6)


@METHODS
@pytest.mark.parametrize("way", ["beams", "returned beams", "samples", "sampled beams"])
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_beams_and_samples_equal_the_stock_model_fed_the_short_sequence(
    llava: Any, prompts: Any, short: Any, method: Any, way: str, images: tuple[int, ...]
) -> None:
    more = {
        "beams": {"num_beams": 3},
        "returned beams": {"num_beams": 3, "num_return_sequences": 3},
        "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        "sampled beams": {"do_sample": True, "num_beams": 2},
    }[way]
    model = llava(dtype=torch.float32)
    if max(images) > 1 and not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("this transformers gives the beams of a prompt with several images the wrong images, pruned or not")
    inputs = prompts(model, images=images)
    stock, _ = short(model, inputs, method)
    torch.manual_seed(5)
    expected = say(model, stock, **more)
    with method(model):
        torch.manual_seed(5)
        found = say(model, inputs, **more)
    assert torch.equal(found, expected)
    assert found.shape[0] == len(images) * more.get("num_return_sequences", 1)


@METHODS
@pytest.mark.parametrize("way", ["inputs_embeds", "no cache", "no mask"])
def test_other_ways_to_generate_equal_the_stock_model_fed_the_short_sequence(
    llava: Any, prompts: Any, short: Any, method: Any, way: str
) -> None:
    model = llava()
    inputs = prompts(model, images=(1,) if way == "no mask" else (1, 2))
    stock, _ = short(model, inputs, method)
    expected, more = say(model, stock), {}
    if way == "inputs_embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    elif way == "no cache":
        more["use_cache"] = False
    else:
        del inputs["attention_mask"]
    with method(model):
        assert torch.equal(say(model, inputs, **more), expected)
    assert len(set(expected.flatten().tolist())) > 2


@METHODS
@pytest.mark.parametrize("positions", ["compact", "preserve"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_forward_without_mask_equals_one_with_a_mask_of_ones(
    llava: Any, prompts: Any, short: Any, method: Any, positions: str, use_cache: bool
) -> None:
    model = llava()
    inputs = prompts(model)
    stock, places = short(model, inputs, method)
    more = {"position_ids": places} if positions == "preserve" else {}
    del inputs["attention_mask"]
    found = run(model, type(method)(method.keep, positions=positions, **seed_of(method)), inputs, use_cache=use_cache)
    same_logits(found.logits, run_inside(model, stock, **more), stock["attention_mask"], 1e-10)


def seed_of(method: Any) -> dict[str, Any]:
    return {"seed": method.seed} if isinstance(method, RandomPrune) else {}


@pytest.mark.parametrize("masked", [True, False])
def test_prompts_of_one_length_with_different_numbers_of_images_need_no_mask(
    llava: Any, tiny: ModuleType, prompts: Any, short: Any, masked: bool
) -> None:
    model, method = llava(), UNIFORM
    inputs = prompts(model, images=(1, 2), text=3)
    filler = inputs["attention_mask"] == 0
    inputs["input_ids"][filler] = torch.arange(3, 3 + int(filler.sum()))  # real text instead of padding
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    stock, _ = short(model, inputs, method)
    if not masked:
        del inputs["attention_mask"]
    same_logits(run(model, method, inputs).logits, run_inside(model, stock), stock["attention_mask"], 1e-10)
    expected = decode(model, tiny, stock, 3, None)
    with method(model):
        found = decode(model, tiny, inputs, 3, None)
    for step, reference in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(step, reference, rtol=1e-10, atol=1e-10)


@METHODS
def test_preserve_equals_the_stock_model_given_the_original_positions(
    llava: Any, prompts: Any, short: Any, method: Any
) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))
    stock, places = short(model, inputs, method)
    keeping = type(method)(method.keep, positions="preserve", **seed_of(method))
    given = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    expected = run_inside(model, stock, position_ids=places)
    same_logits(run(model, keeping, inputs).logits, expected, stock["attention_mask"], SHIFTED)
    same_logits(run(model, keeping, inputs, **given).logits, expected, stock["attention_mask"], 1e-10)
    compact = run(model, method, inputs, **given).logits
    consecutive = (stock["attention_mask"].cumsum(1) - 1).clamp(min=0)
    same_logits(compact, run_inside(model, stock, position_ids=consecutive), stock["attention_mask"], 1e-10)
    assert not torch.allclose(compact[:, -1], expected[:, -1], atol=1e-4)


# Decoding -------------------------------------------------------------------------------------------------------------
def decode(
    model: Any, tiny: ModuleType, inputs: dict[str, Any], steps: int, positions: str | None
) -> list[torch.Tensor]:
    """A decode loop by hand: [prefill logits, step logits, ...]; `positions`: how position_ids are given, if at all."""
    inputs = dict(inputs)
    mask, places = inputs.get("attention_mask"), inputs.pop("position_ids", None)
    if positions == "given" and places is None:
        places = (mask.cumsum(1) - 1).clamp(min=0)
    out, logits = None, []
    for _ in range(steps + 1):
        more: dict[str, Any] = {} if places is None else {"position_ids": places}
        with torch.no_grad():
            if out is None:
                out = model(**inputs, **more, use_cache=True)
            else:
                token = tiny.next_token(logits[-1])
                mask = None if mask is None else torch.cat([mask, torch.ones_like(token)], 1)
                out = model(
                    input_ids=token, attention_mask=mask, **{tiny.CACHE: out[tiny.CACHE]}, **more, use_cache=True
                )
        logits.append(out.logits)
        if places is not None:
            places = places[:, -1:] + 1
    return logits


@METHODS
@pytest.mark.parametrize("keep_positions", ["compact", "preserve"])
@pytest.mark.parametrize("positions", ["given", None])
@pytest.mark.parametrize("images", [(1,), (2, 1)], ids=str)
def test_a_decode_loop_by_hand_equals_the_stock_loop_on_the_short_sequence(
    llava: Any, tiny: ModuleType, prompts: Any, short: Any, method: Any, keep_positions: str, positions: str | None,
    images: tuple[int, ...],
) -> None:  # fmt: skip
    model = llava()
    inputs = prompts(model, images=images)
    stock, places = short(model, inputs, method)
    if keep_positions == "preserve":
        stock["position_ids"] = places
    expected = decode(model, tiny, stock, 4, "given")
    with type(method)(method.keep, positions=keep_positions, **seed_of(method))(model):
        found = decode(model, tiny, inputs, 4, positions)
    tolerance = 1e-10 if positions == "given" else SHIFTED
    same_logits(found[0], expected[0], stock["attention_mask"], tolerance)
    for step, reference in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(step, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("positions", ["compact", "preserve"])
def test_a_decode_loop_without_masks_equals_one_with_them(
    llava: Any, tiny: ModuleType, prompts: Any, positions: str
) -> None:
    model = llava()
    inputs = prompts(model)
    with vlattn.FlowCut(keep=8, positions=positions)(model):
        expected = decode(model, tiny, inputs, 3, None)
        del inputs["attention_mask"]
        found = decode(model, tiny, inputs, 3, None)
    for step, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(step, reference, rtol=1e-12, atol=1e-12)


@METHODS
@pytest.mark.parametrize("positions", ["compact", "preserve"])
def test_cached_decoding_equals_recomputing_the_whole_sequence(
    llava: Any, tiny: ModuleType, prompts: Any, method: Any, positions: str
) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))
    with type(method)(method.keep, positions=positions, **seed_of(method))(model):
        steps = decode(model, tiny, inputs, 4, "given")
        tokens = torch.cat([tiny.next_token(logits) for logits in steps[:-1]], 1)
        whole = {
            "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
            "pixel_values": inputs["pixel_values"],
        }
        whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
        found = run_inside(model, whole)
    for i, step in enumerate(steps[1:]):
        torch.testing.assert_close(step[:, -1], found[:, -4 + i], rtol=1e-10, atol=1e-10)


def test_several_tokens_in_one_cached_step_equal_one_at_a_time(llava: Any, tiny: ModuleType, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad(), FLOWCUT(model):
        steps = decode(model, tiny, inputs, 3, "given")
        tokens = torch.cat([tiny.next_token(logits) for logits in steps[:-1]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=places[:, :-3])
        out = model(input_ids=tokens, attention_mask=mask, position_ids=places[:, -3:], **{tiny.CACHE: out[tiny.CACHE]})
    torch.testing.assert_close(out.logits, torch.cat(steps[1:], 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("images", [(1,), (2, 1)], ids=str)
def test_the_cache_is_shorter_in_every_layer_and_the_prompt_comes_back_whole(
    llava: Any, tiny: ModuleType, prompts: Any, images: tuple[int, ...]
) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, images=images)
    before = {name: value.clone() for name, value in inputs.items()}
    with FLOWCUT(model) as trace:
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = found[tiny.CACHE]
    expected = trace.prompt_length - max(images) * (36 - 8)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [expected + 3] * 3
    assert torch.equal(found.sequences[:, :-4], inputs["input_ids"])
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


# State ----------------------------------------------------------------------------------------------------------------
def test_repeated_generation_with_other_prompts_starts_afresh_each_time(llava: Any, prompts: Any) -> None:
    model = llava()
    batches = [prompts(model, images=images, seed=i) for i, images in enumerate([(1, 2), (3,), (1, 1, 1)])]
    alone = []
    for inputs in batches:
        with FLOWCUT(model):
            alone.append(say(model, inputs))
    with FLOWCUT(model) as trace:
        for inputs, expected in [*zip(batches, alone, strict=True), (batches[0], alone[0])]:
            assert torch.equal(say(model, inputs), expected)
            assert trace.kept.shape == (inputs["pixel_values"].shape[0], 8)
            assert set(trace.kept_by_layer) == {1, 3}


def test_a_prompt_that_fails_leaves_nothing_behind_for_the_next(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with FLOWCUT(model):
        expected = say(model, inputs)
        layer = model.model.vision_tower.encoder.layers[3]
        for module in (layer, model.model.multi_modal_projector, model.model.language_model.layers[1]):
            broken = module.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")), prepend=True)
            with pytest.raises(RuntimeError, match="stop"):
                say(model, inputs)
            broken.remove()
            assert torch.equal(say(model, inputs), expected)


def test_two_models_at_once_do_not_see_each_other(llava: Any, tiny: ModuleType, prompts: Any) -> None:
    models = [llava(seed=seed) for seed in (0, 1)]
    methods = [FLOWCUT, vlattn.FlowCut(keep=5, positions="preserve")]
    batches = [prompts(models[0], images=(1, 2)), prompts(models[1], images=(2,))]
    alone = []
    for model, method, inputs in zip(models, methods, batches, strict=True):
        with method(model):
            alone.append(decode(model, tiny, inputs, 3, "given"))
    with methods[0](models[0]), methods[1](models[1]), torch.no_grad():
        masks = [inputs["attention_mask"] for inputs in batches]
        starts = [(mask.cumsum(1) - 1).clamp(min=0) for mask in masks]
        outs = [models[i](**batches[i], position_ids=starts[i]) for i in range(2)]
        for step in range(3):
            for i, model in enumerate(models):
                token = tiny.next_token(outs[i].logits)
                masks[i] = torch.cat([masks[i], torch.ones_like(token)], 1)
                places = masks[i].cumsum(1)[:, -1:] - 1
                outs[i] = model(
                    input_ids=token, attention_mask=masks[i], position_ids=places, **{tiny.CACHE: outs[i][tiny.CACHE]}
                )
                torch.testing.assert_close(outs[i].logits, alone[i][step + 1], rtol=1e-12, atol=1e-12)


def test_two_threads_with_two_models_do_not_see_each_other(llava: Any, prompts: Any) -> None:
    models = [llava(seed=seed) for seed in (0, 1)]
    methods = [FLOWCUT, RANDOM]
    batches = [prompts(models[0], images=(1, 2)), prompts(models[1], images=(2,))]
    expected = []
    for model, method, inputs in zip(models, methods, batches, strict=True):
        with method(model):
            expected.append(say(model, inputs))
    found: list[list[torch.Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(4):
            with methods[i](models[i]):
                found[i].append(say(models[i], batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 4
        assert all(torch.equal(tokens, expected[i]) for tokens in found[i])


# Leaving --------------------------------------------------------------------------------------------------------------
@METHODS
@pytest.mark.parametrize("by_exception", [False, True])
def test_leaving_restores_hooks_settings_and_outputs_bit_for_bit(
    llava: Any, tiny: ModuleType, prompts: Any, method: Any, by_exception: bool
) -> None:
    model = llava(dtype=torch.float32)
    inputs = prompts(model, images=(1, 2))
    model.model.language_model.register_forward_pre_hook(lambda module, args: None)  # the user's own stay
    expected, spoken = run_inside(model, inputs, output_hidden_states=True), say(model, inputs)
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    try:
        with method(model):
            say(model, inputs)
            assert tiny.hooks_of(model) != hooks
            if by_exception:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings
    assert torch.equal(run_inside(model, inputs), expected)
    assert torch.equal(say(model, inputs), spoken)


def test_attach_acts_until_detach_which_may_be_called_twice(llava: Any, tiny: ModuleType, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with FLOWCUT(model):
        pruned = run_inside(model, inputs)
    vanilla, hooks = run_inside(model, inputs), tiny.hooks_of(model)
    handle = vlattn.attach(model, FLOWCUT)
    assert torch.equal(run_inside(model, inputs), pruned)
    assert handle.trace.kept.shape == (1, 8)
    with pytest.raises(InputError, match="attached already"):
        handle.attach()
    assert torch.equal(run_inside(model, inputs), pruned)
    handle.detach()
    handle.detach()
    assert tiny.hooks_of(model) == hooks
    assert torch.equal(run_inside(model, inputs), vanilla)
    with handle as trace:  # and it can be entered again
        assert torch.equal(run_inside(model, inputs), pruned)
    assert trace is handle.trace


def test_a_model_that_is_forgotten_while_attached_is_freed(llava: Any, prompts: Any) -> None:
    model = llava(layers=2, feature_layer=-1)
    handle = vlattn.attach(model, FLOWCUT)
    run_inside(model, prompts(model))
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


# Combining ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("second", [FLOWCUT, vlattn.FlowCut(keep=5), UNIFORM], ids=["same", "equal kind", "other kind"])
def test_a_second_pruner_is_refused_and_the_first_goes_on(
    llava: Any, tiny: ModuleType, prompts: Any, second: Any
) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))
    with pytest.raises(InputError, match="already chooses the image features"):
        vlattn.compose(FLOWCUT, second)
    with FLOWCUT(model):
        expected = say(model, inputs)
    hooks = tiny.hooks_of(model)
    with FLOWCUT(model):
        for context in (second(model), vlattn.compose(second)(model)):
            with pytest.raises(InputError, match="already chooses the image features"), context:
                pass
            assert torch.equal(say(model, inputs), expected)
        with pytest.raises(InputError, match="already chooses"):
            vlattn.attach(model.model, second)  # the same network under another name
        assert torch.equal(say(model, inputs), expected)
    assert tiny.hooks_of(model) == hooks


def test_a_composition_of_one_is_that_one_and_compose_refuses_what_is_no_intervention(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with FLOWCUT(model):
        expected = run_inside(model, inputs)
    with vlattn.compose(FLOWCUT)(model) as trace:
        assert torch.equal(run_inside(model, inputs), expected)
    assert trace.kept.shape == (1, 8)
    with pytest.raises(InputError, match="nothing"):
        vlattn.compose()
    with pytest.raises(InputError, match="no intervention"):
        vlattn.compose(FLOWCUT, "random")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="intervention"):
        vlattn.attach(model, vlattn.FlowCut)  # type: ignore[arg-type]


def test_the_inner_model_without_its_head_can_be_given(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with FLOWCUT(model), torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    with FLOWCUT(model.model), torch.no_grad():
        found = model.model(**inputs).last_hidden_state
    assert torch.equal(found, expected)


# Errors ---------------------------------------------------------------------------------------------------------------
def test_a_prompt_padded_on_the_right_is_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model, images=(1, 2))
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1)
    with FLOWCUT(model), pytest.raises(InputError, match="padding_side = 'left'"):
        run_inside(model, inputs)


def test_an_image_behind_a_cached_text_is_refused(llava: Any, prompts: Any, tiny: ModuleType) -> None:
    model = llava()
    inputs = prompts(model)
    with torch.no_grad(), FLOWCUT(model):
        with pytest.warns(UserWarning, match="no visual tokens"):
            cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)[tiny.CACHE]
        with pytest.raises(InputError, match="an image comes after positions that are cached already"):
            model(**{**inputs, "attention_mask": None, tiny.CACHE: cache})


def test_a_prompt_with_a_broken_span_is_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with FLOWCUT(model), pytest.raises(InputError, match="do not divide"):
        run_inside(model, {name: value[:, 5:] if value.ndim == 2 else value for name, value in inputs.items()})


@METHODS
@pytest.mark.parametrize("images", [(1,), (2, 1)], ids=str)
def test_a_static_cache_says_what_a_dynamic_one_says(
    llava: Any, prompts: Any, method: Any, images: tuple[int, ...]
) -> None:
    model = llava()
    inputs = prompts(model, images=images)
    with method(model):
        assert torch.equal(say(model, inputs, cache_implementation="static"), say(model, inputs))


def test_a_four_dimensional_mask_does_what_the_same_two_dimensional_one_does(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model, images=(2, 1))
    mask, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    by_hand = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None] & mask[:, None, :, None]
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with FLOWCUT(model):
        expected = run_inside(model, inputs)
        found = run_inside(model, {**inputs, "attention_mask": by_hand})
    torch.testing.assert_close(found[:, -5:], expected[:, -5:], rtol=1e-10, atol=1e-10)


def test_features_from_outside_the_context_are_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with torch.no_grad():
        outside = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    del inputs["pixel_values"]
    with FLOWCUT(model):
        with pytest.raises(InputError, match="outside this context"):
            run_inside(model, inputs, mm_encoder_outputs={"image": outside})
        with pytest.raises(InputError, match="outside this context"):
            run_inside(model, inputs)
    with vlattn.FlowCut(keep=36)(model):  # nothing is pruned, so nothing is missed
        run_inside(model, inputs, mm_encoder_outputs={"image": outside})


@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_of_another_prompt_is_refused(llava: Any, tiny: ModuleType, prompts: Any, masked: bool) -> None:
    model = llava()
    inputs, other = prompts(model), prompts(model, images=(1, 1))
    token = torch.tensor([[5]])
    with torch.no_grad():
        stock = model(**inputs)[tiny.CACHE]
        with FLOWCUT(model):
            mine = model(**inputs)[tiny.CACHE]
            model(**other)
            mask = torch.cat([inputs["attention_mask"], token.clamp(max=1)], 1) if masked else None
            with pytest.raises(InputError, match="does not continue the last prompt"):
                model(input_ids=token, attention_mask=mask, **{tiny.CACHE: mine})
            model(**inputs)
            if masked:
                with pytest.raises(InputError, match="attention_mask"):
                    model(input_ids=token, attention_mask=mask, **{tiny.CACHE: stock})


def test_a_mask_of_the_short_prompt_is_refused_at_a_step(llava: Any, tiny: ModuleType, prompts: Any) -> None:
    model = llava()
    inputs, token = prompts(model), torch.tensor([[5]])
    with FLOWCUT(model), torch.no_grad():
        cache = model(**inputs)[tiny.CACHE]
        short_mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        with pytest.raises(InputError, match="unpruned prompt's mask"):
            model(input_ids=token, attention_mask=short_mask, **{tiny.CACHE: cache})


@pytest.mark.parametrize("begun", ["outside", "inside"])
def test_an_image_that_arrives_after_the_first_cached_position_is_refused(
    llava: Any, tiny: ModuleType, prompts: Any, begun: str
) -> None:
    model = llava()
    inputs = prompts(model)
    start = {"input_ids": torch.tensor([[5, 6, 7]])} if begun == "outside" else inputs
    with torch.no_grad():
        if begun == "outside":
            cache = model(**start)[tiny.CACHE]
        with FLOWCUT(model):
            if begun == "inside":
                cache = model(**start)[tiny.CACHE]
            mask = torch.ones(1, start["input_ids"].shape[1] + inputs["input_ids"].shape[1], dtype=torch.long)
            with pytest.raises(InputError, match="empty cache"):
                model(**{**inputs, "attention_mask": mask}, **{tiny.CACHE: cache})


@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_generating_on_from_a_pruned_cache_with_the_whole_sequence_is_refused(
    llava: Any, tiny: ModuleType, prompts: Any, images: tuple[int, ...]
) -> None:
    model = llava()
    inputs = prompts(model, images=images)
    with FLOWCUT(model):
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = torch.full((len(images), 6), 5)
        ids = torch.cat([first.sequences, more[:, :3]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        with pytest.raises(InputError, match=r"start each generation with an empty cache|unpruned prompt's mask"):
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, **{tiny.CACHE: first[tiny.CACHE]})


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="assisted decoding there hands over a mask shorter than the tokens seen, which is refused in one line",
)
def test_looking_tokens_up_in_the_prompt_changes_no_token(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model, text=6)
    with FLOWCUT(model):
        expected = say(model, inputs, 12)
        # An end token that is never said: older transformers look one up in any case.
        looked_up = say(model, inputs, 12, prompt_lookup_num_tokens=3, eos_token_id=[10**6])
        assert torch.equal(looked_up, expected)


def test_a_prompt_prefilled_in_chunks_is_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model, images=(2,))
    for chunk in (16, 42):  # a chunk may end inside an image, or hold a whole one
        with FLOWCUT(model), pytest.raises(InputError):
            say(model, inputs, prefill_chunk_size=chunk)


def test_gradients_pass_through_the_drop_and_are_finite(llava: Any, prompts: Any) -> None:
    model = llava()
    with FLOWCUT(model):
        model(**prompts(model, images=(1, 2))).logits[:, -1].square().sum().backward()
    for module in (model.model.multi_modal_projector, model.model.language_model.layers[0]):
        for weight in module.parameters():
            assert bool(weight.grad.isfinite().all())
            assert bool((weight.grad != 0).any())


def test_an_unknown_family_is_refused_with_the_known_ones(llava: Any) -> None:
    with pytest.raises(InputError, match=r"known: gemma3, .*llava") as caught:
        vlattn.attach(torch.nn.Linear(2, 2), FLOWCUT)
    assert "Linear" in str(caught.value)
    with pytest.raises(InputError, match="model_type 'llama'"):
        vlattn.attach(llava().model.language_model, FLOWCUT)
