"""`vlattn eval`: from a command line to records and a report, and one-line errors for bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vlattn.assets.paths import tiny_coco
from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.eval.coco import read_coco
from vlattn.eval.records import read_records, read_sidecar

DATA = tiny_coco("val")
runner = CliRunner()


def run(*words: str):
    return runner.invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.mark.slow
def test_pope_on_the_embedded_set_records_every_question_and_prints_the_three_splits(tmp_path):
    out = tmp_path / "pope.jsonl"
    result = run("eval", "pope", "--n-images", "4", "--method", "flowcut:keep=36", "--batch-size", "8", "--out", out)
    assert result.exit_code == 0
    assert len(read_records(out)) == 4 * 6 * 3
    for split in ("random", "popular", "adversarial"):
        assert split in result.output
    settings = read_sidecar(out)["settings"]
    assert settings["method"].startswith("FlowCut(keep=36")
    assert (settings["n_images"], settings["seed"]) == (4, 0)


@pytest.mark.parametrize(("data", "images"), [("val", 300), ("shift", 150)])
def test_without_a_number_the_embedded_sets_are_asked_about_as_many_images_as_they_have(
    tmp_path, monkeypatch, data, images
):
    import vlattn.cli.eval as command

    asked = []
    monkeypatch.setattr(command, "_run", lambda task, items, *a, **k: asked.extend(items))
    with pytest.raises(InputError, match="cannot be read"):  # nothing was recorded, so nothing can be scored
        run("eval", "pope", "--data", data, "--out", tmp_path / "a.jsonl")
    assert len({item.image_id for item in asked}) == images


@pytest.mark.slow
def test_chair_on_given_files_describes_the_chosen_images(tmp_path):
    out = tmp_path / "chair.jsonl"
    result = run(
        "eval", "chair", "--annotations", DATA.instances, "--captions", DATA.captions, "--images", DATA.images,
        "--n-images", "3", "--seed", "5", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0
    images = {r.image_id for r in read_records(out)}
    assert len(images) == 3
    assert images < set(read_coco(DATA.instances).image_ids)


def test_a_question_file_is_asked_as_it_stands(tmp_path):
    run("build-pope", DATA.instances, "--out", tmp_path / "questions", "--n-images", "4")
    from vlattn.eval.items import pope_items

    built = pope_items(DATA.instances, n_images=4, seed=0)
    for source in (tmp_path / "questions", tmp_path / "questions" / "pope_popular.json"):
        read = pope_items(source)
        assert {(i.id, i.prompt, i.label, i.image) for i in read} <= {(i.id, i.prompt, i.label, i.image) for i in built}
    assert len(pope_items(tmp_path / "questions")) == len(built)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "flowcuts:keep=3"], "known: vanilla"),
        (["--method", "flowcut:kep=3"], "field=value with keep"),
        (["--method", "flowcut"], "needs keep"),
        (["--method", "flowcut:keep=145"], "144 visual tokens"),
        (["--method", "flowcut:keep=0"], "at least 1"),
        (["--annotations", str(DATA.instances)], "give both"),
        (["--annotations", str(DATA.instances), "--images", "nowhere"], "not a folder"),
        (["--annotations", "nowhere.json", "--images", str(DATA.images)], "cannot be read"),
        (["--model", "nowhere/nothing"], "neither a folder"),
        (["--dtype", "float31"], "torch dtype"),
        (["--n-images", "100000"], "images"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, words, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=says) as error:
        run(
            "eval",
            "pope",
            "--out",
            tmp_path / "a.jsonl",
            *(["--n-images", "4"] if words[0] != "--n-images" else []),
            *words,
        )
    assert "\n" not in str(error.value)


def test_annotations_without_categories_are_refused(tmp_path):
    data = json.loads(DATA.instances.read_text())
    del data["categories"]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="categories"):
        run(
            "eval",
            "pope",
            "--annotations",
            tmp_path / "bad.json",
            "--images",
            DATA.images,
            "--out",
            tmp_path / "a.jsonl",
        )


def test_the_program_prints_bad_input_without_a_traceback_and_exits_with_2(tmp_path):
    command = [sys.executable, "-c", "from vlattn.cli import main; main()", "build-pope", "nowhere.json", "--out", "x"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("vlattn: ")
    assert ran.stderr.count("\n") == 1
