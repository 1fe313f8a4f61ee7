"""Options that several commands read the same way."""

from __future__ import annotations

from vlattn.errors import InputError


def parse_layers(text: str | None) -> list[int] | None:
    """Layer indices written as "2,3,4"; None for None.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"layers: got {text!r}; give layer indices such as 2,3,4") from None
