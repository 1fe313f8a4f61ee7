"""A report carries the numbers, how sure they are, and everything that decided them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlattn.errors import InputError
from vlattn.eval.chair_io import read_captions
from vlattn.eval.coco import ImageObjects
from vlattn.eval.pope import build_pope, write_pope
from vlattn.eval.records import Record, RecordWriter, ids_sha256
from vlattn.eval.report import score_file, write_report

SCENES = [("person", "dog"), ("car", "bus"), ("cat", "couch"), ("kite", "bench")]


@pytest.fixture
def pope_run(tmp_path: Path) -> tuple[Path, Path]:
    """A run that answers every question, wrong on the first image only; and its question folder."""
    questions = build_pope([ImageObjects(i, f"{i}.jpg", s) for i, s in enumerate(SCENES, 1)], 4, 2)
    folder = tmp_path / "pope"
    write_pope(questions, folder, {})
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, {"task": "pope", "model": "tiny", "prompt": "{question}"}, {"device": "cpu"}) as writer:
        for asked in questions.values():
            for q in asked:
                right = q.image_id != 1
                raw = {"yes": "Yes", "no": "No"}[q.label] if right else {"yes": "No", "no": "Yes"}[q.label]
                writer.write(Record(q.item_id, q.image_id, q.image, q.text, raw, label=q.label, finish="eos"))
    return path, folder


def test_a_pope_report_takes_its_task_from_the_sidecar(pope_run: tuple[Path, Path]) -> None:
    path, folder = pope_run
    report = score_file(path, annotations=folder, n_boot=500)
    assert (report["task"], report["profile"]) == ("pope", "pope-official")
    assert report["run"] == {"task": "pope", "model": "tiny", "prompt": "{question}"}
    assert report["environment"] == {"device": "cpu"}
    assert report["metrics"]["accuracy"]["value"] == report["pooled"]["accuracy"]["value"] == 0.75
    assert set(report["splits"]) == {"random", "popular", "adversarial"}
    assert report["splits"]["popular"]["counts"]["n"] == 16
    assert report["unparsed_rate"] == 0
    assert report["records"]["n_items"] == 48
    ids = [f"{split}:{i}" for split in report["splits"] for i in range(1, 17)]
    assert report["records"]["ids_sha256"] == ids_sha256(ids)
    assert report["annotations"]["pope_random.json"]["questions"] == 16
    assert {"vlattn", "numpy", "python", "pycocotools"} <= set(report["versions"])
    low, high = (report["metrics"]["accuracy"][side] for side in ("low", "high"))
    assert low < 0.75 < high <= 1
    assert report["bootstrap"]["n_images"] == 4  # not 48 questions


def test_a_report_is_plain_json_and_repeats(pope_run: tuple[Path, Path], tmp_path: Path) -> None:
    first, again = score_file(pope_run[0], n_boot=300), score_file(pope_run[0], n_boot=300)
    assert first == again
    write_report(first, tmp_path / "deep" / "report.json")
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == first


def test_failed_items_are_counted_listed_and_not_scored(pope_run: tuple[Path, Path]) -> None:
    path, folder = pope_run
    lines = path.read_text().splitlines()
    broken = {**json.loads(lines[0]), "raw": "", "error": "image cannot be opened"}
    path.write_text("\n".join([json.dumps(broken), *lines[1:]]) + "\n")
    report = score_file(path, annotations=folder, n_boot=100)
    assert (report["records"]["n_errors"], report["records"]["error_ids"]) == (1, ["random:1"])
    assert (report["records"]["n_items"], report["records"]["n_scored"]) == (48, 47)
    assert report["splits"]["random"]["counts"]["n"] == 15
    assert report["pooled"]["accuracy"]["value"] == pytest.approx(36 / 47)
    assert "1 items failed" in report["warnings"][0]


def test_an_unfinished_run_is_refused_when_its_questions_are_given(pope_run: tuple[Path, Path]) -> None:
    path, folder = pope_run
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match=r"lacks 1 item ids \(adversarial:16\)"):
        score_file(path, annotations=folder)


def test_official_answer_files_score_against_their_questions(pope_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = pope_run
    questions = [json.loads(line) for line in (folder / "pope_random.json").read_text().splitlines()]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"question": q["text"], "answer": "Yes"}) + "\n" for q in questions))
    report = score_file(path, "pope", annotations=folder / "pope_random.json", n_boot=50)
    assert report["metrics"]["yes_ratio"]["value"] == 1
    assert report["metrics"]["f1"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="give the POPE question file"):
        score_file(path, "pope")


@pytest.fixture
def chair_files(write_coco: Any) -> tuple[Path, Path]:
    return write_coco({1: ["dog"], 2: ["cat", "dog"], 3: ["bus"]}, {1: ["A dog"], 2: ["A cat"], 3: ["A bus"]})


TEXTS = {1: "A dog and a cat.", 2: "Two dogs.", 3: "A man by a bus."}


def test_a_chair_report_holds_metrics_intervals_and_details(chair_files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with RecordWriter(path, {"task": "chair"}) as writer:
        for i, text in TEXTS.items():
            writer.write(Record(str(i), i, raw=text, finish="eos"))
    report = score_file(path, annotations=chair_files[0], captions=chair_files[1], n_boot=200, details=True)
    assert report["profile"] == "chair-legacy"
    assert report["ground_truth"] == "instances and reference captions"
    assert report["metrics"]["chair_s"]["value"] == 2 / 3
    assert report["metrics"]["chair_i"]["value"] == 2 / 4
    assert report["metrics"]["chair_s"]["low"] <= 2 / 3 <= report["metrics"]["chair_s"]["high"]
    assert report["metrics"]["chair_s"]["wilson"] == pytest.approx([0.2077, 0.9385], abs=1e-4)
    first = report["items"][0]
    assert first["text"][first["mentions"][1]["start"] : first["mentions"][1]["end"]] == "cat"
    assert first["mentions"][1]["hallucinated"] is True
    assert first["truth"] == ["dog"]
    json.dumps(report, allow_nan=False)


def forms() -> dict[str, str]:
    entries = [{"image_id": i, "caption": text} for i, text in TEXTS.items()]
    return {
        "list.json": json.dumps(entries, indent=1),
        "one_line.json": json.dumps(entries),
        "lines.jsonl": "".join(json.dumps(e) + "\n" for e in entries),
        "original.json": json.dumps({"overall": {}, "imgToEval": {str(e["image_id"]): e for e in entries}}),
        "records.jsonl": "".join(json.dumps(Record(str(i), i, raw=t).to_json()) + "\n" for i, t in TEXTS.items()),
    }


@pytest.mark.parametrize("name", forms())
def test_every_caption_form_gives_the_same_numbers(chair_files: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(forms()[name])
    assert [(c.image_id, c.text) for c in read_captions(path)] == list(TEXTS.items())
    report = score_file(path, "chair", annotations=chair_files[0], captions=chair_files[1], n_boot=20)
    assert report["metrics"]["chair_i"]["value"] == 0.5


def test_caption_files_may_use_other_keys_and_must_have_integer_ids(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"img": 4, "text": "A dog."}\n')
    assert read_captions(path, "img", "text")[0].image_id == 4
    with pytest.raises(InputError, match="without 'image_id' or 'caption'"):
        read_captions(path)
    path.write_text('{"image_id": "4", "caption": "A dog."}\n')
    with pytest.raises(InputError, match="image id '4'"):
        read_captions(path)
    path.write_text('{"image_id": 4, "caption": "A dog."}\n' * 2)
    with pytest.raises(InputError, match="repeats the image id 4"):
        read_captions(path)
    path.write_text("no json")
    with pytest.raises(InputError, match="neither JSON nor JSON Lines"):
        read_captions(path)


def test_what_cannot_be_scored_is_said(pope_run: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = pope_run
    with pytest.raises(InputError, match="holds answers for 'pope'"):
        score_file(path, "chair")
    with pytest.raises(InputError, match="task='mme'"):
        score_file(path, "mme")
    with pytest.raises(InputError, match="profile='chair-legacy' is no pope profile"):
        score_file(path, profile="chair-legacy")
    with pytest.raises(InputError, match="truncate are for task 'chair'"):
        score_file(path, truncate="drop_partial_sentence")
    with pytest.raises(InputError, match="cannot be read"):
        score_file(tmp_path / "none.jsonl", "pope")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": "1", "image_id": 1, "raw": "A dog."}\n')
    with pytest.raises(InputError, match="task is not given"):
        score_file(bare)
    with pytest.raises(InputError, match="annotations is missing"):
        score_file(bare, "chair")
    bare.write_text('{"x": 1}\n')
    with pytest.raises(InputError, match="holds no records"):
        score_file(bare, "pope")
    bare.write_text('{"id": "1", "image_id": 1, "raw": "", "error": "no"}\n')
    with pytest.raises(InputError, match="no answered item"):
        score_file(bare, "chair")
