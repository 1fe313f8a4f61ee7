"""Every method on every family it claims: batches with left padding, eager and sdpa, fp32 and bf16, cached generation.

What a family cannot do is said by `Intervention.refuses`, which the documentation's table is made from.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.registry import METHODS, parse_method
from vlattn.models.registry import adapter_for

NEW = 4
# Small enough for images of nine tokens and decoders of four layers, and different from what does nothing.
SETTINGS = {
    "act": "act:heads=all,theta=0.02,min_rows=1",
    "divprune": "divprune:keep=4",
    "dyvte": "dyvte:exit_layer=1",
    "fastv": "fastv:keep=3,layer=2",
    "flowcut": "flowcut:keep=2,count=per_image",
    "hiprune": "hiprune:keep=4,alpha=0.3,object_layer=2",
    "icd": "icd:disturbance=[5,6,7],beta=0",
    "m3id": "m3id:lam=0.5,beta=0",
    "opera": "opera:num_beams=2,num_attn_candidates=4,warmup=0",
    "pai": "pai:cutoff=0",
    "paint": "paint:spatial_ratio=0.1",
    "prumerge": "prumerge:keep=4",
    "pyramiddrop": "pyramiddrop:layers=[1,2,3],ratios=[0.6,0.4,0.2]",
    "random": "random:keep=4",
    "sid": "sid:layer=2,keep=3,beta=0",
    "sparsevlm": "sparsevlm:layers=[1,2],counts=[5,3]",
    "tome": "tome:keep=4",
    "uniform": "uniform:keep=4",
    "var": "var:sink_dims=[3,7],tau=1.2,min_visual_mass=0.05,rho_nonsink=0.3",
    "vcd": "vcd:beta=0",
    "vhr": "vhr",
    "visionzip": "visionzip:dominant=3,contextual=1",
    "vispruner": "vispruner:keep=4",
}
# What prunes nothing: methods that edit attention, heads or logits.
EDITS = {"act", "icd", "m3id", "opera", "pai", "paint", "sid", "var", "vcd", "vhr"}
# What searches for an answer of its own, and leaves a forward pass as it is.
SEARCHES = {"opera"}


def test_every_method_of_the_registry_is_in_the_matrix() -> None:
    assert sorted(SETTINGS) == sorted(METHODS)


FAMILIES = (
    "llava", "llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm", "gemma3",
)  # fmt: skip


def build(family: str, families: ModuleType, tiny: ModuleType, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny random model of `family` and a left-padded batch of two prompts for it."""
    if family == "llava":
        model = tiny.llava(decoder_layers=4, image_size=16, layers=4, **options)
        return model, tiny.prompts(model, images=(1, 2))
    model = families.model(family, **options)
    # OneVision cuts an image into tiles only where it is alone in its prompt, and shrinks many tiles.
    return model, families.inputs(family, model, images=2 if family == "llava_onevision" else 1)


def alone(family: str, inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """Prompt `b` of a batch of two, without its padding, with its own images."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    images = {"llava": (0, 1, 3), "llava_onevision": (0, 2, 4)}.get(family, (0, 1, 2))
    found = {}
    for name, value in inputs.items():
        if value.shape[:2] == ids.shape:
            found[name] = value[b : b + 1, mask[b]]
        elif name == "pixel_values" and family.startswith("qwen"):
            found[name] = value.split(inputs["image_grid_thw"].prod(-1).tolist())[b]
        elif name == "pixel_values" and family == "internvl":
            found[name] = value.split([2, 3])[b]
        elif value.ndim and value.shape[0] == images[-1]:
            found[name] = value[images[b] : images[b + 1]]
        else:
            found[name] = value
    if "batch_num_images" in found:
        found["batch_num_images"] = inputs["batch_num_images"][b : b + 1]
    return found


def test_the_families_here_are_those_with_an_adapter(families: ModuleType) -> None:
    from vlattn.models.registry import families as known

    assert sorted(FAMILIES) == sorted(known())


def generate(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_method_prunes_a_family_it_claims_and_leaves_it_as_it_was(
    families: ModuleType, tiny: ModuleType, name: str, family: str, attn: str, dtype: torch.dtype
) -> None:
    method = parse_method(SETTINGS[name])
    assert isinstance(method, Intervention)
    model, inputs = build(family, families, tiny, attn=attn, dtype=dtype)
    reason = method.refuses(type(adapter_for(model)))
    if reason is not None:
        with pytest.raises(InputError, match="not supported on") as caught:
            method(model).attach()
        assert reason in str(caught.value)
        return
    with torch.no_grad():
        vanilla = model(**inputs).logits
    with torch.no_grad(), method(model) as trace:
        out = model(**inputs)
        assert bool(out.logits[:, -1].isfinite().all())
        implementation = model.config.get_text_config()._attn_implementation
        assert implementation.removeprefix("vlattn_" if name in EDITS else "") == attn
        generated = generate(model, inputs)
        assert generated.shape == (2, NEW)
    full, budget = sum(trace.visual_full) / len(trace.visual_full), trace.budget()  # beams are rows
    assert budget["final"] == full if name in EDITS else budget["final"] < full
    assert budget["final"] <= budget["counted"] <= budget["average"] <= full
    assert not trace.masked
    assert trace.decoder_lengths == sorted(trace.decoder_lengths, reverse=True)
    assert torch.equal(out.logits[:, -1], vanilla[:, -1]) == (name in SEARCHES)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_prompt_says_in_a_padded_batch_what_it_says_alone(
    families: ModuleType, tiny: ModuleType, name: str, family: str
) -> None:
    method = parse_method(SETTINGS[name])
    assert isinstance(method, Intervention)
    model, inputs = build(family, families, tiny)
    if method.refuses(type(adapter_for(model))) is not None:
        pytest.skip("this method does not claim this family")
    with method(model):
        together = generate(model, inputs)
        for b in range(2):
            assert torch.equal(generate(model, alone(family, inputs, b)), together[b : b + 1])
    assert len(set(together.flatten().tolist())) > 1


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_prompts_without_any_image_are_left_as_they_are_with_one_warning(tiny: ModuleType, name: str) -> None:
    model, inputs = build("llava", ModuleType("none"), tiny, dtype=torch.float32)
    method, text = parse_method(SETTINGS[name]), {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    assert method is not None
    labelled = {**text, "labels": text["input_ids"]}
    vanilla, logits = generate(model, text), model(**labelled)
    with method(model):
        edited = [generate(model, inputs) for _ in range(2)]
    with method(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for expected in edited:
            assert torch.equal(generate(model, text), vanilla)
            assert torch.equal(generate(model, inputs), expected)
        found = model(**labelled)
    assert torch.equal(found.logits, logits.logits)
    assert torch.equal(found.loss, logits.loss)
    assert sum("no visual tokens" in str(one.message) for one in caught) == 1
