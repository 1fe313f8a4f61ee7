"""open_clip backbones against the towers' own forward with `output_tokens`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vlattn.errors import InputError
from vlattn.probing.backbones import load_backbone

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXT = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=1)


@pytest.fixture
def clip(tiny: ModuleType) -> Callable[..., Any]:
    """`clip(**vision)`: a random CLIP of width 24 projected to 12, patches of 8 px, for images of 32 px."""

    def make(**vision: Any) -> Any:
        settings = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 12, "layers": 3, **vision}
        model = open_clip.model.CLIP(12, open_clip.CLIPVisionCfg(**settings), TEXT)
        tiny._draw(model, 0, 1.0)
        return model.eval()

    return make


@torch.no_grad()
def with_tokens(visual: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tower gives with `output_tokens=True`: pooled and projected, and tokens."""
    before, visual.output_tokens = visual.output_tokens, True
    try:
        return visual(PIXELS)
    finally:
        visual.output_tokens = before


@torch.no_grad()
def last_block(visual: Any) -> torch.Tensor:
    return visual.transformer(visual._embeds(PIXELS))


@pytest.mark.parametrize("output_tokens", [False, True])
@pytest.mark.parametrize("more", [{}, {"no_ln_pre": True}, {"final_ln_after_pool": True}])
def test_cls_is_pooled_and_projected_and_patches_are_not(
    clip: Callable[..., Any], output_tokens: bool, more: dict[str, Any]
) -> None:
    model = clip(output_tokens=output_tokens, **more)
    pooled, tokens = with_tokens(model.visual)
    backbone = load_backbone(model)
    read = backbone(PIXELS)
    torch.testing.assert_close(read.cls, pooled)
    torch.testing.assert_close(read.patches, tokens)
    assert (backbone.dim, backbone.cls_dim, backbone.grid) == (24, 12, (4, 4))
    assert backbone.describe()["final_norm"] is not more.get("final_ln_after_pool", False)
    assert model.visual.output_tokens is output_tokens
    torch.testing.assert_close(load_backbone(model.visual)(PIXELS).cls, pooled)  # the tower alone


def test_all_takes_patches_through_the_projection_of_cls(clip: Callable[..., Any]) -> None:
    visual = clip().visual
    pooled, tokens = with_tokens(visual)
    backbone = load_backbone(visual)
    chosen = backbone(PIXELS).choose("all")
    torch.testing.assert_close(chosen, torch.cat([pooled[:, None], tokens @ visual.proj], 1))
    assert backbone.width("all") == 12
    assert not chosen.requires_grad


def test_all_takes_patches_through_the_norm_of_cls_where_that_comes_after_pooling(clip: Callable[..., Any]) -> None:
    visual = clip(final_ln_after_pool=True).visual
    everything = visual.ln_post(last_block(visual)) @ visual.proj
    torch.testing.assert_close(load_backbone(visual)(PIXELS).choose("all"), everything)


def test_the_norm_can_be_left_out_and_then_cls_is_a_token_like_the_patches(clip: Callable[..., Any]) -> None:
    visual = clip().visual
    read = load_backbone(visual, final_norm=False)(PIXELS)
    torch.testing.assert_close(read.choose("all"), last_block(visual))


@pytest.mark.parametrize("final_norm", ["auto", True])
def test_blocks_are_those_of_forward_intermediates(clip: Callable[..., Any], final_norm: Any) -> None:
    visual = clip().visual
    expected = visual.forward_intermediates(
        PIXELS, normalize_intermediates=final_norm is True, output_fmt="NLC", output_extra_tokens=True
    )
    for layer in range(3):
        read = load_backbone(visual, layer=layer, final_norm=final_norm)(PIXELS)
        torch.testing.assert_close(read.patches, expected["image_intermediates"][layer])
        torch.testing.assert_close(read.cls[:, None], expected["image_intermediates_prefix"][layer])


def test_a_transformer_with_the_sequence_first_is_read_alike(clip: Callable[..., Any]) -> None:
    model = clip()
    expected = load_backbone(model, layer=1)(PIXELS).choose("all")
    transformer = model.visual.transformer
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False
    torch.testing.assert_close(load_backbone(model, layer=1)(PIXELS).choose("all"), expected)
    torch.testing.assert_close(load_backbone(model)(PIXELS).patches, with_tokens(model.visual)[1])


