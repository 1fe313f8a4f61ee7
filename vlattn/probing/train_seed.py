"""Random draws that depend on the seed and the epoch alone, so that a resumed run repeats those of a whole one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, purpose: str, epoch: int) -> Iterator[None]:
    """Within, the generators of random, numpy and torch start from a state that these three decide; then they are as
    they were before."""
    drawn = random.Random(f"{seed}/{purpose}/{epoch}").getrandbits(32)
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(drawn)
        np.random.seed(drawn)
        torch.manual_seed(drawn)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
