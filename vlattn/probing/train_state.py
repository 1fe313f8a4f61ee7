"""The folder of a run: checkpoint, a log that grows epoch by epoch, and in the end the result and the best head."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.head import load_head, save_head
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_result import EpochRecord, ProbeResult, RateResult, plain

CHECKPOINT, LOG, RESULT, HEAD = "checkpoint.pt", "log.jsonl", "result.json", "head.safetensors"


class RunFolder:
    """Files of one run.

    path: the folder; None keeps nothing.
    record: plain data that decides the run; a checkpoint or result made under another is refused.
    writes: whether this process writes; of several, one does.
    """

    def __init__(self, path: str | Path | None, record: dict[str, Any], writes: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.record: dict[str, Any] = json.loads(json.dumps(plain(record)))  # as it will read back
        self.writes = writes

    def start(self, resume: bool) -> dict[str, Any] | ProbeResult | None:
        """The state to go on from, the result of a run that is done, or None for a new run.

        Raises:
            InputError: the folder holds a run and `resume` is not set, or holds none to resume, or one made with other
                settings.
        """
        if self.path is None:
            if resume:
                raise InputError("resume: there is no folder to go on from; give out")
            return None
        found = [name for name in (RESULT, CHECKPOINT, LOG) if (self.path / name).is_file()]
        if not resume:
            if found:
                raise InputError(
                    f"out: {str(self.path)!r} holds {found[0]} already; resume that run or give another folder"
                )
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
            return None
        if RESULT in found:
            self._check(_read_json(self.path)["record"])
            return load_result(self.path)
        if CHECKPOINT not in found:
            raise InputError(f"resume: {str(self.path)!r} holds no checkpoint; leave resume out to start a run there")
        state: dict[str, Any] = torch.load(self.path / CHECKPOINT, map_location="cpu", weights_only=True)
        self._check(json.loads(state["record"]))
        if self.writes:
            self._cut_log(self.path / LOG, len(state["epochs"]))
        return state

    def log(self, epoch: EpochRecord) -> None:
        """Append one epoch to the log, at once."""
        if self.path is not None and self.writes:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(epoch)) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint beside and rename it: a kill leaves the old or the new one, never half of one."""
        if self.path is not None and self.writes:
            partial = (self.path / CHECKPOINT).with_suffix(".partial")
            torch.save({**state, "record": json.dumps(self.record)}, partial)
            partial.replace(self.path / CHECKPOINT)

    def finish(self, result: ProbeResult) -> None:
        """Write result and best head, and remove the checkpoint."""
        if self.path is not None and self.writes:
            save_head(result.head(), self.path / HEAD, {"about": plain(result.about), "best": plain(result.best)})
            partial = (self.path / RESULT).with_suffix(".partial")
            text = json.dumps({**result.to_json(), "record": self.record}, indent=1)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.path / RESULT)
            (self.path / CHECKPOINT).unlink(missing_ok=True)

    def _check(self, before: dict[str, Any]) -> None:
        differ = sorted(key for key in before.keys() | self.record.keys() if before.get(key) != self.record.get(key))
        if differ:
            raise InputError(
                f"resume: {str(self.path)!r} was begun with other settings ({', '.join(differ)}); repeat those, or "
                "give another folder"
            )

    @staticmethod
    def _cut_log(file: Path, epochs: int) -> None:
        """Epochs after the checkpoint are made again, so their lines go."""
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        file.write_text("".join(lines[:epochs]), encoding="utf-8")


def begun(out: Path) -> bool:
    """Whether a folder holds a run that can be gone on with, or a finished one; the log of a run that was cut off
    before its first checkpoint is removed, so that it can begin anew."""
    if any((out / name).is_file() for name in (CHECKPOINT, RESULT)):
        return True
    (out / LOG).unlink(missing_ok=True)
    return False


def load_result(folder: str | Path) -> ProbeResult:
    """The result of a run that is done, with the head of its best learning rate alone.

    Raises:
        InputError: the folder holds no result that can be read.
    """
    path = Path(folder)
    data = _read_json(path)
    try:
        head = load_head(path / HEAD)
        settings: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in data["settings"].items()
        }
        rates = tuple(RateResult(**_restored(rate)) for rate in data["rates"])
        result = ProbeResult(
            pooler=data["pooler"],
            dim=data["dim"],
            classes=data["classes"],
            grid=None if data["grid"] is None else tuple(data["grid"]),
            metric=data["metric"],
            settings=ProbeSettings(**settings),
            batch=data["batch"],
            trainable=data["trainable"],
            rates=rates,
            epochs=tuple(EpochRecord(**_restored(epoch)) for epoch in data["epochs"]),
            departures=tuple(data["departures"]),
            machine=data["machine"],
            about=data["about"],
            kept=(rates.index(RateResult(**_restored(data["best"]))),),
            states={name: value[None] for name, value in head.state_dict().items()},
            training_only=data.get("training_only", 0),  # older results have none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"folder: {str(path / RESULT)!r} is not the result of a probe ({error}); restore it") from None
    return result


def _restored(record: dict[str, Any]) -> dict[str, Any]:
    """None as the number that is not finite which it stands for, wherever one is due."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(item) for item in value]
        if isinstance(value, dict):
            return {key: number(item) for key, item in value.items()}
        return math.nan if value is None else value

    return {key: value if key == "stopped" else number(value) for key, value in record.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads((path / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"folder: {str(path / RESULT)!r} cannot be read ({error}); give the folder of a finished run"
        ) from None
    return data
