"""What a cache says about how it was made, and whether that is what somebody asks for."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlattn.errors import InputError
from vlattn.probing.cache_layout import Layout, as_bytes
from vlattn.runtime.machine import describe_machine

_FORMAT = "vlattn-token-cache-1"
_FILES = "dataset.files"
_SHOWN = 40  # characters of a value that a message still quotes


@dataclass(frozen=True)
class Manifest:
    """settings decide the tokens and are compared; environment (machine, versions) is told and not compared."""

    settings: Mapping[str, Any]
    layout: Layout
    classes: tuple[str, ...]
    environment: Mapping[str, Any]


def backbone_settings(backbone: Any) -> dict[str, Any]:
    """`backbone.describe()` as plain data without `versions`, and a checksum of the start of every weight."""
    told = json.loads(json.dumps(backbone.describe()))
    checksum = 0
    for weight in backbone.parameters() if isinstance(backbone, nn.Module) else ():
        start = weight.detach().flatten()[:256].float().cpu()
        checksum = zlib.crc32(as_bytes(start), checksum)
    return {key: value for key, value in told.items() if key != "versions"} | {"weights": f"{checksum:08x}"}


def environment(backbone: Any) -> dict[str, Any]:
    """Where tokens are made."""
    return {"versions": backbone.describe().get("versions", {}), "machine": describe_machine()}


def require_same(folder: Path, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse settings that differ from those a cache was made with; only the groups in `asked` are compared.

    A cache from before file sizes were noted is compared by the rest.

    Raises:
        InputError: names every setting that differs.
    """
    before, now = _flat({key: made.get(key) for key in asked}), _flat(asked)
    if _FILES not in before:
        now.pop(_FILES, None)
    differ = [
        f"{key} (made with {_shown(before.get(key))}, asked for {_shown(now.get(key))})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differ:
        advice = "give those settings, or another folder"
        if _FILES in now and before[_FILES] != now[_FILES]:
            advice = "image files have other sizes than when they were read: remove this folder, or give another"
        raise InputError(f"folder: {str(folder)!r} holds a cache with other settings: {'; '.join(differ)}; {advice}")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        InputError: there is a file of that name which is no manifest of this format.
    """
    path = _path(folder)
    if not path.is_file():
        return None
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError
        layout = Layout.from_json(found["layout"])
        return Manifest(found["settings"], layout, tuple(found["classes"]), found["environment"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"folder: {path} is no manifest of {_FORMAT}; give another folder") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    content = {
        "format": _FORMAT,
        "settings": manifest.settings,
        "layout": manifest.layout.to_json(),
        "classes": list(manifest.classes),
        "environment": manifest.environment,
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = _path(folder).with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, _path(folder))


def _path(folder: Path) -> Path:
    return folder / "manifest.json"


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"backbone.layer": 11}: nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}..."