def test_a_tower_that_pools_patches_does_not_project_cls(clip: Callable[..., Any]) -> None:
    visual = clip(pool_type="avg").visual
    read = load_backbone(visual)(PIXELS)
    torch.testing.assert_close(read.patches, with_tokens(visual)[1])
    torch.testing.assert_close(read.choose("all"), visual.ln_post(last_block(visual)))


def test_an_attentional_pooler_gives_cls_and_all_is_refused(clip: Callable[..., Any]) -> None:
    visual = clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2).visual
    backbone = load_backbone(visual)
    read = backbone(PIXELS)
    torch.testing.assert_close(read.cls, with_tokens(visual)[0])
    torch.testing.assert_close(read.patches, last_block(visual)[:, 1:])
    with pytest.raises(InputError, match="CLS of width 12 and patches of width 24"):
        read.choose("all")
    with pytest.raises(InputError, match="no final norm"):
        load_backbone(visual, final_norm=True)


def test_a_resnet_is_read_in_front_of_its_attention_pool(clip: Callable[..., Any]) -> None:
    visual = clip(layers=(1, 1, 1, 1), width=4, head_width=8, image_size=64).visual
    pixels = torch.randn(2, 3, 64, 64)
    seen: list[torch.Tensor] = []
    visual.attnpool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    visual(pixels)
    backbone = load_backbone(visual)
    read = backbone(pixels)
    assert read.grid == tuple(seen[0].shape[2:]) == (2, 2)
    torch.testing.assert_close(read.patches, seen[0].flatten(2).mT)
    assert backbone.depth == 4
    assert not backbone.has_cls
    torch.testing.assert_close(
        load_backbone(visual, layer=0)(pixels).patches, visual.layer1(visual.stem(pixels)).flatten(2).mT
    )


@pytest.mark.parametrize(("pool", "proj"), [("token", "linear"), ("token", "mlp"), ("token", ""), ("avg", "linear")])
def test_timm_towers_project_cls_where_they_pool_by_it(tiny: ModuleType, pool: str, proj: str) -> None:
    vision = open_clip.CLIPVisionCfg(timm_model_name="test_vit", timm_pool=pool, timm_proj=proj, image_size=64)
    model = open_clip.model.CustomTextCLIP(12, vision, TEXT)
    tiny._draw(model, 0, 1.0)
    visual = model.eval().visual
    pixels = torch.randn(2, 3, 64, 64)
    backbone = load_backbone(model)
    read = backbone(pixels)
    features = visual.trunk.forward_features(pixels)
    first = visual.trunk.num_prefix_tokens
    torch.testing.assert_close(read.patches, features[:, first:])
    assert backbone.describe()["library"] == "open_clip"
    assert backbone.grid == (4, 4)
    if pool == "avg":
        torch.testing.assert_close(read.choose("all"), torch.cat([features[:, :1], features[:, first:]], 1))
        return
    torch.testing.assert_close(read.cls, visual(pixels))
    for n in range(16):  # each patch in the place of CLS
        swapped = torch.cat([features[:, first + n, None], features[:, 1:]], 1)
        expected = visual.head(visual.trunk.forward_head(swapped))
        torch.testing.assert_close(read.choose("all")[:, n + 1], expected)


# Transforms -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(50, 40), (30, 90)])
@pytest.mark.parametrize("train", [False, True])
def test_transforms_are_the_library_s_own(clip: Callable[..., Any], size: tuple[int, int], train: bool) -> None:
    model = clip()
    open_clip.model.set_model_preprocess_cfg(
        model, {"size": 32, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "resize_mode": "squash"}
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    own = image_transform_v2(
        PreprocessCfg(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resize_mode="squash"), is_train=train
    )
    backbone = load_backbone(model)
    torch.manual_seed(5)
    expected = own(image)
    torch.manual_seed(5)
    assert torch.equal(backbone.transform(train)(image), expected)
    assert backbone.describe()["mean"] == [0.4, 0.5, 0.6]
    torch.manual_seed(5)
    other = backbone.transform(train, augment="standard")(image)
    assert other.shape == expected.shape
    assert not torch.equal(other, expected)
