"""What holds for every method that acts before the decoder, through live models."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn import DivPrune, HiPrune, PruMerge, ToMe, VisionZip, VisPruner
from vlattn.errors import InputError
from vlattn.models.registry import adapter_for

METHODS = [
    VisionZip(dominant=5, contextual=2),
    PruMerge(),
    PruMerge(plus=True, keep=8),
    ToMe(keep=7),
    ToMe(r=6, order="official"),
    DivPrune(keep=7),
    VisPruner(keep=7),
    HiPrune(keep=7, object_layer=2, alpha=0.5),
]
NEUTRAL = [DivPrune(ratio=1.0), ToMe(r=0), VisPruner(keep=36), HiPrune(keep=36, object_layer=1)]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of rotary tables and of eager attention's softmax, which transformers makes in fp32."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def alone(inputs: dict[str, torch.Tensor], row: int, images: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Prompt `row` of a batch, without its padding, with its own images."""
    real = inputs["attention_mask"][row].bool()
    start = sum(images[:row])
    return {
        "input_ids": inputs["input_ids"][row][real][None],
        "attention_mask": inputs["attention_mask"][row][real][None],
        "pixel_values": inputs["pixel_values"][start : start + images[row]],
    }


@every_method
@pytest.mark.parametrize("options", [{}, {"siglip": True, "feature_layer": -1}], ids=str)
def test_a_prompt_in_a_batch_is_the_prompt_alone(
    llava: Any, prompts: Any, method: Any, options: dict[str, Any]
) -> None:
    model, images = llava(layers=4, **options), (1, 2, 1)
    inputs, start = prompts(model, images=images), 0
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), method(model) as trace:
        logits, said = model(**inputs).logits, model.generate(**inputs, **greedy)
        kept = trace.kept
        for row, count in enumerate(images):
            one = alone(inputs, row, images)
            found = model(**one).logits[0]
            assert_close(logits[row, -len(found) :], found)
            told = model.generate(**one, **greedy)
            assert torch.equal(told[0, one["input_ids"].shape[1] :], said[row, inputs["input_ids"].shape[1] :])
            width = trace.kept.shape[1]
            assert torch.equal(kept[start : start + count, :width], trace.kept)
            assert bool((kept[start : start + count, width:] == -1).all())
            start += count


@every_method
def test_beams_decode_as_the_prompt_alone_does(llava: Any, prompts: Any, method: Any) -> None:
    model, images = llava(layers=4), (1, 2)
    inputs = prompts(model, images=images)
    beams = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad(), method(model):
        together = model.generate(**inputs, **beams)[:, inputs["input_ids"].shape[1] :]
        for row in range(2):
            one = alone(inputs, row, images)
            told = model.generate(**one, **beams)[:, one["input_ids"].shape[1] :]
            assert torch.equal(together[2 * row : 2 * row + 2], told)


@every_method
def test_the_model_is_left_as_it_was_even_by_an_error(llava: Any, prompts: Any, tiny: ModuleType, method: Any) -> None:
    model = llava(layers=4)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        before = tiny.hooks_of(model), tiny.settings_of(model)
        with method(model):
            assert tiny.hooks_of(model) != before[0]
            assert model(**inputs).logits.shape != expected.shape
        assert (tiny.hooks_of(model), tiny.settings_of(model)) == before
        with pytest.raises((RuntimeError, ValueError)), method(model):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :2]})  # two colours
        assert (tiny.hooks_of(model), tiny.settings_of(model)) == before
        assert torch.equal(model(**inputs).logits, expected)


@every_method
def test_one_prompt_leaves_nothing_behind_for_the_next(llava: Any, prompts: Any, method: Any) -> None:
    model = llava(layers=4)
    first, second = prompts(model, images=(1, 2)), prompts(model, images=(1,), seed=3)
    with torch.no_grad(), method(model) as trace:
        logits, kept = model(**first).logits, trace.kept
        model.generate(**second, max_new_tokens=3, do_sample=False)
        assert trace.kept.shape[0] == 1
        assert torch.equal(model(**first).logits, logits)
        assert torch.equal(trace.kept, kept)


