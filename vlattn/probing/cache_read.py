"""Batches of tokens straight from the files of a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.probing.cache_layout import KINDS, Kind, parts_of
from vlattn.probing.cache_order import checked_rows, cut, epoch_order, shared
from vlattn.probing.cache_prefetch import BatchMemory, prefetch

if TYPE_CHECKING:
    from vlattn.probing.cache import TokenCache

Batch = tuple[torch.Tensor, torch.Tensor]
_PAGE = 4096


class CacheBatches:
    """One pass over it is one epoch; `set_epoch` chooses which. Made by `TokenCache.batches`, which tells the settings.

    augmented: whether epochs differ in their images, as they do where the cache has several views.
    """

    def __init__(
        self,
        cache: TokenCache,
        batch_size: int,
        *,
        kind: Kind,
        shuffle: bool,
        block: int,
        seed: int,
        epoch: int,
        view: int | None,
        rows: torch.Tensor | None,
        share: tuple[int, int],
        drop_last: bool,
        prefetch: int,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("block", block, 1), ("prefetch", prefetch, 0)):
            require_count(name, value, least)
        require_choice("kind", kind, KINDS)
        if view is not None and not 0 <= view < cache.views:
            raise InputError(
                f"view: got {view}, but the cache has views 0 to {cache.views - 1}; write more, or choose one"
            )
        self.cache, self.batch_size, self.view, self.parts = cache, batch_size, view, _parts(cache, kind)
        self.shuffle, self.block, self.seed, self.epoch = shuffle, block, seed, epoch
        self.rows, self.share, self.drop_last = checked_rows(rows, len(cache)), share, drop_last
        self.prefetch, self.device = prefetch, torch.device(device)
        self.dtype = cache.dtype if dtype is None else dtype
        self.augmented = view is None and cache.views > 1
        largest = min(batch_size, len(self.rows)) * math.prod(self._shape()) * self.dtype.itemsize
        self._memory = BatchMemory(largest, spare=prefetch + 2)  # waiting, in the making, in use
        if len(self) == 0:
            raise InputError(
                f"batch_size: got {batch_size} of {len(self.rows) // share[1]} images without a last batch that is not "
                "full, which leaves none; give a smaller one, or drop_last=False"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the view of the next pass: epoch e reads view e modulo views, unless one is fixed."""
        self.epoch = epoch

    def __len__(self) -> int:
        images = len(self.rows) // self.share[1]
        return images // self.batch_size if self.drop_last else math.ceil(images / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            yield from prefetch(self._batches(), self.prefetch)
            return
        for (tokens, labels), copied in prefetch(self._cuda_batches(), self.prefetch):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            tokens.record_stream(stream)
            labels.record_stream(stream)
            yield tokens, labels

    def _plan(self) -> tuple[int, list[torch.Tensor]]:
        """The view, and the rows of each batch."""
        order = epoch_order(self.rows, self.block, self.seed, self.epoch) if self.shuffle else self.rows
        view = self.epoch % self.cache.views if self.view is None else self.view
        return view, cut(shared(order, *self.share), self.batch_size, self.drop_last)

    def _batches(self) -> Iterator[Batch]:
        view, plan = self._plan()
        for rows in plan:
            tokens = self._in_place(view, rows)
            if tokens is None:
                tokens = self._memory.empty((len(rows), *self._shape()), self.dtype)
                self._gather(view, rows, tokens)
            labels = self.cache.labels[rows]
            yield (tokens, labels) if self.device.type == "cpu" else (tokens.to(self.device), labels.to(self.device))

    def _cuda_batches(self) -> Iterator[tuple[Batch, torch.cuda.Event]]:
        """Batches on their way to the device, on a stream of their own, and the event of their arrival."""
        view, plan = self._plan()
        stream = torch.cuda.Stream(self.device)
        for rows in plan:
            # Pinned memory is lent again only when the copies from it are done.
            tokens = torch.empty((len(rows), *self._shape()), dtype=self.dtype, pin_memory=True)
            self._gather(view, rows, tokens)
            labels = self.cache.labels[rows].pin_memory()
            with torch.cuda.stream(stream):
                batch = tokens.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield batch, stream.record_event()

    def _shape(self) -> tuple[int, int]:
        """Tokens of an image and their width."""
        shapes = [self.cache.layout.shapes[part] for part in self.parts]
        return sum(math.prod(shape[:-1]) for shape in shapes), shapes[0][-1]

    def _in_place(self, view: int, rows: torch.Tensor) -> torch.Tensor | None:
        """Neighbouring rows as a look at the file, without a copy; None where they have to be gathered."""
        first, last = int(rows[0]), int(rows[-1])
        if len(self.parts) > 1 or self.dtype != self.cache.dtype or last - first + 1 != len(rows):
            return None
        found = self._sources(view)[0][first : last + 1]
        found.flatten()[:: _PAGE // found.element_size()].sum()  # faults pages in here, not where tokens are used
        return found

    def _sources(self, view: int) -> list[torch.Tensor]:
        """What an image's tokens are put together from, in order: [images, n, width] each."""
        return [self.cache.part(part, view).view(len(self.cache), -1, self._shape()[1]) for part in self.parts]

    def _gather(self, view: int, rows: torch.Tensor, into: torch.Tensor) -> None:
        start = 0
        for source in self._sources(view):
            target = into[:, start : start + source.shape[1]]
            start += source.shape[1]
            if source.dtype == target.dtype:
                torch.index_select(source, 0, rows, out=target)
                continue
            for to, row in zip(target, rows.tolist(), strict=True):  # converted on the way, in one pass over memory
                to.copy_(source[row])


def _parts(cache: TokenCache, kind: Kind) -> tuple[str, ...]:
    parts = parts_of(kind, cache.layout.shapes)
    if parts is None:
        kept = ", ".join(f"{part} {list(shape)}" for part, shape in cache.layout.shapes.items() if part != "labels")
        able = ", ".join(repr(one) for one in KINDS if parts_of(one, cache.layout.shapes) is not None)
        raise InputError(f"kind: {kind!r} is not in this cache, which keeps {kept}; give {able}")
    return parts
