"""Towers inside vision-language models: tokens are what the model hands its projector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import vlattn
from vlattn.errors import InputError
from vlattn.models.registry import adapter_for
from vlattn.probing.backbones import load_backbone
from vlattn.probing.backbones.lvlm_backbone import pack_patches

SIDES = {"llava_next": 16, "llava_onevision": 12, "video_llava": 12, "internvl": 16, "idefics3": 24, "smolvlm": 24}
SIDES["gemma3"] = 24
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def noise(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def seen_by_projector(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector of a stock model gets for tiles [B, 3, H, W]."""
    seen: list[torch.Tensor] = []
    hook = adapter_for(model).projector.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    kind = model.config.model_type
    try:
        if kind in ("llava_next", "llava_onevision"):
            side = pixels.shape[2]
            model.model.get_image_features(
                pixels[:, None].expand(-1, 3, -1, -1, -1), torch.tensor([[side, 2 * side]] * 2)
            )
        elif kind in ("idefics3", "smolvlm"):
            model.model.get_image_features(pixels[:, None])
        else:
            model.model.get_image_features(pixels)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("feature_layer", [-1, -2, -5])
def test_tokens_of_a_llava_are_those_of_its_feature_layer(llava: Any, siglip: bool, feature_layer: int) -> None:
    model = llava(layers=6, feature_layer=feature_layer, siglip=siglip)
    pixels = noise(24)
    backbone = load_backbone(model)
    tokens = backbone(pixels)
    torch.testing.assert_close(tokens.patches, seen_by_projector(model, pixels))
    assert tokens.grid == (6, 6)
    assert backbone.has_cls is not siglip
    assert backbone.layer == 6 + feature_layer
    assert backbone.describe()["final_norm"] is False
    assert backbone.describe()["library"] == "lvlm"


def test_any_block_can_be_read_and_several_feature_layers_need_one(llava: Any) -> None:
    model = llava(layers=4, feature_layer=[-2, -3])
    with pytest.raises(InputError, match="vision_feature_layer"):
        load_backbone(model)
    pixels = noise(24)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    for layer in range(4):
        read = load_backbone(model, layer=layer)(pixels)
        torch.testing.assert_close(read.choose("all"), states[layer + 1])


def test_the_final_norm_of_the_tower_can_be_put_on(llava: Any) -> None:
    model = llava(layers=3, feature_layer=-1)
    tower = model.model.vision_tower
    plain, normed = (load_backbone(model, final_norm=on)(noise(24)).choose("all") for on in ("auto", True))
    torch.testing.assert_close(getattr(tower, "vision_model", tower).post_layernorm(plain), normed)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "video_llava", "gemma3", "idefics3", "smolvlm"])
def test_tokens_are_what_the_projector_gets(families: ModuleType, family: str) -> None:
    model = families.model(family)
    pixels = noise(SIDES[family])
    expected = seen_by_projector(model, pixels)
    if family.startswith("llava"):
        expected = expected[::3]  # three tiles of each image, all alike
    backbone = load_backbone(model)
    torch.testing.assert_close(backbone(pixels).patches, expected)
    assert backbone.describe()["final_norm"] is (family in ("gemma3", "idefics3", "smolvlm"))
    assert backbone.has_cls is (family in ("llava_next", "video_llava"))


@pytest.mark.parametrize(
    ("mean_pooling", "feature_layer", "normed"), [(True, -1, False), (False, -1, True), (False, -2, False)]
)
def test_tokens_of_an_internvl_are_those_in_front_of_the_shuffle(
    families: ModuleType, mean_pooling: bool, feature_layer: int, normed: bool
) -> None:
    vision = {**families.model("internvl").config.vision_config.to_dict(), "use_mean_pooling": mean_pooling}
    model = families.model("internvl", vision_config=vision, vision_feature_layer=feature_layer)
    pixels = noise(16)
    backbone = load_backbone(model)
    assert backbone.describe()["final_norm"] is normed
    tokens = backbone(pixels)
    assert tokens.grid == (4, 4)
    assert backbone.has_cls
    shuffled = model.model.pixel_shuffle(tokens.patches.view(2, 4, 4, 16), scale_factor=0.5).reshape(2, 4, 64)
    torch.testing.assert_close(shuffled, seen_by_projector(model, pixels))


