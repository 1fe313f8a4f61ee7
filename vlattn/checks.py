"""Checks of settings that all rooms share; every error names the setting, what was given, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlattn.errors import InputError


def require_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: got {value!r}; give an integer of at least {least}")


def require_divisor(name: str, value: object, of: str, total: int) -> None:
    """Refuse what is no positive integer that divides `total`, which the message calls `of`."""
    require_count(name, value)
    assert isinstance(value, int)
    if total % value:
        raise InputError(f"{name}: got {value}, which does not divide {of}={total}; give a divisor of {total}")


def require_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name}: got {value!r}; give a positive number")


def require_number(name: str, value: object, least: float, most: float | None = None) -> None:
    """Refuse what is no number from `least` to `most`."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value
    if not fits or (most is not None and value > most):  # type: ignore[operator]
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name}: got {value!r}; give a number {wanted}")


def require_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: got {value!r}; give True or False")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: got {value!r}; give {' or '.join(map(repr, choices))}")


def require_one(**alternatives: object) -> None:
    """Refuse anything but exactly one of two settings being given; None stands for not given."""
    given = [name for name, value in alternatives.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(alternatives)
        raise InputError(f"{names}: got {' and '.join(given) or 'neither'}; give exactly one of them")
