"""VAR on live models: plain loops, batches, cached generation, pruning beside it, and what it refuses."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.var import VAR

DEPTH = 5
METHOD = VAR(tau=1.5, sink_dims=(3, 7), min_visual_mass=0.05, rho_nonsink=0.3)
"""Random states of width 32 have sinks at this threshold, and rows of random heads look at the image a little."""


@pytest.fixture(scope="module")
def naive_var() -> ModuleType:
    """`tests/naive_var.py`: the method in plain loops."""
    spec = importlib.util.spec_from_file_location("naive_var", Path(__file__).parents[1] / "naive_var.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(llava: Callable[..., Any]) -> Any:
    return llava(decoder_layers=DEPTH, image_size=16, layers=3)


def notes_of(trace: vlattn.Trace) -> Any:
    return trace.notes


def row(inputs: dict[str, Any], b: int, images: list[int]) -> dict[str, Any]:
    """Prompt `b` of a batch without its padding, with its own images."""
    alive, first = inputs["attention_mask"][b].bool(), sum(images[:b])
    single = {name: x[b : b + 1, alive] for name, x in inputs.items() if name != "pixel_values"}
    return {**single, "pixel_values": inputs["pixel_values"][first : first + images[b]]}


def embedded(model: Any, tiny: ModuleType, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """What the decoder gets of one prompt [T, D], and where its visual tokens are."""
    ids = inputs["input_ids"][0]
    embeds = model.get_input_embeddings()(ids).detach().clone()
    places = (ids == tiny.IMAGE).nonzero().flatten().tolist()
    with torch.no_grad():
        embeds[places] = tiny.features(model, inputs["pixel_values"]).flatten(0, 1)
    return embeds, places


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], method: Any = None, **more: Any) -> torch.Tensor:
    if method is None:
        return model(**inputs, **more).logits
    with method(model):
        return model(**inputs, **more).logits


# Against plain loops --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        VAR(tau=1.5, sink_dims=(3, 7), min_visual_mass=0, rho_nonsink=0, move=1.0),
        VAR(tau=1.2, sink_dims=(0,), min_visual_mass=0.1, skip_first_layers=1, skip_last_layer=False, eps=1e-3),
        VAR(tau=2.0, sink_dims=(9, 4, 30), min_visual_mass=0.05, require_visual_sink=False, skip_first_layers=0),
    ],
    ids=["some", "all", "wide", "text-sinks-alone"],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_prefill_is_that_of_plain_loops(
    llava: Callable[..., Any], prompts: Any, tiny: ModuleType, naive_var: ModuleType, method: VAR, kv_heads: int
) -> None:
    model = llava(decoder_layers=DEPTH, image_size=16, layers=3, kv_heads=kv_heads)
    inputs = prompts(model, images=(2,))
    embeds, image = embedded(model, tiny, inputs)
    expected = naive_var.run(model, embeds, image, method)
    with torch.no_grad(), method(model) as trace:
        found = model(**inputs).logits[0]
    assert float((found - expected.logits).abs().max()) < 1e-12
    assert float((found - logits(model, inputs)[0]).abs().max()) > 1e-3
    acting = range(method.skip_first_layers, DEPTH - int(method.skip_last_layer))
    slots = {place: slot for slot, place in enumerate(image)}
    assert notes_of(trace)["visual_sinks"] == {
        layer: [[slots[i] for i in expected.sinks[layer] if i in slots]] for layer in acting
    }
    pairs = 4 * (len(embeds) - 1 - image[-1])
    shares = {layer: [len(expected.chosen[layer]) / pairs] for layer in acting}
    assert notes_of(trace)["changed"] == shares
    assert any(share[0] > 0 for share in shares.values())


def test_decoding_step_by_step_is_one_pass_over_everything_with_sinks_of_the_prompt_alone(
    model: Any, prompts: Any, tiny: ModuleType, naive_var: ModuleType
) -> None:
    inputs = prompts(model)
    with METHOD(model) as trace:
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        at_prefill = copy.deepcopy(notes_of(trace))
    generated = out.sequences[0, inputs["input_ids"].shape[1] :]
    embeds, image = embedded(model, tiny, inputs)
    prompt = len(embeds)
    table = model.get_input_embeddings()
    whole = torch.cat([embeds, table(generated[:-1]).detach()])
    expected = naive_var.run(model, whole, image, METHOD, prompt=prompt)
    assert any(i >= prompt for found in expected.chosen.values() for _, i in found)
    everywhere = naive_var.run(model, whole, image, METHOD)
    assert float((everywhere.logits[-1] - expected.logits[-1]).abs().max()) > 1e-4  # generated tokens would be sinks
    # generate hands out fp32
    assert float((torch.cat(out.logits) - expected.logits[prompt - 1 :]).abs().max()) < 1e-6
    with METHOD(model) as trace:
        model(**inputs)
        assert notes_of(trace) == at_prefill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eager_attention_returns_the_changed_weights(
    llava: Callable[..., Any], prompts: Any, tiny: ModuleType, naive_var: ModuleType, dtype: torch.dtype
) -> None:
    model = llava(decoder_layers=DEPTH, image_size=16, layers=3, attn="eager", dtype=dtype)
    inputs = prompts(model)
    embeds, image = embedded(model, tiny, inputs)
    expected = naive_var.run(model.double(), embeds.double(), image, METHOD)
    model.to(dtype)
    with torch.no_grad(), METHOD(model):
        out = model(**inputs, output_attentions=True)
    assert len(out.attentions) == DEPTH
    for layer, weights in enumerate(out.attentions):
        assert float((weights[0].double() - expected.weights[layer]).abs().max()) < 1e-5
    assert any(expected.chosen.values())


# Who changes ----------------------------------------------------------------------------------------------------------
def outputs_by_layer(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What each attention hands to its output projection [B, T, H * d]."""
    found: list[torch.Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_the_image_the_text_before_it_and_the_first_layers_keep_their_bits(model: Any, prompts: Any) -> None:
    inputs = prompts(model)
    vanilla = outputs_by_layer(model, inputs)
    with METHOD(model):
        changed = outputs_by_layer(model, inputs)
    behind = 3 + 16  # three words and the image
    for layer in range(DEPTH):
        assert torch.equal(changed[layer][:, :behind], vanilla[layer][:, :behind])
    assert all(torch.equal(changed[layer], vanilla[layer]) for layer in (0, 1))
    assert not torch.equal(changed[2][:, behind:], vanilla[2][:, behind:])


def test_a_layer_changes_only_rows_of_heads_that_look_at_the_image(
    model: Any, prompts: Any, tiny: ModuleType, naive_var: ModuleType
) -> None:
    inputs = prompts(model)
    only = VAR(tau=1.5, sink_dims=(3, 7), min_visual_mass=0.3, rho_nonsink=0.7, skip_first_layers=DEPTH - 2)
    chosen = naive_var.run(model, *embedded(model, tiny, inputs), only).chosen[DEPTH - 2]
    vanilla = outputs_by_layer(model, inputs)[DEPTH - 2][0].unflatten(-1, (4, 8))  # [T, H, d]
    with only(model):
        changed = outputs_by_layer(model, inputs)[DEPTH - 2][0].unflatten(-1, (4, 8))
    differ = (changed != vanilla).any(-1).nonzero().tolist()
    assert {(h, i) for i, h in differ} == chosen
    assert 0 < len(chosen) < 4 * (len(vanilla) - 19)


@pytest.mark.parametrize(("skip_last", "same"), [(True, True), (False, False)])
def test_the_last_layer_changes_only_if_asked(model: Any, prompts: Any, skip_last: bool, same: bool) -> None:
    inputs = prompts(model)
    method = VAR(
        tau=1.5, sink_dims=(3, 7), min_visual_mass=0, rho_nonsink=0,
        skip_first_layers=DEPTH - 2, skip_last_layer=skip_last,
    )  # fmt: skip
    with method(model) as trace:
        model(**inputs)
    assert (list(notes_of(trace)["changed"]) == [DEPTH - 2]) == same


@pytest.mark.parametrize(
    "change",
    [{"move": 0.0}, {"min_visual_mass": 1.01}, {"rho_nonsink": 1.01}, {"tau": 5.6}],
    ids=["move", "mass", "rho", "tau"],
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_neutral_settings_give_the_bits_of_the_stock_model(
    llava: Callable[..., Any], prompts: Any, change: dict[str, Any], attn: str
) -> None:
    model = llava(decoder_layers=DEPTH, image_size=16, layers=3, attn=attn, dtype=torch.float32)
    inputs = prompts(model, images=(1, 2))
    settings = {"tau": 1.5, "min_visual_mass": 0.05, "rho_nonsink": 0.3, **change}
    with VAR(sink_dims=(3, 7), **settings)(model):
        assert (model.config.text_config._attn_implementation == attn) == (change == {"move": 0.0})
        found = logits(model, inputs)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, logits(model, inputs))
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def _fail(*args: Any) -> torch.Tensor:
    raise KeyError


def test_the_model_is_left_as_it_was_by_an_exception_too(model: Any, prompts: Any, tiny: ModuleType) -> None:
    inputs = prompts(model)
    vanilla = logits(model, inputs)  # transformers adds hooks of its own at the first call
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    with pytest.raises(KeyError), METHOD(model):
        model.generate(**inputs, max_new_tokens=2, logits_processor=[_fail])
    with METHOD(model):
        assert not torch.equal(logits(model, inputs), vanilla)
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings
    assert torch.equal(logits(model, inputs), vanilla)


# Batches --------------------------------------------------------------------------------------------------------------
def test_a_padded_batch_is_its_prompts_alone_in_any_order(model: Any, prompts: Any) -> None:
    images = [1, 2, 1]
    inputs = prompts(model, images=images)
    # Without them stock code counts padding, and tables of other positions differ in fp32.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with METHOD(model) as trace:
        together = logits(model, inputs)
        sinks = copy.deepcopy(notes_of(trace)["visual_sinks"])
        for b in (2, 0, 1):  # what came before is forgotten
            single = row(inputs, b, images)
            n = single["input_ids"].shape[1]
            assert float((logits(model, single)[0] - together[b, -n:]).abs().max()) < 1e-12
            assert notes_of(trace)["visual_sinks"] == {layer: [found[b]] for layer, found in sinks.items()}
    assert any(found[0] != found[2] for found in sinks.values())


def test_beams_follow_their_prompts(model: Any, prompts: Any) -> None:
    images = [1, 2]
    inputs = prompts(model, images=images)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with METHOD(model):
        together = model.generate(**inputs, **options)[:, -5:]
        for b in range(2):
            assert torch.equal(model.generate(**row(inputs, b, images), **options)[:, -5:], together[b : b + 1])
    assert not torch.equal(model.generate(**inputs, **options)[:, -5:], together)


def test_a_static_cache_says_what_a_dynamic_one_says(model: Any, prompts: Any) -> None:
    inputs = prompts(model, images=(1, 2))
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with METHOD(model):
        dynamic = model.generate(**inputs, **options)
        static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    assert torch.allclose(torch.stack(dynamic.logits), torch.stack(static.logits), atol=1e-10)


def test_several_tokens_behind_a_prompt_are_what_they_are_one_by_one(
    model: Any, prompts: Any, tiny: ModuleType
) -> None:
    inputs = prompts(model)
    more = torch.tensor([[5, 9, 20]])
    with torch.no_grad(), METHOD(model):
        start = model(**inputs)
        cache = copy.deepcopy(start[tiny.CACHE])
        at_once = model(input_ids=more, **{tiny.CACHE: copy.deepcopy(cache)}).logits
        singly = [model(input_ids=more[:, i : i + 1], **{tiny.CACHE: cache}).logits for i in range(3)]
    assert torch.allclose(at_once, torch.cat(singly, 1), atol=1e-12)


def test_prompts_whose_image_comes_last_change_from_the_first_generated_token_on(
    model: Any, prompts: Any, tiny: ModuleType
) -> None:
    inputs = prompts(model)
    end = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero().max()) + 1
    inputs = {**inputs, **{name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}}
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    vanilla = model.generate(**inputs, **options)
    with METHOD(model):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.logits[0], vanilla.logits[0])
    assert not torch.equal(found.logits[1], vanilla.logits[1])


