"""VHR chooses the heads that its definition chooses, scales them and nothing else, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.vhr import VHR, default_layers
from vlattn.models.registry import adapter_for

IMAGE = 63
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm", "gemma3",
)  # fmt: skip


def small(tiny: ModuleType, **options: Any) -> Any:
    return tiny.llava(**{"decoder_layers": 4, "image_size": 16, "layers": 4, **options})


def alone(inputs: dict[str, Any], b: int, images: slice) -> dict[str, Any]:
    alive = inputs["attention_mask"][b].bool()
    return {
        "input_ids": inputs["input_ids"][b : b + 1, alive],
        "attention_mask": inputs["attention_mask"][b : b + 1, alive],
        "pixel_values": inputs["pixel_values"][images],
    }


def heads_of(trace: vlattn.Trace, b: int = 0) -> dict[int, list[bool]]:
    notes: Any = trace.notes
    return {layer: heads[b].tolist() for layer, heads in notes["heads"].items()}


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], **how: Any) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **how})[:, -6:]


@contextmanager
def watching(model: Any, layers: int, last: bool) -> Iterator[dict[int, list[torch.Tensor]]]:
    """The input of each output projection, before or after the hooks that are there."""
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(layers)}
    handles = []
    for layer in range(layers):

        def hook(module: Any, args: Any, layer: int = layer) -> None:
            seen[layer].append(args[0])

        projection = adapter_for(model).decoder_attention(layer).o_proj
        handles.append(projection.register_forward_pre_hook(hook, prepend=not last))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# The choice -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{}, {"both": False}, {"two_pass": True}, {"outliers": False}], ids=str)
def test_heads_of_a_padded_batch_are_those_of_whole_forwards_on_each_prompt_alone(
    families: ModuleType, tiny: ModuleType, naive_vhr: ModuleType, matrix: ModuleType, family: str, how: dict[str, Any]
) -> None:
    model, inputs = matrix.build(family, families, tiny)
    names = {"both": "reinforce_both", "two_pass": "two_pass", "outliers": "remove_outliers"}
    method = VHR(layers=(1, 2, 3), **{names[name]: value for name, value in how.items()})
    with torch.no_grad(), method(model) as trace:
        logits = model(**inputs).logits[:, -1]
    adapter = adapter_for(model)
    gone = [*adapter.placeholder_ids, *adapter.wrapper_ids]
    notes: Any = trace.notes
    for b in range(2):
        own = matrix.alone(family, inputs, b)
        heads, vhd = naive_vhr.choose(model, own, naive_vhr.text_only(own, gone), (1, 2, 3), **how)
        assert heads_of(trace, b) == heads
        for layer in (1, 2, 3):
            assert notes["vhd"][layer][b].tolist() == pytest.approx(vhd[layer], rel=1e-4)
        with torch.no_grad(), naive_vhr.scaling(model, heads, 2):
            torch.testing.assert_close(logits[b], model(**own).logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heads_and_logits_are_those_of_one_forward_of_twice_the_batch(
    tiny: ModuleType, naive_vhr: ModuleType, both: bool, seed: int
) -> None:
    model = small(tiny, seed=seed)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([[5, 9, *[IMAGE] * 16, 11, 4], [7, 8, *[IMAGE] * 16, 21, 30]])
    table = model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        features = tiny.features(model, pixels)
        embeds = torch.stack([torch.cat([table[ids[b, :2]], features[b], table[ids[b, 18:]]]) for b in range(2)])
    decoder = model.model.language_model
    heads, hidden = naive_vhr.double_batch(decoder, embeds, table[ids[:, [0, 1, 18, 19]]], (1, 2, 3), 2, both)
    with torch.no_grad(), VHR(layers=(1, 2, 3), reinforce_both=both)(model) as trace:
        logits = model(input_ids=ids, pixel_values=pixels).logits
    notes: Any = trace.notes
    assert {layer: found.tolist() for layer, found in notes["heads"].items()} == {
        layer: found.tolist() for layer, found in heads.items()
    }
    torch.testing.assert_close(logits, model.lm_head(hidden), rtol=1e-5, atol=1e-5)


def test_two_passes_agree_with_layer_by_layer_at_first_and_not_always_later(tiny: ModuleType) -> None:
    differ = []
    for seed in range(6):
        model = small(tiny, seed=seed)
        inputs = tiny.prompts(model, images=(1, 2), seed=seed)
        notes: list[Any] = []
        for two_pass in (False, True):
            with torch.no_grad(), VHR(layers=(1, 2, 3), two_pass=two_pass)(model) as trace:
                model(**inputs)
            notes.append(trace.notes)
        assert torch.equal(notes[0]["heads"][1], notes[1]["heads"][1])
        torch.testing.assert_close(notes[0]["vhd"][1], notes[1]["vhd"][1])
        differ.append(not torch.equal(notes[0]["heads"][3], notes[1]["heads"][3]))
    assert any(differ)


def test_query_heads_of_one_key_head_can_fare_differently(tiny: ModuleType) -> None:
    model = small(tiny, kv_heads=2)
    with torch.no_grad(), VHR()(model) as trace:
        model(**tiny.prompts(model, images=(1, 2)))
    notes: Any = trace.notes
    groups = torch.stack(list(notes["heads"].values())).unflatten(-1, (2, 2))
    assert bool((groups[..., 0] != groups[..., 1]).any())


def test_half_of_the_heads_are_chosen_for_each_prompt_by_itself(tiny: ModuleType) -> None:
    model = small(tiny)
    with torch.no_grad(), VHR(remove_outliers=False)(model) as trace:
        model(**tiny.prompts(model, images=(1, 2, 1)))
    notes: Any = trace.notes
    for heads in notes["heads"].values():
        assert heads.sum(1).tolist() == [2, 2, 2]
    assert any(len({tuple(row) for row in heads.tolist()}) > 1 for heads in notes["heads"].values())


# What is done with it -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_neutral_factor_gives_the_vanilla_logits_and_text_bit_for_bit(tiny: ModuleType, attn: str) -> None:
    model = small(tiny, attn=attn, dtype=torch.float32)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad():
        vanilla, text = model(**inputs).logits, generate(model, inputs)
        with VHR(alpha=1)(model):
            assert torch.equal(model(**inputs).logits, vanilla)
            assert torch.equal(generate(model, inputs), text)


@pytest.mark.parametrize("alpha", [2, 0.5, 3.0, 0])
def test_chosen_heads_are_scaled_at_every_position_and_nothing_else_is_touched(tiny: ModuleType, alpha: float) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1, 2))
    method = VHR(alpha=alpha, layers=(1, 3), two_pass=True)
    with method(model) as trace, watching(model, 4, last=False) as before, watching(model, 4, last=True) as after:
        generate(model, inputs)
    notes: Any = trace.notes
    for layer in range(4):
        # The two passes come first.
        pairs = list(zip(before[layer], after[layer], strict=True))[-6:]
        assert [tuple(x.shape[:2]) for x, _ in pairs] == [(2, inputs["input_ids"].shape[1]), *[(2, 1)] * 5]
        for x, y in pairs:
            if layer not in (1, 3):
                assert torch.equal(x, y)
                continue
            for b in range(2):
                for head, chosen in enumerate(notes["heads"][layer][b].tolist()):
                    own = slice(8 * head, 8 * head + 8)
                    assert torch.equal(y[b, :, own], alpha * x[b, :, own] if chosen else x[b, :, own])


def test_layers_below_the_first_reinforced_one_do_what_they_always_do(tiny: ModuleType) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1,))
    with torch.no_grad():
        with watching(model, 4, last=True) as vanilla:
            model(**inputs)
        with VHR(layers=(2,))(model), watching(model, 4, last=True) as seen:
            model(**inputs)
    # When the prompt has come to layer 2, the text-only one goes through all three.
    assert torch.equal(seen[0][0], vanilla[0][0])
    assert torch.equal(seen[1][0], vanilla[1][0])
    assert not torch.equal(seen[2][-1], vanilla[2][0])


@pytest.mark.parametrize("how", [{}, {"reinforce_both": False}, {"two_pass": True}], ids=str)
def test_decoding_with_a_cache_is_one_forward_with_the_same_heads(
    tiny: ModuleType, naive_vhr: ModuleType, how: dict[str, Any]
) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad(), VHR(**how)(model) as trace:
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    chosen = [heads_of(trace, b) for b in range(2)]
    for b, images in enumerate((slice(0, 1), slice(1, 3))):
        own = alone(inputs, b, images)
        ids = torch.cat([own["input_ids"], out.sequences[b : b + 1, -6:-1]], 1)
        with torch.no_grad(), naive_vhr.scaling(model, chosen[b], 2):
            whole = model(input_ids=ids, pixel_values=own["pixel_values"]).logits[0, -6:]
        torch.testing.assert_close(torch.stack(out.logits)[:, b], whole.float(), rtol=1e-4, atol=1e-4)


def test_one_head_of_two_reinforced_turns_the_residual_stream_towards_it(tiny: ModuleType) -> None:
    """cos(x + (alpha - 1) y, y) > cos(x, y) for the residual stream x and the head's own contribution y."""
    config = small(tiny).config
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 2
    config.text_config.head_dim = 16
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    tiny._draw(model, 0, 2.0)
    inputs = tiny.prompts(model, images=(1,))
    layer = adapter_for(model).decoder_layers[1]
    streams: list[torch.Tensor] = []
    handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: streams.append(args[0][0, -1]))
    with torch.no_grad():
        with watching(model, 2, last=False) as heads:
            model(**inputs)
        x, outputs = streams.pop(), heads[1][0][0, -1]
        for alpha in (1.5, 2.0, 4.0):
            with VHR(alpha=alpha, layers=(1,), reinforce_both=False, remove_outliers=False)(model) as trace:
                model(**inputs)
            (chosen,) = [head for head, wanted in enumerate(heads_of(trace)[1]) if wanted]
            own = slice(16 * chosen, 16 * chosen + 16)
            y = layer.self_attn.o_proj.weight[:, own] @ outputs[own]
            torch.testing.assert_close(streams[-1], x + (alpha - 1) * y)
            assert torch.cosine_similarity(streams[-1], y, dim=0) > torch.cosine_similarity(x, y, dim=0)
    handle.remove()


