"""The folder of a training run: a checkpoint, a log that grows epoch by epoch, and in the end the result."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError

CHECKPOINT, LOG, RESULT = "checkpoint.pt", "log.jsonl", "result.json"


class RunFolder:
    """Files of one run.

    path: the folder; None keeps nothing.
    record: plain data that decides the run; a checkpoint or a result made under another is refused.
    writes: whether this process writes; of several, one does.
    """

    other = "another {}; repeat that"
    """How a record that differs is told of."""

    def __init__(self, path: str | Path | None, record: dict[str, Any], writes: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.record: dict[str, Any] = json.loads(json.dumps(plain(record)))  # as it will read back
        self.writes = writes and path is not None

    def start(self, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(state to go on from, content of the result of a run that is done): at most one of them.

        Raises:
            InputError: the folder holds a run and `resume` is not set, or holds none to resume, or one made with other
                settings.
        """
        if self.path is None:
            if resume:
                raise InputError("resume: there is no folder to go on from; give out")
            return None, None
        found = [name for name in (RESULT, CHECKPOINT, LOG) if (self.path / name).is_file()]
        if not resume:
            if found:
                raise InputError(
                    f"out: {str(self.path)!r} holds {found[0]} already; resume that run or give another folder"
                )
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
            return None, None
        if RESULT in found:
            result = self.read_result(self.path)
            self._check(result["record"])
            return None, result
        if CHECKPOINT not in found:
            self.before_checkpoint(LOG in found)
            return None, None
        state: dict[str, Any] = torch.load(self.path / CHECKPOINT, map_location="cpu", weights_only=True)
        self._check(json.loads(state["record"]))
        self.cut_log(len(state["epochs"]))
        return state, None

    def before_checkpoint(self, begun: bool) -> None:
        """What `start` does about a run to resume that has no checkpoint yet; `begun`: whether there is a log."""
        raise InputError(f"resume: {str(self.path)!r} holds no checkpoint; leave resume out to start a run there")

    @staticmethod
    def read_result(folder: str | Path) -> dict[str, Any]:
        """The content of result.json; InputError where it cannot be read."""
        file = Path(folder) / RESULT
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"folder: {str(file)!r} cannot be read ({error}); give the folder of a finished run"
            ) from None
        return data

    def log(self, entry: Any) -> None:
        """One more epoch in the log, at once."""
        if self.writes:
            with self._file(LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(entry)) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint."""
        if self.writes:
            with replacing(self._file(CHECKPOINT)) as partial:
                torch.save({**state, "record": json.dumps(self.record)}, partial)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the result, and remove the checkpoint."""
        if self.writes:
            with replacing(self._file(RESULT)) as partial:
                text = json.dumps(plain({**result, "record": self.record}), indent=1)
                partial.write_text(text + "\n", encoding="utf-8")
            self._file(CHECKPOINT).unlink(missing_ok=True)

    def cut_log(self, epochs: int) -> None:
        """Epochs after the checkpoint are made again, so their lines go."""
        if self.writes:
            file = self._file(LOG)
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
            file.write_text("".join(lines[:epochs]), encoding="utf-8")

    def _file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / name

    def _check(self, before: dict[str, Any]) -> None:
        differ = sorted(key for key in before.keys() | self.record.keys() if before.get(key) != self.record.get(key))
        if differ:
            told = self.other.format(", ".join(differ))
            raise InputError(f"resume: {str(self.path)!r} was begun with {told}, or give another folder")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write beside `file`, which takes its place: a kill leaves the old or the new one, never half of one."""
    partial = file.with_suffix(".partial")
    yield partial
    partial.replace(file)


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses as dicts, tuples as lists, numbers that are not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
