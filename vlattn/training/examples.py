"""What methods are trained on: an image, a question about it, and the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlattn.errors import InputError
from vlattn.image_file import read_rgb

TINY = "tiny:val"


@dataclass(frozen=True)
class Example:
    """One question about one image, and its answer."""

    image: Path
    question: str
    answer: str


def load_examples(data: str | Path) -> list[Example]:
    """The examples of a JSON Lines file, or of `tiny:val`, the part of tiny COCO `val` that is set aside for training.

    Raises:
        InputError: the file cannot be read, or a line lacks one of `image`, `question` and `answer`.
    """
    if str(data) == TINY:
        from vlattn.training.tiny_examples import tiny_examples

        return tiny_examples()
    return read_examples(data)


def read_examples(path: str | Path) -> list[Example]:
    """Examples from JSON Lines, one object a line: {"image": path, "question": text, "answer": text}.

    Image paths are relative to the file. Other keys are ignored.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {str(path)!r} cannot be read ({error}); give a JSON Lines file, or {TINY}") from None
    found = [_example(line, f"{file.name}, line {n}", file.parent) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"data: {str(path)!r} holds no example; give at least one line")
    return found


def _example(line: str, where: str, folder: Path) -> Example:
    try:
        entry: Any = json.loads(line)
    except ValueError:
        raise InputError(f"data: {where} is not JSON; write one object a line") from None
    for key in ("image", "question", "answer"):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"data: {where} has no text under {key!r}; write image, question and answer")
    return Example(folder / entry["image"], entry["question"], entry["answer"])


def open_image(path: Path) -> Image.Image:
    """An RGB image, or an InputError that names the file."""
    return read_rgb(path, "data: the image", "take its lines out")
