"""The embedded model: it loads as any LLaVA does, it sees, it errs as language models err, and methods act on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import vlattn
from vlattn.assets.paths import tiny_coco, tiny_llava

DATA = tiny_coco("val")
QUESTION = "Is there a dog in the image?"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return vlattn.load("tiny")


def inputs_for(processor: Any, texts: list[str], names: list[str]) -> Any:
    images = [Image.open(DATA.images / name).convert("RGB") for name in names]
    return processor(images=images, text=texts, return_tensors="pt", padding=True)


def names(n: int) -> list[str]:
    return sorted(path.name for path in DATA.images.glob("*.jpg"))[:n]


def test_the_folder_is_what_transformers_loads_by_itself() -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    model = AutoModelForImageTextToText.from_pretrained(tiny_llava())
    processor = AutoProcessor.from_pretrained(tiny_llava())
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.vision_feature_layer == -2
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert text == f"USER: <image>\n{QUESTION} ASSISTANT:"
    ids = inputs_for(processor, [text], names(1))["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == 144
    assert processor.tokenizer.unk_token_id not in ids


def test_it_is_small_and_keeps_its_training_log() -> None:
    folder = tiny_llava()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24_000_000
    assert (folder / "model.safetensors").is_file()
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert {"tower", "decoder"} <= {entry.get("stage") for entry in log}


@pytest.mark.slow
def test_it_sees_and_objects_that_go_with_the_scene_mislead_it(loaded: Any, tmp_path: Path) -> None:
    from vlattn.eval.items import pope_items
    from vlattn.eval.report import score_file
    from vlattn.eval.run import run_items

    # The same images and questions as `vlattn eval pope --n-images 100`.
    items, out = pope_items(DATA.instances, n_images=100, seed=0), tmp_path / "pope.jsonl"
    run_items(
        *loaded, items, task="pope", method="vanilla", images=DATA.images, out=out, batch_size=60, max_new_tokens=4
    )
    splits = score_file(out, "pope")["splits"]
    accuracy = {name: split["metrics"]["accuracy"]["value"] for name, split in splits.items()}
    assert accuracy["random"] > 0.9
    assert accuracy["adversarial"] < accuracy["random"]


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_pruned_generation_equals_the_stock_model_fed_the_short_prompt_in_left_padded_batches(
    loaded: Any, tiny: ModuleType, way: dict[str, Any]
) -> None:
    model, processor = loaded
    texts = [f"USER: <image>\n{q} ASSISTANT:" for q in (QUESTION, "Please describe this image in detail.")]
    inputs = inputs_for(processor, texts, names(2))
    assert not bool(inputs["attention_mask"].all())  # the prompts differ in length
    with torch.no_grad(), vlattn.RandomPrune(keep=36)(model) as trace:
        model(**inputs)
    assert trace.kept is not None
    with torch.no_grad():
        values = tiny.features(model, inputs["pixel_values"])
    rows = [tiny.with_slots(value[ids], ids) for value, ids in zip(values, trace.kept, strict=True)]
    stock, _ = tiny.short_sequence(model, inputs, rows)
    torch.manual_seed(1)
    expected = model.generate(**stock, max_new_tokens=12, **{"do_sample": False, **way})
    torch.manual_seed(1)
    with vlattn.RandomPrune(keep=36)(model):
        found = model.generate(**inputs, max_new_tokens=12, **{"do_sample": False, **way})
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flowcut_prunes_the_trained_tower_in_steps_and_keeping_all_changes_nothing(dtype: str) -> None:
    model, processor = vlattn.load("tiny", dtype=dtype)
    inputs = inputs_for(processor, [f"USER: <image>\n{QUESTION} ASSISTANT:"] * 3, names(3)).to(model.dtype)
    vanilla = model(**inputs).logits
    with vlattn.FlowCut(keep=144)(model):
        assert torch.equal(model(**inputs).logits, vanilla)
    with vlattn.FlowCut(keep=36)(model) as trace:
        model(**inputs)
    lengths = [ids.shape[1] for ids in trace.kept_by_layer.values()]
    assert list(trace.kept_by_layer) == [1, 3, 5]
    assert 144 > lengths[0] > lengths[1] > lengths[2] == 36  # not all at once, as where attention is flat
    assert torch.equal(model(**inputs).logits, vanilla)


def test_embeddings_in_place_of_ids_give_the_same_answer(loaded: Any) -> None:
    model, processor = loaded
    inputs = inputs_for(processor, [f"USER: <image>\n{QUESTION} ASSISTANT:"], names(1))
    embeds = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    with vlattn.FlowCut(keep=20)(model):
        by_ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        by_embeds = model.generate(**embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(by_ids[:, inputs["input_ids"].shape[1] :], by_embeds)
