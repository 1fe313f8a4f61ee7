"""One record per item in a JSON Lines file that survives being killed, and a sidecar that says how it was made.

`answers.jsonl` has the sidecar `answers.run.json`. Scoring reads records and never calls a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from vlattn.errors import InputError

_SYNC_SECONDS = 1.0  # flushed per line (outlives the process); forced to disk at most this often (outlives the machine)


@dataclass(frozen=True)
class Record:
    """One answered item.

    raw is the model's text, never altered; pred a parser's reading of it and label the right answer, where the task has
    them; finish is "eos", "length" or "stop"; error says why the item has no answer (scores leave it out, reports
    count it).
    """

    id: str
    image_id: int
    image: str = ""
    prompt: str = ""
    raw: str = ""
    pred: str | None = None
    label: str | None = None
    n_new_tokens: int | None = None
    finish: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"id={self.id!r} is not a non-empty string; write record ids as strings")
        if type(self.image_id) is not int:
            raise InputError(f"image_id={self.image_id!r} of record {self.id!r} is not an integer; write it as one")
        if not isinstance(self.raw, str):
            raise InputError(f"raw={self.raw!r} of record {self.id!r} is not text; store the model's answer as it came")

    def to_json(self) -> dict[str, Any]:
        """Plain data; `error` is there only when the item failed."""
        data = asdict(self)
        if self.error is None:
            del data["error"]
        return data


def sidecar_path(path: str | Path) -> Path:
    """`answers.jsonl` -> `answers.run.json`, beside it."""
    return Path(path).with_suffix(".run.json")


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """The sidecar of a records file, {"settings": ..., "environment": ...}; None when there is none."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise InputError(f"{str(sidecar)!r} is not the sidecar of a records file; remove it or restore it")
    return found


def ids_sha256(ids: Iterable[str]) -> str:
    """SHA-256 of the sorted ids, one a line: the same for the same set of items in any order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def read_records(path: str | Path, expected_ids: Iterable[str] | None = None) -> list[Record]:
    """All records of a file, in file order.

    Raises InputError for a duplicate id, a missing field, a line that is no record, and, where `expected_ids` are
    given, for ids that are missing or not among them.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"records={str(path)!r} cannot be read ({error.strerror}); give a records .jsonl file"
        ) from None
    if content and not content.endswith(b"\n"):
        raise InputError(f"records={str(path)!r} ends in a torn line: its run was cut off; resume that run first")
    records = _parse(content, path)
    if expected_ids is not None:
        check_same_ids(expected_ids, [record.id for record in records], f"records={str(path)!r}")
    return records


def check_same_ids(expected: Iterable[str], given: Iterable[str], shown: str) -> None:
    """Raise InputError unless both hold the same ids; `shown` names the given side in the message."""
    want, have = set(expected), set(given)
    for odd, verb in ((want - have, "lacks"), (have - want, "has unexpected")):
        if odd:
            raise InputError(f"{shown} {verb} {len(odd)} item ids ({_some(odd)}); score records of the same item set")


def _some(ids: Iterable[str], n: int = 3) -> str:
    ordered = sorted(ids)
    return ", ".join(ordered[:n]) + (", ..." if len(ordered) > n else "")


def _parse(content: bytes, path: str | Path) -> list[Record]:
    records: list[Record] = []
    seen: set[str] = set()
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"records={str(path)!r} line {number}"
        try:
            data = json.loads(line)
        except ValueError:
            raise InputError(f"{where} is not JSON; restore the file or start a new one") from None
        if not isinstance(data, dict) or "id" not in data or "image_id" not in data:
            raise InputError(f"{where} has no `id` or `image_id`; give a file of records")
        known = {key: data[key] for key in data if key in Record.__dataclass_fields__}
        try:
            record = Record(**known)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if record.id in seen:
            raise InputError(f"{where} repeats the id {record.id!r}; keep one record per item")
        seen.add(record.id)
        records.append(record)
    return records


class RecordWriter:
    """Append records to `path`; entering the context resumes a run that was cut off.

    run_info are the settings that decide the answers (model, prompt, generation arguments, seed, item ids, ...): a file
    made under other settings is refused. environment (hardware, versions, times) is stored and not compared. done_ids
    are the items already recorded, failed ones included. A torn last line is dropped: its item is answered again.
    """

    def __init__(
        self,
        path: str | Path,
        run_info: Mapping[str, Any],
        environment: Mapping[str, Any] | None = None,
        resume: bool = True,
    ) -> None:
        self.path = Path(path)
        self.run_info: dict[str, Any] = json.loads(json.dumps(dict(run_info)))  # as it will read back
        self.environment = dict(environment or {})
        self.resume = resume
        self.done_ids: set[str] = set()
        self._file: BinaryIO | None = None
        self._synced = 0.0

    def __enter__(self) -> RecordWriter:
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if content and not self.resume:
            raise InputError(f"path={str(self.path)!r} already holds records; resume that run or give another path")
        if whole:
            self._check_settings()
            self.done_ids = {record.id for record in _parse(whole, self.path)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not whole or read_sidecar(self.path) is None:
            self._write_sidecar()
        self._file = self.path.open("ab")
        self._file.truncate(len(whole))
        return self

    def write(self, record: Record) -> None:
        """Append one record and flush it."""
        if self._file is None:
            raise InputError("write() was called outside the writer's context; use `with RecordWriter(...) as writer:`")
        if record.id in self.done_ids:
            raise InputError(f"id={record.id!r} is recorded already; skip the ids in done_ids")
        line = json.dumps(record.to_json()) + "\n"  # ASCII: no character in it ends a line for any reader
        self._file.write(line.encode("ascii"))
        self._file.flush()
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self.done_ids.add(record.id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.closing(self._file):
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file = None

    def _check_settings(self) -> None:
        found = read_sidecar(self.path)
        if found is None:
            raise InputError(
                f"path={str(self.path)!r} holds records but has no {sidecar_path(self.path).name}; give another path"
            )
        before: Mapping[str, Any] = found["settings"]
        differ = sorted(
            key
            for key in before.keys() | self.run_info.keys()
            if (key in before) != (key in self.run_info) or before.get(key) != self.run_info.get(key)
        )
        if differ:
            raise InputError(
                f"path={str(self.path)!r} was made with other settings ({', '.join(differ)}); "
                "repeat those settings or give another path"
            )

    def _write_sidecar(self) -> None:
        text = json.dumps({"settings": self.run_info, "environment": self.environment}, indent=2, sort_keys=True)
        sidecar = sidecar_path(self.path)
        part = sidecar.with_name(sidecar.name + ".part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, sidecar)


def usable(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records that have an answer, and the ids of those that failed."""
    return [r for r in records if r.error is None], [r.id for r in records if r.error is not None]
