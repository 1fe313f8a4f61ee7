"""Backbones by name, and what is said where one cannot be had."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
import transformers as hf
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones import Backbone, load_backbone

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_timm_name_loads_frozen_at_the_size_asked_for() -> None:
    backbone = load_backbone("timm/vit_tiny_patch16_224", pretrained=False, image_size=64)
    assert isinstance(backbone, Backbone)
    assert backbone.grid == (4, 4)
    assert backbone.describe()["name"] == "timm/vit_tiny_patch16_224"
    assert not any(p.requires_grad for p in backbone.parameters())
    assert load_backbone("timm/test_resnet", pretrained=False, image_size=64).images.size == (64, 64)


def test_an_open_clip_model_loads_by_name_and_tag_or_file(tmp_path: Any, tiny: ModuleType) -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 12, "layers": 3}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "small-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    model = open_clip.create_model("small-vit")
    tiny._draw(model, 3, 1.0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    backbone = load_backbone(f"open_clip/small-vit:{tmp_path / 'weights.pt'}")
    torch.testing.assert_close(backbone(PIXELS).cls, model.eval().visual(PIXELS))
    with pytest.raises(InputError, match=r"name the weights of small-vit"):
        load_backbone("open_clip/small-vit")
    assert load_backbone("open_clip/small-vit", pretrained=False).dim == 24
    assert load_backbone("open_clip/small-vit", pretrained=False, image_size=16).grid == (2, 2)


def test_a_hugging_face_folder_loads_with_its_processor(tmp_path: Any) -> None:
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vit = hf.ViTModel(hf.ViTConfig(**shape, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "vit")
    backbone = load_backbone(f"hf/{tmp_path / 'vit'}")
    torch.testing.assert_close(backbone(PIXELS).patches, vit.eval()(PIXELS).last_hidden_state[:, 1:])
    assert backbone.images.mean == (0.1, 0.2, 0.3)
    random = load_backbone(f"hf/{tmp_path / 'vit'}", pretrained=False)
    assert not torch.allclose(random(PIXELS).patches, backbone(PIXELS).patches)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vit_tiny_patch16_224", "what: got 'vit_tiny_patch16_224'; give \"timm/NAME\""),
        ("timm/", "what: got 'timm/'"),
        ("torchvision/resnet18", "what: got"),
        ("timm/no_such_model", "could not be loaded"),
        ("open_clip/no-such-model", "no model 'no-such-model'"),
        ("open_clip/ViT-B-32", "name the weights of ViT-B-32, as open_clip/ViT-B-32:TAG; there are: .*openai"),
        ("hf/no-such-owner/no-such-model", "could not be loaded"),
        ("lvlm/no-such-owner/no-such-model", "neither a folder"),
        (nn.Linear(2, 2), "Linear is no model of timm, open_clip or transformers"),
        (3, "what: got int"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, what: Any, message: str) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(what)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float31", "int64", torch.int8])
def test_a_dtype_without_fractions_is_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match="no floating-point dtype"):
        load_backbone("timm/vit_tiny_patch16_224", dtype=dtype, pretrained=False)
