"""`query_row_attention` on Triton: the attention weights of a few rows over all keys, which are read once.

Query heads that share a key head lie in one tile. A program leaves its logits where the weights will be and follows
their maximum and sum; then it turns them into weights, or, where there are few tiles and the keys are split over
programs, a second kernel does. Nothing is added atomically: the same inputs give the same bits on one card under one
configuration. Gradients are a few products of the weights, in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.language import tensor as T

from vlattn.kernels.compilation import Compilation
from vlattn.kernels.launch import Tuned, dot
from vlattn.kernels.received_attention import LOG2_E, load_columns, split_keys


@triton.jit
def row_weights(
    q: T, k: T, mask: T, out: T, stats: T, scale: T, kv_heads: T, rows: T, keys: T, chunk: T, lines: T,
    q_b: T, q_h: T, q_r: T, q_d: T, k_b: T, k_h: T, k_n: T, k_d: T, mask_b: T, mask_r: T, mask_n: T,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
    LINES: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of rows over the keys of one split. Program (tile + tiles * (prompt and key head), split).

    out: [B, H, R, N]. stats: [splits, B H R, 2], maximum and sum, where there are splits; then logits stay in `out`.
    MASK: 1 for a key mask [B, N], 2 for [B, R, N]. lines: B H R. LINES, KEYS: rounded sizes, which choose the
    configuration.
    """
    tiles = tl.cdiv(rows * SHARE, BLOCK_M)
    tile, pair, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    b, g = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    m, n, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # Row m is head m % SHARE of query m // SHARE.
    row, at, h = m // SHARE, m < rows * SHARE, g * SHARE + m % SHARE
    query = tl.load(
        q + b * q_b + h[:, None] * q_h + row[:, None].to(tl.int64) * q_r + d[None, :] * q_d,
        mask=at[:, None] & (d < WIDTH)[None, :], other=0.0,
    )  # [M, D]  # fmt: skip
    first = split * chunk
    end = tl.minimum(first + chunk, keys)
    k += b * k_b + g * k_h + first.to(tl.int64) * k_n
    line = (b * kv_heads * SHARE + h) * rows + row
    cells = out + line[:, None] * keys
    if MASK > 0:
        mask += b * mask_b
    if MASK == 2:
        # Far rows and keys are reached by scalars of 64 bits, a tile from there by 32.
        top_row = tile * BLOCK_M // SHARE
        mask += top_row.to(tl.int64) * mask_r + first.to(tl.int64) * mask_n
        line_of_mask = (tl.minimum(row, rows - 1) - top_row) * mask_r  # [M]
    top, z = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, end, BLOCK_N):
        j = start + n
        inside = at[:, None] & (j < end)[None, :]
        seen = inside
        if MASK == 1:
            seen = inside & (tl.load(mask + j * mask_n, mask=j < end, other=0) != 0)[None, :]
        if MASK == 2:
            where = mask + line_of_mask[:, None] + n[None, :] * mask_n
            seen = tl.load(where, mask=(j < end)[None, :], other=0) != 0
            mask += BLOCK_N * mask_n
        key = load_columns(k, n, d, k_n, k_d, end - start, True, WIDTH, BLOCK_D)
        k += BLOCK_N * k_n
        s = dot(query, key, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale  # [M, N]
        s = tl.where(seen, s, float("-inf"))
        tl.store(cells + j[None, :], s, mask=inside)
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        z = z * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new
    if stats is None:
        base = tl.where(top == float("-inf"), 0.0, top)
        inverse = 1.0 / tl.where(z > 0, z, 1.0)
        tl.debug_barrier()  # threads may read what others of the program have written
        for start in range(first, end, BLOCK_N):
            j = start + n
            inside = at[:, None] & (j < end)[None, :]
            s = tl.load(cells + j[None, :], mask=inside, other=float("-inf"))
            tl.store(cells + j[None, :], tl.exp2(s - base[:, None]) * inverse[:, None], mask=inside)
    else:
        state = stats + (split.to(tl.int64) * lines + line) * 2
        tl.store(state, top, mask=at)
        tl.store(state + 1, z, mask=at)


@triton.jit
def normalise(out: T, stats: T, keys: T, lines: T, splits: T, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr) -> None:
    """Logits to weights, in place. Program (line, tile of keys). SPLITS: rounded up."""
    line, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.arange(0, SPLITS)
    state = stats + (split.to(tl.int64) * lines + line) * 2
    tops = tl.load(state, mask=split < splits, other=float("-inf"))
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    z = tl.sum(tl.exp2(tops - base) * tl.load(state + 1, mask=split < splits, other=0.0), 0)
    cells = out + line * keys + j
    s = tl.load(cells, mask=j < keys, other=float("-inf"))
    tl.store(cells, tl.exp2(s - base) / tl.where(z > 0, z, 1.0), mask=j < keys)


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)


