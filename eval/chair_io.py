"""Reading generated captions from the files that CHAIR users have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.eval.chair import Caption
from vlattn.eval.records import Record, read_records


def captions_of(records: Iterable[Record]) -> list[Caption]:
    """The captions in records that have an answer."""
    return [Caption(r.id, r.image_id, r.raw, r.finish) for r in records if r.error is None]


def read_captions(path: str | Path, image_key: str = "image_id", caption_key: str = "caption") -> list[Caption]:
    """Captions from any of three forms.

    (a) a JSON list or JSON Lines of {image_key: int, caption_key: str}; (b) the original CHAIR output, a dict whose
    `imgToEval` holds such entries; (c) this project's records.
    Raises InputError for an id that is no integer or repeats.
    """
    shown = f"captions={str(path)!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown} cannot be read ({error}); give a JSON or JSON Lines file") from None
    items = _items(text, shown)
    if items and isinstance(items[0], dict) and "raw" in items[0]:
        return captions_of(read_records(path))
    captions: list[Caption] = []
    seen: set[int] = set()
    for item in items:
        if not isinstance(item, dict) or image_key not in item or caption_key not in item:
            raise InputError(f"{shown} has an entry without {image_key!r} or {caption_key!r}; name the keys it uses")
        image_id = item[image_key]
        if type(image_id) is not int:
            raise InputError(f"{shown} has the image id {image_id!r}, which is not an integer; write ids as integers")
        if image_id in seen:
            raise InputError(f"{shown} repeats the image id {image_id}; keep one caption per image")
        seen.add(image_id)
        captions.append(Caption(str(image_id), image_id, str(item[caption_key]), item.get("finish")))
    return captions


def _items(text: str, shown: str) -> list[Any]:
    try:
        whole = json.loads(text)
    except ValueError:
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError:
            raise InputError(f"{shown} is neither JSON nor JSON Lines; give one of them") from None
    if isinstance(whole, dict) and isinstance(whole.get("imgToEval"), dict):
        return list(whole["imgToEval"].values())
    return whole if isinstance(whole, list) else [whole]
