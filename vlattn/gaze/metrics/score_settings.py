"""How files are scored: what is compared with what, and what is averaged over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlattn.checks import require_bool, require_choice, require_count, require_number
from vlattn.gaze.metrics.average import Over
from vlattn.gaze.metrics.search import MAX_STEP


@dataclass(frozen=True)
class ScoreSettings:
    """
    compare: a prediction with all human paths on its `stimulus` (scene and target), or with the `trial` it is for
        (T for T/sample).
    over: mean over people, or the `best` of them (most similar, least distant).
    average: the mean of the `tasks`' means, a task being a target, or of all `trials` alike.
    max_step: fixations after the first that count in search metrics.
    truncate: only the first so many fixations count, of human paths too if truncate_human; None for all.
    n_boot, level, seed: bootstrap over stimuli; 0 for no intervals.
    """

    compare: Literal["stimulus", "trial"] = "stimulus"
    over: Over = "mean"
    average: Literal["tasks", "trials"] = "tasks"
    max_step: int = MAX_STEP
    truncate: int | None = None
    truncate_human: bool = True
    n_boot: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("compare", self.compare, ("stimulus", "trial"))
        require_choice("over", self.over, ("mean", "best"))
        require_choice("average", self.average, ("tasks", "trials"))
        require_count("max_step", self.max_step, 0)
        if self.truncate is not None:
            require_count("truncate", self.truncate)
        require_bool("truncate_human", self.truncate_human)
        require_count("n_boot", self.n_boot, 0)
        require_number("level", self.level, 0, 1)
        require_count("seed", self.seed, 0)
