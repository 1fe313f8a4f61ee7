"""Pooling of tokens by a few queries, forward and backward: a token is read once, however wide it is.

Tokens may be as wide as a model, too wide for one product of matrices in registers. They are cut into CHUNKS pieces
of CHUNK channels, the batch of a batched product: each warp has its own channels of the queries, of the tokens and of
the sums, and warps meet only where the pieces of a logit are added. So a tile of tokens that was read for the logits is
still there to be weighed.

Logits are in base 2. A tile of tokens is [C, N, E]: piece, token, channel of the piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlattn.kernels.launch import dot


@triton.jit
def _logits(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Products over all channels, from those over the channels of each piece: [C, I, E], [C, E, J] to [I, J]."""
    none = tl.zeros([left.shape[0], left.shape[1], right.shape[2]], tl.float32)
    return tl.sum(dot(left, right, none), 0)


@triton.jit
def _weighed(weights: tl.tensor, what: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """sums + weights @ what, the same weights [I, J] for every piece of `what` [C, J, E]."""
    same = tl.broadcast_to(weights.to(what.dtype)[None], (what.shape[0], weights.shape[0], weights.shape[1]))
    return dot(same, what, sums)


@triton.jit
def _finite(level: tl.tensor) -> tl.tensor:
    """The level that logits are taken from: 0 where no token was seen, so that 2^(-inf - level) is 0."""
    return tl.where(level == float("-inf"), 0.0, level)


@triton.jit
def forward(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mask: tl.tensor, out: tl.tensor, lse: tl.tensor, scale: tl.tensor,
    heads: tl.tensor, queries: tl.tensor, tokens: tl.tensor, chunk: tl.tensor,
    q_b: tl.tensor, q_h: tl.tensor, q_m: tl.tensor, q_d: tl.tensor, k_b: tl.tensor, k_h: tl.tensor, k_n: tl.tensor,
    k_d: tl.tensor,
    v_b: tl.tensor, v_h: tl.tensor, v_n: tl.tensor, v_d: tl.tensor, mask_b: tl.tensor, mask_n: tl.tensor,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of queries over the tokens of one split. Program (tile + tiles * (image and head), split).

    v: None where tokens are their own values. out [S, B, H, M, D], lse [S, B, H, M]: what each split makes alone.
    chunk: tokens of a split. SHARE: query heads that share a key head.
    """
    tiles, pairs = tl.cdiv(queries, BLOCK_M), tl.num_programs(0) // tl.cdiv(queries, BLOCK_M)
    tile, pair, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1).to(tl.int64)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m, n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = m < queries
    piece = tl.arange(0, CHUNKS)[:, None, None] * CHUNK
    d = piece + tl.arange(0, CHUNK)[None, None, :]  # [C, 1, E]
    upright = piece + tl.arange(0, CHUNK)[None, :, None]  # [C, E, 1]
    query = tl.load(
        q + b * q_b + h * q_h + m[None, None, :] * q_m + upright * q_d,
        mask=at[None, None, :] & (upright < WIDTH), other=0.0,
    )  # [C, E, M]  # fmt: skip
    first = split * chunk
    end = tl.minimum(first + chunk, tokens)
    k += b * k_b + (h // SHARE) * k_h + first * k_n
    if v is not None:
        v += b * v_b + (h // SHARE) * v_h + first * v_n
    if mask is not None:
        mask += b * mask_b + first * mask_n
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([CHUNKS, BLOCK_M, CHUNK], tl.float32)
    for start in range(first, end, BLOCK_N):
        live = start + n < end
        there = live[None, :, None] & (d < WIDTH)
        value = tl.load(k + n[None, :, None] * k_n + d * k_d, mask=there, other=0.0)  # [C, N, E]
        s = _logits(value, query) * scale  # [N, M]
        if mask is not None:
            live = live & (tl.load(mask + n * mask_n, mask=live, other=0) != 0)
            mask += BLOCK_N * mask_n
        s = tl.where(live[:, None], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        base = _finite(new)
        fade = tl.exp2(top - base)
        e = tl.exp2(s - base[None, :])
        z = z * fade + tl.sum(e, 0)
        top = new
        if v is not None:
            value = tl.load(v + n[None, :, None] * v_n + d * v_d, mask=there, other=0.0)
            v += BLOCK_N * v_n
        sums = _weighed(tl.trans(e), value, sums * fade[None, :, None])
        k += BLOCK_N * k_n
    row = (split * pairs + pair) * queries + m
    inverse = 1.0 / tl.where(z > 0, z, 1.0)
    cells = row[None, :, None] * WIDTH + d
    tl.store(
        out + cells, (sums * inverse[None, :, None]).to(out.dtype.element_ty), mask=at[None, :, None] & (d < WIDTH)
    )
    tl.store(lse + row, tl.where(z > 0, top + tl.log2(tl.where(z > 0, z, 1.0)), float("-inf")), mask=at)


@triton.jit
def backward_query(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mask: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor,
    out: tl.tensor, scale: tl.tensor, factor: tl.tensor,
    heads: tl.tensor, queries: tl.tensor, tokens: tl.tensor, chunk: tl.tensor, batch: tl.tensor, images: tl.tensor,
    q_b: tl.tensor, q_h: tl.tensor, q_m: tl.tensor, q_d: tl.tensor, k_b: tl.tensor, k_h: tl.tensor, k_n: tl.tensor,
    k_d: tl.tensor,
    v_b: tl.tensor, v_h: tl.tensor, v_n: tl.tensor, v_d: tl.tensor, mask_b: tl.tensor, mask_n: tl.tensor,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of a tile of queries, over some images and one split. Program (tile + tiles * (images, head), split).

    grad [B, H, M, D], lse and delta [B, H, M]: contiguous. out [images, H, S, M, D]. factor: scale of the logits.
    """
    tiles, splits = tl.cdiv(queries, BLOCK_M), tl.num_programs(1)
    tile, pair, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    some, h = pair // heads, (pair % heads).to(tl.int64)
    m, n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = m < queries
    piece = tl.arange(0, CHUNKS)[:, None, None] * CHUNK
    d = piece + tl.arange(0, CHUNK)[None, None, :]  # [C, 1, E]
    upright = piece + tl.arange(0, CHUNK)[None, :, None]  # [C, E, 1]
    inside = at[None, None, :] & (upright < WIDTH)
    query = tl.load(
        q + (some * images).to(tl.int64) * q_b + h * q_h + m[None, None, :] * q_m + upright * q_d,
        mask=inside, other=0.0,
    )  # [C, E, M]  # fmt: skip
    first = split.to(tl.int64) * chunk
    end = tl.minimum(first + chunk, tokens)
    sums = tl.zeros([CHUNKS, BLOCK_M, CHUNK], tl.float32)
    for image in range(some * images, tl.minimum((some + 1) * images, batch)):
        b = tl.zeros([], tl.int64) + image
        row = (b * heads + h) * queries + m
        pull = tl.load(grad + row[None, None, :] * WIDTH + upright, mask=inside, other=0.0)  # [C, E, M]
        level = _finite(tl.load(lse + row, mask=at, other=0.0))
        mean = tl.load(delta + row, mask=at, other=0.0)
        keys = k + b * k_b + (h // SHARE) * k_h + first * k_n
        for start in range(first, end, BLOCK_N):
            live = start + n < end
            there = live[None, :, None] & (d < WIDTH)
            key = tl.load(keys + n[None, :, None] * k_n + d * k_d, mask=there, other=0.0)  # [C, N, E]
            keys += BLOCK_N * k_n
            s = _logits(key, query) * scale  # [N, M]
            if v is None:
                t = _logits(key, pull)
            else:
                values = v + b * v_b + (h // SHARE) * v_h + start * v_n
                t = _logits(tl.load(values + n[None, :, None] * v_n + d * v_d, mask=there, other=0.0), pull)
            if mask is not None:
                live = live & (tl.load(mask + b * mask_b + (start + n) * mask_n, mask=live, other=0) != 0)
            p = tl.exp2(tl.where(live[:, None], s, float("-inf")) - level[None, :])
            sums = _weighed(tl.trans(p * (t - mean[None, :])), key, sums)
    row = (pair.to(tl.int64) * splits + split) * queries + m
    tl.store(out + row[None, :, None] * WIDTH + d, sums * factor, mask=at[None, :, None] & (d < WIDTH))


@triton.jit
def backward_tokens(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mask: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor,
    k_grad: tl.tensor, v_grad: tl.tensor, scale: tl.tensor,
    factor: tl.tensor, kv_heads: tl.tensor, queries: tl.tensor, tokens: tl.tensor,
    q_b: tl.tensor, q_h: tl.tensor, q_m: tl.tensor, q_d: tl.tensor, k_b: tl.tensor, k_h: tl.tensor, k_n: tl.tensor,
    k_d: tl.tensor,
    v_b: tl.tensor, v_h: tl.tensor, v_n: tl.tensor, v_d: tl.tensor, mask_b: tl.tensor, mask_n: tl.tensor,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of a tile of tokens, from all queries that look at them. Program (tile + tiles * (image and key head)).

    k_grad, v_grad [B, Hkv, N, D]: contiguous; v_grad is None where tokens are their own values.
    """
    tiles = tl.cdiv(tokens, BLOCK_N)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, g = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    m, j = tl.arange(0, BLOCK_M), tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, CHUNKS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]  # [C, 1, E]
    live = j < tokens
    there = live[None, :, None] & (d < WIDTH)
    key = tl.load(k + b * k_b + g * k_h + j[None, :, None] * k_n + d * k_d, mask=there, other=0.0)  # [C, N, E]
    value = key
    if v is not None:
        value = tl.load(v + b * v_b + g * v_h + j[None, :, None] * v_n + d * v_d, mask=there, other=0.0)
    if mask is not None:
        live = live & (tl.load(mask + b * mask_b + j * mask_n, mask=live, other=0) != 0)
    key_sums = tl.zeros([CHUNKS, BLOCK_N, CHUNK], tl.float32)
    if v is not None:
        value_sums = tl.zeros([CHUNKS, BLOCK_N, CHUNK], tl.float32)
    steps = tl.cdiv(queries, BLOCK_M)
    for step in range(0, SHARE * steps):
        h, row = g * SHARE + step // steps, (step % steps) * BLOCK_M + m
        at = row < queries
        inside = at[None, :, None] & (d < WIDTH)
        query = tl.load(q + b * q_b + h * q_h + row[None, :, None] * q_m + d * q_d, mask=inside, other=0.0)  # [C, M, E]
        row = (b * SHARE * kv_heads + h) * queries + row
        pull = tl.load(grad + row[None, :, None] * WIDTH + d, mask=inside, other=0.0)  # [C, M, E]
        level = _finite(tl.load(lse + row, mask=at, other=0.0))
        s = _logits(query, tl.trans(key, 0, 2, 1)) * scale  # [M, N]
        s = tl.where(at[:, None] & live[None, :], s, float("-inf"))
        p = tl.exp2(s - level[:, None])
        t = _logits(pull, tl.trans(value, 0, 2, 1))
        slope = p * (t - tl.load(delta + row, mask=at, other=0.0)[:, None]) * factor
        key_sums = _weighed(tl.trans(slope), query, key_sums)
        if v is None:
            key_sums = _weighed(tl.trans(p), pull, key_sums)
        else:
            value_sums = _weighed(tl.trans(p), pull, value_sums)
    cells = (pair.to(tl.int64) * tokens + j)[None, :, None] * WIDTH + d
    tl.store(k_grad + cells, key_sums.to(k_grad.dtype.element_ty), mask=there)
    if v is not None:
        tl.store(v_grad + cells, value_sums.to(v_grad.dtype.element_ty), mask=there)
