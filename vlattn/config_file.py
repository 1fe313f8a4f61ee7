"""Configurations in YAML: files of the user's, or those that come with vlattn by their name."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vlattn.errors import InputError


def read_config(cls: type[Any], path: str | Path, example: str) -> dict[str, Any]:
    """The keys of a configuration file, which are fields of the dataclass `cls`.

    Args:
        cls: says which keys there can be, and by fields without a default which there must be.
        path: a file, or the name of one that comes with vlattn.
        example: one that comes with vlattn, for errors to point to.

    Raises:
        InputError: no such file, no YAML, or keys that are unknown or missing.
    """
    shown = f"config={str(path)!r}"
    try:
        data = yaml.safe_load(_text(path))
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}); give a YAML file, or {example}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{shown} is not YAML; see configs/{example}.yaml for one") from None
    if not isinstance(data, dict):
        raise InputError(f"{shown} holds no keys; see configs/{example}.yaml for one")
    known = {field.name for field in fields(cls)}
    for odd in sorted(map(str, data.keys() - known)):
        raise InputError(f"{shown} has the unknown key {odd!r}; known: {', '.join(sorted(known))}")
    for missing in (f.name for f in fields(cls) if f.default is MISSING and f.name not in data):
        raise InputError(f"{shown} lacks the key {missing!r}; see configs/{example}.yaml for one")
    return data


def file_name(setting: str) -> str:
    """A name for files: `flowcut:keep=36,count=per_image` is `flowcut_keep-36_count-per_image`."""
    return re.sub(r"[^\w.-]+", "_", setting.replace("=", "-"))


def _text(path: str | Path) -> str:
    given = Path(path)
    shipped = files("vlattn.configs") / f"{given.stem}.yaml"
    if given.name == given.stem and not given.is_file() and shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    return given.read_text(encoding="utf-8")
