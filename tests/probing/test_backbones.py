"""What holds for every frozen backbone, and loading by name or live module."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers as hf
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones import load_backbone

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def timm_vit(**changes: Any) -> Any:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **{**settings, **changes})


def open_clip_vit(**changes: Any) -> Any:
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 12, "layers": 3}
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=1)
    return open_clip.model.CLIP(12, open_clip.CLIPVisionCfg(**{**vision, **changes}), text)


def hf_vit(**changes: Any) -> Any:
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return hf.ViTModel(hf.ViTConfig(**{**shape, "image_size": 32, "patch_size": 8, **changes}))


def lvlm() -> Any:
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=hf.LlamaConfig(**text, vocab_size=64),
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config)


MAKERS: dict[str, Callable[[], Any]] = {
    "timm": timm_vit,
    "timm_cnn": lambda: timm.create_model("test_resnet", pretrained=False),
    "open_clip": open_clip_vit,
    "hf": hf_vit,
    "lvlm": lvlm,
}
each = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture
def make(tiny: ModuleType) -> Callable[[str], Any]:
    """A random model of a kind, in eval mode."""

    def made(kind: str) -> Any:
        model = MAKERS[kind]()
        tiny._draw(model, 0, 1.0)
        return model.eval()

    return made


# Frozen ---------------------------------------------------------------------------------------------------------------
@each
def test_no_gradient_reaches_the_backbone_or_goes_through_it(make: Callable[[str], Any], kind: str) -> None:
    model = make(kind)
    backbone = load_backbone(model)
    pixels = PIXELS.clone().requires_grad_()
    tokens = backbone(pixels)
    head = nn.Linear(backbone.dim, 2)
    head(tokens.choose("patch").mean(1)).sum().backward()
    assert head.weight.grad is not None
    assert not tokens.patches.requires_grad
    assert pixels.grad is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_dropout_stays_off_whoever_calls_train(tiny: ModuleType) -> None:
    model = timm_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, pos_drop_rate=0.5, patch_drop_rate=0.5)
    tiny._draw(model, 0, 1.0)
    expected = model.eval().forward_features(PIXELS)
    backbone = load_backbone(model)
    probe = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(24, 2)})
    for call in (backbone.train, probe.train, model.train):
        call()
        assert torch.equal(backbone(PIXELS).patches, expected[:, 1:])
    assert not backbone.training


def test_batch_norm_keeps_its_statistics_whoever_calls_train(make: Callable[[str], Any]) -> None:
    model = make("timm_cnn")
    backbone = load_backbone(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    backbone(PIXELS)
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_live_model_is_in_the_mode_it_was_after_each_call(make: Callable[[str], Any]) -> None:
    model = make("timm")
    model.blocks[1].train()
    before = [part.training for part in model.modules()]
    load_backbone(model)(PIXELS)
    assert [part.training for part in model.modules()] == before
    with pytest.raises(AssertionError):  # timm's own word on a size it cannot take
        load_backbone(model)(PIXELS.new_zeros(1, 3, 5, 5))
    assert [part.training for part in model.modules()] == before


@each
@pytest.mark.parametrize("layer", [None, 0])
def test_reading_leaves_no_hook_and_edits_no_class(make: Callable[[str], Any], kind: str, layer: int | None) -> None:
    model = make(kind)

    def state() -> Any:
        classes = {base for part in model.modules() for base in type(part).__mro__}
        hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
        return hooks, {kind: dict(vars(kind)) for kind in classes}, [set(vars(part)) for part in model.modules()]

    before = state()
    backbone = load_backbone(model, layer=layer)
    backbone.describe()
    backbone(PIXELS)
    assert state() == before


def block_list(model: nn.Module) -> nn.ModuleList:
    return max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len)


# Layers ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["timm", "open_clip", "hf", "lvlm"])
def test_layer_0_is_the_first_block_and_blocks_behind_a_layer_do_not_run(make: Callable[[str], Any], kind: str) -> None:
    model = make(kind)
    parts = {
        "timm": lambda: (model.blocks, model.forward_features),
        "open_clip": lambda: (model.visual.transformer.resblocks, model.visual),
        "hf": lambda: (block_list(model), model),
        "lvlm": lambda: (block_list(model.model.vision_tower), model.model.vision_tower),
    }
    blocks, forward = parts[kind]()
    seen: dict[int, torch.Tensor] = {}
    for b, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, out, b=b: seen.update({b: out[0] if isinstance(out, tuple) else out})
        )
    forward(PIXELS)
    outputs = dict(seen)
    assert len(outputs) == 3
    whole = load_backbone(model)(PIXELS).patches
    for layer in range(3):
        seen.clear()
        backbone = load_backbone(model, layer=layer)
        tokens = backbone(PIXELS)
        # The reading hook may end the call before the block's other hooks see its output, but not a block behind it.
        assert max(seen, default=-1) in (layer - 1, layer)
        torch.testing.assert_close(tokens.patches, outputs[layer][:, 1:])
        torch.testing.assert_close(tokens.cls, outputs[layer][:, 0])
        assert backbone.describe()["layer"] == layer
        assert backbone.describe()["final_norm"] is False
    assert not torch.allclose(load_backbone(model, layer=0)(PIXELS).patches, whole)


@pytest.mark.parametrize("layer", [-1, 3, True, 1.0, "last"])
def test_a_layer_that_is_none_is_refused_with_the_numbers_there_are(layer: Any) -> None:
    with pytest.raises(InputError, match=r"layer: got .* has blocks 0 to 2"):
        load_backbone(timm_vit(), layer=layer)


@pytest.mark.parametrize("final_norm", ["off", None, 1])
def test_a_final_norm_that_is_none_of_the_three_is_refused(final_norm: Any) -> None:
    with pytest.raises(InputError, match="final_norm: got"):
        load_backbone(timm_vit(), final_norm=final_norm)


def test_a_final_norm_that_a_model_lacks_is_refused(make: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="no final norm"):
        load_backbone(make("timm_cnn"), final_norm=True)


# Shapes and the record ------------------------------------------------------------------------------------------------
@each
def test_dim_grid_and_cls_are_those_of_the_tokens(make: Callable[[str], Any], kind: str) -> None:
    backbone = load_backbone(make(kind))
    pixels = torch.randn(3, 3, *backbone.images.size)
    tokens = backbone(pixels)
    assert tokens.patches.shape == (3, backbone.grid[0] * backbone.grid[1], backbone.dim)
    assert tokens.grid == backbone.grid
    assert backbone.has_cls is (kind != "timm_cnn")
    assert backbone.cls_dim == (tokens.cls.shape[1] if backbone.has_cls else None)
    assert backbone.width("patch") == backbone.dim
    if backbone.has_cls:
        assert backbone.width("all") == tokens.choose("all").shape[-1]
    else:
        for chosen in ("all", "cls"):
            with pytest.raises(InputError, match="CLS"):
                tokens.choose(chosen)


@each
def test_the_record_is_plain_and_says_what_decides_the_numbers(make: Callable[[str], Any], kind: str) -> None:
    record = load_backbone(make(kind)).describe()
    assert json.loads(json.dumps(record)) == record
    assert record["library"] == kind.removesuffix("_cnn")
    assert record["final_norm"] is {"timm": True, "timm_cnn": False, "open_clip": True, "hf": True, "lvlm": False}[kind]
    assert record["size"] == [160, 160] if kind == "timm_cnn" else [32, 32]
    assert record["dtype"] == "float32"
    package = {"timm": timm, "open_clip": open_clip, "hf": hf, "lvlm": hf}[record["library"]]
    assert package.__version__ in record["versions"].values()
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__


@each
def test_pixels_go_to_the_dtype_of_the_model(make: Callable[[str], Any], kind: str) -> None:
    expected = load_backbone(make(kind))(PIXELS).patches
    backbone = load_backbone(make(kind), dtype="bfloat16")
    tokens = backbone(PIXELS)
    assert tokens.patches.dtype == torch.bfloat16
    assert backbone.describe()["dtype"] == "bfloat16"
    assert (tokens.patches.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("pixels", [PIXELS[0], PIXELS[:, :1], (PIXELS * 255).to(torch.uint8)])
def test_what_is_no_batch_of_pixels_is_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(InputError, match="pixels: got"):
        load_backbone(timm_vit())(pixels)
