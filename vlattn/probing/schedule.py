"""Learning rates of a probe over its epochs, and how they grow with the batch."""

from __future__ import annotations

import math

from vlattn.errors import InputError

REFERENCE_BATCH = 256


def absolute_lr(blr: float, batch: int) -> float:
    """The learning rate of a batch of `batch` images, all processes and accumulated steps together: blr batch / 256."""
    return blr * batch / REFERENCE_BATCH


def lr_factor(epoch: float, epochs: int, warmup_epochs: float = 10) -> float:
    """The factor on the learning rate after `epoch` epochs, of which fractions count: set it anew before each update.

    A line from 0 over `warmup_epochs`, then half a cosine down to 0 at `epochs`.

    Raises:
        InputError: the warm-up does not end before the run.
    """
    if not 0 <= warmup_epochs < epochs:
        raise InputError(
            f"warmup_epochs: got {warmup_epochs:g} in a run of {epochs} epochs; give a number from 0 to below "
            f"{epochs}, such as {epochs / 9:.2g}, the share that 10 of 90 epochs are"
        )
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
