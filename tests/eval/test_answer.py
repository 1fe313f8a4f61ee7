"""Asking a model: what is recorded, what is asked once, what happens to bad images and cut-off runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.eval.coco import read_coco
from vlattn.eval.items import Item, chair_items, choose_images, pope_items
from vlattn.eval.records import read_records, sidecar_path

DATA = tiny_coco("val")


@pytest.fixture(scope="module")
def tiny():
    import vlattn

    return vlattn.load("tiny")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return pope_items(DATA.instances, n_images=4, seed=3)


def ask(tiny, items, out: Path, **kwargs) -> list:
    from vlattn.eval.run import run_items

    options = {"task": "pope", "method": "vanilla", "images": DATA.images, "batch_size": 5, "max_new_tokens": 4}
    run_items(*tiny, items, out=out, **(options | kwargs))
    return read_records(out)


def test_answers_equal_those_of_stock_generate_one_prompt_at_a_time(tiny, items, tmp_path):
    model, processor = tiny
    records = {r.id: r for r in ask(tiny, items, tmp_path / "a.jsonl")}
    assert set(records) == {item.id for item in items}
    from PIL import Image

    for item in items[:8]:
        text = f"USER: <image>\n{item.prompt} ASSISTANT:"
        inputs = processor(images=Image.open(DATA.images / item.image), text=text, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert records[item.id].raw == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert records[item.id].label == item.label


def test_the_same_question_of_the_same_image_is_asked_once(tiny, items, tmp_path, monkeypatch):
    model, _ = tiny
    prompts = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: prompts.append(len(k["input_ids"])) or original(**k))
    ask(tiny, items, tmp_path / "a.jsonl")
    assert sum(prompts) == len({(item.image, item.prompt) for item in items}) < len(items)


def test_a_run_cut_off_in_the_middle_is_completed_without_asking_anything_twice(tiny, items, tmp_path, monkeypatch):
    whole = ask(tiny, items, tmp_path / "whole.jsonl")
    shutil.copy(tmp_path / "whole.jsonl", tmp_path / "cut.jsonl")
    shutil.copy(sidecar_path(tmp_path / "whole.jsonl"), sidecar_path(tmp_path / "cut.jsonl"))
    lines = (tmp_path / "cut.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:20])
    model, _ = tiny
    asked = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: asked.append(len(k["input_ids"])) or original(**k))
    again = ask(tiny, items, tmp_path / "cut.jsonl")
    assert {r.id: r.raw for r in again} == {r.id: r.raw for r in whole}
    assert sum(asked) <= len(items) - 7


def test_a_finished_run_is_not_continued_under_another_method(tiny, items, tmp_path):
    ask(tiny, items[:5], tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="method"):
        ask(tiny, items[:5], tmp_path / "a.jsonl", method="random:keep=36")


def test_a_finished_run_is_not_continued_with_other_weights_under_the_same_name(tiny, items, tmp_path):
    import copy

    ask(tiny, items[:5], tmp_path / "a.jsonl")
    other = copy.deepcopy(tiny[0])
    other.model.multi_modal_projector.linear_2.bias.data += 1
    with pytest.raises(InputError, match="weights"):
        ask((other, tiny[1]), items[:5], tmp_path / "a.jsonl")


def test_a_method_changes_what_reaches_the_decoder_and_is_named_in_the_sidecar(tiny, items, tmp_path):
    ask(tiny, items[:5], tmp_path / "a.jsonl", method="flowcut:keep=9")
    settings = json.loads(sidecar_path(tmp_path / "a.jsonl").read_text())["settings"]
    assert settings["method"].startswith("FlowCut(keep=9")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff broken", None])
def test_a_bad_image_stops_the_run_or_is_recorded_by_choice(tiny, tmp_path, content):
    good = pope_items(DATA.instances, n_images=4, seed=0)[0]
    shutil.copy(DATA.images / good.image, tmp_path / good.image)
    if content is not None:
        (tmp_path / "bad.jpg").write_bytes(content)
    items = [Item("bad", 5, "bad.jpg", good.prompt, "yes"), good]
    with pytest.raises(InputError, match=r"bad\.jpg.*--on-error skip"):
        ask(tiny, items, tmp_path / "a.jsonl", images=tmp_path)
    records = ask(tiny, items, tmp_path / "b.jsonl", images=tmp_path, on_error="skip")
    failed = {r.id: r.error for r in records}
    assert "bad.jpg" in failed["bad"]
    assert failed[good.id] is None


def test_a_truncated_image_is_an_error_not_a_grey_picture(tiny, tmp_path):
    item = pope_items(DATA.instances, n_images=4, seed=0)[0]
    content = (DATA.images / item.image).read_bytes()
    (tmp_path / item.image).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="no readable image"):
        ask(tiny, [item], tmp_path / "a.jsonl", images=tmp_path)


def test_captions_end_by_eos_or_by_length_and_say_which(tiny, tmp_path):
    items = chair_items(read_coco(DATA.instances), n_images=3)
    short = ask(tiny, items, tmp_path / "a.jsonl", task="chair", max_new_tokens=3)
    assert {(r.n_new_tokens, r.finish) for r in short} == {(3, "length")}


def test_choosing_images_ignores_their_order_and_repeats_with_the_seed():
    ids = list(range(100, 200))
    assert choose_images(ids, 10, 1) == choose_images(ids[::-1], 10, 1) != choose_images(ids, 10, 2)
    with pytest.raises(InputError, match="n_images"):
        choose_images(ids, 101, 0)


def test_a_suffix_goes_on_its_own_line_after_every_question():
    assert all(i.prompt.endswith("?\nOne word.") for i in pope_items(DATA.instances, 4, 0, "One word."))
