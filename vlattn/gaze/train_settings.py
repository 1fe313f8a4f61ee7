"""How an OAT is trained, with the reference's values as defaults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlattn.checks import require_bool, require_choice, require_count, require_number, require_positive

SELECT = ("delta", "loss")


@dataclass(frozen=True)
class OATTraining:
    """optimizer: `adam`, or `adamw`, which tells weight decay apart from the gradient. lr: constant.

    batch: searches of an update. clip: largest norm of its gradient.
    epochs: at most. patience: epochs without a better val score before training stops.
    select: the val score that chooses the best epoch, lower being better: `delta` of greedy paths, as published, or
        `loss`, which also tells good paths from bad ones.
    seed: of order and dropout. init_seed: of the first weights.
    test_last: test the last weights in memory and not the best epoch's: a defect of the reference, for parity.
    save_every: epochs between checkpoints.
    """

    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    batch: int = 20
    clip: float = 1.0
    epochs: int = 500
    patience: int = 30
    select: str = "delta"
    seed: int = 1234
    init_seed: int = 0
    test_last: bool = False
    save_every: int = 1

    def __post_init__(self) -> None:
        require_choice("optimizer", self.optimizer, ("adam", "adamw"))
        require_choice("select", self.select, SELECT)
        for name in ("lr", "clip"):
            require_positive(name, getattr(self, name))
        require_number("weight_decay", self.weight_decay, 0)
        for name in ("batch", "epochs", "patience", "save_every"):
            require_count(name, getattr(self, name))
        for name in ("seed", "init_seed"):
            require_count(name, getattr(self, name), 0)
        require_bool("test_last", self.test_last)

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr=self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
