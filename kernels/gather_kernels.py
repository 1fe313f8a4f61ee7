"""Rows copied by index: several tensors in one launch, or a cache layer inside its own memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy(
    source: tl.tensor, target: tl.tensor, place: tl.tensor, known: tl.tensor, row: tl.tensor, at: tl.tensor,
    width: tl.tensor, source_n: tl.tensor, source_w: tl.tensor, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """target[row] = source[place], 0 where the place is not known; `at` says which rows there are."""
    for start in range(0, width, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        cells = place[:, None] * source_n + w[None, :].to(tl.int64) * source_w
        x = tl.load(source + cells, mask=known[:, None] & (w < width)[None, :], other=0)
        tl.store(target + row[:, None] * width + w[None, :], x, mask=at[:, None] & (w < width)[None, :])


@triton.jit
def gather(
    index: tl.tensor, kept: tl.tensor, tokens: tl.tensor, heads: tl.tensor, index_b: tl.tensor, index_k: tl.tensor,
    source0: tl.tensor, target0: tl.tensor, width0: tl.tensor, b0: tl.tensor, h0: tl.tensor, n0: tl.tensor,
    w0: tl.tensor,
    source1: tl.tensor, target1: tl.tensor, width1: tl.tensor, b1: tl.tensor, h1: tl.tensor, n1: tl.tensor,
    w1: tl.tensor,
    source2: tl.tensor, target2: tl.tensor, width2: tl.tensor, b2: tl.tensor, h2: tl.tensor, n2: tl.tensor,
    w2: tl.tensor,
    source3: tl.tensor, target3: tl.tensor, width3: tl.tensor, b3: tl.tensor, h3: tl.tensor, n3: tl.tensor,
    w3: tl.tensor,
    WIDEST: tl.constexpr, ROUND0: tl.constexpr, ROUND1: tl.constexpr, ROUND2: tl.constexpr, ROUND3: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """A few rows of up to four tensors [B, H, N, W] to [B, H, K, W]. Program: tile of rows + tiles * (batch and head).

    index [B, K]: outside 0 to N - 1 stands for a row of zeros. b, h, n, w: strides of a source; targets are contiguous.
    ROUND: a width rounded up, None for no tensor. WIDEST: the largest, by which tuning goes.
    """
    tiles = tl.cdiv(kept, BLOCK_K)
    tile, pair = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // heads, pair % heads
    rank = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    at = rank < kept
    place = tl.load(index + b * index_b + rank * index_k, mask=at, other=-1).to(tl.int64)
    known = (place >= 0) & (place < tokens)
    row = pair * kept + rank
    if ROUND0 is not None:
        _copy(source0 + b * b0 + h * h0, target0, place, known, row, at, width0, n0, w0, min(ROUND0, BLOCK_W))
    if ROUND1 is not None:
        _copy(source1 + b * b1 + h * h1, target1, place, known, row, at, width1, n1, w1, min(ROUND1, BLOCK_W))
    if ROUND2 is not None:
        _copy(source2 + b * b2 + h * h2, target2, place, known, row, at, width2, n2, w2, min(ROUND2, BLOCK_W))
    if ROUND3 is not None:
        _copy(source3 + b * b3 + h * h3, target3, place, known, row, at, width3, n3, w3, min(ROUND3, BLOCK_W))


@triton.jit
def compact(
    index: tl.tensor, kept: tl.tensor, tokens: tl.tensor, heads: tl.tensor, index_b: tl.tensor, index_k: tl.tensor,
    key: tl.tensor, key_width: tl.tensor, key_b: tl.tensor, key_h: tl.tensor, key_n: tl.tensor, key_d: tl.tensor,
    value: tl.tensor, value_width: tl.tensor, value_b: tl.tensor, value_h: tl.tensor, value_n: tl.tensor,
    value_d: tl.tensor,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """Some columns of the rows of one head move to its first K places. Program (batch and head, columns).

    index [B, K] is ascending with padding at the end, so that index[r] >= r: what a tile of rows writes lies in front
    of all that later tiles read, and a tile is read before any of it is written.
    """
    pair, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_W
    b, h = pair // heads, pair % heads
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    w = first + tl.arange(0, BLOCK_W)
    for start in range(0, kept, BLOCK_K):
        rank = start + tl.arange(0, BLOCK_K)
        at = rank < kept
        place = tl.load(index + b * index_b + rank * index_k, mask=at, other=-1).to(tl.int64)
        known = (place >= 0) & (place < tokens)
        k_inside, v_inside = (w < key_width)[None, :], (w < value_width)[None, :]
        k_columns, v_columns = w[None, :].to(tl.int64) * key_d, w[None, :].to(tl.int64) * value_d
        k_rows = tl.load(key + place[:, None] * key_n + k_columns, mask=known[:, None] & k_inside, other=0)
        v_rows = tl.load(value + place[:, None] * value_n + v_columns, mask=known[:, None] & v_inside, other=0)
        tl.debug_barrier()  # other warps may still be reading what this one is about to write
        rank = rank.to(tl.int64)
        tl.store(key + rank[:, None] * key_n + k_columns, k_rows, mask=at[:, None] & k_inside)
        tl.store(value + rank[:, None] * value_n + v_columns, v_rows, mask=at[:, None] & v_inside)
