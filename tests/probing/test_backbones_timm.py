"""timm backbones against the library's own forward, and against its parts run one by one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import timm
import torch

from vlattn.errors import InputError
from vlattn.probing.backbones import load_backbone

PIXELS = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit(tiny: ModuleType) -> Any:
    """`vit(name, ...)`: a random ViT of width 24 with 3 blocks and patches of 8 px, for images of 32 x 48."""

    def make(name: str = "vit_tiny_patch16_224", **changes: Any) -> Any:
        settings = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
        model = timm.create_model(name, pretrained=False, **{**settings, **changes})
        tiny._draw(model, 0, 1.0)
        return model.eval()

    return make


@torch.no_grad()
def block_by_block(model: Any, layer: int) -> torch.Tensor:
    """What block `layer` puts out, from the ViT's parts."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(PIXELS)))
    for block in model.blocks[: layer + 1]:
        x = block(x)
    return x


# name and settings, CLS, registers
VITS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cls": ({}, 1, 0),
    "registers": ({"reg_tokens": 4}, 1, 4),
    "registers_no_cls": ({"reg_tokens": 3, "class_token": False, "global_pool": "avg"}, 0, 3),
    "no_cls": ({"class_token": False, "global_pool": "avg"}, 0, 0),
    "no_cls_map": ({"class_token": False, "global_pool": "map"}, 0, 0),
    "cls_avg": ({"global_pool": "avg"}, 1, 0),
    "pre_norm": ({"pre_norm": True, "no_embed_class": True}, 1, 0),
}
each_vit = pytest.mark.parametrize("kind", VITS)


@each_vit
def test_tokens_are_those_of_forward_features_told_apart(vit: Any, kind: str) -> None:
    settings, cls, registers = VITS[kind]
    model = vit(**settings)
    tokens, expected = load_backbone(model)(PIXELS), model.forward_features(PIXELS)
    assert tokens.grid == (4, 6)
    assert torch.equal(tokens.patches, expected[:, cls + registers :])
    assert tokens.patches.shape == (2, 24, 24)
    assert (tokens.cls is not None) is bool(cls)
    if cls:
        assert torch.equal(tokens.cls, expected[:, 0])
    if registers:
        assert torch.equal(tokens.registers, expected[:, cls : cls + registers])
    else:
        assert tokens.registers is None


@each_vit
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("final_norm", ["auto", True, False])
def test_tokens_of_a_block_are_those_of_the_parts(vit: Any, kind: str, layer: int, final_norm: Any) -> None:
    settings, cls, registers = VITS[kind]
    model = vit(**settings)
    backbone = load_backbone(model, layer=layer, final_norm=final_norm)
    expected = block_by_block(model, layer)
    if final_norm is True:
        expected = (
            model.fc_norm(expected) if kind in ("cls_avg", "no_cls", "registers_no_cls") else model.norm(expected)
        )
    tokens = backbone(PIXELS)
    torch.testing.assert_close(tokens.patches, expected[:, cls + registers :])
    if cls:
        torch.testing.assert_close(tokens.cls, expected[:, 0])
    if registers:
        torch.testing.assert_close(tokens.registers, expected[:, cls : cls + registers])
    assert backbone.describe()["final_norm"] is (final_norm is True)


def test_the_final_norm_is_on_by_default_and_can_be_left_out(vit: Any) -> None:
    model = vit()
    raw = block_by_block(model, 2)
    assert load_backbone(model).describe()["final_norm"] is True
    torch.testing.assert_close(load_backbone(model, final_norm=False)(PIXELS).patches, raw[:, 1:])
    torch.testing.assert_close(load_backbone(model, final_norm=True)(PIXELS).patches, model.norm(raw)[:, 1:])
    assert not torch.allclose(raw, model.norm(raw))


def test_an_average_pooled_vit_skips_its_norm_unless_asked(vit: Any) -> None:
    model = vit(global_pool="avg")
    raw = block_by_block(model, 2)[:, 1:]
    auto, normed = load_backbone(model), load_backbone(model, final_norm=True)
    assert auto.describe()["final_norm"] is False
    assert normed.describe()["final_norm"] is True
    torch.testing.assert_close(auto(PIXELS).patches, raw)
    torch.testing.assert_close(normed(PIXELS).patches, model.fc_norm(raw))


def test_distilled_models_keep_the_distillation_token_out_of_the_patches(vit: Any) -> None:
    model = vit("deit_tiny_distilled_patch16_224")
    tokens, expected = load_backbone(model)(PIXELS), model.forward_features(PIXELS)
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.registers[:, 0], expected[:, 1])
    assert torch.equal(tokens.patches, expected[:, 2:])


