"""Comparing two runs: paired, on equal items, with everything that differs named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from vlattn.errors import InputError
from vlattn.eval.compare import compare_files
from vlattn.eval.records import Record, RecordWriter
from vlattn.eval.stats import holm

N = 60


def write_pope(path: Path, wrong: Callable[[int], bool], **settings: Any) -> Path:
    """N questions, two per image; `wrong` says which are answered wrongly."""
    with RecordWriter(path, {"task": "pope", **settings}) as writer:
        for i in range(N):
            label = "yes" if i % 2 == 0 else "no"
            raw = label if not wrong(i) else {"yes": "no", "no": "yes"}[label]
            writer.write(Record(f"random:{i}", i // 2, raw=raw, label=label))
    return path


def test_the_better_run_is_found_with_every_test(tmp_path: Path) -> None:
    a = write_pope(tmp_path / "a.jsonl", lambda i: i % 3 == 0, method="none", seed=1)
    b = write_pope(tmp_path / "b.jsonl", lambda i: i % 15 == 0, method="flowcut", seed=1)
    report = compare_files(a, b, n_boot=1000)
    accuracy = report["metrics"]["accuracy"]
    assert (accuracy["a"], accuracy["b"]) == pytest.approx((40 / 60, 56 / 60))
    assert accuracy["difference"] == pytest.approx(16 / 60)
    assert 0 < accuracy["low"] < 16 / 60 < accuracy["high"]
    assert accuracy["p_value"] == pytest.approx(1 / 1001)
    assert report["mcnemar"] == {
        "only_a_right": 0,
        "only_b_right": 16,
        "p_value": pytest.approx(scipy_stats.binomtest(0, 16).pvalue),
    }
    ps = [found["p_value"] for found in report["metrics"].values()]
    assert [found["p_holm"] for found in report["metrics"].values()] == holm(ps)
    assert report["settings_that_differ"] == ["method"]
    json.dumps(report, allow_nan=False)


def test_a_run_compared_with_itself_differs_by_nothing(tmp_path: Path) -> None:
    a = write_pope(tmp_path / "a.jsonl", lambda i: i % 3 == 0)
    report = compare_files(a, a, metrics=["accuracy", "precision"], n_boot=200)
    for found in report["metrics"].values():
        assert (found["difference"], found["low"], found["high"], found["p_holm"]) == (0, 0, 0, 1)
    assert report["mcnemar"]["p_value"] == 1


def test_the_order_of_items_does_not_matter(tmp_path: Path) -> None:
    a = write_pope(tmp_path / "a.jsonl", lambda i: i % 3 == 0)
    b = write_pope(tmp_path / "b.jsonl", lambda i: i % 4 == 0)
    before = compare_files(a, b, n_boot=100)
    b.write_text("\n".join(reversed(b.read_text().splitlines())) + "\n")
    assert compare_files(a, b, n_boot=100)["metrics"] == before["metrics"]


def test_unequal_items_are_refused(tmp_path: Path) -> None:
    a = write_pope(tmp_path / "a.jsonl", lambda i: False)
    b = write_pope(tmp_path / "b.jsonl", lambda i: False)
    lines = b.read_text().splitlines()
    b.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match=r"lacks 1 item ids \(random:59\)"):
        compare_files(a, b)
    with pytest.raises(InputError, match="unexpected 1 item ids"):
        compare_files(b, a)
    for change in ({"label": "yes"}, {"image_id": 999}):
        b.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), **change})]) + "\n")
        with pytest.raises(InputError, match="another image or label"):
            compare_files(a, b)


def test_items_that_failed_in_one_run_are_left_out_of_both(tmp_path: Path) -> None:
    a = write_pope(tmp_path / "a.jsonl", lambda i: i == 0)
    b = write_pope(tmp_path / "b.jsonl", lambda i: False)
    lines = b.read_text().splitlines()
    b.write_text("\n".join([json.dumps({**json.loads(lines[0]), "error": "no image"}), *lines[1:]]) + "\n")
    report = compare_files(a, b, n_boot=50)
    assert (report["n_items"], report["left_out_ids"]) == (59, ["random:0"])
    assert report["metrics"]["accuracy"]["a"] == 1
    assert "left out of both" in report["warnings"][0]


def write_chair(path: Path, texts: dict[int, str]) -> Path:
    with RecordWriter(path, {"task": "chair"}) as writer:
        for i, text in texts.items():
            writer.write(Record(str(i), i, raw=text, finish="eos"))
    return path


def test_captions_are_compared_by_image(tmp_path: Path, write_coco: Any) -> None:
    instances, captions = write_coco({i: ["dog"] for i in range(20)}, {i: ["A dog."] for i in range(20)})
    a = write_chair(tmp_path / "a.jsonl", dict.fromkeys(range(20), "A dog and a cat."))
    b = write_chair(tmp_path / "b.jsonl", {i: "A dog." if i % 2 else "A dog, a cat." for i in range(20)})
    report = compare_files(a, b, instances, captions, n_boot=300)
    assert list(report["metrics"]) == ["chair_s", "chair_i", "recall", "len"]
    assert report["metrics"]["chair_s"]["difference"] == -0.5
    assert report["metrics"]["chair_i"]["difference"] == pytest.approx(1 / 3 - 1 / 2)
    assert report["metrics"]["recall"]["difference"] == 0
    assert report["mcnemar"]["only_b_right"] == 10
    with pytest.raises(InputError, match="annotations is missing"):
        compare_files(a, b)


def test_two_tasks_or_an_unknown_metric_are_refused(tmp_path: Path) -> None:
    a = write_pope(tmp_path / "a.jsonl", lambda i: False)
    b = write_chair(tmp_path / "b.jsonl", {1: "A dog."})
    with pytest.raises(InputError, match="compare one task"):
        compare_files(a, b)
    with pytest.raises(InputError, match="metric='chair_s' is no pope metric"):
        compare_files(a, a, metrics=["chair_s"])