# Qwen-VL --------------------------------------------------------------------------------------------------------------
def packed_by_hand(pixels: torch.Tensor, side: int, frames: int) -> torch.Tensor:
    """Patches as Qwen-VL's processors pack them, with cells of 2 x 2 patches."""
    rows = []
    for image in pixels:
        for cell_row in range(image.shape[1] // side // 2):
            for cell_column in range(image.shape[2] // side // 2):
                for row in (2 * cell_row, 2 * cell_row + 1):
                    for column in (2 * cell_column, 2 * cell_column + 1):
                        patch = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                        rows.append(torch.stack([patch] * frames, 1).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_tokens_of_a_qwen_merge_into_the_features_of_the_stock_tower(
    families: ModuleType, family: str, layer: int | None
) -> None:
    model = families.model(family)
    pixels = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.tensor([[1, 6, 10]] * 2)
    backbone = load_backbone(model, layer=layer)
    tokens = backbone(pixels)
    assert tokens.grid == (6, 10)
    assert not backbone.has_cls
    # Each cell's four patches, through the tower's own merger, are what a tower of that many blocks gives.
    cells = torch.stack(
        [tokens.patches[b].view(6, 10, -1)[r : r + 2, c : c + 2].flatten(0, 1)
         for b in range(2) for r in range(0, 6, 2) for c in range(0, 10, 2)]
    )  # fmt: skip
    short = copy.deepcopy(model)
    tower = short.model.visual
    if layer is not None:
        tower.blocks = tower.blocks[: layer + 1]
    with torch.no_grad():
        merged = tower.merger(cells.flatten(0, 1))
        out = tower(packed_by_hand(pixels, 4, 2), grid_thw=grid)
    torch.testing.assert_close(merged, out.pooler_output if hasattr(out, "pooler_output") else out)


def test_images_are_packed_as_the_processor_of_qwen_packs_them() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8))
    processor = hf.Qwen2VLImageProcessor(do_resize=False)
    out = processor(image, return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 6]]
    plain = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    packed = pack_patches(((plain - mean) / std)[None], 14, 2, 2)
    torch.testing.assert_close(packed, out["pixel_values"].float(), atol=1e-5, rtol=0)


def test_a_qwen_refuses_sides_that_its_cells_do_not_fill(families: ModuleType) -> None:
    with pytest.raises(InputError, match=r"24 x 20; .* multiples of 8"):
        load_backbone(families.model("qwen2_vl"))(torch.randn(1, 3, 24, 20))
    with pytest.raises(InputError, match="no final norm"):
        load_backbone(families.model("qwen2_vl"), final_norm=True)


# Frozen, alone, embedded ----------------------------------------------------------------------------------------------
def test_a_tower_that_is_being_pruned_is_refused(llava: Any) -> None:
    model = llava(layers=6)
    backbone = load_backbone(model)
    with vlattn.FlowCut(keep=9)(model), pytest.raises(InputError, match="pruned"):
        backbone(noise(24))
    assert backbone(noise(24)).grid == (6, 6)


def test_only_the_tower_is_held(llava: Any) -> None:
    model = llava(layers=3)
    tower = {id(p) for p in model.model.vision_tower.parameters()}
    assert {id(p) for p in load_backbone(model).parameters()} <= tower


def test_the_embedded_tower_gives_what_the_embedded_model_sees() -> None:
    model, processor = vlattn.load("tiny")
    backbone = load_backbone("lvlm/tiny")
    image = Image.open(sorted(vlattn.tiny_coco("val").images.iterdir())[0])
    theirs = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(backbone(theirs).patches, seen_by_projector(model, theirs))
    assert (backbone.dim, backbone.grid, backbone.has_cls, backbone.depth, backbone.layer) == (
        128,
        (12, 12),
        True,
        8,
        6,
    )
    assert backbone.images.size == (96, 96)
    assert backbone.images.mean == (0.5, 0.5, 0.5)
    assert backbone.images.std == (0.25, 0.25, 0.25)
    assert backbone.transform(train=False)(image).shape == (3, 96, 96)
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("family", "processor"),
    [
        ("llava_next", hf.CLIPImageProcessor),
        ("qwen2_vl", hf.Qwen2VLImageProcessor),
        ("gemma3", hf.SiglipImageProcessor),
    ],
)
def test_without_a_processor_mean_and_std_are_those_of_the_family(
    families: ModuleType, family: str, processor: Any
) -> None:
    backbone, default = load_backbone(families.model(family)), processor()
    assert backbone.images.mean == tuple(default.image_mean)
    assert backbone.images.std == tuple(default.image_std)
    assert backbone.describe()["mean_and_std_from"] == "family"


def test_a_live_model_takes_mean_and_std_from_a_processor_and_its_own_size(
    llava: Callable[..., Any],
) -> None:
    processor = hf.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], crop_size={"height": 224, "width": 224})
    images = load_backbone(llava(layers=2, feature_layer=-1), processor=processor).images
    assert images.mean == (0.1, 0.2, 0.3)
    assert images.size == (24, 24)