@pytest.mark.parametrize(
    ("name", "cls", "registers"),
    [("eva02_tiny_patch14_224", 1, 0), ("vit_small_patch16_dinov3", 1, 4), ("beit_base_patch16_224", 1, 0)],
)
def test_eva_dinov3_and_beit_are_told_apart(vit: Any, name: str, cls: int, registers: int) -> None:
    model = vit(name)
    tokens, expected = load_backbone(model)(PIXELS), model.forward_features(PIXELS)
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, 1 + registers :])
    assert (0 if tokens.registers is None else tokens.registers.shape[1]) == registers
    assert tokens.grid == (4, 6)
    last = load_backbone(model, layer=2)(PIXELS)
    outputs = model.forward_intermediates(PIXELS, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(last.patches, outputs[-1])


def test_another_image_size_gives_its_own_grid_where_the_model_takes_it(vit: Any) -> None:
    backbone = load_backbone(vit(dynamic_img_size=True))
    assert backbone.grid == (4, 6)
    assert backbone(torch.randn(1, 3, 40, 24)).grid == (5, 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_feature_map_with_channels_first_is_read_row_by_row(tiny: ModuleType, name: str) -> None:
    model = timm.create_model(name, pretrained=False).eval()
    tiny._draw(model, 0, 1.0)
    pixels = torch.randn(2, 3, 64, 96)
    features, tokens = model.forward_features(pixels), load_backbone(model)(pixels)
    rows, columns = features.shape[2:]
    assert tokens.grid == (rows, columns)
    assert rows != columns
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(tokens.patches[:, row * columns + column], features[:, :, row, column])
    assert tokens.cls is None
    assert tokens.registers is None


def test_a_feature_map_with_channels_last_is_read_row_by_row(tiny: ModuleType) -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(64, 128), window_size=4, embed_dim=8, depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1), pretrained=False,
    ).eval()  # fmt: skip
    tiny._draw(model, 0, 1.0)
    pixels = torch.randn(2, 3, 64, 128)
    features, tokens = model.forward_features(pixels), load_backbone(model)(pixels)
    assert features.shape == (2, 2, 4, 64)
    assert tokens.grid == (2, 4)
    assert torch.equal(tokens.patches, features.reshape(2, 8, 64))
    stage = load_backbone(model, layer=1)
    assert stage.depth == 4
    assert stage(pixels).grid == (8, 16)
    expected = model.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0]
    assert torch.equal(stage(pixels).patches, expected.flatten(2).transpose(1, 2))
    unnormed = load_backbone(model, final_norm=False)(pixels).patches
    torch.testing.assert_close(model.norm(unnormed), tokens.patches)
    assert not torch.allclose(unnormed, tokens.patches)


def test_class_attention_models_have_cls_at_the_end_and_none_inside(tiny: ModuleType) -> None:
    model = timm.create_model(
        "cait_xxs24_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, pretrained=False
    ).eval()
    tiny._draw(model, 0, 1.0)
    pixels = PIXELS[:, :, :, :32]
    tokens, expected = load_backbone(model)(pixels), model.forward_features(pixels)
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.patches, expected[:, 1:])
    inside = load_backbone(model, layer=0)
    assert not inside.has_cls
    assert inside(pixels).patches.shape == (2, 16, 24)


@pytest.mark.parametrize(("name", "size"), [("crossvit_tiny_240", 240), ("pit_ti_224", 224), ("coat_lite_tiny", 224)])
def test_what_ends_with_no_single_grid_of_patches_is_refused(name: str, size: int) -> None:
    model = timm.create_model(name, pretrained=False).eval()  # two branches; CLS alone; an undeclared CLS
    pixels = torch.randn(1, 3, size, size)
    with pytest.raises(InputError, match=r"on a grid cannot be told; give layer=\d"):
        load_backbone(model)(pixels)
    if name != "crossvit_tiny_240":
        last = load_backbone(model, layer=load_backbone(model).depth - 1)(pixels)
        assert last.patches.shape[1] == last.grid[0] * last.grid[1]


def test_relative_position_vits_without_cls_give_their_blocks() -> None:
    model = timm.create_model("test_vit_relpos", pretrained=False).eval()
    pixels = torch.randn(1, 3, 160, 160)
    expected = model.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(load_backbone(model, layer=1)(pixels).patches, expected.flatten(2).mT)


def test_the_pixels_of_a_model_are_those_of_its_data_config(vit: Any) -> None:
    model = vit()
    config = timm.data.resolve_model_data_config(model)
    images = load_backbone(model).images
    assert images.size == (32, 48)
    assert (images.mean, images.std) == (config["mean"], config["std"])
    half = load_backbone(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    assert half.images.mean == (0.5, 0.5, 0.5)
    assert half.images.size == (224, 224)
