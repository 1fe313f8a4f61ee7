"""What training a probe gives back: the course of every learning rate, the best epochs, and the heads themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.head import ProbeHead, inference_state, make_head
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_loss import Metric
from vlattn.runtime.run_folder import plain


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, counted from 0; a list has one number for each learning rate.

    lr: of the last update.
    train_loss: mean over the images seen; not finite where a head diverged.
    val: "loss", and "top1" and "top5" or "map" in percent; empty for epochs that were not evaluated.
    seconds: of training and evaluation.
    parts: means of what train_loss is the sum of, "bag", "branch" and "div" before weights; empty for poolers that have
        no losses of their own. val has the loss of the bag.
    """

    epoch: int
    lr: list[float]
    train_loss: list[float]
    val: dict[str, list[float]]
    seconds: float
    parts: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RateResult:
    """One learning rate.

    rate: as the settings give it, blr or lr; lr: at the end of the warm-up.
    best, best_epoch: the highest value of the metric in percent, and its epoch; NaN and -1 where no epoch had one.
    stopped: epoch at which this head stopped early, or diverged; None if it went on to the end.
    """

    rate: float
    lr: float
    best: float
    best_epoch: int
    stopped: int | None
    diverged: bool


@dataclass(frozen=True)
class ProbeResult:
    """A trained probe.

    pooler, dim, classes, grid: what the head was made from.
    metric: "top1" or "map"; best epochs and rates are chosen by it on the val source, as published figures are, so they
        are slightly optimistic.
    batch: images of an update, all processes and accumulated steps together.
    trainable: parameters of one head, the classifier included, and what only training needs.
    departures: where the run leaves the published protocol; figures compare with published ones only if empty.
    about: what the caller gave to keep with the result, such as `backbone.describe()`.
    kept: the learning rates whose heads are held; all of them, or the best one after `load_result`.
    states: their state dicts at their best epochs, stacked.
    training_only: how many of the trainable parameters no prediction needs, and no head given back has.
    """

    pooler: str
    dim: int
    classes: int
    grid: tuple[int, int] | None
    metric: Metric
    settings: ProbeSettings
    batch: int
    trainable: int
    rates: tuple[RateResult, ...]
    epochs: tuple[EpochRecord, ...]
    departures: tuple[str, ...]
    machine: Mapping[str, Any]
    about: Mapping[str, Any]
    kept: tuple[int, ...]
    states: Mapping[str, torch.Tensor] = field(repr=False)
    training_only: int = 0

    @property
    def best_rate(self) -> int:
        """Index of the learning rate with the highest value; the first of equal ones."""
        return max(
            range(len(self.rates)), key=lambda i: -math.inf if self.rates[i].best_epoch < 0 else self.rates[i].best
        )

    @property
    def best(self) -> RateResult:
        """The learning rate with the highest value."""
        return self.rates[self.best_rate]

    def head(self, rate: int | None = None) -> ProbeHead:
        """The head of learning rate number `rate` at its best epoch, in eval mode on the CPU; None is the best rate."""
        rate = self.best_rate if rate is None else rate
        if rate not in self.kept:
            raise InputError(f"rate: got {rate}; the heads of learning rates {list(self.kept)} are held")
        head = make_head(self.pooler, self.dim, self.classes, grid=self.grid, for_training=False)
        place = self.kept.index(rate)
        head.load_state_dict({name: value[place] for name, value in inference_state(self.states).items()})
        return head.eval()

    def to_json(self) -> dict[str, Any]:
        """Plain data without the weights; numbers that are not finite are None."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("states", "kept")}
        found: dict[str, Any] = plain({**kept, "best": self.best})
        return found
