"""What the kernels of `pooled_probe` cover, known without Triton."""

from __future__ import annotations

import torch

MAX_WIDTH, MAX_OWN_VALUES = 1024, 256
"""Widest tokens: where they are their own values, and where values are given."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(key: torch.Tensor, value: torch.Tensor | None = None) -> str | None:
    """What of a call the kernels do not cover; None where they cover it."""
    if key.dtype not in DTYPES:
        return f"has no {key.dtype}"
    most = MAX_WIDTH if value is None else MAX_OWN_VALUES
    if key.shape[-1] > most:
        return f"takes {'tokens' if value is None else 'values'} of at most {most} channels, not {key.shape[-1]}"
    return None
