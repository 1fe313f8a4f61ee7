"""A line on the terminal that tells how far training a probe has come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlattn.probing.train_result import EpochRecord


class Heard:
    """What training tells while it runs; here it goes nowhere."""

    def batch(self, epoch: int, share: float) -> None:
        """A batch is done; `share` of the epoch."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is done."""


class _Bar(Heard):
    def __init__(self, update: Callable[..., None]) -> None:
        self.update, self.text = update, "probe"

    def batch(self, epoch: int, share: float) -> None:
        self.update(completed=epoch + share, description=self.text)

    def epoch(self, record: EpochRecord) -> None:
        name = next((n for n in ("top1", "map") if n in record.val), None)
        if name is not None:
            self.text = f"epoch {record.epoch}: {name} {max(record.val[name]):.2f}"
        self.update(completed=record.epoch + 1, description=self.text)


@contextlib.contextmanager
def progress_bar(epochs: int, first: int, shown: bool) -> Iterator[Heard]:
    """A bar over `epochs` that starts at `first`, or silence."""
    if not shown:
        yield Heard()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("probe", total=epochs, completed=first)
        yield _Bar(lambda **changes: progress.update(task, **changes))
