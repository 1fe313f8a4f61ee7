"""The best epoch of each head, and when to stop waiting for a better one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Best:
    """One head's course.

    value, epoch: the highest metric, in percent, and its epoch counted from 0; the first of equal ones. -1 is none yet.
    stopped: the epoch at which this head stopped; later ones do not count, as a run of its own would not have had them.
    diverged: whether it stopped because its loss was not finite.
    mark, waited: the value that a gain is measured from, and evaluations since the last gain.
    """

    value: float = -math.inf
    epoch: int = -1
    stopped: int | None = None
    diverged: bool = False
    mark: float = -math.inf
    waited: int = 0


class BestEpochs:
    """Follows R heads.

    patience: evaluations in a row without a gain after which a head stops; None never stops.
    min_delta: points by which a value must exceed the last gain's to count as a gain.
    stop_from: first epoch at which a head may stop. Evaluations before it count for patience.
    """

    def __init__(self, heads: int, patience: int | None = None, min_delta: float = 0.1, stop_from: int = 15) -> None:
        self.heads = [Best() for _ in range(heads)]
        self.patience, self.min_delta, self.stop_from = patience, min_delta, stop_from

    def see(self, epoch: int, values: Sequence[float], finite: Sequence[bool]) -> list[int]:
        """Take in the metric of every head at `epoch`; returns the heads whose best it is.

        A head whose loss is not `finite` has diverged: it stops here.
        """
        better = []
        for index, (best, value, alive) in enumerate(zip(self.heads, values, finite, strict=True)):
            if best.stopped is not None:
                continue
            if value > best.value:
                best.value, best.epoch = value, epoch
                better.append(index)
            if value > best.mark + self.min_delta:
                best.mark, best.waited = value, 0
            else:
                best.waited += 1
            tired = self.patience is not None and best.waited >= self.patience and epoch >= self.stop_from
            best.diverged = not alive
            if tired or best.diverged:
                best.stopped = epoch
        return better

    @property
    def done(self) -> bool:
        """Whether all heads have stopped."""
        return all(best.stopped is not None for best in self.heads)

    def state_dict(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(best) for best in self.heads]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.heads = [Best(**best) for best in state]
