"""A small sweep on the embedded model: cut off, resumed, and every figure behind a record."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import vlattn.eval.answer as answer
from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.eval.records import read_records
from vlattn.eval.sweep import Sweep
from vlattn.eval.sweep_config import SweepConfig

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "images": 3,
    "max_new_tokens": 12,
    "batch_size": 12,
    "bootstrap": 200,
    "methods": {
        "random": ["random:keep=36"],
        "flowcut": ["flowcut:keep=36,count=per_image"],
        "pyramiddrop": ["pyramiddrop:layers=[1,3,5]"],
    },
}
SETTINGS = ["vanilla", *(setting for listed in CONFIG["methods"].values() for setting in listed)]
STOP_AFTER = 100


def lines_of(out: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted((out / "records").glob("*.jsonl"))}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep interrupted in the middle, then the command on the same folder, with and without matplotlib."""
    out = tmp_path_factory.mktemp("sweep")
    (out / "small.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    steps: list[int] = []

    def interrupt(what: str, done: int) -> None:
        steps.append(done)
        if sum(steps) > STOP_AFTER:
            raise KeyboardInterrupt

    job = Sweep(SweepConfig.read(out / "small.yaml"), out)
    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    before = lines_of(out)
    asked: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        generate = answer._generate

        def counted(model: Any, processor: Any, batch: Any, max_new_tokens: int) -> Any:
            asked.extend((group[0].image, group[0].prompt) for group, _ in batch)
            return generate(model, processor, batch, max_new_tokens)

        patch.setattr(answer, "_generate", counted)
        command = ["sweep", str(out / "small.yaml"), "--out", str(out), "--no-figure"]
        ran = CliRunner().invoke(app, command, catch_exceptions=False, env={"COLUMNS": "100"})
    results = json.loads((out / "sweep.json").read_text())
    return {"out": out, "job": job, "before": before, "asked": asked, "ran": ran, "results": results}


def test_an_interrupted_sweep_goes_on_and_asks_nothing_twice(swept: dict[str, Any]) -> None:
    before, after = swept["before"], lines_of(swept["out"])
    assert 0 < sum(map(len, before.values())) < sum(map(len, after.values()))
    for name, lines in before.items():
        assert after[name][: len(lines)] == lines
    job = swept["job"]
    for task, items in (("pope", job.pope), ("chair", job.chair)):
        for arm in job.config.arms:
            ids = [record.id for record in read_records(job.records_of(task, arm.file))]
            assert sorted(ids) == sorted(item.id for item in items)
    expected: Counter[tuple[str, str]] = Counter()
    for name, lines in after.items():
        if not name.startswith("budget"):
            told = {json.loads(line)["id"] for line in before.get(name, [])}
            expected.update({(r["image"], r["prompt"]) for r in map(json.loads, lines) if r["id"] not in told})
    assert Counter(swept["asked"]) == expected


def test_a_finished_sweep_asks_nothing_and_counts_every_step(
    swept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(answer, "_generate", never)
    monkeypatch.setattr(type(swept["job"].model), "forward", never)
    done: list[int] = []
    again = swept["job"].run(lambda what, n: done.append(n))
    assert sum(done) == swept["job"].steps
    assert json.loads(json.dumps(again["arms"])) == swept["results"]["arms"]


def test_every_arm_answered_about_the_same_images(swept: dict[str, Any]) -> None:
    results, job = swept["results"], swept["job"]
    assert [arm["setting"] for arm in results["arms"]] == SETTINGS
    assert (results["data"]["images"], results["data"]["questions"]) == (3, len(job.pope))
    images = {
        frozenset(r.image_id for r in read_records(job.records_of(task, arm.file)))
        for task in ("pope", "chair")
        for arm in job.config.arms
    }
    assert len(images) == 1


def test_scores_and_differences_are_those_of_the_records(swept: dict[str, Any]) -> None:
    job, f1 = swept["job"], {}
    for arm in swept["results"]["arms"]:
        right: dict[str, list[bool]] = {}
        counts: dict[str, list[int]] = {}
        for record in read_records(job.records_of("pope", arm["file"])):
            says_yes = not {"No", "not", "no"} & set(record.raw.split(".")[0].replace(",", "").split(" "))
            split, is_yes = record.meta["split"], record.label == "yes"
            right.setdefault(split, []).append(says_yes == is_yes)
            tally = counts.setdefault(split, [0, 0])
            tally[0] += says_yes and is_yes
            tally[1] += says_yes + is_yes
        for split in right:
            shown = arm["pope"]["splits"][split]
            assert shown["accuracy"]["value"] == pytest.approx(sum(right[split]) / len(right[split]))
            assert shown["f1"]["value"] == pytest.approx(2 * counts[split][0] / counts[split][1])
        pooled = [sum(parts) for parts in zip(*counts.values(), strict=True)]
        assert arm["pope"]["pooled"]["f1"]["value"] == pytest.approx(2 * pooled[0] / pooled[1])
        f1[arm["setting"]] = sum(2 * hit / both for hit, both in counts.values()) / 3
        assert arm["pope"]["mean_f1"]["value"] == pytest.approx(f1[arm["setting"]])
        assert arm["pope"]["mean_f1"]["low"] <= f1[arm["setting"]] <= arm["pope"]["mean_f1"]["high"]
    same, other = swept["results"]["arms"][2], swept["results"]["arms"][3]
    difference = same["against"]["random"]["pope"]["metrics"]["f1"]["difference"]
    assert difference == pytest.approx(f1[same["setting"]] - f1["random:keep=36"])
    assert other["against"]["random"] == {"pope": None, "chair": None}  # no random arm of 63 tokens
    difference = other["against"]["vanilla"]["pope"]["metrics"]["f1"]["difference"]
    assert difference == pytest.approx(f1[other["setting"]] - f1["vanilla"])


def test_budgets_are_measured_per_arm_in_all_three_senses(swept: dict[str, Any]) -> None:
    halved = [144, 72, 72, 36, 36, 18, 18]  # what enters each of six decoder layers, and what the last hands on
    for arm, layers in zip(swept["results"]["arms"], ([144] * 7, [36] * 7, [36] * 7, halved), strict=True):
        for task in ("pope", "chair"):
            assert arm["budget"][task] == {
                "full": 144, "final": layers[-1], "average": sum(layers[:-1]) / 6, "counted": sum(layers[1:]) / 6,
                "masked": False,
            }  # fmt: skip


def test_the_command_prints_every_setting_and_where_the_numbers_are(swept: dict[str, Any]) -> None:
    shown = swept["ran"].output
    assert swept["ran"].exit_code == 0
    assert str(swept["out"] / "sweep.json") in shown.replace("\n", "")
    assert max(map(len, shown.splitlines())) <= max(100, len(str(swept["out"] / "sweep.json")))
    joined = "".join(line[:27].strip() for line in shown.splitlines())
    for arm in swept["results"]["arms"]:
        assert arm["setting"] in joined


def test_the_figure_is_drawn_over_the_budget_that_was_chosen(swept: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    command = ["sweep", str(swept["out"] / "small.yaml"), "--out", str(swept["out"]), "--budget", "counted"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    with Image.open(swept["out"] / "pareto.png") as picture:
        picture.load()
        assert picture.width >= 1200
    words = " ".join(ElementTree.parse(swept["out"] / "pareto.svg").getroot().itertext())
    assert "visual tokens, counted: mean of what each decoder layer hands on" in words
    assert json.loads((swept["out"] / "sweep.json").read_text())["budget"] == "counted"


def test_a_missing_matplotlib_and_a_setting_that_does_not_fit_are_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "big.yaml"
    config.write_text(yaml.safe_dump({"images": 2, "methods": {"random": ["random:keep=36", "random:keep=500"]}}))
    command = ["sweep", str(config), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="144 visual tokens"):
        CliRunner().invoke(app, [*command, "--no-figure"], catch_exceptions=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'vlattn\[viz\]'"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
