"""Accuracy of probes against what they cost: parameters on the left, measured time of a training step on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlattn.viz import figure_files
from vlattn.viz.pareto import require_matplotlib

KINDS = {
    "linear probe": ("#000000", "s"),
    "efficient probing": ("#0072B2", "o"),
    "other attentive poolers": ("#D55E00", "^"),
    "poolers without attention": ("#8a8a8a", "D"),
}
"""Kinds of poolers, by a colour of Okabe and Ito's and a marker of their own: told apart with any colour vision."""

LINEAR = ("cls", "gap", "gap_all")
WITHOUT = ("bag_max", "bag_mean", "cbam", "dolg", "gem", "gmp", "lse")
PLACES = ((6, 0), (-6, 0), (0, 8), (0, -8), (6, 8), (-6, 8), (6, -8), (-6, -8))
"""Where a label may stand, in points from its marker; the first free place is taken, else one farther out."""


def draw_probe_pareto(subject: Mapping[str, Any], out: Path) -> list[Path]:
    """Write out/pareto.png and out/pareto.svg for one subject of a probing sweep; return their paths.

    Bars are 95% t intervals over seeds, and horizontally the quartiles of the measured time.

    Args:
        subject: an entry of `subjects` in what `vlattn.probing.sweep.ProbeSweep.run` returns, or in `probe.json`.
        out: a folder.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(figure_files.style()):
        figure = Figure(figsize=(15, 7.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        arms = subject["arms"]
        _panel(left, arms, [arm["parameters"] for arm in arms], None)
        _panel(right, arms, [arm["step"]["median"] for arm in arms], [arm["step"] for arm in arms])
        left.set_xlabel("trainable parameters, classifier included")
        batch = arms[0]["step"]["batch"]
        right.set_xlabel(f"milliseconds of a training step, batches of {batch}, measured (bars: quartiles)")
        left.set_ylabel(f"{subject['metric']} in percent, 95% t interval over seeds")
        figure.suptitle(f"{subject['backbone']['name']} on {subject['data']}", x=0.01, ha="left", fontweight="bold")
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        canvas.draw()
        for axes, costs in ((left, "parameters"), (right, "step")):
            xs = [arm[costs] if costs == "parameters" else arm[costs]["median"] for arm in arms]
            ys = [arm["value"]["mean"] for arm in arms]
            place_labels(axes, xs, ys, [arm["pooler"] for arm in arms], _bars(arms, xs, costs))
        return figure_files.save(figure, out, "pareto")


def kind_of(pooler: str) -> str:
    """The key of `KINDS` that a pooler belongs to."""
    name = pooler.partition(":")[0]
    if name in LINEAR:
        return "linear probe"
    base = name.removesuffix("_all")
    if base == "ep":
        return "efficient probing"
    return "poolers without attention" if base in WITHOUT else "other attentive poolers"


def place_labels(
    axes: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    names: Sequence[str],
    bars: Sequence[tuple[float, float, float, float]] = (),
) -> list[Any]:
    """Write a name beside each point, so that names overlap neither each other nor markers, as far as there is room.

    A name that stands farther off has a thin line to its point. The figure has been drawn once.

    Args:
        axes: with points at `xs` and `ys`.
        names: one for each point.
        bars: (x, y, x, y), lines from one point to another that names should leave free as well.
    """
    renderer = axes.figure.canvas.get_renderer()
    scale = axes.figure.dpi / 72
    points = [axes.transData.transform(point) for point in zip(xs, ys, strict=True)]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in points]
    for bar in bars:
        (x0, y0), (x1, y1) = axes.transData.transform([bar[:2], bar[2:]])
        taken.append((x0 - scale, y0 - scale, x1 + scale, y1 + scale))
    inside = axes.get_window_extent(renderer)
    labels = []
    for index in sorted(range(len(names)), key=lambda i: -ys[i]):
        place = {"xytext": (0, 0), "textcoords": "offset points"}
        label = axes.annotate(names[index], (xs[index], ys[index]), **place, fontsize=8)
        label.set_gid(f"label-{names[index]}")
        best: tuple[float, tuple[float, float], Any] | None = None
        for far in (1, 2, 3, 4.5, 6.5, 9):
            for dx, dy in PLACES:
                _put(label, far * dx, far * dy)
                box = label.get_window_extent(renderer).extents
                cost = sum(_overlap(box, other) for other in taken) + 10 * _outside(box, inside.extents)
                if best is None or cost < best[0]:
                    best = (cost, (far * dx, far * dy), box)
            if best is not None and best[0] == 0:
                break
        assert best is not None
        _put(label, *best[1])
        taken.append(tuple(best[2]))
        labels.append(label)
        if max(map(abs, best[1])) > 12:
            axes.annotate(
                "",
                (xs[index], ys[index]),
                xytext=best[1],
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            )
    return labels


def _bars(
    arms: Sequence[Mapping[str, Any]], xs: Sequence[float], costs: str
) -> list[tuple[float, float, float, float]]:
    """Ends of the interval bars."""
    found = []
    for arm, x in zip(arms, xs, strict=True):
        value = arm["value"]
        if value["low"] is not None:
            found.append((x, value["low"], x, value["high"]))
        if costs == "step":
            found.append((arm["step"]["lower"], value["mean"], arm["step"]["upper"], value["mean"]))
    return found


def _put(label: Any, dx: float, dy: float) -> None:
    label.set_position((dx, dy))
    label.set_ha("left" if dx > 0 else "right" if dx < 0 else "center")
    label.set_va("bottom" if dy > 0 else "top" if dy < 0 else "center")


def _overlap(one: Any, other: Any) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return float(width * height) if width > 0 and height > 0 else 0.0


def _outside(box: Any, frame: Any) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return float(area - _overlap(box, frame))


def _panel(axes: Any, arms: Sequence[Mapping[str, Any]], xs: Sequence[float], spreads: Any) -> None:
    for kind, (colour, marker) in KINDS.items():
        chosen = [index for index, arm in enumerate(arms) if kind_of(arm["pooler"]) == kind]
        if not chosen:
            continue
        values = [arms[index]["value"] for index in chosen]
        down = [0 if v["low"] is None else v["mean"] - v["low"] for v in values]
        up = [0 if v["high"] is None else v["high"] - v["mean"] for v in values]
        aside = None
        if spreads is not None:
            steps = [spreads[index] for index in chosen]
            aside = [[s["median"] - s["lower"] for s in steps], [s["upper"] - s["median"] for s in steps]]
        axes.errorbar(
            [xs[index] for index in chosen],
            [v["mean"] for v in values],
            yerr=[down, up],
            xerr=aside,
            color=colour,
            marker=marker,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=kind,
        )
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.06)
    axes.grid(axis="y", color="#000000", alpha=0.1, linewidth=0.8)
    axes.set_axisbelow(True)
