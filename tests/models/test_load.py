"""Loading by folder, and the errors of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, llava: Any) -> Path:
    """A tiny LLaVA with its processor, as transformers saves them; the tokenizer pads on the right."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<bos>", *[f"w{i}" for i in range(60)]]
    backend = Tokenizer(WordLevel({**{word: i for i, word in enumerate(words)}, "<image>": 63}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", padding_side="right",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 24, "width": 24}
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=size)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    path = tmp_path / "tiny"
    llava(layers=2, feature_layer=-1, dtype=torch.bfloat16).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_local_folder_loads_ready_for_batched_generation(folder: Path, kind: Any) -> None:
    from PIL import Image

    model, processor = vlattn.load(kind(folder))
    assert processor.tokenizer.padding_side == "left"
    assert not model.training
    assert model.dtype == torch.bfloat16  # as stored
    image = Image.new("RGB", (24, 24), (200, 30, 30))
    inputs = processor(
        text=["w1 <image> w2", "<image> w2 w3 w4 w5"], images=[image, image], padding=True, return_tensors="pt"
    )
    with vlattn.FlowCut(keep=9)(model) as trace:
        out = model.generate(**inputs.to(model.dtype), max_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2
    assert trace.kept.shape == (2, 9)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), (torch.float16, torch.float16)])
def test_dtype_device_and_attention_are_as_asked(folder: Path, dtype: Any, expected: torch.dtype) -> None:
    model, _ = vlattn.load(folder, dtype=dtype, device="cpu", attn_implementation="eager")
    assert model.dtype == expected
    assert model.device.type == "cpu"
    assert model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "eager"


def test_a_hub_id_out_of_reach_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'no-such-owner/no-such-model' is neither a folder") as caught:
        vlattn.load("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)
    assert "tiny" in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json") as caught:
        vlattn.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float31", "nn", "Tensor"])
def test_a_dtype_that_is_none_is_refused_before_anything_is_read(dtype: str) -> None:
    with pytest.raises(InputError, match=f"dtype: '{dtype}' is not a torch dtype"):
        vlattn.load("no-such-owner/no-such-model", dtype=dtype)