# Batches, caches, searches --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_prompt_says_in_a_batch_in_any_order_what_it_says_alone(tiny: ModuleType, attn: str) -> None:
    model = small(tiny, attn=attn, dtype=torch.float32)
    inputs = tiny.prompts(model, images=(1, 2, 1))
    order, images = [2, 0, 1], [3, 0, 1, 2]
    shuffled = {
        "input_ids": inputs["input_ids"][order],
        "attention_mask": inputs["attention_mask"][order],
        "pixel_values": inputs["pixel_values"][images],
    }
    with VHR()(model):
        together = generate(model, inputs)
        assert torch.equal(generate(model, shuffled), together[order])
        for b, own in enumerate((slice(0, 1), slice(1, 3), slice(3, 4))):
            assert torch.equal(generate(model, alone(inputs, b, own)), together[b : b + 1])


def test_a_prompt_without_an_image_in_a_batch_is_left_as_it_is(tiny: ModuleType) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1, 0))
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with VHR()(model) as trace:
            logits = model(**inputs).logits
    alive = inputs["attention_mask"][1].bool()
    assert torch.equal(logits[1, alive], vanilla[1, alive])
    assert not torch.equal(logits[0, -1], vanilla[0, -1])
    assert not any(any(heads) for heads in heads_of(trace, 1).values())


