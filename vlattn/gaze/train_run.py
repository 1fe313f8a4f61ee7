"""Training an OAT epoch by epoch, and the state that a run goes on from."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_batch import OATBatch, OATData, Search
from vlattn.gaze.train_evaluate import evaluate_oat
from vlattn.gaze.train_settings import OATTraining

Heard = Callable[[float, dict[str, Any] | None], object]
"""What hears of progress: epochs done, parts of one included, and the record of the last epoch that ended."""


class OATRun:
    """A model, what trains it, and what has come of it so far.

    train, val: searches with paths, of the scenes that `data` holds.
    """

    def __init__(
        self, model: OAT, data: OATData, train: Sequence[Search], val: Sequence[Search], settings: OATTraining
    ) -> None:
        self.model, self.data, self.train, self.val, self.settings = model, data, list(train), list(val), settings
        self.device = next(model.parameters()).device
        self.optimizer = settings.make_optimizer(model.parameters())
        self.epochs: list[dict[str, Any]] = []
        self.best_epoch, self.best_value = -1, math.inf
        self.best = self._weights()

    @property
    def done(self) -> bool:
        """Whether all epochs are through, or the last `patience` of them were no better."""
        waited = len(self.epochs) - 1 - self.best_epoch
        return len(self.epochs) >= self.settings.epochs or bool(self.epochs and waited >= self.settings.patience)

    def epoch(self, heard: Heard = lambda share, record: None) -> dict[str, Any]:
        """Train one epoch and evaluate it; what the log keeps of it."""
        epoch, start = len(self.epochs), time.monotonic()
        with seeded(self.settings.seed, epoch, self.device):
            losses = self._train(epoch, heard)
        found = evaluate_oat(self.model, self.data, self.val)
        value = found[self.settings.select]
        value = math.inf if math.isnan(value) else value  # of no path at all
        if value < self.best_value or self.best_epoch < 0:
            self.best_epoch, self.best_value, self.best = epoch, value, self._weights()
        if not math.isfinite(losses):
            raise InputError(f"lr: the loss of epoch {epoch} is {losses}; give a smaller one than {self.settings.lr:g}")
        record = {
            "epoch": epoch,
            "loss": losses,
            "val": found,
            "best": epoch == self.best_epoch,
            "seconds": round(time.monotonic() - start, 2),
        }
        self.epochs.append(record)
        heard(epoch + 1, record)
        return record

    def load_best(self) -> None:
        """Give the model the weights of its best epoch."""
        self.model.load_state_dict(self.best)

    def _train(self, epoch: int, heard: Heard) -> float:
        """Mean loss of the epoch's tokens."""
        self.model.train()
        order = torch.randperm(len(self.train)).tolist()
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(order), self.settings.batch):
            part = order[first : first + self.settings.batch]
            batch = self.data.batch([self.train[place] for place in part]).to(self.device)
            losses, counted = self.model.token_losses(batch)
            self.optimizer.zero_grad(set_to_none=True)
            batch_loss(losses, counted, batch, self.model.config.parity).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
            self.optimizer.step()
            total += torch.stack((losses.detach().sum(), counted.sum())).double().cpu()
            heard(epoch + (first + len(part)) / len(order), None)
        return float(total[0] / total[1])

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    # Going on where a run was cut off ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that the following epochs depend on, as `torch.save` and a load with weights_only take it."""
        return {
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self.epochs, self.best_epoch, self.best_value = state["epochs"], state["best_epoch"], state["best_value"]


def batch_loss(losses: torch.Tensor, counted: torch.Tensor, batch: OATBatch, parity: bool) -> torch.Tensor:
    """Mean over the tokens [B, T] that count. parity: the reference's sum of such means over scenes of each size, where
    a batch mixes sets."""
    if not parity or batch.present is None:
        return losses.sum() / counted.sum()
    sizes = batch.present.sum(1)
    groups = [sizes == size for size in sizes.unique()]
    return torch.stack([losses[rows].sum() / counted[rows].sum() for rows in groups]).sum()


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Within, torch draws what seed and epoch decide, so that a resumed run repeats the draws of a whole one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(f"{seed}/{epoch}").getrandbits(32))
        yield
