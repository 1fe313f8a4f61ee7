"""`pooled_probe` on Triton: a few queries gather tokens, which are read once in each direction.

Where there are few queries and images the tokens are split over programs, and what these made is merged in a fixed
order. Nothing is added atomically: the same inputs give the same bits on one card under one configuration.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from vlattn.kernels.launch import Tuned
from vlattn.kernels.pooled_configs import CONFIGS, KERNELS, rounded_width
from vlattn.kernels.pooled_configs import compilations as compilations

SPLIT = 256
"""Fewest tokens worth a program. A split is a multiple of it, and so of every tile of tokens."""
LOG2_E = 1.4426950408889634
_TUNED = {key: Tuned(KERNELS[key[0]], configs, ["WIDTH", "SHARE"]) for key, configs in CONFIGS.items()}


def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _chunk(programs: int, tokens: int, device: torch.device) -> int:
    """Tokens of a split: all, where programs without splits keep the card busy."""
    splits = max(1, min(_cores(device) // max(programs, 1), triton.cdiv(tokens, SPLIT)))
    return max(1, triton.cdiv(triton.cdiv(tokens, splits), SPLIT)) * SPLIT


def _tuned(kernel: str, key: torch.Tensor) -> tuple[Tuned, int]:
    """The kernel for these tokens, and the fewest queries of a tile."""
    tuned = _TUNED[kernel, rounded_width(key.shape[-1]), key.dtype == torch.float32]
    return tuned, min(c.kwargs["BLOCK_M"] for c in tuned.configs)


def _strides(value: torch.Tensor | None, mask: torch.Tensor | None) -> tuple[int, ...]:
    own = (0,) * 4 if value is None else value.stride()
    return (*own, *((0, 0) if mask is None else mask.stride()))


def _shapes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int, int]:
    return key.shape[0], query.shape[1], query.shape[2], query.shape[3]


@torch.library.custom_op("vlattn::pooled_probe", mutates_args=())
def _pooled_probe(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, M, D], log-sum-exp in base 2 [B, H, M]) of query [B or 1, H, M, D], key and value [B, Hkv, N, D]."""
    batch, heads, queries, width = shape = _shapes(query, key)
    kv_heads, tokens = key.shape[1:3]
    tuned, rows = _tuned("forward", key)
    chunk = _chunk(batch * heads * triton.cdiv(queries, rows), tokens, key.device)
    splits = max(1, triton.cdiv(tokens, chunk))
    dtype = key.dtype if splits == 1 else torch.float32
    out = key.new_empty(splits, *shape, dtype=dtype)
    lse = key.new_empty(splits, *shape[:3], dtype=torch.float32)
    if out.numel():
        bits = None if mask is None else mask.view(torch.uint8)
        tuned(
            lambda c: (triton.cdiv(queries, c["BLOCK_M"]) * batch * heads, splits),
            query, key, value, bits, out, lse, scale * LOG2_E, heads, queries, tokens, chunk,
            query.stride(0) if query.shape[0] > 1 else 0, *query.stride()[1:], *key.stride(), *_strides(value, mask),
            SHARE=heads // kv_heads, WIDTH=width,
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    return _merged(out, lse, key.dtype)


def _merged(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One pool from those of the splits."""
    top = lse.amax(0)
    base = top.masked_fill(top == -torch.inf, 0)
    weights = (lse - base).exp2()  # [S, B, H, M]
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1)
    return (out * weights[..., None]).sum(0).to(dtype), base + total.log2()


@_pooled_probe.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = _shapes(query, key)
    return key.new_empty(shape), key.new_empty(shape[:3], dtype=torch.float32)


@torch.library.custom_op("vlattn::pooled_probe_backward", mutates_args=())
def _pooled_probe_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    mask: torch.Tensor | None,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    of_query: bool,
    of_tokens: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, with no numbers in what is not asked for.

    grad: [B, H, M, D], contiguous. lse, delta: fp32 [B, H, M]; delta is <grad, out>.
    """
    batch, heads, queries, width = _shapes(query, key)
    kv_heads, tokens = key.shape[1:3]
    bits, factors = None if mask is None else mask.view(torch.uint8), (scale * LOG2_E, scale)
    strides = (
        query.stride(0) if query.shape[0] > 1 else 0, *query.stride()[1:], *key.stride(), *_strides(value, mask),
    )  # fmt: skip
    share = heads // kv_heads
    query_grad, key_grad, value_grad = _gradients(query, key, value, of_query, of_tokens)
    if of_query and query_grad.numel():
        tuned, rows = _tuned("backward_query", key)
        programs = triton.cdiv(queries, rows) * heads
        # Queries of all images: a program adds up a few images, so that the sums it leaves are few as well.
        images = 1 if query.shape[0] == batch else triton.cdiv(batch, max(1, _cores(key.device) // programs))
        parts = triton.cdiv(batch, images)
        chunk = _chunk(programs * parts, tokens, key.device)
        splits = max(1, triton.cdiv(tokens, chunk))
        sums = key.new_empty(parts, heads, splits, queries, width, dtype=torch.float32)
        tuned(
            lambda c: (triton.cdiv(queries, c["BLOCK_M"]) * heads * parts, splits),
            query, key, value, bits, grad, lse, delta, sums, *factors,
            heads, queries, tokens, chunk, batch, images, *strides, SHARE=share, WIDTH=width,
        )  # fmt: skip
        query_grad = sums.sum(2 if query.shape[0] == batch else (0, 2)).view(query.shape).to(query.dtype)
    if of_tokens and key_grad.numel():
        tuned, _ = _tuned("backward_tokens", key)
        tuned(
            lambda c: (triton.cdiv(tokens, c["BLOCK_N"]) * batch * kv_heads,),
            query, key, value, bits, grad, lse, delta, key_grad, None if value is None else value_grad, *factors,
            kv_heads, queries, tokens, *strides, SHARE=share, WIDTH=width,
        )  # fmt: skip
    return query_grad, key_grad, value_grad


def _gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, of_query: bool, of_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        query.new_zeros(query.shape if of_query else 0),
        key.new_empty(key.shape if of_tokens else 0),
        key.new_empty(key.shape if of_tokens and value is not None else 0),
    )


@_pooled_probe_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: Any, mask: Any, lse: torch.Tensor,
    delta: torch.Tensor, scale: float, of_query: bool, of_tokens: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _gradients(query, key, value, of_query, of_tokens)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, mask, *output)


def _backward(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    query, key, value, mask, out, lse = ctx.saved_tensors
    of_query, of_key, of_value = ctx.needs_input_grad[:3]
    delta = (grad.float() * out.float()).sum(-1)
    query_grad, key_grad, value_grad = torch.ops.vlattn.pooled_probe_backward(
        grad.contiguous(), query, key, value, mask, lse, delta, ctx.scale, of_query, of_key or of_value
    )
    found = (query_grad, of_query), (key_grad, of_key), (value_grad, of_value)
    return *(x if wanted else None for x, wanted in found), None, None


_pooled_probe.register_autograd(_backward, setup_context=_keep)


@_pooled_probe.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    """Sets of queries that look at the same tokens become one larger set; others are done one after the other."""
    query_dim, *others, _ = in_dims
    if query_dim is not None and not any(dim is not None for dim in others):
        joined = query.movedim(query_dim, 2).flatten(2, 3)  # [B or 1, H, R M, D]
        out, lse = torch.ops.vlattn.pooled_probe(joined, key, value, mask, scale)
        sets = (info.batch_size, -1)
        return (out.unflatten(2, sets), lse.unflatten(2, sets)), (2, 2)
    given: list[tuple[Any, int | None]] = list(zip((query, key, value, mask), in_dims, strict=False))
    done = [
        torch.ops.vlattn.pooled_probe(*(x if dim is None else x.select(dim, i) for x, dim in given), scale)
        for i in range(info.batch_size)
    ]
    out, lse = (torch.stack(parts) for parts in zip(*done, strict=True))
    return (out, lse), (0, 0)


@register_flop_formula(torch.ops.vlattn.pooled_probe)
def _flops(query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products: logits and sums."""
    return 4 * key[0] * query[1] * query[2] * key[2] * query[3]


@register_flop_formula(torch.ops.vlattn.pooled_probe_backward)
def _backward_flops(
    grad: Any, query: Any, key: Any, value: Any, mask: Any, lse: Any, delta: Any, scale: float, of_query: bool,
    of_tokens: bool, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Logits and their gradients anew in each kernel; then one product for queries, two for tokens."""
    return (3 * of_query + 4 * of_tokens) * 2 * key[0] * query[1] * query[2] * key[2] * query[3]


def pooled_probe(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, scale: float, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """Pools of tokens, [B, H, M, D]; see `vlattn.ops.pooled_probe`. All in four dimensions."""
    out: torch.Tensor = torch.ops.vlattn.pooled_probe(query, key, value, key_mask, float(scale))[0]
    return out
