"""What a calibration of heads has measured so far, in a file that a run that was cut off goes on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.interventions.act_head_file import HeadMap, write_heads
from vlattn.interventions.act_margins import Gain
from vlattn.interventions.act_screen import Screened
from vlattn.models.adapter import Adapter


class CalibrationLog:
    """Figures of one calibration; each is written as it comes, where there is a file.

    Args:
        path: the file; None keeps figures in memory alone.
        adapter: of the model.
        name: what to call the model.
        settings: plain data; those of a file that is gone on with must be the same.
        ids: of the held-out questions; the same.

    Raises:
        InputError: the file is no calibration, or one of other settings or questions.
    """

    def __init__(
        self, path: str | Path | None, adapter: Adapter, name: str, settings: dict[str, Any], ids: Sequence[str]
    ) -> None:
        self._path, self._adapter, self._name = None if path is None else Path(path), adapter, name
        digest = hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()
        self._content: dict[str, Any] = {
            "settings": settings,
            "items": {"count": len(ids), "sha256": digest, "ids": list(ids)},
        }
        if self._path is not None and self._path.is_file():
            self._go_on(self._path)

    def _go_on(self, path: Path) -> None:
        try:
            before: Any = json.loads(path.read_text(encoding="utf-8"))
            settings = self._content["settings"]
            differ = sorted(key for key in settings if before["settings"].get(key, self) != settings[key])
            if before["items"]["sha256"] != self._content["items"]["sha256"]:
                differ.append("items")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"out: {str(path)!r} is there and holds no calibration; give another file") from None
        if differ:
            raise InputError(f"out: {str(path)!r} was begun with other {', '.join(differ)}; give another file")
        self._content = {key: value for key, value in before.items() if key not in ("format", "model")}

    def vanilla(self, margin: float, error: float, accuracy: float) -> None:
        """Note the model as it is; the figures of a run that is gone on with must be the same."""
        before = self._content.get("vanilla")
        if before is not None and abs(before["margin"] - margin) > 0.01 * (1 + abs(margin)):
            raise InputError(
                f"out: {str(self._path)!r} was begun on a model with a mean margin of {before['margin']:.4g}, not "
                f"{margin:.4g}; give another file"
            )
        self._put("vanilla", {"margin": margin, "error": error, "accuracy": accuracy})

    @property
    def screened(self) -> list[Screened] | None:
        """None before the screen."""
        known = self._content.get("screened")
        return None if known is None else [Screened(**entry) for entry in known]

    def screen(self, found: list[Screened]) -> None:
        self._put("screened", [dataclasses.asdict(one) for one in found])

    def gains(self, kind: str) -> list[Gain]:
        """The trials of a kind, "single" or "joint", in the order they were made."""
        return [
            Gain(**{**entry, "heads": tuple((layer, head) for layer, head in entry["heads"])})
            for entry in self._content.get(kind, [])
        ]

    def add(self, kind: str, gain: Gain) -> None:
        entry = json.loads(json.dumps(dataclasses.asdict(gain)))
        self._put(kind, [*self._content.get(kind, []), entry])

    def finish(self, heads: HeadMap) -> None:
        self._put("heads", {str(layer): list(chosen) for layer, chosen in heads.items()})

    def _put(self, key: str, value: Any) -> None:
        self._content[key] = value
        if self._path is not None:
            write_heads(self._path, self._content, self._adapter, self._name)
