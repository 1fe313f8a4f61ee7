"""What poolers share: the class they derive from, and attention with a softmax in fp32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from vlattn import ops
from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.kernels.dispatch import uses_triton
from vlattn.kernels.pooled_sizes import unsupported
from vlattn.probing.poolers.branches import BranchLosses


class Pooler(nn.Module, ABC):
    """Turns the tokens of an image into one feature vector.

    A subclass takes `dim` and keyword-only settings, and says what it costs. Its forward begins with
    `self.check(tokens)`.

    dim: width D of the tokens.
    width: width of the feature, D unless the pooler narrows it.
    needs_grid: whether the constructor takes `grid`, (rows, columns) of the patch tokens.
    branch_losses: what training a probe with it adds to the loss of its feature; None is nothing.
    """

    needs_grid: ClassVar[bool] = False
    branch_losses: BranchLosses | None = None

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        require_count("dim", dim)
        self.dim = dim
        self.width = dim if width is None else width

    @abstractmethod
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feature [B, width] of tokens [B, N, D]; under autocast in the dtype that autocast gives."""

    @abstractmethod
    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of `forward` in eval mode, for one image with `tokens` tokens.

        In the form in use: rows that a released code computes and drops are not made here and do not count; poolers of
        such codes have `built_macs`, which counts them as published tables do. Products with weights and weighted sums
        over tokens count, and the mean of a pooler that is a mean; norms, softmax, activations, and a mean that is a
        step among others do not.
        """

    def attention(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Attention maps [B, M, N] of tokens [B, N, D], fp32 or finer, rows sum to 1; None where there are none."""
        return None

    def check(self, tokens: torch.Tensor) -> None:
        """Refuse what is not floating point [B, N, D] with at least one token of this pooler's width.

        Raises:
            InputError: shape, width, or, outside autocast, another dtype than the parameters'.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.dim or tokens.shape[1] == 0:
            raise InputError(
                f"tokens: got shape {list(tokens.shape)}; give [B, N, {self.dim}] with N of at least 1, "
                f"as this pooler was made for dim={self.dim}"
            )
        if not tokens.is_floating_point():
            raise InputError(f"tokens: got {tokens.dtype}; give a floating-point tensor")
        weight = next(self.parameters(), tokens)
        if tokens.dtype != weight.dtype and not torch.is_autocast_enabled(tokens.device.type):
            raise InputError(
                f"tokens: got {tokens.dtype} for a pooler in {weight.dtype}; convert one to the other, or use autocast"
            )


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, D] as [B, H, N, D / H], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_maps(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of scale * query key^T over keys.

    Args:
        query: [..., M, E].
        key: [..., N, E].
        scale: factor on the scores.

    Returns:
        [..., M, N], rows sum to 1; fp32 for half-precision inputs and under autocast, else the inputs' dtype.
    """
    scores = (query * scale) @ key.transpose(-2, -1)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def on_kernel(key: torch.Tensor, value: torch.Tensor | None = None) -> bool:
    """Whether `ops.pooled_probe` runs its kernel on them, which reads them once; elsewhere torch has better ways."""
    return key.is_cuda and uses_triton(key, None) and unsupported(key, value) is None


def pool(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What a few queries gather, softmax(E^(-1/2) query key^T) value.

    Args:
        query: [B, H, M, E].
        key, value: [B, H, N, E].

    Returns:
        [B, H, M, E], from the kernel of `ops.pooled_probe` on a GPU and from torch's attention elsewhere.
    """
    if on_kernel(key, value):
        return ops.pooled_probe(query, key, value, scale=key.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(query, key, value)