@pytest.mark.parametrize("method", NEUTRAL, ids=repr)
@pytest.mark.parametrize("options", [{}, {"siglip": True, "feature_layer": -1}, {"strategy": "full"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_keeping_everything_is_the_stock_model_bit_for_bit(
    llava: Any, prompts: Any, method: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = llava(layers=3, dtype=dtype, **options)
    if options.get("strategy") == "full" and isinstance(method, VisPruner | HiPrune):
        method = type(method)(**{**vars(method), "keep": 37})  # CLS counts
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        logits = model(**inputs).logits
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with method(model) as trace:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), said)
    assert trace.kept.tolist() == [list(range(36))] * 3


@pytest.mark.parametrize(
    "method", [DivPrune(ratio=1.0), ToMe(keep=16), VisPruner(keep=16), HiPrune(keep=16, object_layer=1)], ids=repr
)
def test_keeping_every_tile_is_the_stock_model_bit_for_bit(families: ModuleType, method: Any) -> None:
    model = families.model("llava_next")
    inputs = families.inputs("llava_next", model, images=2)
    with torch.no_grad():
        expected = model(**inputs).logits
        with method(model):
            assert torch.equal(model(**inputs).logits, expected)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_decodes_in_its_own_dtype(llava: Any, prompts: Any, method: Any, dtype: torch.dtype) -> None:
    model = llava(layers=4, dtype=dtype)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad(), method(model):
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert logits.dtype == dtype
    assert bool(logits[:, -1].isfinite().all())


@every_method
def test_eager_and_sdpa_agree(llava: Any, prompts: Any, method: Any) -> None:
    found = []
    for attn in ("eager", "sdpa"):
        model = llava(layers=4, attn=attn)
        with torch.no_grad(), method(model):
            found.append(model(**prompts(model, images=(2,))).logits)
    assert_close(*found)


@every_method
def test_gradients_reach_the_tower_through_what_is_kept(llava: Any, prompts: Any, method: Any) -> None:
    model = llava(layers=4)
    with method(model):
        model(**prompts(model, images=(1, 1))).logits[:, -1].square().sum().backward()
    for name, weight in model.named_parameters():
        if "multi_modal_projector" in name or "patch_embedding" in name:
            assert weight.grad is not None
            assert bool(weight.grad.isfinite().all())
            assert bool(weight.grad.any())


def test_old_positions_can_be_kept(llava: Any, prompts: Any, tiny: ModuleType) -> None:
    model = llava(layers=4)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad(), VisPruner(keep=7, positions="preserve")(model) as trace:
        found = model(**inputs).logits
        kept = trace.kept
    assert kept is not None
    with torch.no_grad():
        stock = tiny.features(model, inputs["pixel_values"])
        slots = [tiny.with_slots(image[ids], ids) for image, ids in zip(stock, kept, strict=True)]
        short, positions = tiny.short_sequence(model, inputs, slots)
        expected = model(**short, position_ids=positions).logits
    real = short["attention_mask"].bool()
    assert_close(found[real], expected[real])


@every_method
def test_only_one_method_may_choose_the_features(llava: Any, method: Any) -> None:
    other = vlattn.RandomPrune(keep=5)
    with pytest.raises(InputError, match=r"RandomPrune: .* already chooses the image features"):
        vlattn.compose(method, other)
    model = llava(layers=4)
    with method(model), pytest.raises(InputError, match="already chooses the image features"):
        other(model).attach()


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, DivPrune)], ids=repr)
def test_features_that_skipped_the_tower_are_refused(llava: Any, method: Any) -> None:
    model = llava(layers=4)
    with method(model), pytest.raises(InputError, match="did not pass through the vision tower inside this context"):
        model.model.multi_modal_projector(torch.zeros(1, 36, 16, dtype=torch.float64))


@every_method
def test_families_are_served_or_refused_with_a_reason(families: ModuleType, method: Any) -> None:
    served = []
    for family in families.FAMILIES:
        model = families.model(family)
        if type(method).refuses(type(adapter_for(model))):
            with pytest.raises(InputError, match=rf"not supported on .*{family}.*; supported: .*llava_next"):
                method(model).attach()
            continue
        # OneVision shrinks what a single image is cut into, but not several images.
        inputs = families.inputs(family, model, images=2 if family == "llava_onevision" else 1)
        with torch.no_grad(), method(model) as trace:
            assert bool(model(**inputs).logits[:, -1].isfinite().all())
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert all(0 < n < full for n, full in zip(trace.visual_by_layer[0], trace.visual_full, strict=True))
        served.append(family)
    qwen = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"} if isinstance(method, VisionZip | HiPrune) else set()
    everywhere = set(families.FAMILIES)
    expected = everywhere if isinstance(method, DivPrune) else {"llava_next", "llava_onevision", "video_llava"} | qwen
    assert set(served) == expected


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, DivPrune)], ids=repr)
def test_tiles_that_the_model_shrinks_and_frames_that_it_pools_are_refused(families: ModuleType, method: Any) -> None:
    model = families.model("llava_onevision")
    for inputs in (
        families.inputs("llava_onevision", model, batch=2),
        families.inputs("llava_onevision", model, images=0, video=True),
    ):
        with method(model), pytest.raises(InputError, match="pools or shrinks the features"):
            model(**inputs)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, DivPrune)], ids=repr)
def test_a_frame_of_a_video_is_treated_as_an_image_is(families: ModuleType, method: Any) -> None:
    model = families.model("video_llava", vision_feature_select_strategy="full")
    model.model.video_tower.load_state_dict(model.model.image_tower.state_dict())
    video = families.inputs("video_llava", model, images=0, video=True)
    ids = video["input_ids"]
    pixels = video["pixel_values_videos"].flatten(0, 1)
    images = {
        "input_ids": torch.where(ids == model.config.video_token_id, model.config.image_token_id, ids),
        "attention_mask": video["attention_mask"],
        next(iter(k for k in families.inputs("video_llava", model) if k.startswith("pixel_values"))): pixels,
    }
    with torch.no_grad(), method(model):
        torch.testing.assert_close(model(**video).logits, model(**images).logits, rtol=1e-9, atol=1e-9)


@every_method
def test_the_decoder_can_prune_what_the_encoder_left(llava: Any, prompts: Any, method: Any) -> None:
    model = llava(layers=4, decoder_layers=3)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad(), vlattn.compose(vlattn.FastV(keep=4, layer=1), method)(model) as trace:
        both = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), method(model), vlattn.FastV(keep=4, layer=1)(model):
        assert torch.equal(model(**inputs).logits, both)
    first = trace.visual_by_layer[0]
    assert all(4 < n < full for n, full in zip(first, trace.visual_full, strict=True))
    assert trace.visual_by_layer[1:] == [[4, 4]] * 3
