"""The folder of a training run: checkpoint, a log that grows epoch by epoch, and in the end result and model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError

CHECKPOINT, LOG, RESULT, MODEL = "checkpoint.pt", "log.jsonl", "result.json", "model.safetensors"


class TrainFolder:
    """Files of one run.

    path: the folder; None keeps nothing. record: plain data that decides the run; a checkpoint or a result made under
    another is refused.
    """

    def __init__(self, path: str | Path | None, record: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.record: dict[str, Any] = json.loads(json.dumps(plain(record)))  # as it will read back

    def start(self, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(state to go on from, result of a run that is done): at most one of them.

        Raises:
            InputError: the folder holds a run and `resume` is not set, or holds none to resume, or one made with other
                settings or data.
        """
        if self.path is None:
            if resume:
                raise InputError("resume: there is no folder to go on from; give out")
            return None, None
        found = [name for name in (RESULT, CHECKPOINT, LOG) if (self.path / name).is_file()]
        if not resume:
            if found:
                raise InputError(f"out: {str(self.path)!r} holds {found[0]} already; resume it or give another folder")
            self.path.mkdir(parents=True, exist_ok=True)
            return None, None
        if RESULT in found:
            result = read_result(self.path)
            self._check(result["record"])
            return None, result
        if CHECKPOINT not in found:
            if LOG not in found:
                raise InputError(f"resume: {str(self.path)!r} holds no run; leave resume out to start one there")
            self._cut_log(self.path / LOG, 0)  # cut off before its first checkpoint
            return None, None
        state: dict[str, Any] = torch.load(self.path / CHECKPOINT, map_location="cpu", weights_only=True)
        self._check(json.loads(state["record"]))
        self._cut_log(self.path / LOG, len(state["epochs"]))
        return state, None

    def log(self, entry: dict[str, Any]) -> None:
        """Append one epoch to the log, at once."""
        if self.path is not None:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(entry)) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint beside and rename it: a kill leaves the old or the new one, never half of one."""
        if self.path is not None:
            partial = (self.path / CHECKPOINT).with_suffix(".partial")
            torch.save({**state, "record": json.dumps(self.record)}, partial)
            partial.replace(self.path / CHECKPOINT)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and remove the checkpoint. The model is there already."""
        if self.path is not None:
            partial = (self.path / RESULT).with_suffix(".partial")
            text = json.dumps(plain({**result, "record": self.record}), indent=1)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.path / RESULT)
            (self.path / CHECKPOINT).unlink(missing_ok=True)

    def _check(self, before: dict[str, Any]) -> None:
        differ = sorted(key for key in before.keys() | self.record.keys() if before.get(key) != self.record.get(key))
        if differ:
            raise InputError(
                f"resume: {str(self.path)!r} was begun with another {', '.join(differ)}; repeat that, or give another "
                "folder"
            )

    @staticmethod
    def _cut_log(file: Path, epochs: int) -> None:
        """Epochs after the checkpoint are made again, so their lines go."""
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        file.write_text("".join(lines[:epochs]), encoding="utf-8")


def read_result(folder: str | Path) -> dict[str, Any]:
    """result.json of a run that is done.

    Raises:
        InputError: there is none that can be read.
    """
    file = Path(folder) / RESULT
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"run: {str(file)!r} cannot be read ({error}); give the folder of a finished run") from None
    return data


def plain(value: Any) -> Any:
    """As JSON has it: None where a number is not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