# By whether there are few rows, whether numbers are fp32, and whether heads are wider than 128. Others spill registers.
FEW = 16
CONFIGS: dict[tuple[bool, bool, bool], list[triton.Config]] = {
    (True, False, False): [_config(16, 64, 4, 4), _config(16, 128, 4, 3), _config(16, 32, 4, 4)],
    (True, False, True): [_config(16, 64, 4, 3), _config(16, 32, 4, 3)],
    (True, True, False): [_config(16, 32, 8, 3), _config(16, 16, 4, 3)],
    (True, True, True): [_config(16, 32, 4, 2), _config(16, 16, 4, 2)],
    (False, False, False): [_config(64, 64, 8, 3), _config(32, 64, 4, 3)],
    (False, False, True): [_config(64, 64, 4, 2), _config(32, 64, 4, 2)],
    (False, True, False): [_config(16, 32, 8, 2), _config(32, 16, 8, 2)],
    (False, True, True): [_config(32, 16, 4, 2), _config(16, 32, 4, 2)],
}
_TUNED = {kind: Tuned(row_weights, configs, ["LINES", "KEYS", "WIDTH", "MASK"]) for kind, configs in CONFIGS.items()}
# One configuration: it works in place, and tuning would run it again and again.
_NORMALISE = Tuned(normalise, [triton.Config({"BLOCK_N": 1024}, num_warps=4)], [])


