"""In which order the images of a cache are read in an epoch."""

from __future__ import annotations

import random

import torch

from vlattn.errors import InputError


def epoch_order(rows: torch.Tensor, block: int, seed: int, epoch: int) -> torch.Tensor:
    """Rows in the order of an epoch, which seed and epoch decide.

    Blocks of `block` neighbours are shuffled as wholes, from a start that differs by epoch; a block of 1 is a uniform
    shuffle. The images of a cache are stored in random order, so a block is a random sample of the dataset, but one
    that stays together.

    Args:
        rows: int64 [n], ascending.

    Returns:
        int64 [n], a permutation of `rows`.
    """
    # torch's CPU generator takes the low 32 bits of what it is seeded with and ignores the rest.
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{epoch}").getrandbits(32))
    if block == 1:
        return rows[torch.randperm(len(rows), generator=generator)]
    start = int(torch.randint(min(block, len(rows)), (), generator=generator))
    blocks = [rows[:start], *rows[start:].split(block)] if start else list(rows.split(block))
    order = torch.randperm(len(blocks), generator=generator).tolist()
    return torch.cat([blocks[at] for at in order])


def shared(order: torch.Tensor, rank: int, processes: int) -> torch.Tensor:
    """The part of an order that one of several processes reads; what does not divide is left out."""
    each = len(order) // processes
    return order[rank * each : (rank + 1) * each]


def cut(order: torch.Tensor, batch_size: int, drop_last: bool) -> list[torch.Tensor]:
    """Batches of an order, each ascending: what is read together is read from front to back."""
    batches = [part.sort().values for part in order.split(batch_size)]
    return [part for part in batches if len(part) == batch_size] if drop_last else batches


def checked_rows(rows: torch.Tensor | None, images: int) -> torch.Tensor:
    """int64 rows, ascending, each once; None is all.

    Raises:
        InputError: a row is given twice or is not in the cache, or there are none.
    """
    if rows is None:
        return torch.arange(images)
    rows = torch.as_tensor(rows)
    if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool or len(rows) == 0:
        raise InputError(f"rows: got {rows.dtype} {list(rows.shape)}; give row numbers, int64 [n] with n of at least 1")
    rows = rows.to(torch.int64).sort().values
    if rows[0] < 0 or rows[-1] >= images:
        odd = int(rows[0] if rows[0] < 0 else rows[-1])
        raise InputError(f"rows: got {odd}, but the cache has rows 0 to {images - 1}; see cache.indices")
    if (rows[1:] == rows[:-1]).any():
        raise InputError("rows: a row is given more than once; give each once")
    return rows
