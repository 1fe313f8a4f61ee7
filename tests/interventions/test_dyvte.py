"""DyVTE on live models: who exits where, what that changes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.eval.answer import chat_prompt
from vlattn.eval.coco import read_coco
from vlattn.interventions.dyvte_gates import DyVTEGates, Gate, ModelPrint, gate_input, gate_span, text_after_image
from vlattn.interventions.registry import parse_method
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import cache_of
from vlattn.runtime.trace import Trace
from vlattn.training.examples import open_image
from vlattn.training.tiny_examples import is_training_image

LAYERS = 5
Make = Callable[..., Any]


@pytest.fixture
def model(llava: Make) -> Any:
    return llava(decoder_layers=LAYERS)


@pytest.fixture
def inputs(model: Any, prompts: Make) -> dict[str, torch.Tensor]:
    return prompts(model, (1,), text=4)


def random_gates(model: Any, seed: int = 0, hidden: int = 16) -> DyVTEGates:
    return DyVTEGates(ModelPrint.of(adapter_for(model)), hidden, seed).double()


def deciding(model: Any, decisions: str) -> DyVTEGates:
    """Gates that always say what `decisions` spells, one letter a layer: `k` keep, `e` exit."""
    gates = random_gates(model, hidden=2)
    with torch.no_grad():
        for layer, letter in enumerate(decisions):
            gate = gates.gate(layer)
            gate.w1[1] = -gate.w1[0]  # GELU(x) + GELU(-x) = x erf(x / sqrt 2) is above 0
            gate.w2.zero_()
            gate.w2[1 if letter == "e" else 0] = 1
    return gates


def note(trace: Trace, name: str) -> Any:
    """What the method noted about the last prompt."""
    return trace.notes[name]


def lengths(output: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache_of(output).layers]


@torch.no_grad()
def cut_by_hand(model: Any, inputs: dict[str, torch.Tensor], exit_layer: int) -> torch.Tensor:
    """Logits [N, V] of one unpadded prompt, visual positions cut out after `exit_layer`: the model's own layers in a
    loop, with a mask and positions made here."""
    language = model.model.language_model
    ids = inputs["input_ids"][0]
    visual = ids == model.config.image_token_id
    hidden = language.embed_tokens(ids.masked_fill(visual, 0))
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    hidden[visual] = torch.cat(list(features)).to(hidden.dtype)
    place = torch.arange(len(ids))
    for number, layer in enumerate(language.layers):
        causal = torch.full((len(place), len(place)), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        tables = language.rotary_emb(hidden[None], place[None])
        out = layer(hidden[None], attention_mask=causal[None, None], position_embeddings=tables)
        hidden = (out[0] if isinstance(out, tuple) else out)[0]
        if number == exit_layer:
            hidden, place = hidden[~visual], place[~visual]
    return model.lm_head(language.norm(hidden))


# Neutral settings -----------------------------------------------------------------------------------------------------


def test_a_threshold_of_1_gives_the_vanilla_logits_and_tokens_bit_for_bit(model: Any, prompts: Make) -> None:
    inputs = prompts(model, (1, 2))
    vanilla, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with vlattn.DyVTE(random_gates(model), threshold=1.0, batch_policy="all")(model) as trace:
        assert torch.equal(model(**inputs).logits, vanilla)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
    assert note(trace, "exit_layer") == [-1, -1]
    assert trace.kept_in_decoder == {}


def test_an_exit_after_the_last_layer_leaves_the_text_s_logits_bit_for_bit(
    model: Any, inputs: dict[str, torch.Tensor], tiny: ModuleType
) -> None:
    vanilla = model(**inputs).logits
    text = inputs["input_ids"][0] != tiny.IMAGE
    with vlattn.DyVTE(exit_layer=LAYERS - 1)(model):
        output = model(**inputs)
    assert torch.equal(output.logits, vanilla[:, text])
    assert lengths(output) == [len(text)] * LAYERS


# An exit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_exit_equals_the_model_s_layers_run_by_hand_without_the_span(
    layer: int, model: Any, inputs: dict[str, torch.Tensor]
) -> None:
    expected = cut_by_hand(model, inputs, layer)
    with vlattn.DyVTE(exit_layer=layer)(model):
        output = model(**inputs)
    torch.testing.assert_close(output.logits[0], expected, atol=1e-10, rtol=0)
    full, short = inputs["input_ids"].shape[1], len(expected)
    assert lengths(output) == [full] * (layer + 1) + [short] * (LAYERS - layer - 1)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_removing_visual_tokens_equals_hiding_their_keys(
    layer: int, model: Any, prompts: Make, tiny: ModuleType
) -> None:
    inputs = prompts(model, (1, 2))
    with vlattn.DyVTE(exit_layer=layer)(model) as trace:
        removed = model(**inputs).logits[:, -3:]
    assert not trace.masked
    with vlattn.DyVTE(exit_layer=layer, batch_policy="mask")(model) as trace:
        hidden = model(**inputs).logits[:, -3:]
    assert trace.masked
    torch.testing.assert_close(removed, hidden, atol=1e-10, rtol=0)


@pytest.mark.parametrize("layer", [0, 2])
def test_cached_decoding_equals_recomputing_prompt_and_tokens_with_the_same_exit(
    layer: int, model: Any, inputs: dict[str, torch.Tensor], tiny: ModuleType
) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    full, visual = ids.shape[1], tiny.per_image(model)
    found: list[torch.Tensor] = []
    with vlattn.DyVTE(exit_layer=layer)(model), torch.no_grad():
        output = model(**inputs, use_cache=True)
        for step in range(1, 5):
            new = tiny.next_token(output.logits)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            output = model(input_ids=new, attention_mask=mask, **{tiny.CACHE: cache_of(output)})
            found.append(output.logits[0, -1])
            above = LAYERS - layer - 1
            assert lengths(output) == [full + step] * (layer + 1) + [full + step - visual] * above
    for step, logits in enumerate(found, 1):
        again = cut_by_hand(model, {**inputs, "input_ids": ids[:, : full + step]}, layer)
        torch.testing.assert_close(logits, again[-1], atol=1e-10, rtol=0)


def test_text_keeps_its_position_ids_after_an_exit(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    seen: list[torch.Tensor] = []
    handle = vlattn.attach(model, vlattn.DyVTE(exit_layer=1))
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    model(**inputs)
    handle.detach()
    text = (inputs["input_ids"][0] != model.config.image_token_id).nonzero().flatten()
    assert seen[1][0].tolist() == list(range(inputs["input_ids"].shape[1]))
    assert seen[2][0].tolist() == seen[4][0].tolist() == text.tolist()


def test_the_trace_tells_what_each_layer_processes(
    model: Any, inputs: dict[str, torch.Tensor], tiny: ModuleType
) -> None:
    visual, full = tiny.per_image(model), inputs["input_ids"].shape[1]
    with vlattn.DyVTE(exit_layer=1)(model) as trace:
        model(**inputs)
    assert note(trace, "exit_layer") == [1]
    assert trace.visual_by_layer == [[visual], [visual], [0], [0], [0], [0]]
    assert trace.decoder_lengths == [full, full, full - visual, full - visual, full - visual]
    assert trace.budget()["average"] == visual * 2 / LAYERS
    assert {layer: kept.shape for layer, kept in trace.kept_in_decoder.items()} == {1: (1, 0)}


# The gates' say -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decisions", "exits"), [("eeeee", 0), ("kkeke", 2), ("kkkke", 4), ("kkkkk", -1)])
def test_the_first_gate_that_says_exit_wins_and_none_above_it_is_asked(
    decisions: str, exits: int, model: Any, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    forward = Gate.forward

    def counted(self: Gate, u: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return forward(self, u)

    gates = deciding(model, decisions)
    monkeypatch.setattr(Gate, "forward", counted)
    with vlattn.DyVTE(gates)(model) as trace:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert asked == (exits + 1 if exits >= 0 else LAYERS)  # and none while decoding
    assert note(trace, "exit_layer") == [exits]
    probability = note(trace, "exit_probability")
    assert list(probability) == list(range(asked))
    forced = vlattn.DyVTE(exit_layer=exits) if exits >= 0 else vlattn.DyVTE(gates, threshold=1.0)
    with forced(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("images", [1, 2])
def test_gates_read_the_outputs_of_layers_before_the_final_norm(
    images: int, model: Any, prompts: Make, tiny: ModuleType
) -> None:
    inputs = prompts(model, (images,), text=4)
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.model.language_model.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    gates = random_gates(model)
    with vlattn.DyVTE(gates, threshold=1.0)(model) as trace:
        model(**inputs)
    # Text after the first image, by hand: four words behind each image, the last one apart.
    ids, behind = inputs["input_ids"][0], []
    for t in range(int((ids == tiny.IMAGE).nonzero()[0]), len(ids) - 1):
        if ids[t] != tiny.IMAGE:
            behind.append(t)
    assert len(behind) == 4 * images - 1
    for number, hidden in enumerate(outputs):
        u = torch.cat([hidden[0, behind].mean(0), hidden[0, -1]])
        z = gates(number, u[None])
        assert note(trace, "exit_probability")[number] == pytest.approx(z.softmax(-1)[:, 1].tolist(), abs=1e-6)


def test_an_exit_drops_the_visual_tokens_of_all_images(model: Any, prompts: Make, tiny: ModuleType) -> None:
    inputs = prompts(model, (3,))
    text = int((inputs["input_ids"] != tiny.IMAGE).sum())
    with vlattn.DyVTE(deciding(model, "kekkk"))(model) as trace:
        output = model(**inputs)
    assert output.logits.shape[1] == text
    assert trace.visual_by_layer[1:3] == [[3 * tiny.per_image(model)], [0]]
    torch.testing.assert_close(output.logits[0], cut_by_hand(model, inputs, 1), atol=1e-10, rtol=0)


def test_a_higher_threshold_never_exits_earlier(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    def exit_at(gates: DyVTEGates, threshold: float) -> int:
        with vlattn.DyVTE(gates, threshold=threshold)(model) as trace:
            model(**inputs)
        (found,) = note(trace, "exit_layer")
        return LAYERS if found < 0 else found

    seen: set[int] = set()
    for seed in range(12):
        exits = [exit_at(random_gates(model, seed), t / 10) for t in range(11)]
        assert exits == sorted(exits)
        assert (exits[0], exits[-1]) == (0, LAYERS)
        seen |= set(exits)
    assert len(seen) > 3


def test_each_prefill_decides_anew(model: Any, prompts: Make) -> None:
    for seed in range(40):
        gates = random_gates(model, seed)
        alone = []
        for n in range(3):
            with vlattn.DyVTE(gates)(model) as trace:
                model(**prompts(model, (1,), seed=n))
            alone.append(note(trace, "exit_layer"))
        if len({str(found) for found in alone}) > 1:
            break
    else:
        pytest.fail("no seed makes the prompts exit at different layers")
    with vlattn.DyVTE(gates)(model) as trace:
        for n in (0, 1, 2, 1, 0):
            model.generate(**prompts(model, (1,), seed=n), max_new_tokens=3)
            assert note(trace, "exit_layer") == alone[n]


def test_half_precision_models_are_gated_in_the_dtype_of_the_gates(llava: Make, prompts: Make) -> None:
    model = llava(decoder_layers=3, dtype=torch.bfloat16)
    gates = DyVTEGates(ModelPrint.of(adapter_for(model)), 4)
    inputs = prompts(model, (1,))
    with vlattn.DyVTE(gates, threshold=1.0)(model) as trace:
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    visual = inputs["input_ids"] == model.config.image_token_id
    span = gate_span(~visual, text_after_image(visual, torch.ones_like(visual)))
    expected = gates(0, gate_input(hidden, span)).softmax(-1)[:, 1].tolist()
    assert note(trace, "exit_probability")[0] == pytest.approx(expected, abs=1e-7)


# Batches --------------------------------------------------------------------------------------------------------------


def disagreeing(model: Any, batch: dict[str, torch.Tensor]) -> tuple[DyVTEGates, list[int]]:
    """Gates under which the prompts of a batch exit after different layers, and those layers."""
    for seed in range(200):
        gates = random_gates(model, seed)
        with vlattn.DyVTE(gates, batch_policy="mask")(model) as trace:
            model(**batch)
        exits = note(trace, "exit_layer")
        if len(set(exits)) == len(exits) and min(exits) >= 0 and max(exits) < LAYERS - 1:
            return gates, exits
    pytest.fail("no seed makes the prompts disagree")


def alone(batch: dict[str, torch.Tensor], row: int, images: list[int]) -> dict[str, torch.Tensor]:
    """One prompt of a batch without its padding."""
    alive = batch["attention_mask"][row].bool()
    first = sum(images[:row])
    return {
        "input_ids": batch["input_ids"][row : row + 1, alive],
        "attention_mask": batch["attention_mask"][row : row + 1, alive],
        "pixel_values": batch["pixel_values"][first : first + images[row]],
    }


def test_with_policy_mask_each_prompt_of_a_padded_batch_answers_as_when_alone(model: Any, prompts: Make) -> None:
    images = [1, 2]
    batch = prompts(model, images)
    gates, exits = disagreeing(model, batch)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vlattn.DyVTE(gates, batch_policy="mask")(model) as trace:
        together = model.generate(**batch, **options)
    assert note(trace, "exit_layer") == exits
    assert trace.masked
    for row in range(2):
        with vlattn.DyVTE(gates)(model) as trace:
            single = model.generate(**alone(batch, row, images), **options)
        assert note(trace, "exit_layer") == [exits[row]]
        assert torch.equal(single.sequences[0, -4:], together.sequences[row, -4:])
        for a, b in zip(single.logits, together.logits, strict=True):
            torch.testing.assert_close(a[0], b[row], atol=1e-9, rtol=0)


def test_with_policy_all_the_batch_exits_when_the_last_prompt_wants_to(model: Any, prompts: Make) -> None:
    images = [1, 2]
    batch = prompts(model, images)
    gates, _ = disagreeing(model, batch)
    with vlattn.DyVTE(gates, batch_policy="all")(model) as trace:
        logits = model(**batch).logits[:, -1]
    probability = note(trace, "exit_probability")
    agreed = [layer for layer, row in probability.items() if min(row) > 0.5]
    expected = agreed[0] if agreed else -1
    assert note(trace, "exit_layer") == [expected, expected]
    assert list(probability) == list(range(expected + 1 if agreed else LAYERS))
    forced = vlattn.DyVTE(exit_layer=expected) if agreed else vlattn.DyVTE(gates, threshold=1.0, batch_policy="all")
    with forced(model):
        assert torch.equal(model(**batch).logits[:, -1], logits)


def test_a_forced_exit_of_a_padded_batch_equals_its_prompts_alone(model: Any, prompts: Make) -> None:
    images = [1, 2]
    batch = prompts(model, images)
    with vlattn.DyVTE(exit_layer=1)(model):
        together = model(**batch).logits[:, -1]
        for row in range(2):
            single = model(**alone(batch, row, images)).logits[0, -1]
            torch.testing.assert_close(together[row], single, atol=1e-4, rtol=0)  # fp32 rotary tables, shifted


def test_a_prompt_without_an_image_neither_objects_nor_changes(model: Any, prompts: Make) -> None:
    batch = prompts(model, (1, 0))
    vanilla = model(**batch).logits[1, -1]
    gates = random_gates(model)
    with vlattn.DyVTE(gates, threshold=1.0, batch_policy="mask")(model) as trace:
        model(**batch)
    probability = note(trace, "exit_probability")
    with_image, without = probability[0]
    threshold = (with_image + without) / 2
    if with_image < without:
        with torch.no_grad():  # the other way round: the prompt with an image wants to exit, the other one does not
            gates.gate(0).w2.copy_(gates.gate(0).w2.flip(0).clone())
        threshold = 1 - threshold
    with vlattn.DyVTE(gates, threshold=threshold, batch_policy="all")(model) as trace:
        found = model(**batch).logits[1, -1]
    assert note(trace, "exit_layer") == [0, 0]
    torch.testing.assert_close(found, vanilla, atol=1e-10, rtol=0)


def test_single_refuses_a_batch_and_beams(model: Any, prompts: Make, inputs: dict[str, torch.Tensor]) -> None:
    with vlattn.DyVTE(random_gates(model))(model):
        with pytest.raises(InputError, match="one prompt at a time, got 2"):
            model(**prompts(model, (1, 1)))
        with pytest.raises(InputError, match="beams count"):
            model.generate(**inputs, num_beams=3, max_new_tokens=2)


def test_beams_search_under_the_same_exit_whether_tokens_are_removed_or_hidden(model: Any, prompts: Make) -> None:
    batch = prompts(model, (1, 1))
    found = []
    for policy in ("all", "mask"):
        with vlattn.DyVTE(deciding(model, "kkekk"), batch_policy=policy)(model):
            found.append(model.generate(**batch, num_beams=3, max_new_tokens=6, do_sample=False))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], model.generate(**batch, num_beams=3, max_new_tokens=6, do_sample=False))


# With other methods ---------------------------------------------------------------------------------------------------


def test_pruning_in_front_of_the_decoder_leaves_fewer_tokens_to_drop(
    model: Any, inputs: dict[str, torch.Tensor]
) -> None:
    both = vlattn.compose(vlattn.DyVTE(deciding(model, "kkekk")), vlattn.UniformPrune(keep=9))
    with both(model) as trace:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert trace.visual_by_layer == [[9], [9], [9], [0], [0], [0]]
    assert note(trace, "exit_layer") == [2]
    with vlattn.UniformPrune(keep=9)(model), vlattn.DyVTE(exit_layer=2, batch_policy="mask")(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


def test_after_fastv_an_exit_drops_the_tokens_that_are_left(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    both = vlattn.compose(vlattn.FastV(keep=9, layer=2), vlattn.DyVTE(deciding(model, "kkkek")))
    with both(model) as trace:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        removed = model(**inputs).logits[:, -3:]
    assert trace.visual_by_layer == [[36], [36], [9], [9], [0], [0]]
    assert note(trace, "exit_layer") == [3]
    with vlattn.FastV(keep=9, layer=2)(model), vlattn.DyVTE(exit_layer=3, batch_policy="mask")(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
        torch.testing.assert_close(model(**inputs).logits[:, -3:], removed, atol=1e-10, rtol=0)


def test_gates_take_tokens_that_fastv_hides_for_visual_ones(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    gates, said = random_gates(model), []
    for mode in ("drop", "mask"):
        both = vlattn.compose(vlattn.FastV(keep=9, layer=2, mode=mode), vlattn.DyVTE(gates, threshold=1.0))
        with both(model) as trace:
            model(**inputs)
        said.append([p for (p,) in note(trace, "exit_probability").values()])
    assert said[0] == pytest.approx(said[1], abs=1e-7)


# On every family ------------------------------------------------------------------------------------------------------

FAMILIES = ["llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES += ["internvl", "idefics3", "smolvlm", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_logits_without_an_exit_and_its_text_behind_one(
    family: str, families: ModuleType
) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, batch=2, images=2)
    adapter = adapter_for(model)
    visual = adapter.visual_tokens(inputs).mask
    layers = len(adapter.decoder_layers)
    vanilla = model(**inputs).logits
    with vlattn.DyVTE(random_gates(model), threshold=1.0, batch_policy="all")(model):
        assert torch.equal(model(**inputs).logits, vanilla)
    with vlattn.DyVTE(deciding(model, "ke" + "k" * (layers - 2)), batch_policy="all")(model) as trace:
        removed = model(**inputs).logits[:, -1]
    assert note(trace, "exit_layer") == [1, 1]
    assert trace.visual_by_layer == [visual.sum(1).tolist()] * 2 + [[0, 0]] * (layers - 1)
    with vlattn.DyVTE(deciding(model, "ke" + "k" * (layers - 2)), batch_policy="mask")(model):
        hidden = model(**inputs).logits[:, -1]
    torch.testing.assert_close(removed, hidden, atol=1e-9, rtol=0)
    assert float((removed - vanilla[:, -1]).detach().abs().max()) > 1e-6


# The embedded gates ---------------------------------------------------------------------------------------------------


def test_the_embedded_gates_let_images_go_earlier_for_questions_than_for_captions() -> None:
    model, processor = vlattn.load("tiny")
    coco = read_coco(tiny_coco("val").instances)
    images = [i for i in coco.image_ids if not is_training_image(i)][:12]
    pictures = [open_image(tiny_coco("val").images / coco.file_names[i]) for i in images]

    def mean_layers(questions: list[str]) -> float:
        texts = [chat_prompt(processor, question) for question in questions]
        inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
        with vlattn.DyVTE(batch_policy="mask")(model) as trace, torch.no_grad():
            model(**inputs)
        exits = note(trace, "exit_layer")
        return sum(6 if layer < 0 else layer + 1 for layer in exits) / len(exits)

    questions = mean_layers([f"Is there a {coco.objects[i][0]} in the image?" for i in images])
    captions = mean_layers(["Please describe this image in detail."] * len(images))
    assert questions < captions - 1
    assert captions > 5


# What it leaves behind, and what it refuses ---------------------------------------------------------------------------


def test_leaving_restores_the_model_and_the_caller_s_gates_stay_theirs(
    model: Any, inputs: dict[str, torch.Tensor], tiny: ModuleType
) -> None:
    vanilla = model(**inputs).logits
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    gates = random_gates(model)
    with vlattn.DyVTE(gates, threshold=0.0)(model):
        model(**inputs)
    with vlattn.DyVTE(gates)(model), pytest.raises(ValueError):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :, :8]})
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings
    assert torch.equal(model(**inputs).logits, vanilla)
    assert all(weight.requires_grad for weight in gates.parameters())


def test_gates_are_read_from_a_folder(model: Any, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    gates = deciding(model, "kkkek")
    gates.save(tmp_path)
    with vlattn.DyVTE(gates=str(tmp_path))(model) as trace:
        model(**inputs)
    assert note(trace, "exit_layer") == [3]


def test_a_method_string_names_its_settings() -> None:
    expected = vlattn.DyVTE(gates="auto", exit_layer=2, batch_policy="all", threshold=0.7)
    assert parse_method("dyvte:exit_layer=2,batch_policy=all,threshold=0.7") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": -1}, "exit_layer: got -1"),
        ({"exit_layer": True}, "exit_layer: got True"),
        ({"exit_layer": 1.0}, "exit_layer: got 1.0"),
        ({"batch_policy": "any"}, "batch_policy: got 'any'"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"threshold": "high"}, "threshold: got 'high'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vlattn.DyVTE(**settings)


def test_layers_and_gates_that_do_not_fit_the_model_are_refused(
    model: Any, inputs: dict[str, torch.Tensor], llava: Make, tmp_path: Path, tiny: ModuleType
) -> None:
    hooks = tiny.hooks_of(model)
    with pytest.raises(InputError, match="exit_layer: got 5; this model's decoder has layers 0 to 4"):
        vlattn.attach(model, vlattn.DyVTE(exit_layer=5))
    with pytest.raises(InputError, match="gates: they were made for"):
        vlattn.attach(model, vlattn.DyVTE(random_gates(llava(decoder_layers=2))))
    with pytest.raises(InputError, match="train gates for this model"):
        vlattn.attach(model, vlattn.DyVTE())
    with pytest.raises(InputError, match="holds no"):
        vlattn.attach(model, vlattn.DyVTE(tmp_path / "nowhere"))
    assert tiny.hooks_of(model) == hooks


def test_a_prompt_that_ends_with_its_image_is_refused(
    model: Any, inputs: dict[str, torch.Tensor], tiny: ModuleType
) -> None:
    ends = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1
    short = {**inputs, "input_ids": inputs["input_ids"][:, :ends], "attention_mask": inputs["attention_mask"][:, :ends]}
    for method in (vlattn.DyVTE(exit_layer=1), vlattn.DyVTE(random_gates(model))):
        with method(model), pytest.raises(InputError, match="put the question after the image"):
            model(**short)


def test_the_trace_is_as_empty_as_any_before_the_first_prompt(model: Any) -> None:
    with vlattn.DyVTE(random_gates(model))(model) as trace:
        assert trace == Trace()
