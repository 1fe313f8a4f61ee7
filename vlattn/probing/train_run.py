"""Training a bank of heads epoch by epoch, and the state that a run goes on from."""

from __future__ import annotations

import time
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_evaluate import evaluate_bank
from vlattn.probing.train_loss import Metric, training_losses
from vlattn.probing.train_progress import Heard
from vlattn.probing.train_result import EpochRecord, RateResult
from vlattn.probing.train_scale import LossScaler
from vlattn.probing.train_seed import seeded
from vlattn.probing.train_source import Source, read_batches
from vlattn.probing.train_stop import BestEpochs
from vlattn.probing.train_world import World


class ProbeRun:
    """A bank of heads, what trains it, and what has come of it so far.

    train, val: sources of batches; see `vlattn.probing.train_source`.
    bank: one head for each learning rate of `settings`, on the device of `world`.
    kind: tokens to choose where a source gives `Tokens`.
    classes: number of classes K.
    """

    def __init__(
        self, train: Source, val: Source, bank: HeadBank, kind: str, classes: int, settings: ProbeSettings, world: World
    ) -> None:
        self.train, self.val, self.bank, self.kind, self.classes = train, val, bank, kind, classes
        self.settings, self.world = settings, world
        self.parameters = list(bank.parameters())
        self.optimizer = settings.make_optimizer(self.parameters)
        self.half = settings.autocast_dtype(world.device)
        self.autocast = torch.autocast(world.device.type, dtype=self.half, enabled=self.half is not None)
        self.scaler = LossScaler(bank.copies, self.half == torch.float16, world.device)
        self.course = BestEpochs(bank.copies, settings.patience, settings.min_delta, settings.stop_from)
        self.best = {name: value.clone() for name, value in bank.stacked.state_dict().items()}
        self.epochs: list[EpochRecord] = []
        self.micro = 0  # images of a batch of the train source; its first batch says

    @property
    def done(self) -> bool:
        """Whether all epochs are through, or all heads have stopped."""
        return len(self.epochs) == self.settings.epochs or self.course.done

    @property
    def batch(self) -> int:
        """Images of an update."""
        return self.micro * self.settings.accumulate * self.world.size

    @property
    def metric(self) -> Metric:
        """What best epochs are chosen by; the labels decide."""
        return "map" if any("map" in record.val for record in self.epochs) else "top1"

    def epoch(self, heard: Heard) -> EpochRecord:
        """Train one epoch, and evaluate it where that is due."""
        epoch, start = len(self.epochs), time.monotonic()
        with seeded(self.settings.seed + self.world.rank, "train", epoch):
            losses, rates = self._train(epoch, heard)
        total = losses.pop("total")
        found: dict[str, list[float]] = {}
        if (epoch + 1) % self.settings.eval_every == 0 or epoch + 1 == self.settings.epochs:
            self.world.share_from_first(self.bank.buffers())
            with seeded(self.settings.seed, "val", epoch):
                found = evaluate_bank(self.bank, self._read(self.val, epoch), self.world, self.autocast)
            self._judge(epoch, found)
        self.epochs.append(EpochRecord(epoch, rates, total, found, round(time.monotonic() - start, 3), losses))
        return self.epochs[-1]

    def rates(self) -> tuple[RateResult, ...]:
        """How each learning rate has done."""
        given = zip(self.settings.given_rates, self.settings.rates(self.batch), self.course.heads, strict=True)
        return tuple(
            RateResult(
                rate, lr, best.value if best.epoch >= 0 else float("nan"), best.epoch, best.stopped, best.diverged
            )
            for rate, lr, best in given
        )

    def _train(self, epoch: int, heard: Heard) -> tuple[dict[str, list[float]], list[float]]:
        """Mean loss of each head with its parts, and the learning rates of the last update."""
        self.bank.train()
        length = _length("train", self.train)
        batches, sums = torch.zeros(1, device=self.world.device), dict[str, torch.Tensor]()
        updates = filled = 0
        accumulate = self.settings.accumulate
        for index, (tokens, labels) in enumerate(self._read(self.train, epoch)):
            if self.micro == 0:
                self.micro = len(labels)
            if filled == 0 and length - index < accumulate:  # too few are left for another update
                break
            if len(labels) != self.micro:
                continue
            if filled == 0:
                self._set_rates(epoch + index / length)
            with self.autocast:
                seen = self.bank.read(tokens)
            losses = training_losses(seen, labels, self.bank.branch_losses)
            self.scaler.total(losses["total"] / accumulate).backward()
            batches += 1
            for name, values in losses.items():
                sums[name] = sums[name] + values.detach() if name in sums else values.detach().float()
            filled += 1
            if filled == accumulate:
                self.world.mean_gradients(self.parameters)
                self.scaler.step(self.optimizer, self.parameters)
                self.optimizer.zero_grad(set_to_none=True)
                updates, filled = updates + 1, 0
            heard.batch(epoch, (index + 1) / length)
        self.optimizer.zero_grad(set_to_none=True)  # of a batch whose partner was not full
        if updates == 0:
            raise InputError(
                f"train: {length} batches of up to {self.micro} images make no update of {accumulate}; "
                "give more images, smaller batches or a smaller accumulate"
            )
        every = self.world.add(batches)
        means = {name: (self.world.add(values) / every).tolist() for name, values in sums.items()}
        return means, self.optimizer.param_groups[0]["lr"].tolist()

    def _read(self, source: Source, epoch: int) -> Any:
        return read_batches(source, epoch, self.kind, self.classes, self.world.device, self.half)

    def _set_rates(self, epoch: float) -> None:
        factor = self.settings.factor(epoch)
        rates = [rate * factor for rate in self.settings.rates(self.batch)]
        # Without waiting for the device, which would be waited for at each update.
        self.optimizer.param_groups[0]["lr"] = torch.tensor(rates).to(self.world.device, non_blocking=True)

    def _judge(self, epoch: int, found: dict[str, list[float]]) -> None:
        values = found["map"] if "map" in found else found["top1"]
        finite = [abs(loss) < float("inf") for loss in found["loss"]]
        now = self.bank.stacked.state_dict()
        for index in self.course.see(epoch, values, finite):
            for name, value in self.best.items():
                value[index].copy_(now[name][index])

    # Going on where a run was cut off ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that the following epochs depend on, as `torch.save` and a load with weights_only take it."""
        return {
            "bank": self.bank.state_dict(),
            "draws": self.bank.draws(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "course": self.course.state_dict(),
            "epochs": [vars(record) for record in self.epochs],
            "micro": self.micro,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be where `state_dict` was taken."""
        self.bank.load_state_dict(state["bank"])
        self.bank.load_draws(state["draws"])
        for name, value in self.best.items():
            value.copy_(state["best"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.course.load_state_dict(state["course"])
        self.epochs = [EpochRecord(**record) for record in state["epochs"]]
        self.micro = state["micro"]


def _length(name: str, source: Source) -> int:
    try:
        return len(source)
    except TypeError:
        raise InputError(
            f"{name}: a {type(source).__name__} has no length, which the learning rate needs; give it a __len__, the "
            "batches of an epoch"
        ) from None