@torch.library.custom_op("vlattn::query_row_attention", mutates_args=())
def _query_row_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None, chunk: int
) -> torch.Tensor:
    """chunk: keys of a split, 0 for what fits the card."""
    (batch, heads, rows, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    out = torch.empty(batch, heads, rows, keys, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    share, lines = heads // kv_heads, batch * heads * rows
    kind = (rows * share <= FEW, q.dtype == torch.float32, width > 128)
    smallest = int(CONFIGS[kind][0].kwargs["BLOCK_M"])
    chunk = chunk or split_keys(triton.cdiv(rows * share, smallest) * batch * kv_heads, keys, q.device)
    splits = triton.cdiv(keys, chunk)
    stats = None if splits == 1 else out.new_empty(splits, lines, 2)
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    strides = (0, 0, 0) if mask is None else mask.stride()
    if len(strides) == 2:
        strides = (strides[0], 0, strides[1])
    _TUNED[kind](
        lambda c: (triton.cdiv(rows * share, c["BLOCK_M"]) * batch * kv_heads, splits),
        q, k, mask, out, stats, scale * LOG2_E, kv_heads, rows, keys, chunk, lines,
        *q.stride(), *k.stride(), *strides, SHARE=share, WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(width)),
        MASK=0 if mask is None else mask.ndim - 1, LINES=triton.next_power_of_2(max(rows * share, 16)),
        KEYS=triton.next_power_of_2(max(keys, 16)),
    )  # fmt: skip
    if stats is not None:
        _NORMALISE(
            lambda c: (lines, triton.cdiv(keys, c["BLOCK_N"])),
            out, stats, keys, lines, splits, SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out


@_query_row_attention.register_fake
def _(q: Any, k: Any, scale: float, key_mask: Any, chunk: int) -> torch.Tensor:
    return torch.empty(*q.shape[:3], k.shape[2], dtype=torch.float32, device=q.device)


@register_flop_formula(torch.ops.vlattn.query_row_attention)
def _flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * k[2] * width


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, ctx.scale, _, _ = inputs
    ctx.save_for_backward(q, k, output)


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    """A masked key weighs 0, and so its logit has no gradient."""
    q, k, weights = ctx.saved_tensors
    batch, groups, keys, width = k.shape
    slope = weights * (gradient - (weights * gradient).sum(-1, keepdim=True)) * ctx.scale  # [B, H, R, N]
    slope = slope.reshape(batch, groups, -1, keys)  # heads that share a key head are rows of one product
    query = q.float().reshape(batch, groups, -1, width)
    q_grad = (slope @ k.float()).view(q.shape)
    return q_grad.to(q.dtype), (slope.transpose(-1, -2) @ query).to(k.dtype), None, None, None


_query_row_attention.register_autograd(_gradients, setup_context=_save)


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None = None, chunk: int = 0
) -> torch.Tensor:
    """Weights [B, H, R, N], fp32; see `vlattn.ops.query_row_attention`. chunk: keys of a split, 0 for what fits."""
    return torch.ops.vlattn.query_row_attention(q, k, float(scale), key_mask, chunk)


# Compilation for cards that are not there -----------------------------------------------------------------------------
def compilations() -> list[Compilation]:
    """Every configuration with a mask, alone and in splits, and the kernel that brings splits together.

    Usual heads in half precision also with a mask for each row, of a length that 16 does not divide.
    """
    found = []
    for (few, fp32, wide), configs in CONFIGS.items():
        for width in (256,) if wide else (64, 128):
            for config in configs:
                found += [_compilation(few, fp32, width, config, alone) for alone in (True, False)]
                if width == 128 and not fp32:
                    found += [_compilation(few, fp32, width, config, alone, by_row=True) for alone in (True, False)]
    types = {"out": "*fp32", "stats": "*fp32", "keys": "i32", "lines": "i32", "splits": "i32"}
    constants = {"SPLITS": 16, "BLOCK_N": 1024}
    return [*found, Compilation("query rows normalise", normalise, types, constants, 4, 2, ("out", "stats"))]


def _compilation(
    few: bool, fp32: bool, width: int, config: triton.Config, alone: bool, by_row: bool = False
) -> Compilation:
    names, half = row_weights.arg_names, "fp32" if fp32 else "bf16"
    types = dict.fromkeys(names[names.index("kv_heads") : names.index("SHARE")], "i32")
    types |= {"scale": "fp32", "q": f"*{half}", "k": f"*{half}", "mask": "*u8", "out": "*fp32", "stats": "*fp32"}
    constants: dict[str, Any] = {"q_d": 1, "k_d": 1, "mask_n": 1}
    constants |= {"SHARE": 7, "MASK": 2} if by_row else {"SHARE": 4, "MASK": 1, "mask_r": 0}
    constants |= {"WIDTH": width, "BLOCK_D": width, "LINES": 16 if few else 256, "KEYS": 4096, **config.kwargs}
    if alone:
        constants["stats"] = None
    kept = {name: types[name] for name in names if name in types and name not in constants}
    wide = names[names.index("q_b") : names.index("mask_b" if by_row else "SHARE")]
    aligned = [name for name, type_ in kept.items() if type_[0] == "*" or name in wide]
    if by_row:
        aligned.remove("mask")
    title = f"{'few' if few else 'many'} {'alone' if alone else 'split'} {config.kwargs['BLOCK_M']}x"
    title += f"{config.kwargs['BLOCK_N']}{' by row' if by_row else ''}"
    return Compilation(
        f"query rows {half} D{width} {title}", row_weights, kept, constants, config.num_warps, config.num_stages,
        aligned,
    )  # fmt: skip
