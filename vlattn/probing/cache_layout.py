"""How tokens lie in a cache: one raw file per kind of token, rows of equal size in the order they were written.

A row is one view of one image. All images of view 0 come first, then all of view 1, and so on; labels are kept once.
bfloat16, which NumPy does not have, needs no stand-in: files are bytes, and torch looks at them as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlattn.errors import InputError

Kind = Literal["patch", "all", "cls"]
KINDS: tuple[Kind, ...] = ("patch", "all", "cls")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""What tokens can be kept in."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a cache.

    images, views: a cache has images * views rows, and as many labels as images.
    dtype: of tokens, a name in DTYPES.
    grid: (rows, columns) of the patches; None where they have none.
    shapes: of one row, by part: patches (N, D), cls (Dc,), registers (R, D), and projected (N, Dc), the patches in the
        width of a projected CLS, each where it is kept; labels () for class indices (int64), or (K,) for presence
        (float32).
    """

    images: int
    views: int
    dtype: str
    grid: tuple[int, int] | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def rows(self) -> int:
        return self.images * self.views

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def multi_label(self) -> bool:
        return self.shapes["labels"] != ()

    def kind(self, part: str) -> torch.dtype:
        """The dtype of a part."""
        if part == "labels":
            return torch.float32 if self.multi_label else torch.int64
        return DTYPES[self.dtype]

    def count(self, part: str) -> int:
        """Rows of a part: views share their labels."""
        return self.images if part == "labels" else self.rows

    def row_bytes(self, part: str) -> int:
        return math.prod(self.shapes[part]) * self.kind(part).itemsize

    def bytes_after(self, done: int) -> int:
        """Bytes of all rows from `done` on; of the whole cache for 0."""
        return sum(self.row_bytes(part) * max(0, self.count(part) - done) for part in self.parts)

    def part_bytes(self, part: str) -> int:
        return self.row_bytes(part) * self.count(part)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "views": self.views,
            "dtype": self.dtype,
            "grid": None if self.grid is None else list(self.grid),
            "shapes": {part: list(shape) for part, shape in self.shapes.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Layout:
        grid = found["grid"]
        shapes = {part: tuple(shape) for part, shape in found["shapes"].items()}
        return cls(found["images"], found["views"], found["dtype"], None if grid is None else tuple(grid), shapes)


def parts_of(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    """The parts that tokens of a kind are put together from, in order; None where `shapes` do not give that kind."""
    patches = "projected" if kind == "all" and "projected" in shapes else "patches"
    parts = {"patch": (patches,), "cls": ("cls",), "all": ("cls", patches)}[kind]
    widths = {shapes[part][-1] if part in shapes else None for part in parts}
    return parts if len(widths) == 1 and None not in widths else None


def part_path(folder: Path, part: str) -> Path:
    """The file of a part."""
    return folder / f"{part}.bin"


def stored_order(images: int, seed: int) -> torch.Tensor:
    """Dataset indices int64 [images] in the order that images are stored.

    A permutation, so that neighbours on disk make a fair batch even where the dataset is sorted by class.

    RandomState's stream is the one that NumPy keeps the same in all versions.
    """
    return torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(images).astype(np.int64))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def map_part(folder: Path, layout: Layout, part: str, in_memory: bool) -> torch.Tensor:
    """A part as [count, *shape], over the file itself or in memory.

    The map is private: what is written into it stays in this process and never reaches the file.

    Raises:
        InputError: the file is missing or has another size than the manifest says.
    """
    path = part_path(folder, part)
    size = path.stat().st_size if path.is_file() else None
    if size != layout.part_bytes(part):
        there = "is missing" if size is None else f"has {size} bytes"
        raise InputError(f"folder: {path} {there} where {layout.part_bytes(part)} are due; write the cache anew")
    if in_memory:
        raw = np.fromfile(path, np.uint8)
    else:
        raw = np.memmap(path, np.uint8, mode="c")
    return torch.from_numpy(raw).view(layout.kind(part)).view(layout.count(part), *layout.shapes[part])
