"""Attention over keys in four groups, from one online softmax.

Keys fall into SETS disjoint sets, each with a running maximum and sum of values of its own. A tile of keys takes one
step of flash attention for each set that it has keys of, so tiles of one kind, as most are, cost what they cost there.

SETS  set 0          set 1          set 2          set 3
1     all
2     rest, text     image
3     rest           visual         sinks
4     rest           visual         visual sinks   text sinks

Query heads that share a key head are rows of one tile, head fastest: row m is head m % SHARE of query m // SHARE.
Logits are in base 2 until the log-sum-exp is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import tensor as T

from vlattn.kernels.grouped_finish import finish, leave
from vlattn.kernels.launch import dot


@triton.jit
def _step(s: T, inside: T, v: T, top: T, sums: T, EVERY: tl.constexpr) -> T:
    """A step of an online softmax over the keys `inside`: the new maximum, what older sums fade by, 2^s, the sums."""
    if not EVERY:
        s = tl.where(inside[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    fade = tl.exp2(top - base)
    e = tl.exp2(s - base[:, None])
    sums = dot(e.to(v.dtype), v, sums * fade[:, None])
    return new, fade, e, sums


@triton.jit
def _total(z: T, fade: T, e: T, kind: T, GROUP: tl.constexpr, count: T) -> T:
    """The sum of 2^s over a group, with what this tile adds."""
    z = z * fade
    if count > 0:
        z += tl.sum(tl.where((kind == GROUP)[None, :], e, 0.0), 1)
    return z


@triton.jit
def _kinds(groups: T, mask: T, j: T, end: T, groups_n: T, mask_n: T, MASK: tl.constexpr) -> T:
    """Group of each key of a tile, 4 for those that nobody may see."""
    kind = tl.load(groups + j * groups_n, mask=j < end, other=0).to(tl.int32) & 3
    live = j < end
    if MASK == 1:
        live &= tl.load(mask + j * mask_n, mask=j < end, other=0) != 0
    return tl.where(live, kind, 4)


@triton.jit
def attend(
    q: T, k: T, v: T, groups: T, mask: T, edited: T, gamma: T, weights: T, slack: T, head_scale: T,
    out: T, lse: T, mass: T, partial: T, without: T, shift: T, chosen: T, stats: T, split_sums: T,
    scale: T, sink_share: T, min_mass: T, move: T,
    heads: T, kv_heads: T, rows: T, keys: T, chunk: T, lines: T,
    q_b: T, q_h: T, q_r: T, q_d: T, k_b: T, k_h: T, k_n: T, k_d: T,
    v_b: T, v_h: T, v_n: T, v_d: T, groups_b: T, groups_n: T, mask_b: T, mask_r: T, mask_n: T,
    gamma_b: T, gamma_n: T,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SETS: tl.constexpr, MASSES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of rows over the keys of one split. Program (tile of rows + tiles * (prompt and key head), split).

    MASK: 1 for a key mask [B, N], 2 for [B, R, N]. stats, split_sums: where splits leave their state, if
    there are some. lines: B H R. KEYS, ROWS: rounded sizes, which choose the configuration.
    """
    tiles = tl.cdiv(rows * SHARE, BLOCK_M)
    tile, pair, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    b, g = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    m, n, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row, at = m // SHARE, m < rows * SHARE
    h = g * SHARE + m % SHARE
    wide = d < WIDTH
    query = tl.load(
        q + b * q_b + h[:, None] * q_h + row[:, None].to(tl.int64) * q_r + d[None, :] * q_d,
        mask=at[:, None] & wide[None, :], other=0.0,
    )  # [M, D]  # fmt: skip
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    groups += b * groups_b
    first = split * chunk
    if MASK > 0:
        mask += b * mask_b
    # Far rows and keys are reached by scalars of 64 bits, tiles from there by 32.
    if MASK == 2:
        top_row = tile * BLOCK_M // SHARE
        mask += top_row.to(tl.int64) * mask_r + first.to(tl.int64) * mask_n
        line_of_mask = (tl.minimum(row, rows - 1) - top_row) * mask_r  # [M]
    if gamma is not None:
        gamma += b * gamma_b
        gate = tl.full([BLOCK_M], 1.0, tl.float32)
        if weights is not None:
            gate = tl.load(weights + b * heads + h, mask=at, other=0.0)
        if edited is not None:
            gate = tl.where(tl.load(edited + b * rows + row, mask=at, other=0) != 0, gate, 0.0)

    none = tl.full([BLOCK_M], float("-inf"), tl.float32)
    top0, top1, top2, top3 = none, none, none, none
    zero = tl.zeros([BLOCK_M], tl.float32)
    z0, z1, z2, z3 = zero, zero, zero, zero
    empty = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums0, sums1, sums2, sums3 = empty, empty, empty, empty

    end = tl.minimum(first + chunk, keys)
    edge = end - BLOCK_N + 1  # tiles that start here or later do not lie inside
    if CAUSAL:
        last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // SHARE, rows - 1)
        end = tl.minimum(end, last + keys - rows + 1)
        edge = tl.minimum(edge, tile * BLOCK_M // SHARE + keys - rows + 2 - BLOCK_N)
    # Kinds are read one tile ahead: everything in a tile waits for them.
    ahead = _kinds(groups, mask, first + n, end, groups_n, mask_n, MASK)
    k += split.to(tl.int64) * chunk * k_n
    v += split.to(tl.int64) * chunk * v_n
    for start in range(first, end, BLOCK_N):
        j = start + n
        kind = ahead
        ahead = _kinds(groups, mask, j + BLOCK_N, end, groups_n, mask_n, MASK)
        live = kind < 4
        key = tl.load(
            k + n[None, :] * k_n + d[:, None] * k_d, mask=(j < end)[None, :] & wide[:, None], other=0.0
        )  # [D, N]
        s = dot(query, key, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale  # [M, N]
        if gamma is not None:
            raised = tl.load(gamma + j * gamma_n, mask=j < end, other=0.0).to(tl.float32)
            s += gate[:, None] * raised[None, :] * tl.abs(s)
        if MASK == 2:
            seen = tl.load(mask + line_of_mask[:, None] + n[None, :] * mask_n, mask=(j < end)[None, :], other=0)
            mask += BLOCK_N * mask_n
            s = tl.where(seen != 0, s, float("-inf"))
        if MASK == 1:
            s = tl.where(live[None, :], s, float("-inf"))
        if start >= edge:
            inside = live[None, :]
            if CAUSAL:
                inside = inside & (j[None, :] <= row[:, None] + keys - rows)
            s = tl.where(inside, s, float("-inf"))
        value = tl.load(
            v + n[:, None] * v_n + d[None, :] * v_d, mask=(j < end)[:, None] & wide[None, :], other=0.0
        )  # [N, D]
        k += BLOCK_N * k_n
        v += BLOCK_N * v_n
        if MASSES:
            # How many keys of each group, eight bits for each.
            counts = tl.sum(tl.where(live, 1 << (8 * (kind & 3)), 0), 0)
            n0, n1, n2, n3 = counts & 255, (counts >> 8) & 255, (counts >> 16) & 255, (counts >> 24) & 255
        if SETS == 1:
            top0, fade, e, sums0 = _step(s, live, value, top0, sums0, True)
            if MASSES:
                z0, z1 = _total(z0, fade, e, kind, 0, n0), _total(z1, fade, e, kind, 1, n1)
                z2, z3 = _total(z2, fade, e, kind, 2, n2), _total(z3, fade, e, kind, 3, n3)
            else:
                z0 = z0 * fade + tl.sum(e, 1)
        if SETS == 2:
            if n0 + n3 > 0:
                top0, fade, e, sums0 = _step(s, (kind == 0) | (kind == 3), value, top0, sums0, False)
                z0, z3 = _total(z0, fade, e, kind, 0, n0), _total(z3, fade, e, kind, 3, n3)
            if n1 + n2 > 0:
                top1, fade, e, sums1 = _step(s, (kind == 1) | (kind == 2), value, top1, sums1, False)
                z1, z2 = _total(z1, fade, e, kind, 1, n1), _total(z2, fade, e, kind, 2, n2)
        if SETS >= 3:
            if n0 > 0:
                top0, fade, e, sums0 = _step(s, kind == 0, value, top0, sums0, False)
                z0 = z0 * fade + tl.sum(e, 1)
            if n1 > 0:
                top1, fade, e, sums1 = _step(s, kind == 1, value, top1, sums1, False)
                z1 = z1 * fade + tl.sum(e, 1)
        if SETS == 3:  # noqa: SIM102  (known before n2 and n3 are)
            if n2 + n3 > 0:
                top2, fade, e, sums2 = _step(s, (kind == 2) | (kind == 3), value, top2, sums2, False)
                z2, z3 = _total(z2, fade, e, kind, 2, n2), _total(z3, fade, e, kind, 3, n3)
        if SETS == 4:
            if n2 > 0:
                top2, fade, e, sums2 = _step(s, kind == 2, value, top2, sums2, False)
                z2 = z2 * fade + tl.sum(e, 1)
            if n3 > 0:
                top3, fade, e, sums3 = _step(s, kind == 3, value, top3, sums3, False)
                z3 = z3 * fade + tl.sum(e, 1)

    o = (b * heads + h) * rows + row
    if stats is None:
        finish(
            o, at, tl.zeros([BLOCK_M], tl.int64) + b, h, row, d, heads, rows, WIDTH,
            top0, top1, top2, top3, z0, z1, z2, z3, sums0, sums1, sums2, sums3,
            edited, slack, head_scale, sink_share, min_mass, move,
            out, lse, mass, partial, without, shift, chosen, SETS,
        )  # fmt: skip
    else:
        line = split.to(tl.int64) * lines + o
        leave(stats, split_sums, line, at, d, top0, z0, sums0, 0, SETS, WIDTH)
        leave(stats, split_sums, line, at, d, top1, z1, sums1, 1, SETS, WIDTH)
        leave(stats, split_sums, line, at, d, top2, z2, sums2, 2, SETS, WIDTH)
        leave(stats, split_sums, line, at, d, top3, z3, sums3, 3, SETS, WIDTH)