def test_generations_do_not_see_each_other(tiny: ModuleType) -> None:
    model = small(tiny)
    first, second = (tiny.prompts(model, images=images, seed=seed) for images, seed in (((1, 2), 0), ((2,), 5)))
    fresh = []
    for inputs in (first, second):
        with VHR()(model):
            fresh.append(generate(model, inputs))
    with VHR()(model):
        assert torch.equal(generate(model, first), fresh[0])
        assert torch.equal(generate(model, second), fresh[1])
        assert torch.equal(generate(model, first), fresh[0])


@pytest.mark.parametrize("both", [True, False])
def test_beams_keep_the_heads_of_their_prompt(tiny: ModuleType, naive_vhr: ModuleType, both: bool) -> None:
    model = small(tiny)
    # One image each: older transformers repeat several of a prompt in the wrong order for its beams.
    inputs = tiny.prompts(model, images=(1, 1))
    with VHR(reinforce_both=both)(model) as trace:
        found = generate(model, inputs, num_beams=3)
        for b, images in enumerate((slice(0, 1), slice(1, 2))):
            own = alone(inputs, b, images)
            assert torch.equal(generate(model, own, num_beams=3), found[b : b + 1])
    for b, images in enumerate((slice(0, 1), slice(1, 2))):
        own = alone(inputs, b, images)
        with torch.no_grad(), VHR(reinforce_both=both)(model) as trace:
            model(**own)
        with naive_vhr.scaling(model, heads_of(trace), 2):
            assert torch.equal(generate(model, own, num_beams=3), found[b : b + 1])