def test_newline_tokens_of_tiled_images_count_as_text(families: ModuleType) -> None:
    model = families.model("llava_next")
    inputs = families.inputs("llava_next", model, batch=1)
    everywhere = VAR(tau=1e-6, sink_dims=(3, 7), min_visual_mass=0, rho_nonsink=0)
    visual = (inputs["input_ids"] == families.IMAGE)[0]
    with everywhere(model) as trace:
        logits(model, inputs)
    with torch.no_grad():
        packed = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        newline = model.model.image_newline
        is_newline = (torch.cat(list(packed.pooler_output)) == newline).all(-1)
    assert 0 < int(is_newline.sum()) < int(visual.sum())
    expected = (~is_newline).nonzero().flatten().tolist()
    assert notes_of(trace)["visual_sinks"] == {2: [expected]}


def test_no_matrix_of_all_rows_by_all_keys_is_made(llava: Callable[..., Any], tiny: ModuleType) -> None:
    model = llava(decoder_layers=3, layers=1, image_size=16, dtype=torch.float32, feature_layer=-1)
    model.config.text_config.max_position_embeddings = 5000
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 60, (1, 4096), generator=generator)
    words[0, 4060:4076] = tiny.IMAGE
    inputs = {"input_ids": words, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    method = VAR(tau=1.0, sink_dims=(3, 7), min_visual_mass=0, rho_nonsink=0, skip_last_layer=False)
    with torch.no_grad(), Watch(), method(model) as trace:
        model(**inputs, logits_to_keep=1)
    assert notes_of(trace)["changed"][2][0] > 0
    assert largest < 4096 * 4096 / 16


# Beside pruning -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pruner",
    [
        vlattn.FastV(keep=6, layer=3),
        vlattn.DyVTE(exit_layer=2),
        vlattn.PyramidDrop(layers=(1, 3), counts=(9, 4), positions="preserve"),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_beside_cuts_inside_the_decoder_it_is_that_of_plain_loops_on_what_is_left(
    model: Any, prompts: Any, tiny: ModuleType, naive_var: ModuleType, pruner: Any
) -> None:
    inputs = prompts(model)
    embeds, image = embedded(model, tiny, inputs)
    with torch.no_grad(), vlattn.compose(METHOD, pruner)(model) as trace:
        found = model(**inputs).logits[0, -1]
    text = [i for i in range(len(embeds)) if i not in image]
    cuts = {
        layer: sorted([*text, *(image[slot] for slot in kept[0].tolist() if slot >= 0)])
        for layer, kept in trace.kept_in_decoder.items()
    }
    assert cuts
    expected = naive_var.run(model, embeds, image, METHOD, cuts=cuts)
    assert any(expected.chosen.values())
    assert float((found - expected.logits[-1]).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "pruner",
    [
        vlattn.FlowCut(keep=6),
        vlattn.ToMe(keep=6),
        vlattn.UniformPrune(keep=6),
        vlattn.FastV(keep=6, layer=2),
        vlattn.FastV(keep=6, layer=2, mode="mask"),
        vlattn.SparseVLM(layers=(1, 2), counts=(9, 5)),
        vlattn.DyVTE(exit_layer=2),
    ],
    ids=["flowcut", "tome", "uniform", "fastv", "fastv-mask", "sparsevlm", "dyvte"],
)
def test_beside_pruning_a_prompt_says_in_a_batch_what_it_says_alone(model: Any, prompts: Any, pruner: Any) -> None:
    images = [1, 2]
    inputs = prompts(model, images=images)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with pruner(model):
        without = model.generate(**inputs, **options)
    with vlattn.compose(METHOD, pruner)(model):
        together = torch.stack(model.generate(**inputs, **options).logits, 1)
        for b in range(2):
            single = torch.stack(model.generate(**row(inputs, b, images), **options).logits, 1)
            assert float((single[0] - together[b]).abs().max()) < 1e-10
    assert float((torch.stack(without.logits, 1) - together).abs().max()) > 1e-3


def test_the_order_of_contexts_does_not_matter(model: Any, prompts: Any) -> None:
    inputs = prompts(model, images=(1, 2))
    pruner = vlattn.FastV(keep=6, layer=2)
    with METHOD(model), pruner(model):
        inner = logits(model, inputs)
    with pruner(model), METHOD(model):
        outer = logits(model, inputs)
    assert torch.equal(inner, outer)


# Settings -------------------------------------------------------------------------------------------------------------
def test_presets_are_what_paper_and_code_say() -> None:
    assert VAR.paper(rho=0.8) == VAR(move=0.6, rho_nonsink=0.8)
    assert VAR.released_code() == VAR(skip_last_layer=False, eps=1e-6)
    assert VAR.released_code(rho=0.25, summ=0.3, p=0.5, tau=25) == VAR(
        tau=25, rho_nonsink=0.75, min_visual_mass=0.3, move=0.5, skip_last_layer=False, eps=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0}, "tau: got 0; give a positive number"),
        ({"tau": "20"}, "tau: got '20'"),
        ({"rho_nonsink": -0.1}, "rho_nonsink: got -0.1; give a number of at least 0"),
        ({"min_visual_mass": float("nan")}, "min_visual_mass: got nan"),
        ({"move": 1.1}, "move: got 1.1; give a number from 0 to 1"),
        ({"skip_first_layers": -1}, "skip_first_layers: got -1"),
        ({"skip_last_layer": 1}, "skip_last_layer: got 1; give True or False"),
        ({"require_visual_sink": None}, "require_visual_sink: got None"),
        ({"eps": -1e-6}, "eps: got -1e-06"),
        ({"sink_dims": ()}, r"sink_dims: got \(\); give a tuple of different channel numbers"),
        ({"sink_dims": (3, 3)}, r"sink_dims: got \(3, 3\)"),
        ({"sink_dims": (3, -1)}, r"sink_dims: got \(3, -1\)"),
        ({"sink_dims": 3}, "sink_dims: got 3"),
        ({"sink_dims": (True,)}, r"sink_dims: got \(True,\)"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VAR(**settings)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VAR(), r"sink_dims: not given.*llava with a llama decoder \(5 layers of width 32\).*calibrate_sinks"),
        (VAR(sink_dims=(3,)), r"tau: got 20, but .* sqrt\(D\) = 5.657"),
        (VAR(sink_dims=(3,), tau=6), "tau: got 6, but"),
        (VAR(sink_dims=(3, 32), tau=2), r"sink_dims: got \(3, 32\).*below 32"),
        (VAR(sink_dims=(3,), tau=2, skip_first_layers=4), "skip_first_layers: got 4 with skip_last_layer=True"),
    ],
)
def test_settings_that_do_not_fit_a_model_are_refused_and_leave_it_alone(
    model: Any, tiny: ModuleType, method: VAR, message: str
) -> None:
    before = tiny.hooks_of(model)
    with pytest.raises(InputError, match=message):
        method(model).attach()
    assert tiny.hooks_of(model) == before


