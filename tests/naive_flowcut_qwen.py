"""FlowCut in the towers of Qwen2-VL and Qwen2.5-VL as the released code runs it, in plain loops over one image.

Nothing here comes from the package.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

MERGE = 2  # cells are 2 x 2 patches


class Place(NamedTuple):
    """A patch: row and column among patches; its cell in raster order; the window it attends in (0 for all)."""

    row: int
    column: int
    cell: int
    window: int


class Flow(NamedTuple):
    """by_layer: {block: places left of the sequence as the blocks see it}, after each pruning.
    patches: the patches that are left at the end. features [n / 4, D]: every four of them merged, in their order.
    gap: by how much the worst score that stays beats the best that leaves, over the root mean square of scores.
    """

    by_layer: dict[int, list[int]]
    patches: list[Place]
    features: torch.Tensor
    gap: float


def order_of(model: Any, rows: int, columns: int) -> list[Place]:
    """The patches of an image of rows x columns patches in the order in which the blocks see them: cell by cell, and in
    Qwen2.5-VL window by window of cells."""
    config = model.config.vision_config
    high, wide = rows // MERGE, columns // MERGE
    side = config.window_size // MERGE // config.patch_size if hasattr(config, "window_size") else max(high, wide)
    found, window = [], 0
    for top in range(0, high, side):
        for left in range(0, wide, side):
            for row in range(top, min(top + side, high)):
                for column in range(left, min(left + side, wide)):
                    for i in range(MERGE):
                        for j in range(MERGE):
                            cell = row * wide + column
                            found.append(Place(MERGE * row + i, MERGE * column + j, cell, window))
            window += 1
    return found


@torch.no_grad()
def flow(
    model: Any, pixels: torch.Tensor, rows: int, columns: int, keep: int, unit: int = 1, semantic: str = "none"
) -> Flow:
    """The tower on one image, pixels [N, C * T * P * P] in the processor's order (cell by cell, raster order of cells).

    unit: 1 prunes patches, 4 whole cells whose score is the sum of their patches'.
    """
    vision, config = model.model.visual, model.config.vision_config
    places = order_of(model, rows, columns)
    given = [4 * place.cell + place.row % MERGE * MERGE + place.column % MERGE for place in places]
    assert sorted(given) == list(range(rows * columns))
    x = pixels[given] @ vision.patch_embed.proj.weight.flatten(1).T
    target, last = min(8 * keep, len(places)), len(vision.blocks) - 1
    left, by_layer, gap = list(range(len(places))), dict[int, list[int]](), math.inf
    average: list[float] = []
    for number, block in enumerate(vision.blocks):
        now = [places[i] for i in left]
        y = block.norm1(x)
        attention, h = block.attn, config.num_heads
        q, k, v = attention.qkv(y).unflatten(-1, (3, h, -1)).permute(1, 2, 0, 3)  # [H, n, d] each
        q, k = turn(q, now), turn(k, now)
        whole = number in getattr(config, "fullatt_block_indexes", range(last + 1))
        x = x + attention.proj(attend(q, k, v, [0 if whole else place.window for place in now]))
        x = x + block.mlp(block.norm2(x))
        n = len(left)
        if n <= target:
            continue
        weights, size = proxy(q, k), norms(v)
        if semantic == "none":
            score = [a * s for a, s in zip(weights, size, strict=True)]
        else:
            alike = similarity(v, semantic)
            score = [(a / sum(weights) + b / sum(alike)) * s for a, b, s in zip(weights, alike, size, strict=True)]
        score, weights = summed(score, unit), summed(weights, unit)
        average = score if not average else [0.5 * a + 0.5 * b for a, b in zip(average, score, strict=True)]
        remaining = last - number
        if remaining % 2:
            continue
        units, goal = n // unit, target // unit
        stay = goal
        if remaining:
            entropy = -sum(a * math.log(a + 1e-7) for a in weights) / math.log(units)
            stay = max(units - round((units - goal) / math.sqrt(remaining) * (1 - entropy**2)), goal)
        ranked = sorted(range(units), key=lambda i: -average[i])
        if stay < units:
            gap = min(gap, (average[ranked[stay - 1]] - average[ranked[stay]]) / max(average))
        chosen = sorted(ranked[:stay])
        average = [average[i] for i in chosen]
        rows_left = [unit * i + j for i in chosen for j in range(unit)]
        left, x = [left[i] for i in rows_left], x[rows_left]
        by_layer[number] = left
    return Flow(by_layer, [places[i] for i in left], vision.merger(x), gap)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: list[int]) -> torch.Tensor:
    """Full attention among the patches of the same window, [n, H * d]."""
    out = torch.zeros_like(q)
    for head in range(q.shape[0]):
        for window in set(windows):
            of = [i for i, number in enumerate(windows) if number == window]
            weights = (q[head, of] @ k[head, of].T / math.sqrt(q.shape[-1])).softmax(-1)
            out[head, of] = weights @ v[head, of]
    return torch.cat(list(out), -1)


def turn(x: torch.Tensor, places: list[Place]) -> torch.Tensor:
    """x [H, n, d] with rows and columns turned in: a quarter of the frequencies follows each, then again."""
    quarter = x.shape[-1] // 4
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 2 * quarter, 2).float() / (2 * quarter)))
    row = torch.tensor([float(place.row) for place in places])[:, None] * inverse
    column = torch.tensor([float(place.column) for place in places])[:, None] * inverse
    angle = torch.cat([row, column], -1)  # [n, d / 2]
    a, b = x.float().chunk(2, -1)  # stock code rotates in fp32
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def proxy(q: torch.Tensor, k: torch.Tensor) -> list[float]:
    """Attention of the mean query, averaged over heads; [H, n, d] each."""
    found = [0.0] * q.shape[1]
    for head in range(q.shape[0]):
        mean = [sum(float(q[head, j, e]) for j in range(q.shape[1])) / q.shape[1] for e in range(q.shape[2])]
        logits = [
            sum(a * float(b) for a, b in zip(mean, k[head, j], strict=True)) / math.sqrt(q.shape[2])
            for j in range(q.shape[1])
        ]
        top = max(logits)
        total = sum(math.exp(value - top) for value in logits)
        found = [old + math.exp(value - top) / total / q.shape[0] for old, value in zip(found, logits, strict=True)]
    return found


def norms(v: torch.Tensor) -> list[float]:
    """L1 norm of the mean over heads of each value [H, n, d]."""
    return [
        sum(abs(sum(float(v[head, j, e]) for head in range(v.shape[0])) / v.shape[0]) for e in range(v.shape[2]))
        for j in range(v.shape[1])
    ]


def similarity(v: torch.Tensor, semantic: str) -> list[float]:
    """How alike each value [H, n, d] is to the mean value: an unscaled softmax by head, or the cosine of head means."""
    if semantic == "softmax":
        return torch.stack([(head @ head.mean(0)).softmax(0) for head in v]).mean(0).tolist()
    mean = v.mean(0)
    return [max(float(torch.cosine_similarity(mean[j], mean.mean(0), dim=0)), 0.0) for j in range(v.shape[1])]


def summed(values: list[float], unit: int) -> list[float]:
    return [sum(values[i : i + unit]) for i in range(0, len(values), unit)]


def positions_of(ids: list[int], image: int, grids: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """M-RoPE positions of an unpadded prompt whose images have rows x columns patches: text counts on; an image's cells
    stand at (start, start + row, start + column), and what follows starts behind its longer side."""
    found: list[tuple[int, int, int]] = []
    at, next_ = 0, 0
    left = list(grids)
    while at < len(ids):
        if ids[at] != image:
            found.append((next_, next_, next_))
            at, next_ = at + 1, next_ + 1
            continue
        rows, columns = left.pop(0)
        high, wide = rows // MERGE, columns // MERGE
        found += [(next_, next_ + row, next_ + column) for row in range(high) for column in range(wide)]
        at, next_ = at + high * wide, next_ + max(high, wide)
    return found