def test_sampling_draws_what_scaling_by_hand_draws(tiny: ModuleType, naive_vhr: ModuleType) -> None:
    model = small(tiny)
    own = tiny.prompts(model, images=(1,))
    torch.manual_seed(3)
    with VHR()(model) as trace:
        found = generate(model, own, do_sample=True, top_k=20)
    torch.manual_seed(3)
    with naive_vhr.scaling(model, heads_of(trace), 2):
        assert torch.equal(generate(model, own, do_sample=True, top_k=20), found)


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_a_static_cache_changes_nothing(
    families: ModuleType, tiny: ModuleType, matrix: ModuleType, family: str, two_pass: bool
) -> None:
    model, inputs = matrix.build(family, families, tiny)
    with VHR(two_pass=two_pass)(model):
        dynamic = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), dynamic)


def test_a_prompt_may_be_repeated_after_its_prefill(tiny: ModuleType, naive_vhr: ModuleType) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1, 1))
    cache = DynamicCache(config=model.config.get_text_config())
    new = torch.tensor([[7], [8], [9], [10]])
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(2, 0), torch.ones(4, 1, dtype=torch.long)], 1)
    with torch.no_grad(), VHR()(model) as trace:
        model(**inputs, **{tiny.CACHE: cache})
        cache.batch_repeat_interleave(2)
        step = model(input_ids=new, attention_mask=mask, **{tiny.CACHE: cache}).logits[:, -1]
    chosen = [heads_of(trace, b) for b in range(2)]
    for row in range(4):
        own = alone(inputs, row // 2, slice(row // 2, row // 2 + 1))
        ids = torch.cat([own["input_ids"], new[row : row + 1]], 1)
        with torch.no_grad(), naive_vhr.scaling(model, chosen[row // 2], 2):
            whole = model(input_ids=ids, pixel_values=own["pixel_values"]).logits[0, -1]
        torch.testing.assert_close(step[row], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_embeddings_in_place_of_ids_are_the_same_prompt(
    families: ModuleType, tiny: ModuleType, matrix: ModuleType, family: str
) -> None:
    model, inputs = matrix.build(family, families, tiny)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad(), VHR()(model) as trace:
        by_ids = model(**inputs).logits[:, -1]
        notes: Any = {name: dict(found) for name, found in trace.notes.items()}  # type: ignore[call-overload]
        assert torch.equal(model(inputs_embeds=embeds, **rest).logits[:, -1], by_ids)
    assert all(torch.equal(notes["heads"][layer], heads) for layer, heads in trace.notes["heads"].items())  # type: ignore


@pytest.mark.parametrize("both", [True, False])
def test_recorded_hidden_states_and_attentions_are_those_of_the_prompt_with_its_image(
    tiny: ModuleType, naive_vhr: ModuleType, both: bool
) -> None:
    model = small(tiny, attn="eager", dtype=torch.float32)
    own = tiny.prompts(model, images=(1,))
    how = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad(), VHR(reinforce_both=both)(model) as trace:
        out = model(**own, **how)
    with torch.no_grad(), naive_vhr.scaling(model, heads_of(trace), 2):
        expected = model(**own, **how)
    for name in ("hidden_states", "attentions"):
        found = getattr(out, name)
        assert len(found) == len(getattr(expected, name))
        for one, other in zip(found, getattr(expected, name), strict=True):
            torch.testing.assert_close(one, other)


def test_bf16_chooses_by_norms_in_single_and_doubles_exactly(tiny: ModuleType) -> None:
    model = small(tiny, dtype=torch.bfloat16)
    inputs = tiny.prompts(model, images=(1, 2))
    with VHR(layers=(1,))(model) as trace, watching(model, 4, False) as before, watching(model, 4, True) as after:
        generate(model, inputs, max_new_tokens=1)
    notes: Any = trace.notes
    assert notes["vhd"][1].dtype == torch.float32
    scale = torch.where(notes["heads"][1], 2.0, 1.0).repeat_interleave(8, 1)[:, None]
    assert torch.equal(after[1][-1], (before[1][0] * scale).to(torch.bfloat16))


def test_gradients_flow_through_the_scaled_heads(tiny: ModuleType, naive_vhr: ModuleType) -> None:
    model = small(tiny)
    own = tiny.prompts(model, images=(1,))
    weight = adapter_for(model).decoder_attention(1).v_proj.weight

    def gradient() -> torch.Tensor:
        logits = model(**own).logits[0, -1]
        return torch.autograd.grad(logits.logsumexp(0) - logits[5], weight)[0]

    with VHR()(model) as trace:
        found = gradient()
    with naive_vhr.scaling(model, heads_of(trace), 2):
        expected = gradient()
    torch.testing.assert_close(found, expected)


# Together with others -------------------------------------------------------------------------------------------------
OTHERS = {
    "flowcut": vlattn.FlowCut(keep=3, count="per_image"),
    "fastv": vlattn.FastV(keep=3, layer=2),
    "fastv late": vlattn.FastV(keep=3, layer=3, positions="compact"),
    "dyvte": vlattn.DyVTE(exit_layer=1),
    "both": vlattn.compose(vlattn.FlowCut(keep=6, count="per_image"), vlattn.FastV(keep=3, layer=2)),
}


@pytest.mark.parametrize("how", [{}, {"reinforce_both": False}, {"two_pass": True}], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_with_pruning_a_prompt_says_in_a_batch_what_it_says_alone(
    tiny: ModuleType, name: str, how: dict[str, Any]
) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1, 2))
    with OTHERS[name](model):
        pruned = generate(model, inputs)
    # In either order of attaching.
    with vlattn.compose(VHR(**how), OTHERS[name])(model) as trace:
        together = generate(model, inputs)
        chosen = [heads_of(trace, b) for b in range(2)]
        assert trace.budget()["final"] < sum(trace.visual_full) / 2
        for b, images in enumerate((slice(0, 1), slice(1, 3))):
            assert torch.equal(generate(model, alone(inputs, b, images)), together[b : b + 1])
            assert heads_of(trace) == chosen[b]
    with VHR(**how)(model) as trace, OTHERS[name](model):
        assert torch.equal(generate(model, inputs), together)
        assert [heads_of(trace, b) for b in range(2)] == chosen
    assert not torch.equal(pruned, together)


def test_with_pruning_heads_are_those_of_a_pruned_forward_with_what_was_chosen_below(
    tiny: ModuleType, naive_vhr: ModuleType
) -> None:
    model = small(tiny)
    own = tiny.prompts(model, images=(2,))
    blind = naive_vhr.text_only(own, [IMAGE])
    prune = vlattn.FastV(keep=3, layer=2)
    with torch.no_grad(), vlattn.compose(VHR(), prune)(model) as trace:
        logits = model(**own).logits[:, -1]
    heads: dict[int, list[bool]] = {}
    for layer in (1, 2, 3):
        with naive_vhr.scaling(model, heads, 2):
            with prune(model):
                seeing = naive_vhr.outputs(model, own, layer)[-1]
            without = naive_vhr.outputs(model, blind, layer)[-1]
        vhd = naive_vhr.drop_outliers(naive_vhr.divergence(seeing, without), without)
        heads[layer] = naive_vhr.above_median(vhd)
    assert heads_of(trace) == heads
    with torch.no_grad(), naive_vhr.scaling(model, heads, 2), prune(model):
        torch.testing.assert_close(model(**own).logits[:, -1], logits)


def test_two_passes_refuse_a_cut_that_holds_deepstack_features_back(families: ModuleType) -> None:
    model = families.model("qwen3_vl")
    inputs = families.inputs("qwen3_vl", model)
    early = vlattn.FastV(keep=2, layer=1)
    with vlattn.compose(VHR(two_pass=True), early)(model), pytest.raises(InputError, match="deepstack"):
        model(**inputs)
    with vlattn.compose(VHR(), early)(model):
        assert generate(model, inputs).shape == (2, 6)


# Settings, errors, restoring ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("depth", "expected"),
    [(32, (1, *range(18, 32))), (1, (0,)), (2, (1,)), (4, (1, 2, 3)), (6, (1, 3, 4, 5)), (28, (1, *range(16, 28)))],
)
def test_default_layers_are_the_second_and_the_last_14_of_32(depth: int, expected: tuple[int, ...]) -> None:
    assert default_layers(depth) == expected


def test_layers_can_be_chosen_in_any_order(tiny: ModuleType) -> None:
    assert VHR(layers=(3, 0)) == VHR(layers=(0, 3))
    model = small(tiny)
    with torch.no_grad(), VHR(layers=(3, 0))(model) as trace:
        model(**tiny.prompts(model))
    assert sorted(heads_of(trace)) == [0, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha: got -0.1"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": float("inf")}, "alpha: got inf"),
        ({"alpha": True}, "alpha: got True"),
        ({"alpha": "2"}, "alpha: got '2'"),
        ({"layers": ()}, r"layers: got \(\)"),
        ({"layers": (1, 1)}, "different"),
        ({"layers": (-1,)}, "0-based"),
        ({"layers": (1.5,)}, "0-based"),
        ({"layers": 3}, "layers: got 3"),
        ({"reinforce_both": 1}, "reinforce_both: got 1"),
        ({"two_pass": None}, "two_pass: got None"),
        ({"remove_outliers": "no"}, "remove_outliers: got 'no'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VHR(**settings)


def test_a_layer_the_decoder_lacks_is_refused(tiny: ModuleType) -> None:
    model = small(tiny)
    hooks = tiny.hooks_of(model)
    with pytest.raises(InputError, match="layers: got 4, but this model's decoder has layers 0 to 3"):
        VHR(layers=(1, 4))(model).attach()
    assert tiny.hooks_of(model) == hooks


def test_it_cannot_be_on_a_model_twice(tiny: ModuleType) -> None:
    model = small(tiny)
    with VHR()(model), pytest.raises(InputError, match="on this model already"):
        VHR(alpha=3)(model).attach()
    with pytest.raises(InputError, match="on this model already"):
        vlattn.compose(VHR(), VHR(alpha=3))(model).attach()


def test_a_cache_from_outside_and_prompts_in_pieces_are_refused(tiny: ModuleType) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1,))
    cache = DynamicCache(config=model.config.get_text_config())
    one, two = torch.tensor([[7]]), torch.tensor([[7, 8]])
    with torch.no_grad():
        model(**inputs, **{tiny.CACHE: cache})
        with VHR()(model):
            with pytest.raises(InputError, match="a prompt that VHR has not seen"):
                model(input_ids=one, **{tiny.CACHE: cache})
            cache = DynamicCache(config=model.config.get_text_config())
            model(**inputs, **{tiny.CACHE: cache})
            with pytest.raises(InputError, match="2 positions behind a cached prompt"):
                model(input_ids=two, **{tiny.CACHE: cache})
            model(**tiny.prompts(model, images=(1, 1)))
            with pytest.raises(InputError, match="a step of batch 1"):
                model(input_ids=one, **{tiny.CACHE: cache})


