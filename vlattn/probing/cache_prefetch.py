"""Getting the next batches ready in a thread while one is being used."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
_END = object()


def prefetch(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items in order, up to `depth` of them made ahead in a thread; 0 makes each when it is asked for.

    An error in the making is raised where its item would have come. Leaving early ends the thread.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def make() -> None:
        error = None
        try:
            for item in items:
                if left.is_set():
                    return
                ready.put((item, None))
        except BaseException as caught:
            error = caught
        ready.put((_END, error))

    thread = threading.Thread(target=make, name="vlattn-prefetch", daemon=True)
    thread.start()
    try:
        while (found := ready.get())[0] is not _END:
            item = found[0]
            del found  # the queue's hold on the memory of a batch ends when the batch is handed out
            yield item
            del item
        if found[1] is not None:
            raise found[1]
    finally:
        left.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)
        thread.join()


class BatchMemory:
    """CPU memory for batches of up to `size` bytes; it is lent again as soon as no tensor looks at it.

    The system would otherwise hand out zeroed pages for every batch, which takes about as long as filling them. Batches
    that are held on to get memory of their own, so nobody sees a batch change.

    size: bytes of the largest batch.
    spare: pieces that are kept while nobody uses them.
    """

    def __init__(self, size: int, spare: int = 2) -> None:
        self._size = size
        self._free: deque[np.ndarray[Any, np.dtype[np.uint8]]] = deque(maxlen=spare)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of at most `size` bytes."""
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(self._size, np.uint8)
        # torch holds this view for as long as any tensor shares its memory; its end gives the memory back.
        lent = whole[: math.prod(shape) * dtype.itemsize]
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)