def test_it_acts_on_a_model_once(model: Any) -> None:
    with METHOD(model), pytest.raises(InputError, match="VAR: it is on this model already"):
        METHOD(model).attach()


def test_attention_dropout_is_refused_in_training(model: Any) -> None:
    model.config.text_config.attention_dropout = 0.1
    with METHOD(model):
        pass
    with pytest.raises(InputError, match=r"model: it is in training mode with attention_dropout=0.1"):
        METHOD(model.train()).attach()


def test_the_embedded_model_has_channels_of_its_own() -> None:
    tiny_llava, processor = vlattn.load("tiny")
    from PIL import Image

    from vlattn.assets.paths import tiny_coco

    name = min(path for path in tiny_coco("val").images.glob("*.jpg"))
    text = "USER: <image>\nIs there a dog in the image? ASSISTANT:"
    inputs = processor(images=[Image.open(name)], text=[text], return_tensors="pt")
    with torch.no_grad(), VAR()(tiny_llava) as trace:
        found = tiny_llava(**inputs).logits
    assert notes_of(trace)["sink_dims"] == [113, 18]
    assert notes_of(trace)["tau"] == 4.0
    assert list(notes_of(trace)["changed"]) == [2, 3, 4]
    assert max(share for shares in notes_of(trace)["changed"].values() for share in shares) > 0
    assert not torch.equal(found[:, -1], logits(tiny_llava, inputs)[:, -1])