def test_generation_that_cuts_the_prompt_into_chunks_is_refused(tiny: ModuleType) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1,))  # 22 tokens
    with VHR()(model), pytest.raises(InputError, match="2 positions behind a cached prompt"):
        generate(model, inputs, prefill_chunk_size=20)


@pytest.mark.parametrize("how", [{}, {"reinforce_both": False}, {"two_pass": True}], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_the_model_is_as_it_was_after_the_context_and_after_an_exception(
    families: ModuleType, tiny: ModuleType, matrix: ModuleType, family: str, how: dict[str, Any]
) -> None:
    model, inputs = matrix.build(family, families, tiny)
    with torch.no_grad():
        vanilla = model(**inputs).logits
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)

    class Stop(Exception):
        pass

    def stop(module: Any, args: Any) -> None:
        raise Stop

    with VHR(**how)(model) as trace:
        generate(model, inputs)
    assert len(heads_of(trace)) == 3
    # In the middle of the text-only prompt, which reaches the last projection first.
    handle = adapter_for(model).decoder_attention(3).o_proj.register_forward_pre_hook(stop)
    with pytest.raises(Stop), VHR(**how)(model):
        model(**inputs)
    handle.remove()
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vanilla)


def test_an_interrupted_prompt_leaves_nothing_for_the_next(tiny: ModuleType) -> None:
    model = small(tiny)
    inputs = tiny.prompts(model, images=(1, 2))

    def stop(module: Any, args: Any) -> None:
        raise RuntimeError("stop")

    with VHR()(model):
        fresh = generate(model, inputs)
    with VHR()(model):
        handle = adapter_for(model).decoder_attention(2).o_proj.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            model(**inputs)
        handle.remove()
        assert torch.equal(generate(model, inputs), fresh)
