"""A page as one HTML file: everything that it shows is in it, so it opens from disk offline."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from vlattn.errors import InputError
from vlattn.viz.page_html import Html, element

if TYPE_CHECKING:
    from PIL.Image import Image

TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
QUALITY = 88
"""Of JPEG, where pictures are made for a page."""


def write_index(title: str, style: str, body: Html, out: Path, *, scripts: bool = False) -> Path:
    """Write out/index.html and return its path; the folder is made.

    style: rules of CSS. scripts: whether those in `body` run.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if scripts:
        policy += "; script-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", title),
        element("style", Html(f"\n{style}\n")),
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "index.html"
    path.write_text(f"<!DOCTYPE html>\n{element('html', head, element('body', body), lang='en')}\n", encoding="utf-8")
    return path


def page_part(name: str) -> str:
    """A file of this package that pages are made of."""
    return files("vlattn.viz").joinpath(name).read_text(encoding="utf-8")


def data_uri(path: Path) -> str:
    """An image file as a data URI."""
    kind = TYPES.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise InputError(f"image {path} is missing or not one of {', '.join(TYPES)}")
    return _uri(kind, path.read_bytes())


def picture_uri(picture: Image) -> str:
    """A picture as a data URI, in JPEG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
