"""`vlattn calibrate act`: from questions on disk to heads that the method loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlattn
from vlattn.assets.paths import tiny_coco
from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.interventions.act_margins import margins
from vlattn.training.examples import read_examples
from vlattn.training.yes_no import yes_no_batches

runner = CliRunner()
ASKED = {2: "dog", 6: "bicycle", 8: "apple", 12: "car"}


def calibrate(*words: object) -> Any:
    return runner.invoke(app, ["calibrate", "act", *map(str, words)], catch_exceptions=False, env={"COLUMNS": "100"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = tiny_coco("val").images
    lines = [
        {"image": str(images / f"{i:012d}.jpg"), "question": question, "answer": answer}
        for i, name in ASKED.items()
        for question, answer in (
            (f"Is there a {name} in the image?", "no"),
            ("Describe this image.", "a dog."),
            ("Is there a person in the image?", "Yes."),
        )
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_heads_are_found_shown_written_and_loadable(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    options = ("--layers", "3,4", "--settings", "theta=0.05,recipients=visual", "--verify", 2, "--rule", "gain")
    result = calibrate("--data", data, "--out", out, *options)
    assert result.exit_code == 0
    content = json.loads(out.read_text())
    assert content["settings"]["theta"] == 0.05
    assert content["settings"]["recipients"] == "visual"
    assert content["settings"]["layers"] == [3, 4]
    assert content["items"]["count"] == 8
    assert len(content["single"]) == 2
    assert content["model"]["name"] == "tiny"
    model, _ = vlattn.load("tiny")
    with vlattn.ACT(out)(model):
        pass
    layer, head = content["single"][0]["heads"][0]
    assert f"{layer}.{head}" in result.output
    assert f"{content['single'][0]['gain']:+.4f}" in result.output


def test_margins_are_those_of_the_answers_the_model_would_give(data: Path) -> None:
    model, processor = vlattn.load("tiny")
    batches = yes_no_batches(processor, read_examples(data), batch_size=3)
    assert [len(batch.ids) for batch in batches] == [3, 3, 2]
    found = margins(model, batches)
    for batch, ahead in zip(batches, found.split([3, 3, 2]), strict=True):
        with torch.no_grad():
            output = model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)[:, -1]  # type: ignore[operator]
        words = [processor.tokenizer.decode([token]).strip() for token in output.tolist()]
        right = [processor.tokenizer.decode([token]).strip() for token in batch.right.tolist()]
        assert set(right) <= {"yes", "no"}
        assert [word == good for word, good in zip(words, right, strict=True)] == (ahead > 0).tolist()


def test_what_cannot_be_asked_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    for options, message in (
        (("--answers", "yes"), "answers: got 'yes'"),
        (("--answers", "yes,yes"), "begin with the same token"),
        (("--layers", "two"), "layers: got 'two'"),
        (("--settings", "tau=3"), "'tau=3' is no setting of act"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate("--data", data, "--out", out, *options)
    _, processor = vlattn.load("tiny")
    captions = [example for example in read_examples(data) if "Describe" in example.question]
    with pytest.raises(InputError, match="none is answered with yes or no"):
        yes_no_batches(processor, captions)
