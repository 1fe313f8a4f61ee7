"""`received_attention` on Triton: what each key receives over all queries, from two sweeps over tiles of weights.

The first sweep leaves the log-sum-exp of each row, as the first half of flash attention does; the second takes a tile
of keys to all queries and adds up exp(s - lse). Nothing is added atomically: the same inputs give the same bits on one
card under one configuration. Gradients go through the weights again, a block of rows at a time, in PyTorch.
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

LOG2_E = 1.4426950408889634
SPLIT = 128
"""Keys of a split are a multiple of this, which every tile of keys divides."""


@triton.jit
def load_columns(
    x: T, i: T, d: T, x_i: T, x_d: T, left: T, EDGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
) -> T:
    """Rows i of x as columns [D, I], 0 beyond its width, and beyond `left` rows where a tile may reach the EDGE."""
    where = x + i[None, :] * x_i + d[:, None] * x_d
    if EDGE:
        there = (i < left)[None, :]
        if WIDTH < BLOCK_D:
            there = there & (d < WIDTH)[:, None]
        found = tl.load(where, mask=there, other=0.0)
    elif WIDTH < BLOCK_D:
        found = tl.load(where, mask=(i >= 0)[None, :] & (d < WIDTH)[:, None], other=0.0)
    else:
        found = tl.load(where)
    return found


@triton.jit
def _row_step(
    query: T, k: T, mask: T, row: T, top: T, z: T, scale: T, begin: T, end: T, ahead: T, n: T, d: T,
    k_n: T, k_d: T, mask_n: T,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
) -> T:  # fmt: skip
    """An online softmax over keys `begin` to `end`: the maximum of each row, and its sum of 2^(s - maximum)."""
    k += begin.to(tl.int64) * k_n
    for start in range(begin, end, BLOCK_N):
        j = start + n
        if mask is not None:
            seen = tl.load(mask + j * mask_n, mask=j < end, other=0) != 0
        key = load_columns(k, n, d, k_n, k_d, end - start, EDGE, WIDTH, BLOCK_D)
        k += BLOCK_N * k_n
        s = dot(query, key, tl.zeros([query.shape[0], BLOCK_N], tl.float32)) * scale  # [M, N]
        if EDGE:
            inside = (j < end)[None, :]
            if CAUSAL:
                inside = inside & (j[None, :] <= row[:, None] + ahead)
            s = tl.where(inside, s, float("-inf"))
        if mask is not None:
            s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        z = z * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new
    return top, z


@triton.jit
def row_sums(
    q: T, k: T, mask: T, lse: T, scale: T, heads: T, rows: T, keys: T, chunk: T, lines: T,
    q_b: T, q_h: T, q_r: T, q_d: T, k_b: T, k_h: T, k_n: T, k_d: T, mask_b: T, mask_n: T,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Log-sum-exp of a tile of rows over the keys of one split. Program (tile + tiles * (prompt and head), split).

    lse: [splits, B, H, R]. lines: B H R. STEP: see `in_steps`. ROWS, KEYS: rounded sizes, which choose the
    configuration.
    """
    q_b, q_h, q_r, k_b, k_h, k_n = q_b * STEP, q_h * STEP, q_r * STEP, k_b * STEP, k_h * STEP, k_n * STEP
    tiles = tl.cdiv(rows, BLOCK_M)
    pair, split = tl.program_id(0) // tiles, tl.program_id(1)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last rows take longest
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row, ahead = tile * BLOCK_M + m, keys - rows
    q += b * q_b + h * q_h + (tile * BLOCK_M).to(tl.int64) * q_r
    query = tl.load(
        q + m[:, None] * q_r + d[None, :] * q_d, mask=(row < rows)[:, None] & (d < WIDTH)[None, :], other=0.0
    )  # [M, D]
    k += b * k_b + (h // SHARE) * k_h
    if mask is not None:
        mask += b * mask_b
    first = split * chunk
    end = tl.minimum(first + chunk, keys)
    seen_by_all = end
    if CAUSAL:
        end = tl.minimum(end, tl.minimum(tile * BLOCK_M + BLOCK_M, rows) + ahead)
        seen_by_all = tl.minimum(end, tile * BLOCK_M + ahead + 1)
    whole = first + tl.maximum(seen_by_all - first, 0) // BLOCK_N * BLOCK_N
    top, z = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    top, z = _row_step(
        query, k, mask, row, top, z, scale, first, whole, ahead, n, d, k_n, k_d, mask_n,
        False, CAUSAL, WIDTH, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    top, z = _row_step(
        query, k, mask, row, top, z, scale, whole, end, ahead, n, d, k_n, k_d, mask_n,
        True, CAUSAL, WIDTH, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    found = tl.where(z > 0, (top + tl.log2(tl.where(z > 0, z, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse + split.to(tl.int64) * lines + (b * heads + h) * rows + row, found, mask=row < rows)


@triton.jit
def _column_step(
    key: T, q: T, lse: T, counted: T, j: T, total: T, best: T, scale: T, begin: T, end: T, ahead: T, m: T, d: T,
    q_r: T, q_d: T, lse_r: T, counted_r: T,
    MAXIMA: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> T:  # fmt: skip
    """Add the weights of queries `begin` to `end` to what the keys have; CAUSAL where some may not look at all."""
    q += begin.to(tl.int64) * q_r
    for start in range(begin, end, BLOCK_M):
        row = start + m
        level = tl.load(lse + row * lse_r, mask=row < end, other=float("inf"))
        # Rows that see nothing or do not count weigh 2^-inf.
        level = tl.where(level == float("-inf"), float("inf"), level * 1.4426950408889634)
        if counted is not None:
            level = tl.where(tl.load(counted + row * counted_r, mask=row < end, other=0) != 0, level, float("inf"))
        query = load_columns(q, m, d, q_r, q_d, end - start, EDGE, WIDTH, BLOCK_D)
        q += BLOCK_M * q_r
        s = dot(key, query, tl.zeros([key.shape[0], BLOCK_M], tl.float32)) * scale - level[None, :]  # [N, M]
        if CAUSAL:
            s = tl.where(j[:, None] <= row[None, :] + ahead, s, float("-inf"))
        p = tl.exp2(s)
        total += tl.sum(p, 1)
        if MAXIMA:
            best = tl.maximum(best, tl.max(p, 1))
    return total, best


@triton.jit
def column_sums(
    q: T, k: T, mask: T, counted: T, lse: T, sums: T, maxima: T, scale: T, heads: T, rows: T, keys: T,
    q_b: T, q_h: T, q_r: T, q_d: T, k_b: T, k_h: T, k_n: T, k_d: T, mask_b: T, mask_n: T,
    counted_b: T, counted_r: T, lse_b: T, lse_h: T, lse_r: T,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Sums, and maxima if wanted, of a tile of columns [B, H, N]. Program tile + tiles * (prompt and head)."""
    q_b, q_h, q_r, k_b, k_h, k_n = q_b * STEP, q_h * STEP, q_r * STEP, k_b * STEP, k_h * STEP, k_n * STEP
    tiles = tl.cdiv(keys, BLOCK_N)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    j, ahead = tile * BLOCK_N + n, keys - rows
    k += b * k_b + (h // SHARE) * k_h + (tile * BLOCK_N).to(tl.int64) * k_n
    key = tl.load(
        k + n[:, None] * k_n + d[None, :] * k_d, mask=(j < keys)[:, None] & (d < WIDTH)[None, :], other=0.0
    )  # [N, D]
    q += b * q_b + h * q_h
    lse += b * lse_b + h * lse_h
    if counted is not None:
        counted += b * counted_b
    total, best = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    some = tl.program_id(0) * 0
    if CAUSAL:
        # Queries that see the first key of the tile but not yet its last.
        before = tl.maximum(tile * BLOCK_N - ahead, 0) // BLOCK_M * BLOCK_M
        after = tl.maximum(tl.minimum(tile * BLOCK_N + BLOCK_N, keys) - 1 - ahead, 0)
        some = tl.minimum(tl.cdiv(after, BLOCK_M) * BLOCK_M, rows)
        total, best = _column_step(
            key, q, lse, counted, j, total, best, scale, before, some, ahead, m, d, q_r, q_d, lse_r, counted_r,
            maxima is not None, True, True, WIDTH, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    whole = tl.maximum(rows // BLOCK_M * BLOCK_M, some)
    total, best = _column_step(
        key, q, lse, counted, j, total, best, scale, some, whole, ahead, m, d, q_r, q_d, lse_r, counted_r,
        maxima is not None, False, False, WIDTH, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    total, best = _column_step(
        key, q, lse, counted, j, total, best, scale, whole, rows, ahead, m, d, q_r, q_d, lse_r, counted_r,
        maxima is not None, True, False, WIDTH, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    out = (b * heads + h) * keys + j
    if mask is not None:
        # Only here: what a masked key would have got does not matter to the others.
        seen = tl.load(mask + b * mask_b + j.to(tl.int64) * mask_n, mask=j < keys, other=0) != 0
        total, best = tl.where(seen, total, 0.0), tl.where(seen, best, 0.0)
    tl.store(sums + out, total, mask=j < keys)
    if maxima is not None:
        tl.store(maxima + out, best, mask=j < keys)


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)


# By kernel, whether numbers are fp32, and whether heads are wider than 128. Others spill registers.
CONFIGS: dict[tuple[str, bool, bool], list[triton.Config]] = {
    ("rows", False, False): [
        _config(64, 64, 4, 3), _config(128, 64, 8, 3), _config(128, 128, 8, 2), _config(16, 128, 4, 3),
    ],
    ("rows", False, True): [_config(64, 64, 4, 2), _config(128, 64, 8, 2), _config(16, 64, 4, 2)],
    ("rows", True, False): [_config(32, 32, 8, 2), _config(32, 16, 8, 2), _config(16, 32, 8, 2)],
    ("rows", True, True): [_config(32, 16, 4, 2), _config(16, 32, 4, 2)],
    ("columns", False, False): [
        _config(64, 64, 4, 3), _config(64, 128, 8, 3), _config(128, 128, 8, 2), _config(32, 64, 4, 3),
    ],
    ("columns", False, True): [_config(64, 64, 4, 2), _config(64, 128, 8, 2), _config(32, 64, 4, 2)],
    ("columns", True, False): [_config(16, 32, 8, 2), _config(32, 16, 8, 2)],
    ("columns", True, True): [_config(16, 32, 4, 2), _config(32, 16, 4, 2)],
}  # fmt: skip
_KEY = ["ROWS", "KEYS", "WIDTH", "CAUSAL"]
_TUNED = {
    kind: Tuned(row_sums if kind[0] == "rows" else column_sums, configs, _KEY) for kind, configs in CONFIGS.items()
}


def split_keys(tiles: int, keys: int, device: torch.device) -> int:
    """Keys of a split: all, where tiles alone keep the card busy."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    splits = max(1, min(2 * cores // max(tiles, 1), triton.cdiv(keys, 2 * SPLIT)))
    return triton.cdiv(triton.cdiv(keys, splits), SPLIT) * SPLIT


def in_steps(q: torch.Tensor, k: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """(STEP, strides of q and k): all but the last in steps of 8 numbers where they allow it, else of 1.

    Triton looks whether 16 divides a stride and otherwise reads number by number. Heads of 72 channels, as SigLIP has,
    can be read in eights.
    """
    outer = (*q.stride()[:3], *k.stride()[:3])
    step = 1 if any(stride % 8 for stride in outer) else 8
    outer = tuple(stride // step for stride in outer)
    return step, (*outer[:3], q.stride(3), *outer[3:], k.stride(3))


@torch.library.custom_op("vlattn::received_attention", mutates_args=())
def _received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    causal: bool,
    key_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    lse: torch.Tensor | None,
    maxima: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, maxima (no numbers if not asked for), and log-sum-exp (none if given).

    chunk: keys of a split, 0 for what fits the card.
    """
    (batch, heads, rows, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    sums, best, found = _results(q, k, lse, maxima)
    if not rows or not sums.numel():
        return sums.zero_(), best.zero_(), found.fill_(-torch.inf)
    mask, counted = (None if x is None else x.view(torch.uint8) for x in (key_mask, query_mask))
    sizes = {"SHARE": heads // kv_heads, "WIDTH": width, "BLOCK_D": max(16, triton.next_power_of_2(width))}
    sizes |= {"CAUSAL": causal, "ROWS": triton.next_power_of_2(max(rows, 16))}
    sizes["KEYS"] = triton.next_power_of_2(max(keys, 16))
    sizes["STEP"], strides = in_steps(q, k)
    strides += mask.stride() if mask is not None else (0, 0)
    kind, pairs, base2 = (q.dtype == torch.float32, width > 128), batch * heads, scale * LOG2_E
    if lse is None:
        chunk = chunk or split_keys(triton.cdiv(rows, 64) * pairs, keys, q.device)
        splits, lines = triton.cdiv(keys, chunk), pairs * rows
        parts = found if splits == 1 else found.new_empty(splits, *found.shape)
        _TUNED[("rows", *kind)](
            lambda c: (triton.cdiv(rows, c["BLOCK_M"]) * pairs, splits),
            q, k, mask, parts, base2, heads, rows, keys, chunk, lines, *strides, **sizes,
        )  # fmt: skip
        if splits > 1:
            torch.logsumexp(parts, 0, out=found)
    level = found if lse is None else lse.float()
    _TUNED[("columns", *kind)](
        lambda c: (triton.cdiv(keys, c["BLOCK_N"]) * pairs,),
        q, k, mask, counted, level, sums, best if maxima else None, base2, heads, rows, keys, *strides,
        *(counted.stride() if counted is not None else (0, 0)), *level.stride(), **sizes,
    )  # fmt: skip
    return sums, best, found


def _results(q: Any, k: Any, lse: Any, maxima: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = (*q.shape[:2], k.shape[2])

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    return make(*columns), make(*columns) if maxima else make(0), make(*q.shape[:3]) if lse is None else make(0)


@_received_attention.register_fake
def _(
    q: Any, k: Any, scale: float, causal: bool, key_mask: Any, query_mask: Any, lse: Any, maxima: bool, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(q, k, lse, maxima)


@register_flop_formula(torch.ops.vlattn.received_attention)
def _flops(
    q: Any, k: Any, scale: Any, causal: Any, key_mask: Any, query_mask: Any, lse: Any, *args: Any, **kwargs: Any
) -> int:
    """One product for each sweep: what lies behind the causal edge counts too."""
    batch, heads, rows, width = q
    return (4 if lse is None else 2) * batch * heads * rows * k[2] * width


# Gradients ------------------------------------------------------------------------------------------------------------
BLOCK = 2**25
"""Weights that exist at one time on the way back."""


@torch.library.custom_op("vlattn::received_attention_backward", mutates_args=())
def _backward(
    sums_grad: torch.Tensor,
    lse_grad: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    key_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    fixed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and the given log-sum-exp. fixed: whether it was given, and does not follow q and k.

    With p the weights and g the gradient of the sums, that of a logit is p (g - sum of p g over its row), or p g.
    """
    (batch, heads, rows, width), keys = q.shape, k.shape[2]
    groups = k.shape[1]
    key = k.float()[:, :, None]  # [B, Hkv, 1, N, D]
    q_grad = torch.zeros(batch, groups, heads // groups, rows, width, device=q.device)
    k_grad = torch.zeros(batch, groups, keys, width, device=q.device)
    level_grad = torch.zeros(batch, groups, heads // groups, rows, device=q.device)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return x.float().unflatten(1, (groups, -1))

    gradient = grouped(sums_grad)[..., None, :]  # [B, Hkv, H / Hkv, 1, N]
    position = torch.arange(keys, device=q.device)
    step = max(1, BLOCK // max(batch * heads * keys, 1))
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        query, level = grouped(q[:, :, here]), grouped(lse[:, :, here])[..., None]
        weights = (query @ key.transpose(-1, -2) * scale - level).exp()  # [B, Hkv, H / Hkv, r, N]
        unseen = level == -torch.inf
        if key_mask is not None:
            unseen = unseen | ~key_mask[:, None, None, None]
        if causal:
            unseen = unseen | (position > torch.arange(here.start, here.stop, device=q.device)[:, None] + keys - rows)
        weights = weights.masked_fill(unseen, 0)
        slope = gradient
        if query_mask is not None:
            slope = slope * query_mask[:, None, None, here, None]
        own = (weights * slope).sum(-1)
        level_grad[..., here] = -own
        if not fixed:
            slope = slope - own[..., None]
        if lse_grad is not None:
            slope = slope + grouped(lse_grad[:, :, here])[..., None]
        slope = weights * slope * scale
        q_grad[..., here, :] = slope @ key
        k_grad += (slope.transpose(-1, -2) @ query).sum(2)
    return q_grad.flatten(1, 2).to(q.dtype), k_grad.to(k.dtype), level_grad.flatten(1, 2).to(lse.dtype)


@_backward.register_fake
def _(
    sums_grad: Any, lse_grad: Any, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, causal: bool,
    key_mask: Any, query_mask: Any, fixed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, lse))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, ctx.scale, ctx.causal, key_mask, query_mask, lse, _, _ = inputs
    ctx.fixed = lse is not None
    ctx.save_for_backward(q, k, output[2] if lse is None else lse, key_mask, query_mask)


def _gradients(ctx: Any, sums_grad: torch.Tensor, maxima_grad: Any, lse_grad: torch.Tensor) -> tuple[Any, ...]:
    q, k, lse, key_mask, query_mask = ctx.saved_tensors
    grads = torch.ops.vlattn.received_attention_backward(
        sums_grad, None if ctx.fixed else lse_grad, q, k, lse, ctx.scale, ctx.causal, key_mask, query_mask, ctx.fixed
    )
    return grads[0], grads[1], None, None, None, None, grads[2] if ctx.fixed else None, None, None


_received_attention.register_autograd(_gradients, setup_context=_save)


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    maxima: bool = False,
    chunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(sums, maxima, log-sum-exp); see `vlattn.ops.received_attention`. chunk: keys of a split, 0 for what fits."""
    sums, best, found = torch.ops.vlattn.received_attention(
        q, k, float(scale), causal, key_mask, query_mask, lse, maxima, chunk
    )
    return sums, best if maxima else None, found if lse is None else lse


# Compilation for cards that are not there -----------------------------------------------------------------------------
def compilations() -> list[Compilation]:
    """Every configuration under a causal order with every mask, and maxima.

    Strides are taken as multiples of 8; half precision also has heads of 72 channels, as in SigLIP.
    """
    return [
        _compilation(kind, fp32, width, config)
        for (kind, fp32, wide), configs in CONFIGS.items()
        for width in ((256,) if wide else (64, 128) if fp32 else (64, 72, 128))
        for config in configs
    ]


def _compilation(kind: str, fp32: bool, width: int, config: triton.Config) -> Compilation:
    kernel, half = row_sums if kind == "rows" else column_sums, "fp32" if fp32 else "bf16"
    names = kernel.arg_names
    types = dict.fromkeys(names[names.index("heads") : names.index("SHARE")], "i32")
    types |= {"scale": "fp32", "q": f"*{half}", "k": f"*{half}", "mask": "*u8", "counted": "*u8"}
    types |= dict.fromkeys(("lse", "sums", "maxima"), "*fp32")
    constants: dict[str, Any] = {"q_d": 1, "k_d": 1, "mask_n": 1, "counted_r": 1, "lse_r": 1, "CAUSAL": True}
    constants |= {"SHARE": 4, "WIDTH": width, "BLOCK_D": triton.next_power_of_2(width), "ROWS": 4096, "KEYS": 4096}
    constants |= {"STEP": 8, **config.kwargs}
    constants = {name: value for name, value in constants.items() if name in names}
    kept = {name: types[name] for name in names if name in types and name not in constants}
    aligned = [name for name, type_ in kept.items() if type_[0] == "*"]
    title = "x".join(str(config.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N"))
    return Compilation(
        f"received {kind} {half} D{width} {title}", kernel, kept, constants, config.num_warps, config.num_stages,
        aligned,
    )  # fmt: skip
