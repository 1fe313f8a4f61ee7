"""What the readers of published JSON share: errors that name file, trial and field."""

from __future__ import annotations

import json
import math
from numbers import Real
from pathlib import Path
from typing import Any

from vlattn.errors import InputError


def read_json(path: str | Path, wanted: type[Any], what: str) -> Any:
    """The content of a JSON file, a `wanted` (list or dict).

    Raises:
        InputError: it cannot be read, is not JSON, or is none.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give {what}") from None
    except ValueError:
        raise InputError(f"{path}: is not JSON; give {what}") from None
    if not isinstance(data, wanted) or not data:
        raise InputError(f"{path}: holds {type(data).__name__} with nothing to read; give {what}")
    return data


def field_of(entry: Any, name: str, where: str) -> Any:
    """entry[name], or an InputError that says which field is missing where."""
    if not isinstance(entry, dict) or name not in entry:
        raise InputError(f"{where}: {name} is missing; add it, or leave the trial out")
    return entry[name]


def number(value: Any, name: str, where: str) -> float:
    """A finite number, or an InputError that names the field."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{where}: {name} is {value!r}; give a finite number")
    return float(value)


def numbers(value: Any, name: str, where: str, count: int | None = None) -> list[float]:
    """A list of `count` finite numbers."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise InputError(f"{where}: {name} is {value!r:.60}; give a list of {count or 'the'} numbers")
    return [number(one, f"{name}[{place}]", where) for place, one in enumerate(value)]
