"""`select_tokens` on Triton: the best of each row by bisection over the bits of the scores, then one gather of all.

A score becomes an integer of the same order. The k-th largest is found bit by bit, counting what reaches a threshold,
so that no sort is needed and a tie is a tie; those who pass come out in their own order by a running count. Nothing is
added atomically: the same scores give the same tokens on every card, and those of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from vlattn.kernels import gather_kv
from vlattn.kernels.compilation import Compilation
from vlattn.kernels.launch import Tuned

MAX_TOKENS = 8192
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def choose(
    score: tl.tensor, counts: tl.tensor, index: tl.tensor, tokens: tl.tensor, kept: tl.tensor,
    score_b: tl.tensor, score_n: tl.tensor, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Places of the best of one row, ascending, -1 behind them. counts: how many of each row; None is `kept` of all."""
    b, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    there = n < tokens
    x = tl.load(score + b * score_b + n.to(tl.int64) * score_n, mask=there, other=0.0).to(tl.float32)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(x != x, 0x7FFFFFFF, rank)
    if counts is None:
        wanted = tl.minimum(kept, tokens)
    else:
        wanted = tl.minimum(tl.maximum(tl.load(counts + b).to(tl.int32), 0), tl.minimum(kept, tokens))
    # The largest integer that at least `wanted` reach: the sign first, then bit by bit.
    least = tl.where(tl.sum((there & (rank >= 0)).to(tl.int32), 0) >= wanted, 0, -2147483648)
    for bit in range(31):
        tried = least + (1 << (30 - bit))
        least = tl.where(tl.sum((there & (rank >= tried)).to(tl.int32), 0) >= wanted, tried, least)
    above, equal = there & (rank > least), there & (rank == least)
    free = wanted - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= free))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    index += b * kept
    tl.store(index + place, n.to(tl.int64), mask=chosen)
    tl.store(index + n, tl.full([BLOCK_N], -1, tl.int64), mask=(n >= wanted) & (n < kept))


CONFIGS = {
    size: [triton.Config({"BLOCK_N": size}, num_warps=warps) for warps in several]
    for size, several in ((1024, (4, 8)), (4096, (8, 16)), (MAX_TOKENS, (16,)))
}
"""{tokens: configurations}."""
_CHOOSE = {size: Tuned(choose, configs, []) for size, configs in CONFIGS.items()}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, N, ...] as [B, 1, N, W]: a view, or a copy where the dimensions behind N do not lie in steps of one size."""
    width = math.prod(x.shape[2:])
    try:
        flat = x.view(*x.shape[:2], width)
    except RuntimeError:
        flat = x.reshape(*x.shape[:2], width)
    return flat[:, None]


@torch.library.custom_op("vlattn::select_tokens", mutates_args=())
def _select_tokens(
    score: torch.Tensor, kept: int, counts: torch.Tensor | None, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """[index, *gathered]. kept: columns of the index. counts: int [B], how many of each row; None for all `kept`."""
    batch, tokens = score.shape
    index = torch.empty(batch, kept, dtype=torch.int64, device=score.device)
    if batch and kept:
        size = next(size for size in CONFIGS if tokens <= size)
        _CHOOSE[size](lambda c: (batch,), score, counts, index, tokens, kept, *score.stride())
    gathered = gather_kv.gather_rows(index, [_rows(x) for x in tensors])
    return [index, *(y.view(batch, kept, *x.shape[2:]) for x, y in zip(tensors, gathered, strict=True))]


@_select_tokens.register_fake
def _(
    score: torch.Tensor, kept: int, counts: torch.Tensor | None, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    shape = (score.shape[0], kept)
    return [score.new_empty(shape, dtype=torch.int64), *(x.new_empty(*shape, *x.shape[2:]) for x in tensors)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(output[0])
    ctx.tokens = inputs[0].shape[1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    """Gradients go back to the places they came from. No place is chosen twice, so nothing is added up."""
    (index,) = ctx.saved_tensors
    return None, None, None, [None if grad is None else _spread(grad, index, ctx.tokens) for grad in grads[1:]]


def _spread(grad: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    # Padding goes to a place behind the last.
    places = torch.where(index < 0, tokens, index).view(*index.shape, *[1] * (grad.ndim - 2)).expand_as(grad)
    wide = grad.new_zeros(grad.shape[0], tokens + 1, *grad.shape[2:])
    return wide.scatter(1, places, grad)[:, :tokens]


_select_tokens.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.vlattn.select_tokens)
def _flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Comparisons and copies."""
    return 0


def unsupported(score: torch.Tensor, tensors: Sequence[torch.Tensor]) -> str | None:
    """What of a call the kernel does not cover."""
    if score.dtype not in DTYPES:
        return f"has no {score.dtype} scores"
    if score.shape[1] > MAX_TOKENS:
        return f"takes rows of at most {MAX_TOKENS} tokens, not {score.shape[1]}"
    return gather_kv.unsupported(*tensors)


def select_tokens(
    score: torch.Tensor, kept: int, counts: torch.Tensor | None, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The best tokens of each row; see `vlattn.ops.select_tokens`. kept, counts: see the op above."""
    return tuple(torch.ops.vlattn.select_tokens(score.detach(), kept, counts, list(tensors)))


def compilations() -> list[Compilation]:
    """Every size and configuration, for rows of one length and ragged ones. The gather is in `gather_kv`."""
    found = []
    for size, configs in CONFIGS.items():
        for config in configs:
            for kind in ("bf16", "fp32"):
                for ragged in (False, True):
                    types = {"score": f"*{kind}", "index": "*i64", "tokens": "i32", "kept": "i32", "score_b": "i32"}
                    constants: dict[str, Any] = {"score_n": 1, **config.kwargs}
                    if ragged:
                        types["counts"] = "*i64"
                    else:
                        constants["counts"] = None
                    title = f"choose {kind} {size} warps{config.num_warps}{' ragged' if ragged else ''}"
                    aligned = ("score", "index", "counts", "score_b")
                    found.append(
                        Compilation(title, choose, types, constants, config.num_warps, config.num_stages, aligned)
                    )
    return found
