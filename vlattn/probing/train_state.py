"""The folder of a probe's run, which in the end has the result and the best head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.probing.head import load_head, save_head
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_result import EpochRecord, ProbeResult, RateResult
from vlattn.runtime.run_folder import CHECKPOINT, LOG, RESULT, RunFolder, plain

HEAD = "head.safetensors"


class ProbeFolder(RunFolder):
    """Files of one run of a probe."""

    other = "other settings ({}); repeat those"

    def finish(self, result: ProbeResult) -> None:
        """Write result and best head, and remove the checkpoint."""
        if self.writes and self.path is not None:
            save_head(result.head(), self.path / HEAD, {"about": plain(result.about), "best": plain(result.best)})
            self.write_result(result.to_json())


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
    data = RunFolder.read_result(path)
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
