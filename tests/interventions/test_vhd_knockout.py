"""The knock-out VHD is what leaving image keys out of one row's softmax does, computed in two other ways."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.interventions.vhd_knockout import KnockOut, knockout_outputs
from vlattn.models.registry import adapter_for
from vlattn.runtime.routing import AttentionCall

IMAGE = 63


def rows(seed: int, kv_heads: int = 2) -> dict[str, torch.Tensor]:
    """Logits [2, 4, 3, 9] under a causal mask with padding in front of the second prompt."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()[None, None, -3:].repeat(2, 1, 1, 1)
    allowed[1, :, :, :2] = False
    visual = torch.zeros(2, 9, dtype=torch.bool)
    visual[0, 1:4] = visual[1, 2:6] = True
    return {
        "logits": 3 * torch.randn(2, 4, 3, 9, generator=generator, dtype=torch.float64),
        "allowed": allowed,
        "visual": visual,
        "value": torch.randn(2, kv_heads, 9, 5, generator=generator, dtype=torch.float64),
    }


def attend(logits: list[float], value: list[list[float]], keys: list[int]) -> list[float]:
    """softmax(logits) @ value over some keys, in plain loops."""
    total = sum(math.exp(logits[key]) for key in keys)
    return [sum(math.exp(logits[key]) * value[key][i] for key in keys) / total for i in range(len(value[0]))]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_the_distance_to_the_output_over_the_other_keys(seed: int, kv_heads: int) -> None:
    given = rows(seed, kv_heads)
    scores, rest = knockout_outputs(**given)
    assert scores.shape == (2, 4, 3)
    for b in range(2):
        for head in range(4):
            value = given["value"][b, head * kv_heads // 4].tolist()
            for row in range(3):
                logits = given["logits"][b, head, row].tolist()
                keys = given["allowed"][b, 0, row].nonzero().flatten().tolist()
                others = [key for key in keys if not given["visual"][b, key]]
                whole, without = attend(logits, value, keys), attend(logits, value, others)
                assert scores[b, head, row].item() == pytest.approx(math.dist(whole, without), rel=1e-10)
                assert rest[b, head, row].tolist() == pytest.approx(without, rel=1e-10)


def test_rows_that_see_no_image_or_nothing_else_are_numbers() -> None:
    given = rows(0)
    none = knockout_outputs(**{**given, "visual": torch.zeros(2, 9, dtype=torch.bool)})
    assert none[0].tolist() == torch.zeros(2, 4, 3).tolist()
    scores, rest = knockout_outputs(**{**given, "visual": torch.ones(2, 9, dtype=torch.bool)})
    assert not rest.any()
    weights = given["logits"].masked_fill(~given["allowed"], -torch.inf).softmax(-1)
    whole = weights @ given["value"].repeat_interleave(2, 1)
    torch.testing.assert_close(scores, whole.norm(dim=-1))
    padding = knockout_outputs(**{**given, "allowed": torch.zeros(2, 1, 3, 9, dtype=torch.bool)})
    assert padding[0].tolist() == torch.zeros(2, 4, 3).tolist()
    assert padding[1].isfinite().all()


def test_huge_logits_do_not_overflow() -> None:
    given = rows(1)
    scores, _ = knockout_outputs(**{**given, "logits": given["logits"] + 1e4})
    torch.testing.assert_close(scores, knockout_outputs(**given)[0])


# On models ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def layer_states(model: Any, call: dict[str, Any], layer: int) -> dict[str, Any]:
    """Queries, keys and values of a layer of one prompt without padding, positions turned in; and its head outputs."""
    adapter = adapter_for(model)
    attention = adapter.decoder_attention(layer)
    found: dict[str, Any] = {}
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda m, args, output, name=name: found.update({name: output})
        )
        for name in "qkv"
    ]
    handles.append(
        attention.register_forward_pre_hook(lambda m, args, kwargs: found.update(call=kwargs), with_kwargs=True)
    )
    handles.append(attention.o_proj.register_forward_pre_hook(lambda m, args: found.update(heads=args[0])))
    model(**call, use_cache=False)
    for handle in handles:
        handle.remove()
    cos, sin = found["call"]["position_embeddings"]
    q, k = (adapter.decoder_states(layer, name, found[name], cos, sin)[0] for name in "qk")  # [H, N, d]
    value = found["v"][0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
    return {"q": q, "k": k, "v": value, "heads": found["heads"][0].unflatten(-1, (-1, attention.head_dim))}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_map_is_that_of_loops_over_each_layer_and_the_model_goes_on_as_ever(tiny: ModuleType, attn: str) -> None:
    model = tiny.llava(decoder_layers=3, image_size=16, layers=4, attn=attn, dtype=torch.float32)
    inputs = tiny.prompts(model, images=(1, 2))
    found = vlattn.vhd_knockout(model, inputs)
    for b, images in enumerate((slice(0, 1), slice(1, 3))):
        alive = inputs["attention_mask"][b].bool()
        own = {"input_ids": inputs["input_ids"][b : b + 1, alive], "pixel_values": inputs["pixel_values"][images]}
        text = [place for place, token in enumerate(own["input_ids"][0].tolist()) if token != IMAGE]
        for layer in range(3):
            state = layer_states(model, own, layer)
            for head in range(4):
                key, value = state["k"][head // 2], state["v"][head // 2].tolist()
                logits = (key @ state["q"][head, -1] / 8**0.5).tolist()
                whole, without = attend(logits, value, list(range(len(value)))), attend(logits, value, text)
                assert whole == pytest.approx(state["heads"][-1, head].tolist(), abs=1e-4)
                assert found[b, layer, head].item() == pytest.approx(math.dist(whole, without), rel=1e-3, abs=1e-4)


def test_in_the_first_layer_it_is_the_vhd_of_a_prompt_whose_text_keeps_its_positions(
    tiny: ModuleType, naive_vhr: ModuleType
) -> None:
    model = tiny.llava(decoder_layers=3, image_size=16, layers=4)
    own = tiny.prompts(model, images=(1,))
    found = vlattn.vhd_knockout(model, own)[0]
    text = (own["input_ids"][0] != IMAGE).nonzero().flatten()
    blind = {"input_ids": own["input_ids"][:, text], "attention_mask": torch.ones(1, len(text), dtype=torch.long)}
    kept, recounted = {**blind, "position_ids": text[None]}, blind
    for layer in range(3):
        seeing = naive_vhr.outputs(model, own, layer)[-1]
        same_places = naive_vhr.divergence(seeing, naive_vhr.outputs(model, kept, layer)[-1])
        published = naive_vhr.divergence(seeing, naive_vhr.outputs(model, recounted, layer)[-1])
        assert (found[layer].tolist() == pytest.approx(same_places, rel=1e-4)) is (layer == 0)
        assert found[layer].tolist() != pytest.approx(published, rel=1e-2)


@pytest.mark.parametrize("remove", [False, True])
def test_outliers_go_by_the_output_without_image_keys(naive_vhr: ModuleType, remove: bool) -> None:
    changed = 0
    for seed in range(40):
        given = rows(seed)
        call = AttentionCall(2, False, torch.zeros(2, 4, 3, 5), given["value"], given["value"], given["visual"],
                             torch.ones(2, 9, dtype=torch.bool), 9)  # fmt: skip
        edit = KnockOut(remove_outliers=remove)
        assert edit.rows(call) == 3
        assert edit.logits(call, given["logits"], given["allowed"]) is given["logits"]
        (found,) = edit.found[2]
        scores, rest = knockout_outputs(**given)
        for b in range(2):
            for row in range(3):
                expected = scores[b, :, row].tolist()
                if remove:
                    expected = naive_vhr.drop_outliers(expected, rest[b, :, row].tolist())
                assert found[b, :, row].tolist() == pytest.approx(expected)
        changed += int((found != scores).sum())
    assert (changed > 0) is remove


def test_measuring_changes_no_output(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=3, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 2))
    from vlattn.interventions.vhd import joined

    with torch.no_grad():
        vanilla = model(**inputs).logits
        with joined(model) as (session, hooks):
            session.attention.add([0, 1, 2], KnockOut(), hooks)
            assert torch.equal(model(**inputs).logits, vanilla)


def test_image_keys_are_those_that_pruning_leaves(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 2))
    with vlattn.DyVTE(exit_layer=1)(model):
        found = vlattn.vhd_knockout(model, inputs)
    assert torch.equal(found[:, :2], vlattn.vhd_knockout(model, inputs)[:, :2])
    assert found[:, 2:].tolist() == [[[0.0] * 4] * 2] * 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_other_families_give_a_map_as_well(families: ModuleType, family: str) -> None:
    model = families.model(family)
    found = vlattn.vhd_knockout(model, families.inputs(family, model))
    assert found.shape == (2, 4, 4)
    assert bool((found > 0).all())
