"""How fast scanpath metrics are over many pairs at once, against loops over one pair after the other.

    python benchmarks/scanpath_metrics.py --out benchmarks/results/scanpath_metrics_cpu.json

Random paths of equal length are compared: 1,000 predictions with 10 people each by default. The loops below are what
the definitions say, in Python with numpy, as published scorers have them; they run on fewer pairs, and times are
compared per pair. `rapidfuzz off` is the same without that package, and `package` is multimatch-gaze, where these are
installed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vlattn.gaze.metrics import METRICS, Paths, make_paths
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import interleave

SCREEN = (1280, 720)
Points = np.ndarray
PairLoop = Callable[[Points, Points, Sequence[int], Sequence[int]], object]


def random_paths(count: int, length: int, seed: int) -> Paths:
    rng = np.random.default_rng(seed)
    rows = [
        np.concatenate([rng.random((length, 2)) * SCREEN, rng.uniform(100, 500, (length, 1))], 1) for _ in range(count)
    ]
    symbols = rng.integers(0, 12, (count, length)).tolist()
    return make_paths(rows, SCREEN, symbols=symbols)


# Loops over one pair: points [n, 3] with milliseconds, and symbols --------------------------------------------------
def common(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    table = np.zeros((len(s) + 1, len(t) + 1))
    for i in range(len(s)):
        for j in range(len(t)):
            table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], table[i, j] + (s[i] == t[j]))
    return float(table[-1, -1] / max(len(s), len(t)))


def stretched(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    first = [one for one, ms in zip(s, p[:, 2], strict=True) for _ in range(int(ms / 50))]
    second = [one for one, ms in zip(t, q[:, 2], strict=True) for _ in range(int(ms / 50))]
    return common(p, q, first, second)


def edits(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    table = np.zeros((len(s) + 1, len(t) + 1))
    table[:, 0], table[0] = np.arange(len(s) + 1), np.arange(len(t) + 1)
    for i in range(len(s)):
        for j in range(len(t)):
            table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (s[i] != t[j]))
    return float(table[-1, -1])


def matched(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    cells = [[(int(int(x) * 12 / 1280), int(int(y) * 8 / 720)) for x, y, _ in path] for path in (p, q)]
    table = np.zeros((len(p) + 1, len(q) + 1))
    for i, a in enumerate(cells[0]):
        for j, b in enumerate(cells[1]):
            worth = 3.5 - math.dist(a, b)
            table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], table[i, j] + worth)
    return float(table.max() / (3.5 * max(len(p), len(q))))


def warped(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    table = np.full((len(p) + 1, len(q) + 1), np.inf)
    table[0, 0] = 0
    for i in range(len(p)):
        for j in range(len(q)):
            cost = np.linalg.norm(p[i, :2] - q[j, :2])
            table[i + 1, j + 1] = cost + min(table[i, j + 1], table[i + 1, j], table[i, j])
    return float(table[-1, -1])


def coupled(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    table = np.full((len(p) + 1, len(q) + 1), np.inf)
    table[0, 0] = 0
    for i in range(len(p)):
        for j in range(len(q)):
            cost = np.linalg.norm(p[i, :2] - q[j, :2])
            table[i + 1, j + 1] = max(cost, min(table[i, j + 1], table[i + 1, j], table[i, j]))
    return float(table[-1, -1])


def delayed(p: Points, q: Points, k: int) -> float:
    windows = [[path[i : i + k] for i in range(len(path) - k + 1)] for path in (p[:, :2], q[:, :2])]
    nearest = [min(np.linalg.norm(a - b, axis=1).sum() for b in windows[1]) / k for a in windows[0]]
    return float(np.mean(nearest))


def delayed_three(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    return delayed(p, q, 3)


def delayed_all(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> float:
    a, b = p / max(SCREEN), q / max(SCREEN)
    return float(np.mean([math.exp(-delayed(a, b, k)) for k in range(1, min(len(p), len(q)) + 1)]))


def saccades(p: Points, q: Points, s: Sequence[int], t: Sequence[int]) -> list[float]:
    v, u = np.diff(p[:, :2], axis=0), np.diff(q[:, :2], axis=0)
    cost = np.linalg.norm(v[:, None] - u[None], axis=2)
    table = np.full((len(v) + 1, len(u) + 1), np.inf)
    table[0, 0] = 0
    for i in range(len(v)):
        for j in range(len(u)):
            table[i + 1, j + 1] = cost[i, j] + min(table[i, j], table[i, j + 1], table[i + 1, j])
    i, j, path = len(v), len(u), []
    while i:
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: table[at])
    a, b = (np.array(side) for side in zip(*path, strict=True))
    turn = np.abs(np.arctan2(v[a, 1], v[a, 0]) - np.arctan2(u[b, 1], u[b, 0]))
    length = np.abs(np.linalg.norm(v[a], axis=1) - np.linalg.norm(u[b], axis=1))
    diagonal = math.hypot(*SCREEN)
    return [
        1 - float(np.median(cost[a, b])) / (2 * diagonal),
        1 - float(np.median(np.minimum(turn, 2 * np.pi - turn))) / np.pi,
        1 - float(np.median(length)) / diagonal,
        1 - float(np.median(np.linalg.norm(p[a, :2] - q[b, :2], axis=1))) / diagonal,
        1 - float(np.median(np.abs(p[a, 2] - q[b, 2]) / np.maximum(p[a, 2], q[b, 2]))),
    ]


LOOPS: dict[str, PairLoop] = {
    "ss": common,
    "ss_time": stretched,
    "ed": edits,
    "scanmatch": matched,
    "multimatch": saccades,
    "tde": delayed_three,
    "stde": delayed_all,
    "dtw": warped,
    "frechet": coupled,
}


def loop(name: str, predicted: Paths, human: Paths) -> np.ndarray:
    points = [np.concatenate([side.points, side.durations[..., None]], 2) for side in (predicted, human)]
    strings = predicted.symbols["objects"], human.symbols["objects"]
    return np.array([LOOPS[name](p, q, s, t) for p, q, s, t in zip(*points, *strings, strict=True)])  # type: ignore[arg-type]


def variants(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"batched": {}}
    if name in ("ss", "ss_time", "ed") and find_spec("rapidfuzz"):
        found["rapidfuzz off"] = {"engine": "numpy"}
    if name == "multimatch" and find_spec("multimatch_gaze"):
        found["package"] = {"engine": "multimatch-gaze"}
    return found


def measure(name: str, args: argparse.Namespace, predicted: Paths, human: Paths) -> dict[str, Any]:
    """Milliseconds for all pairs, and how many times as long the loop would take. Both are first seen to agree."""
    few = slice(0, args.loop_pairs)
    some = [side.take(np.arange(len(side))[few]) for side in (predicted, human)]
    metric, settings = METRICS[name], variants(name)
    want = loop(name, *some)
    for variant, setting in settings.items():
        if not np.allclose(metric(*some, **setting), want):
            raise SystemExit(f"{name}: {variant} and the loop differ")
    slow = {variant: variant == "package" for variant in settings}
    arms: dict[str, Callable[[], object]] = {"loop": partial(loop, name, *some)}
    for variant, setting in settings.items():
        sides = some if slow[variant] else (predicted, human)
        arms[variant] = partial(metric, *sides, **setting)
    times = interleave(arms, args.repeats, args.warmup)
    pairs = {arm: len(some[0]) if arm == "loop" or slow[arm] else len(predicted) for arm in arms}
    found: dict[str, Any] = {}
    for arm, timing in times.items():
        per_pair = timing.seconds.median / pairs[arm]
        found[arm] = {
            "pairs": pairs[arm],
            "ms": timing.seconds.milliseconds(),
            "us_per_pair": round(per_pair * 1e6, 2),
            "loop_over_this": round(times["loop"].over(timing).median * pairs[arm] / pairs["loop"], 1),
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=1000)
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--length", type=int, default=20, help="fixations in each path")
    parser.add_argument("--loop-pairs", type=int, default=50, help="pairs that the loops run on")
    parser.add_argument("--metrics", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    count = args.predictions * args.people
    predicted = random_paths(args.predictions, args.length, 0).take(np.repeat(np.arange(args.predictions), args.people))
    human = random_paths(count, args.length, 1)
    found = {name: measure(name, args, predicted, human) for name in args.metrics}
    table = Table(title=f"{count:,} pairs of {args.length} fixations", box=box.SIMPLE_HEAD)
    for column in ("metric", "how", "seconds for all", "us a pair", "loop / this"):
        table.add_column(column, justify="left" if column in ("metric", "how") else "right")
    for name, arms in found.items():
        for arm, one in arms.items():
            total = one["us_per_pair"] * count / 1e6
            table.add_row(name, arm, f"{total:.2f}", f"{one['us_per_pair']:.1f}", f"{one['loop_over_this']:.1f}")
    Console().print(table)
    if args.out is not None:
        names = ("predictions", "people", "length", "loop_pairs", "repeats", "warmup")
        content = {"settings": {name: getattr(args, name) for name in names}, "machine": describe_machine("cpu")}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**content, "metrics": found}, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
