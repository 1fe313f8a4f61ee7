"""`vlattn compare`: a table of differences, and a refusal of unequal items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlattn.cli.compare import compare
from vlattn.errors import InputError
from vlattn.eval.records import Record, RecordWriter


def write(path: Path, right: int, n: int = 20) -> Path:
    with RecordWriter(path, {"task": "pope"}) as writer:
        for i in range(n):
            writer.write(Record(f"random:{i}", i, raw="Yes" if i < right else "No", label="yes"))
    return path


def test_differences_are_printed_with_sign_and_written(invoke: Any, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 18)
    out = tmp_path / "out.json"
    result = invoke(compare, a, b, "--metric", "accuracy", "--metric", "recall", "--out", out, "--n-boot", 200)
    assert result.exit_code == 0, result.exception
    for part in ("+40.0", "50.0", "90.0", "McNemar", "in B only 8", "p (Holm)"):
        assert part in result.output
    report = json.loads(out.read_text())
    assert list(report["metrics"]) == ["accuracy", "recall"]
    assert report["mcnemar"]["p_value"] == 2 / 2**8


def test_unequal_items_are_refused(invoke: Any, tmp_path: Path) -> None:
    result = invoke(compare, write(tmp_path / "a.jsonl", 1), write(tmp_path / "b.jsonl", 1, n=19))
    assert isinstance(result.exception, InputError)
    assert "lacks 1 item ids" in str(result.exception)
