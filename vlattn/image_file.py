"""Reading one image, or saying what is wrong with its file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlattn.errors import InputError


def read_rgb(path: str | Path, what: str = "image:", remedy: str = "take it out of the data set") -> Image.Image:
    """The RGB image in a file.

    what: how the error begins. remedy: what can be done besides restoring the file.

    Raises:
        InputError: the file does not exist, or is no readable image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"is no readable image ({error})"
        raise InputError(f"{what} {path} {reason}; restore it, or {remedy}") from None
