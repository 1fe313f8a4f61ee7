"""Running a frozen backbone over a dataset once, and keeping the tokens."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.probing.cache_journal import CacheWriter, read_journal
from vlattn.probing.cache_layout import DTYPES, KINDS, Kind, Layout, parts_of, stored_order
from vlattn.probing.cache_manifest import (
    Manifest,
    backbone_settings,
    environment,
    read_manifest,
    require_same,
    write_manifest,
)
from vlattn.probing.data.fingerprint import fingerprint
from vlattn.probing.data.seeding import SeededView
from vlattn.probing.data.torch_dataset import as_labeled
from vlattn.probing.tokens import Tokens

GB = 1e9


class Batch(NamedTuple):
    """rows: tensors [B, ...] by part, on the CPU, as they are kept; grid: of the patches."""

    rows: dict[str, torch.Tensor]
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class CacheRun:
    """What a run goes through; batches of it can begin at any row."""

    backbone: Any
    dataset: Any
    kinds: tuple[Kind, ...] | None
    views: int
    dtype: str
    seed: int
    batch_size: int
    workers: int

    def settings(self) -> dict[str, Any]:
        """What decides the tokens of a cache."""
        return {
            "backbone": backbone_settings(self.backbone),
            "dataset": fingerprint(self.dataset, self.seed),
            "kinds": None if self.kinds is None else sorted(set(self.kinds)),
            "views": self.views,
            "dtype": self.dtype,
            "seed": self.seed,
        }

    def batches(self, done: int) -> Iterator[Batch]:
        """Tokens of all rows from `done` on, in the stored order; no batch holds rows of two views."""
        order = stored_order(len(self.dataset), self.seed).tolist()
        first, begin = divmod(done, len(order))
        for view in range(first, self.views):
            loader = DataLoader(
                SeededView(self.dataset, view, self.seed),
                batch_size=self.batch_size,
                sampler=order[begin if view == first else 0 :],
                num_workers=self.workers,
                generator=torch.Generator(),  # a loader draws from the global one otherwise
            )
            for pixels, labels in loader:
                yield self._batch(pixels, labels if view == 0 else None)

    @torch.no_grad()
    def _batch(self, pixels: torch.Tensor, labels: torch.Tensor | None) -> Batch:
        tokens = self.backbone(pixels)
        rows = {part: self._kept(part, tensor) for part, tensor in self._parts(tokens).items()}
        if labels is not None:
            rows["labels"] = labels.to(torch.float32 if self.dataset.multi_label else torch.int64)
        return Batch(rows, tokens.grid)

    def _parts(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """What is kept of tokens: all there is, or what the chosen kinds are read from."""
        projected = None
        if tokens.project is not None and (self.kinds is None or "all" in self.kinds):
            projected = tokens.project(tokens.patches)
        every = {
            "patches": tokens.patches,
            "projected": projected,
            "cls": tokens.cls,
            "registers": tokens.registers,
        }
        there = {part: tensor for part, tensor in every.items() if tensor is not None and tensor.shape[1]}
        if self.kinds is None:
            return there
        shapes = {part: tuple(tensor.shape[1:]) for part, tensor in there.items()}
        chosen: set[str] = set()
        for kind in self.kinds:
            if parts_of(kind, shapes) is None:
                tokens.choose(kind)  # raises, and says why this backbone does not give that kind
            chosen.update(parts_of(kind, shapes) or ())
        return {part: tensor for part, tensor in there.items() if part in chosen}

    def _kept(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.to(DTYPES[self.dtype])
        if not torch.isfinite(kept).all():
            if torch.isfinite(tensor).all():
                raise InputError(
                    f"dtype: {part} reach {tensor.abs().max().item():.4g}, which {self.dtype} cannot hold; give "
                    "dtype='bfloat16'"
                )
            raise InputError(f"backbone: its {part} are not all finite; run it in a wider dtype, such as float32")
        return kept.cpu().contiguous()

    def layout(self, batch: Batch) -> Layout:
        shapes = {part: tuple(tensor.shape[1:]) for part, tensor in batch.rows.items()}
        return Layout(len(self.dataset), self.views, self.dtype, batch.grid, shapes)


def write_cache(
    backbone: Any,
    dataset: Any,
    folder: str | Path,
    *,
    kinds: Sequence[Kind] | None = None,
    views: int = 1,
    dtype: str = "float16",
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    announce: Callable[[str], object] | None = print,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Fill a cache, or go on where a run with the same settings was cut off; see `TokenCache.write`."""
    for name, value, least in (("views", views, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        require_count(name, value, least)
    require_count("workers", workers, 0)
    require_choice("dtype", dtype, tuple(DTYPES))
    for kind in kinds or ():
        require_choice("kinds", kind, KINDS)
    run = CacheRun(
        backbone,
        as_labeled(dataset),
        tuple(kinds) if kinds else None,
        views=views,
        dtype=dtype,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
    )
    place, settings = Path(folder), run.settings()
    manifest = read_manifest(place) if read_journal(place)[0] else None  # one without rows binds nobody
    batches: Iterator[Batch] | None = None
    if manifest is None:
        # Sizes are known from a first batch, which is kept like any other.
        batches = run.batches(0)
        first = next(batches)
        batches = itertools.chain([first], batches)
        manifest = Manifest(settings, run.layout(first), tuple(run.dataset.classes), environment(backbone))
        _require_room(place, manifest.layout, 0)
        write_manifest(place, manifest)
    require_same(place, manifest.settings, settings)
    layout = manifest.layout
    with CacheWriter(place, layout) as writer:
        _require_room(place, layout, writer.done)
        if announce is not None:
            announce(_announcement(place, layout, writer.done))
        for batch in run.batches(writer.done) if batches is None else batches:
            _require_shapes(layout, batch)
            writer.write(batch.rows)
            if progress is not None:
                progress(writer.done, layout.rows)


def _announcement(folder: Path, layout: Layout, done: int) -> str:
    parts = ", ".join(f"{part} {list(layout.shapes[part])}" for part in layout.parts if part != "labels")
    text = (
        f"token cache {folder}: {layout.images} images x {layout.views} views, {parts} in {layout.dtype}: "
        f"{layout.bytes_after(0) / GB:.2f} GB"
    )
    if done:
        text += f", of which {layout.bytes_after(done) / GB:.2f} GB are still to be written"
    return text


def _require_room(folder: Path, layout: Layout, done: int) -> None:
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed, free = layout.bytes_after(done), shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"folder: {str(folder)!r} needs {needed / GB:.2f} GB, but its disk has {free / GB:.2f} GB free; give a "
            "folder on another disk, fewer views, or a smaller dataset"
        )


def _require_shapes(layout: Layout, batch: Batch) -> None:
    shapes = {part: tuple(tensor.shape[1:]) for part, tensor in batch.rows.items()}
    expected = {part: shape for part, shape in layout.shapes.items() if part in shapes or part != "labels"}
    if shapes != expected or batch.grid != layout.grid:
        raise InputError(
            f"dataset: a batch gave tokens of shapes {shapes} on the grid {batch.grid}, the first one {expected} on "
            f"{layout.grid}; give a transform that makes all images one size"
        )
