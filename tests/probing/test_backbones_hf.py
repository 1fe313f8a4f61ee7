"""Hugging Face backbones against the models' own outputs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf

from vlattn.errors import InputError
from vlattn.probing.backbones import load_backbone
from vlattn.probing.backbones.hf_images import hf_images

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
FULL = {**SHAPE, "intermediate_size": 32}
CLIP_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}

# model, CLS, registers, whether last_hidden_state is normed, the final norm
MODELS: dict[str, tuple[Callable[[], Any], int, int, bool]] = {
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**FULL)), 1, 0, True),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**FULL)), 1, 1, True),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**FULL)), 1, 0, False),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**FULL)), 0, 0, True),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SHAPE)), 1, 0, True),
    "dinov2_registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3)), 1, 3, True,
    ),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**FULL, num_register_tokens=2)), 1, 2, True),
}  # fmt: skip
each = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture
def make(tiny: ModuleType) -> Callable[[str], Any]:
    def made(kind: str) -> Any:
        model = MODELS[kind][0]()
        tiny._draw(model, 0, 1.0)
        return model.eval()

    return made


def norm_of(model: Any) -> Any:
    inner = getattr(model, "vision_model", model)
    return next(getattr(inner, name) for name in ("post_layernorm", "layernorm", "norm") if hasattr(inner, name))


@each
def test_tokens_are_the_last_hidden_state_told_apart(make: Callable[[str], Any], kind: str) -> None:
    model, (_, cls, registers, normed) = make(kind), MODELS[kind]
    expected = model(PIXELS).last_hidden_state
    backbone = load_backbone(model)
    tokens = backbone(PIXELS)
    torch.testing.assert_close(tokens.patches, expected[:, cls + registers :])
    assert tokens.patches.shape == (2, 16, 24)
    assert tokens.grid == (4, 4)
    assert (tokens.cls is not None) is bool(cls)
    if cls:
        torch.testing.assert_close(tokens.cls, expected[:, 0])
    if registers:
        torch.testing.assert_close(tokens.registers, expected[:, cls : cls + registers])
    else:
        assert tokens.registers is None
    assert backbone.describe()["final_norm"] is normed


@each
@pytest.mark.parametrize("final_norm", ["auto", True])
def test_tokens_of_a_block_are_its_hidden_state(make: Callable[[str], Any], kind: str, final_norm: Any) -> None:
    model, (_, cls, registers, _) = make(kind), MODELS[kind]
    states = make(kind)(PIXELS, output_hidden_states=True).hidden_states[1:]
    assert len(states) == 3
    for layer in range(3):
        expected = norm_of(model)(states[layer]) if final_norm is True else states[layer]
        tokens = load_backbone(model, layer=layer, final_norm=final_norm)(PIXELS)
        torch.testing.assert_close(tokens.patches, expected[:, cls + registers :])
        if cls:
            torch.testing.assert_close(tokens.cls, expected[:, 0])


@each
def test_the_final_norm_can_be_forced_on_and_off(make: Callable[[str], Any], kind: str) -> None:
    model, first = make(kind), MODELS[kind][1] + MODELS[kind][2]
    off = load_backbone(model, final_norm=False)(PIXELS).patches
    on = load_backbone(model, final_norm=True)(PIXELS).patches
    torch.testing.assert_close(norm_of(model)(off), on)
    assert not torch.allclose(on, off)
    last = model(PIXELS).last_hidden_state[:, first:]
    torch.testing.assert_close(on if MODELS[kind][3] else off, last)


@each
def test_the_model_s_own_hidden_states_are_right_after_a_run_that_ended_early(
    make: Callable[[str], Any], kind: str
) -> None:
    model = make(kind)
    expected = make(kind)(PIXELS, output_hidden_states=True)
    load_backbone(model, layer=0)(PIXELS)
    after = model(PIXELS, output_hidden_states=True)
    assert len(after.hidden_states) == len(expected.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "dinov2", "dinov3"])
def test_images_of_another_size_get_interpolated_positions(make: Callable[[str], Any], kind: str) -> None:
    model, (_, cls, registers, _) = make(kind), MODELS[kind]
    pixels = torch.randn(2, 3, 48, 40)
    more = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    tokens = load_backbone(model)(pixels)
    assert tokens.grid == (6, 5)
    torch.testing.assert_close(tokens.patches, model(pixels, **more).last_hidden_state[:, cls + registers :])


def test_mae_runs_unmasked_and_in_order(tiny: ModuleType) -> None:
    config = hf.ViTMAEConfig(**FULL, mask_ratio=0.75)
    mae, vit = hf.ViTMAEModel(config), hf.ViTModel(hf.ViTConfig(**FULL, qkv_bias=True))
    tiny._draw(mae, 0, 1.0)
    missing = vit.load_state_dict(mae.state_dict(), strict=False)
    assert all("pooler" in name for name in missing.missing_keys)
    expected = vit.eval()(PIXELS).last_hidden_state
    backbone = load_backbone(mae.eval())
    tokens = backbone(PIXELS)
    torch.testing.assert_close(tokens.patches, expected[:, 1:])
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    assert mae.config.mask_ratio == 0.75
    assert torch.equal(load_backbone(mae, layer=0)(PIXELS).patches, load_backbone(mae, layer=0)(PIXELS).patches)


def test_the_image_side_of_clip_and_the_model_under_a_classifier_are_found(tiny: ModuleType) -> None:
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=FULL)).eval()
    tiny._draw(clip, 0, 1.0)
    expected = clip.vision_model(PIXELS).last_hidden_state
    torch.testing.assert_close(load_backbone(clip)(PIXELS).patches, expected[:, 1:])
    classifier = hf.ViTForImageClassification(hf.ViTConfig(**FULL)).eval()
    tiny._draw(classifier, 0, 1.0)
    expected = classifier.vit(PIXELS).last_hidden_state
    torch.testing.assert_close(load_backbone(classifier)(PIXELS).patches, expected[:, 1:])


def test_a_model_that_needs_more_than_pixels_is_refused_by_name() -> None:
    config = hf.Siglip2VisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match=r"Siglip2VisionModel needs .*pixel_attention_mask"):
        load_backbone(hf.Siglip2VisionModel(config))


def test_mean_std_and_size_come_from_the_processor_or_the_family(make: Callable[[str], Any]) -> None:
    processor = hf.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]
    )
    told = load_backbone(make("dinov2"), processor=processor)
    assert told.images.size == (24, 24)
    assert told.images.mean == (0.1, 0.2, 0.3)
    assert told.describe()["mean_and_std_from"] == "processor"
    assert load_backbone(make("dinov2"), processor=processor, image_size=16).images.size == (16, 16)
    squash = hf.SiglipImageProcessor(size={"height": 16, "width": 32})
    assert load_backbone(make("siglip"), processor=squash).images.size == (16, 32)
    shortest = hf.CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False)
    assert load_backbone(make("dinov2"), processor=shortest).images.size == (40, 40)
    clip = load_backbone(make("clip")).images
    assert clip.size == (32, 32)
    assert clip.mean == tuple(hf.CLIPImageProcessor().image_mean)
    assert clip.std == tuple(hf.CLIPImageProcessor().image_std)
    assert load_backbone(make("siglip")).images.mean == tuple(hf.SiglipImageProcessor().image_mean)
    assert load_backbone(make("dinov2")).describe()["mean_and_std_from"] == "family"
    assert hf_images(hf.IJepaConfig()).source.startswith("ImageNet")
