"""Learning rates over a run."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, steps: int, warmup: float = 0.03) -> float:
    """The factor on the learning rate at `step` of `steps`: a linear rise over a share `warmup` of them, then half a
    cosine down to 0."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
