"""Model inputs for a benchmark: images and a prompt through the model's own processor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlattn.errors import InputError
from vlattn.eval.answer import chat_prompt, read_image

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_images(given: Sequence[Path]) -> list[Path]:
    """Image files as given; of a folder, all images in it, by name."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise InputError(
                    f"images: {path} holds none of {', '.join(SUFFIXES)}; give image files or their folder"
                )
            found += inside
        else:
            found.append(path)
    return found


def make_inputs(
    processor: ProcessorMixin,
    images: Sequence[Path],
    prompt: str,
    *,
    device: Any = "cpu",
    dtype: Any = None,
    batch: int = 1,
    count: int = 20,
    image_size: int | None = None,
) -> tuple[list[dict[str, Any]], list[float]]:
    """`count` batches of one image and the prompt, images in turn, over and over where there are too few.

    Args:
        processor: of the model.
        images: files.
        prompt: the user's turn, put into the model's chat template.
        device, dtype: of the model; pixels take its dtype.
        batch: prompts per batch.
        count: batches.
        image_size: images are resized to this square first; for families whose token count follows the resolution.

    Returns:
        (inputs of `generate`, seconds that the processor took for each).

    Raises:
        InputError: no image, an unreadable one, or numbers below 1.
    """
    if not images:
        raise InputError("images: got none; give at least one image file")
    if batch < 1 or count < 1 or (image_size is not None and image_size < 1):
        raise InputError(f"batch, count, image_size: got {batch}, {count}, {image_size}; give at least 1")
    text = chat_prompt(processor, prompt)
    found, seconds = [], []
    for turn in range(count):
        pictures = [_read(images[(turn * batch + b) % len(images)], image_size) for b in range(batch)]
        start = time.perf_counter()
        # One list of images per prompt: every family's processor takes that.
        made = processor(images=[[p] for p in pictures], text=[text] * batch, return_tensors="pt", padding=True)
        seconds.append(time.perf_counter() - start)
        found.append(dict(made.to(device=device, dtype=dtype)))
    return found, seconds


def _read(path: Path, size: int | None) -> Image.Image:
    picture = read_image(path)
    return picture if size is None else picture.resize((size, size))
