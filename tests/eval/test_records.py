"""A records file survives a kill, repeats nothing, and refuses what does not belong together."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlattn.errors import InputError
from vlattn.eval.records import Record, RecordWriter, ids_sha256, read_records, read_sidecar, sidecar_path, usable

SETTINGS = {"model": "tiny", "task": "pope", "seed": 0, "generate": {"max_new_tokens": 8}}


def record(name: str, **fields: Any) -> Record:
    return Record(id=name, image_id=7, **fields)


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written = Record(
        *("popular:3", 42, "a.jpg", "Is there a dog?", "Yes,\nté \u2028 \ud800 ."),
        **{"pred": "yes", "label": "no", "n_new_tokens": 5, "finish": "eos", "meta": {"k": [1, None]}},
    )
    with RecordWriter(path, SETTINGS) as writer:
        writer.write(written)
    assert read_records(path) == [written]
    assert "error" not in json.loads(path.read_text().splitlines()[0])


def test_the_sidecar_holds_settings_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "pope.jsonl"
    with RecordWriter(path, SETTINGS, environment={"device": "cpu"}):
        pass
    assert sidecar_path(path) == tmp_path / "pope.run.json"
    assert read_sidecar(path) == {"settings": SETTINGS, "environment": {"device": "cpu"}}
    assert read_sidecar(tmp_path / "other.jsonl") is None


def test_every_line_is_on_disk_before_the_next_item(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS) as writer:
        for i in range(5):
            writer.write(record(f"a:{i}"))
            assert len(read_records(path)) == i + 1


def test_a_torn_last_line_is_dropped_and_its_item_is_answered_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS) as writer:
        for i in range(3):
            writer.write(record(f"a:{i}", raw="yes"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="torn line"):
        read_records(path)
    with RecordWriter(path, SETTINGS) as writer:
        assert writer.done_ids == {"a:0", "a:1"}
        writer.write(record("a:2", raw="yes"))
    assert path.read_bytes() == whole


def test_resuming_under_other_settings_names_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS) as writer:
        writer.write(record("a:0"))
    other = {**SETTINGS, "seed": 1, "generate": {"max_new_tokens": 9}, "extra": None}
    with pytest.raises(InputError, match=r"\(extra, generate, seed\)"), RecordWriter(path, other):
        pass
    with pytest.raises(InputError, match="already holds records"), RecordWriter(path, SETTINGS, resume=False):
        pass
    assert len(read_records(path)) == 1


def test_settings_compare_as_json_so_tuples_equal_lists(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, {"ids": (1, 2)}) as writer:
        writer.write(record("a:0"))
    with RecordWriter(path, {"ids": [1, 2]}) as writer:
        assert writer.done_ids == {"a:0"}


def test_records_without_their_sidecar_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS) as writer:
        writer.write(record("a:0"))
    sidecar_path(path).unlink()
    with pytest.raises(InputError, match=r"run\.run\.json"), RecordWriter(path, SETTINGS):
        pass


def test_a_run_without_records_may_change_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS):
        pass
    with RecordWriter(path, {"seed": 5}):
        pass
    assert (read_sidecar(path) or {})["settings"] == {"seed": 5}


def test_an_item_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS) as writer:
        writer.write(record("a:0"))
        with pytest.raises(InputError, match="recorded already"):
            writer.write(record("a:0"))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InputError, match="line 2 repeats the id 'a:0'"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image_id": 1}', "no `id`"),
        ('{"id": "a"}', "no `id` or `image_id`"),
        ('{"id": 3, "image_id": 1}', "id=3 is not a non-empty string"),
        ('{"id": "a", "image_id": "1"}', "image_id='1'"),
        ('{"id": "a", "image_id": true}', "image_id=True"),
        ('{"id": "a", "image_id": 1, "raw": null}', "raw=None"),
        ("[1]", "no `id`"),
        ("{", "not JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"id": "ok", "image_id": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_records(path)
    assert "line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unexpected_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"id": "a", "image_id": 1}\n{"id": "b", "image_id": 1}\n')
    assert len(read_records(path, ["b", "a"])) == 2
    with pytest.raises(InputError, match=r"lacks 1 item ids \(c\)"):
        read_records(path, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"has unexpected 1 item ids \(b\)"):
        read_records(path, ["a"])
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")


def test_the_digest_of_ids_does_not_depend_on_order() -> None:
    assert ids_sha256(["b", "a"]) == ids_sha256(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert ids_sha256(["a", "b"]) != ids_sha256(["ab"])


def test_failed_items_are_set_apart(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, SETTINGS) as writer:
        writer.write(record("a:0"))
        writer.write(record("a:1", error="image cannot be opened"))
    answered, failed = usable(read_records(path))
    assert [r.id for r in answered] == ["a:0"]
    assert failed == ["a:1"]
    with RecordWriter(path, SETTINGS) as writer:
        assert "a:1" in writer.done_ids


CHILD = """
import sys, time
from vlattn.eval.records import Record, RecordWriter
with RecordWriter(sys.argv[1], {"seed": 0}) as writer:
    for i in range(400):
        if f"a:{i}" not in writer.done_ids:
            writer.write(Record(f"a:{i}", i, raw="x" * 3000))
            time.sleep(0.002)
"""


def test_a_killed_run_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    kills = 0
    for wait_for in (40, 120):  # killed twice, once early and once later
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            if path.is_file() and path.read_bytes().count(b"\n") >= wait_for:
                child.kill()
                kills += 1
                break
            time.sleep(0.005)
        child.wait(timeout=60)
        kept = path.read_bytes()
        with path.open("ab") as torn:  # what a kill in the middle of a write leaves
            torn.write(b'{"id": "a:399", "image')
    assert kills == 2
    subprocess.run([sys.executable, "-c", CHILD, str(path)], check=True, timeout=120)
    assert path.read_bytes().startswith(kept)
    assert [r.id for r in read_records(path)] == [f"a:{i}" for i in range(400)]
