"""From the sums of an online softmax over sets of keys to what `grouped_attention` gives, and the merge of split keys.

The sets are those of `grouped_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import tensor as T


@triton.jit
def _over(top_a: T, z_a: T, sums_a: T, top_b: T, z_b: T, sums_b: T) -> T:
    """The output of attention over the union of two sets; 0 where both are empty."""
    best = tl.maximum(top_a, top_b)
    base = tl.where(best == float("-inf"), 0.0, best)
    a, b = tl.exp2(top_a - base), tl.exp2(top_b - base)
    z = z_a * a + z_b * b
    inverse = 1.0 / tl.where(z > 0, z, 1.0)
    return sums_a * (a * inverse)[:, None] + sums_b * (b * inverse)[:, None]


@triton.jit
def finish(
    o: T, at: T, b: T, h: T, row: T, d: T, heads: T, rows: T, WIDTH: tl.constexpr,
    top0: T, top1: T, top2: T, top3: T, z0: T, z1: T, z2: T, z3: T,
    sums0: T, sums1: T, sums2: T, sums3: T,
    edited: T, slack: T, head_scale: T, sink_share: T, min_mass: T, move: T,
    out: T, lse: T, mass: T, partial: T, without: T, shift: T, chosen_out: T, SETS: tl.constexpr,
) -> None:  # fmt: skip
    """From sums to results. o: place of each row in [B H R]; at: which rows there are; b, h, row: the same apart."""
    cells = o[:, None] * WIDTH + d[None, :]  # [M, D]
    there = at[:, None] & (d < WIDTH)[None, :]
    if without is not None:
        if SETS == 2:
            others, image = z0 + z3, z1 + z2
            left = sums0 * (1.0 / tl.where(others > 0, others, 1.0))[:, None]
            seen = sums1 * (1.0 / tl.where(image > 0, image, 1.0))[:, None]
        else:
            left = _over(top0, z0, sums0, top3, z3, sums3)
            seen = _over(top1, z1, sums1, top2, z2, sums2)
        tl.store(without + cells, left, mask=there)
        distance = tl.sqrt(tl.sum((seen - left) * (seen - left), 1))
    best = top0
    if SETS >= 2:
        best = tl.maximum(best, top1)
    if SETS >= 3:
        best = tl.maximum(best, top2)
    if SETS == 4:
        best = tl.maximum(best, top3)
    base = tl.where(best == float("-inf"), 0.0, best)
    f0 = tl.exp2(top0 - base)
    f1, f2, f3 = f0, f0, f0
    if SETS >= 2:
        f1 = tl.exp2(top1 - base)
        f2 = f1
    if SETS >= 3:
        f2 = tl.exp2(top2 - base)
        f3 = f2
    if SETS == 4:
        f3 = tl.exp2(top3 - base)
    z0, z1, z2, z3 = z0 * f0, z1 * f1, z2 * f2, z3 * f3
    total = z0 + z1 + z2 + z3
    safe = tl.where(total > 0, total, 1.0)
    inverse = 1.0 / safe
    z0, z1, z2, z3 = z0 * inverse, z1 * inverse, z2 * inverse, z3 * inverse  # the masses
    f0, f1, f2, f3 = f0 * inverse, f1 * inverse, f2 * inverse, f3 * inverse
    if lse is not None:
        tl.store(lse + o, tl.where(total > 0, (base + tl.log2(safe)) * 0.6931471805599453, float("-inf")), mask=at)
    if mass is not None:
        tl.store(mass + o * 4, z0, mask=at)
        tl.store(mass + o * 4 + 1, z1, mask=at)
        tl.store(mass + o * 4 + 2, z2, mask=at)
        tl.store(mass + o * 4 + 3, z3, mask=at)
    if shift is not None:
        tl.store(shift + o, (z1 + z2) * distance, mask=at)
    if partial is not None:
        parts = o[:, None] * (4 * WIDTH) + d[None, :]
        tl.store(partial + parts, sums0 * f0[:, None], mask=there)
        tl.store(partial + parts + WIDTH, sums1 * f1[:, None], mask=there)
        tl.store(partial + parts + 2 * WIDTH, sums2 * f2[:, None], mask=there)
        tl.store(partial + parts + 3 * WIDTH, sums3 * f3[:, None], mask=there)
    if slack is not None:
        image = z1 + z2
        # False wherever the slack is NaN.
        chosen = z2 <= sink_share * (image + tl.load(slack + b, mask=at, other=0.0))
        chosen = chosen & (image >= min_mass) & (z1 > 0)
        if edited is not None:
            chosen = chosen & (tl.load(edited + b * rows + row, mask=at, other=0) != 0)
        tl.store(chosen_out + o, chosen.to(tl.uint8), mask=at)
        f1 = f1 * tl.where(chosen, 1.0 + move * (z2 + z3) / tl.where(chosen, z1, 1.0), 1.0)
        kept = tl.where(chosen, 1.0 - move, 1.0)
        f2, f3 = f2 * kept, f3 * kept
    if head_scale is not None:
        factor = tl.load(head_scale + b * heads + h, mask=at, other=0.0)
        f0, f1, f2, f3 = f0 * factor, f1 * factor, f2 * factor, f3 * factor
    result = sums0 * f0[:, None]
    if SETS == 2:
        result += sums1 * f1[:, None]
    if SETS >= 3:
        result += sums1 * f1[:, None] + sums2 * f2[:, None]
    if SETS == 4:
        result += sums3 * f3[:, None]
    tl.store(out + cells, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def leave(
    stats: T, split_sums: T, line: T, at: T, d: T, top: T, z: T, sums: T,
    SET: tl.constexpr, SETS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """A split's state of one set, and of the group of the same number."""
    tl.store(stats + line * 8 + 4 + SET, z, mask=at)
    if SET < SETS:
        tl.store(stats + line * 8 + SET, top, mask=at)
        cells = (line[:, None] * SETS + SET) * WIDTH + d[None, :]
        tl.store(split_sums + cells, sums, mask=at[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _join(
    stats: T, split_sums: T, line: T, at: T, d: T, top: T, sums: T,
    SET: tl.constexpr, SETS: tl.constexpr, WIDTH: tl.constexpr,
) -> T:  # fmt: skip
    """One more split of a set: the new maximum, what older and new sums fade by, the sums."""
    found = tl.load(stats + line * 8 + SET, mask=at, other=float("-inf"))
    new = tl.maximum(top, found)
    base = tl.where(new == float("-inf"), 0.0, new)
    old, young = tl.exp2(top - base), tl.exp2(found - base)
    cells = (line[:, None] * SETS + SET) * WIDTH + d[None, :]
    added = tl.load(split_sums + cells, mask=at[:, None] & (d < WIDTH)[None, :], other=0.0)
    return new, old, young, sums * old[:, None] + added * young[:, None]


@triton.jit
def _joined(z: T, stats: T, line: T, at: T, old: T, young: T, GROUP: tl.constexpr) -> T:
    return z * old + tl.load(stats + line * 8 + 4 + GROUP, mask=at, other=0.0) * young


@triton.jit
def merge(
    stats: T, split_sums: T, edited: T, slack: T, head_scale: T,
    out: T, lse: T, mass: T, partial: T, without: T, shift: T, chosen: T,
    sink_share: T, min_mass: T, move: T, heads: T, rows: T, lines: T, splits: T,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SETS: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """The splits of some rows, always in the same order. Program: a tile of [B H R]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, at = tl.arange(0, BLOCK_D), o < lines
    none = tl.full([BLOCK_M], float("-inf"), tl.float32)
    top0, top1, top2, top3 = none, none, none, none
    zero = tl.zeros([BLOCK_M], tl.float32)
    z0, z1, z2, z3 = zero, zero, zero, zero
    empty = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums0, sums1, sums2, sums3 = empty, empty, empty, empty
    for split in range(0, splits):
        line = o + tl.cast(split, tl.int64) * lines
        top0, old, young, sums0 = _join(stats, split_sums, line, at, d, top0, sums0, 0, SETS, WIDTH)
        z0 = _joined(z0, stats, line, at, old, young, 0)
        if SETS <= 2:
            z3 = _joined(z3, stats, line, at, old, young, 3)
        if SETS >= 2:
            top1, old, young, sums1 = _join(stats, split_sums, line, at, d, top1, sums1, 1, SETS, WIDTH)
        z1 = _joined(z1, stats, line, at, old, young, 1)
        if SETS >= 3:
            top2, old, young, sums2 = _join(stats, split_sums, line, at, d, top2, sums2, 2, SETS, WIDTH)
        z2 = _joined(z2, stats, line, at, old, young, 2)
        if SETS == 4:
            top3, old, young, sums3 = _join(stats, split_sums, line, at, d, top3, sums3, 3, SETS, WIDTH)
        if SETS >= 3:
            z3 = _joined(z3, stats, line, at, old, young, 3)
    b, h, row = o // (heads * rows), o // rows % heads, o % rows
    finish(
        o, at, b, h, row, d, heads, rows, WIDTH,
        top0, top1, top2, top3, z0, z1, z2, z3, sums0, sums1, sums2, sums3,
        edited, slack, head_scale, sink_share, min_mass, move,
        out, lse, mass, partial, without, shift, chosen, SETS,
    )  # fmt: skip
