"""Where batches come from: tokens held in memory, or a frozen backbone under an image loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.cache_order import epoch_order, shared
from vlattn.probing.train_loss import check_labels

Batch = tuple[Any, torch.Tensor]
"""Tokens [B, N, D], or a `vlattn.probing.tokens.Tokens` to choose from, and labels: int64 [B] or float [B, K]."""


class Source(Protocol):
    """One pass over it is one epoch. Where it has `set_epoch(epoch)`, that is called before each pass; else what it
    draws from the generators of random, numpy or torch is seeded anew for each epoch."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def __iter__(self) -> Iterator[Batch]: ...


class TokenBatches:
    """Batches of tokens that are held in memory.

    tokens: [N, T, D].
    labels: int64 [N], or float [N, K].
    batch_size: images of a batch.
    indices: int64, the images to take; None is all.
    shuffle: whether each epoch has an order of its own, which depends on seed and epoch alone.
    drop_last: whether a last batch that is not full is left out.
    share: (rank, processes): which part of each epoch this process reads; what does not divide is left out.
    """

    augmented = False

    def __init__(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        *,
        indices: torch.Tensor | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        require_count("batch_size", batch_size)
        if len(tokens) != len(labels):
            raise InputError(f"labels: got {len(labels)} for {len(tokens)} images; give one for each")
        self.tokens, self.labels, self.batch_size = tokens, labels, batch_size
        self.indices = torch.arange(len(tokens)) if indices is None else indices
        self.shuffle, self.drop_last, self.seed, self.share = shuffle, drop_last, seed, share
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        images = len(self.indices) // self.share[1]
        return images // self.batch_size if self.drop_last else math.ceil(images / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = epoch_order(self.indices, 1, self.seed, self.epoch) if self.shuffle else self.indices
        for rows in shared(order, *self.share).split(self.batch_size)[: len(self)]:
            rows = rows.to(self.tokens.device)
            yield self.tokens[rows], self.labels[rows.to(self.labels.device)]


class LiveTokens:
    """A backbone run on the images of a loader, anew in each epoch, as probes on augmented images need it.

    backbone: pixels [B, 3, H, W] to tokens; run without gradients.
    loader: batches of (pixels, labels), such as a DataLoader. Its sampler's `set_epoch` is called where it has one. A
        resumed run sees the same images if workers start anew in each epoch, without persistent_workers.
    augmented: whether the loader's images differ from epoch to epoch; told in results.
    device: where the backbone is; None leaves pixels where they are.
    """

    def __init__(
        self,
        backbone: Callable[[torch.Tensor], Any],
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        *,
        augmented: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.backbone, self.loader, self.augmented, self.device = backbone, loader, augmented, device

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader and its sampler, where they want to know."""
        parts: tuple[Any, ...] = (self.loader, getattr(self.loader, "sampler", None))
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    @torch.no_grad()
    def _tokens(self, pixels: torch.Tensor) -> Any:
        return self.backbone(pixels if self.device is None else pixels.to(self.device, non_blocking=True))

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in self.loader:
            yield self._tokens(pixels), labels


def read_batches(
    source: Source, epoch: int, kind: str, classes: int | None, device: torch.device, half: torch.dtype | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of a source: tokens on `device`, cut off from any graph, and labels beside them, both checked.

    Args:
        kind: which tokens to take where the source gives `Tokens`: patch, all or cls.
        classes: number of classes K; None leaves labels unchecked.
        half: tokens of this dtype stay in it, that of autocast; others become fp32.
    """
    if hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
    for index, (tokens, labels) in enumerate(source):
        if not isinstance(tokens, torch.Tensor):
            tokens = tokens.choose(kind)
        if tokens.ndim != 3 or len(tokens) != len(labels):
            raise InputError(
                f"source: got tokens {list(tokens.shape)} with {len(labels)} labels; give tokens [B, N, D] and B labels"
            )
        if classes is not None and (
            index == 0 or labels.device.type == "cpu"
        ):  # elsewhere each look would wait for the device
            check_labels(labels, classes)
        dtype = half if tokens.dtype == half else torch.float32
        yield tokens.detach().to(device, dtype, non_blocking=True), labels.to(device, non_blocking=True)
