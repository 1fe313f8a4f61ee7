"""Figures as the page words them. A value that is missing, null, nan or infinite is "n/a"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NA = "n/a"
MINUS = "\N{MINUS SIGN}"


def look(record: Any, *path: str) -> Any:
    """record[path[0]][path[1]]..., None where a step is missing."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def finite(value: Any) -> float | None:
    """A finite number as float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 3) -> str:
    found = finite(value)
    return NA if found is None else f"{found:,.{digits}f}".replace("-", MINUS)


def whole(value: Any) -> str:
    return number(value, 0)


def signed(value: Any, digits: int = 3) -> str:
    shown = number(value, digits)
    return f"+{shown}" if shown != NA and not shown.startswith(MINUS) else shown


def times(value: Any) -> str:
    """A ratio: 0.61×."""
    shown = number(value, 2)
    return shown if shown == NA else f"{shown}×"


def percent(part: Any, whole_part: Any) -> str:
    a, b = finite(part), finite(whole_part)
    return NA if a is None or not b else f"{100 * a / b:.0f}%"


def span(low: Any, high: Any, digits: int = 3, between: str = "–") -> str:
    """0.930–0.970; n/a when an end is missing."""
    ends = number(low, digits), number(high, digits)
    return NA if NA in ends else between.join(ends)


def probability(value: Any) -> str:
    found = finite(value)
    return NA if found is None else "< 0.001" if found < 0.001 else f"{found:.3f}"


def size(n_bytes: Any) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    found = finite(n_bytes)
    if found is None:
        return NA
    for unit in ("B", "KiB", "MiB"):
        if abs(found) < 1024:
            return f"{found:,.0f} B" if unit == "B" else f"{found:,.1f} {unit}"
        found /= 1024
    return f"{found:,.1f} GiB"
