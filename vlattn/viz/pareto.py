"""Quality against visual tokens: two panels, one line per method with interval bars, vanilla as a band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.viz import figure_files
from vlattn.viz.page_numbers import finite, look, whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FB5", "#8C510A")
"""Okabe and Ito's colours that can be read on white, and two more; told apart with any colour vision."""
GREYS = ("#4d4d4d", "#8a8a8a")
MARKERS = "osD^vPX<>ph*d"
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
BAND: dict[str, Any] = {"color": "#000000", "alpha": 0.07, "linewidth": 0}
LINE: dict[str, Any] = {"color": "#000000", "linewidth": 1}
PER_ROW = 7
DODGE, WIDEST = 4.0, 26.0
"""Points (1/72 inch) between neighbouring lines of equal budget, and between the outermost ones at most."""


@dataclass(frozen=True)
class Panel:
    """What a panel draws: the task whose budget is its x axis, and where the value lies in an arm."""

    title: str
    better: str
    task: str
    metric: str


PANELS = (
    Panel("POPE F1, mean of three splits", "higher is better", "pope", "mean_f1"),
    Panel("CHAIR$_i$, hallucinated share of mentions", "lower is better", "chair", "chair_i"),
)


@dataclass(frozen=True)
class Point:
    """An arm in a panel. masked: its tokens are hidden, not removed."""

    tokens: float
    value: float
    low: float
    high: float
    masked: bool


@dataclass(frozen=True)
class Look:
    """How a line is drawn."""

    colour: str
    marker: str
    dash: Any


def require_matplotlib() -> None:
    """Raise InputError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            "figure: drawing needs matplotlib, which is not installed; "
            "run pip install 'vlattn[viz]', or leave the figure out (--no-figure)"
        ) from None


def draw_pareto(results: Mapping[str, Any], out: Path, budget: str | None = None) -> list[Path]:
    """Write out/pareto.png and out/pareto.svg from what a sweep found; return their paths.

    Args:
        results: of `vlattn.eval.sweep.Sweep.run`, or read from `sweep.json`.
        budget: the sense in which visual tokens are counted (final, average, counted); None takes the results' own.

    Raises:
        InputError: matplotlib is missing, or there is no such budget.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budget = budget or str(results["budget"])
    if budget not in results["budgets"]:
        raise InputError(f"budget: got {budget!r}; give {', '.join(results['budgets'])}")
    with matplotlib.rc_context(figure_files.style(11)):
        looks = styles(results)
        figure = Figure(figsize=(12, 5.6 + 0.28 * (len(looks) // PER_ROW)), layout="constrained")
        FigureCanvasAgg(figure)
        for panel, axes in zip(PANELS, figure.subplots(1, len(PANELS)), strict=True):
            _draw(axes, panel, results, looks, budget)
        _caption(figure, results, looks)
        return figure_files.save(figure, out, "pareto", dpi=160)


def lines(results: Mapping[str, Any], panel: Panel, budget: str) -> dict[str, list[Point]]:
    """{method: its arms by visual tokens}, vanilla included; an arm whose metric is 0/0 is left out."""
    found: dict[str, list[Point]] = {}
    for arm in results["arms"]:
        measured = look(arm, panel.task, panel.metric)
        value, low, high = (finite(look(measured, key)) for key in ("value", "low", "high"))
        if value is not None:
            tokens = arm["budget"][panel.task]
            ends = (value if low is None else low, value if high is None else high)
            found.setdefault(arm["method"], []).append(Point(tokens[budget], value, *ends, tokens["masked"]))
    return {method: sorted(points, key=lambda point: point.tokens) for method, points in found.items()}


def styles(results: Mapping[str, Any]) -> dict[str, Look]:
    """A look for each method: baselines, which cite no paper, in grey and dashed; the others differ by colour first."""
    published = {arm["method"]: bool(arm["papers"]) for arm in results["arms"] if arm["method"] != "vanilla"}
    found: dict[str, Look] = {}
    coloured = grey = 0
    for number, (method, has_paper) in enumerate(published.items()):
        marker = MARKERS[number % len(MARKERS)]
        if has_paper:
            dash = DASHES[coloured // len(COLOURS) % len(DASHES)]
            found[method] = Look(COLOURS[coloured % len(COLOURS)], marker, dash)
            coloured += 1
        else:
            found[method] = Look(GREYS[grey % len(GREYS)], marker, DASHES[1 + grey % (len(DASHES) - 1)])
            grey += 1
    return found


def _draw(axes: Any, panel: Panel, results: Mapping[str, Any], looks: Mapping[str, Look], budget: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    found = lines(results, panel, budget)
    spread = min(DODGE * (len(looks) - 1), WIDEST)
    for number, (method, style) in enumerate(looks.items()):
        points = found.get(method, [])
        if not points:
            continue
        aside = spread * (number / max(1, len(looks) - 1) - 0.5)
        drawn = axes.errorbar(
            [point.tokens for point in points],
            [point.value for point in points],
            yerr=[[point.value - point.low for point in points], [point.high - point.value for point in points]],
            color=style.colour,
            linestyle=style.dash,
            linewidth=1.8,
            marker=style.marker,
            markersize=6,
            markerfacecolor="white" if any(point.masked for point in points) else style.colour,
            elinewidth=1,
            capsize=2.5,
            transform=axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans),
        )
        drawn[0].set_gid(f"{panel.task}-{method}")
    for vanilla in found.get("vanilla", []):
        axes.axhspan(vanilla.low, vanilla.high, **BAND)
        axes.axhline(vanilla.value, **LINE)
    everything = [point for points in found.values() for point in points]
    if everything:
        _token_axis(axes, [point.tokens for point in everything], _full(results, panel))
        # By hand: matplotlib does not see lines that are set aside when it looks for limits.
        bottom, top = min(point.low for point in everything), max(point.high for point in everything)
        margin = 0.04 * (top - bottom) or 0.01
        axes.set_ylim(bottom - margin, top + margin)
    axes.set_xlabel(f"visual tokens, {budget}: {results['budgets'][budget]}")
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_title(panel.better, loc="right", fontsize=10, color="#555555")
    axes.grid(axis="y", color="#000000", alpha=0.1, linewidth=0.8)
    axes.set_axisbelow(True)


def _full(results: Mapping[str, Any], panel: Panel) -> float:
    """Visual tokens of a prompt without pruning."""
    return max(arm["budget"][panel.task]["full"] for arm in results["arms"])


def _token_axis(axes: Any, tokens: list[float], full: float) -> None:
    """Halvings of the full count; a linear axis where an arm ends without any visual token."""
    least = min(tokens)
    if least <= 0:
        axes.set_xlim(-0.04 * full, 1.04 * full)
        return
    axes.set_xscale("log", base=2)
    ticks = [full]
    while ticks[-1] > 1.01 * least:
        ticks.append(ticks[-1] / 2)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.8 * least, 1.12 * full)


def _caption(figure: Any, results: Mapping[str, Any], looks: Mapping[str, Look]) -> None:
    """What is above and below both panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    data, level = results["data"], results["bootstrap"]["level"]
    notes = f"Bars and band: {level:.0%} bootstrap intervals by image. Equal budgets are drawn side by side."
    if any(arm["budget"][panel.task]["masked"] for arm in results["arms"] for panel in PANELS):
        notes += " Hollow: tokens are masked, not removed, and save no time."
    figure.suptitle(
        f"Model {results['model']['name']}: {data['questions']:,} POPE questions and {data['images']:,} captions about "
        f"the same images of {data['name']}\n{notes}",
        x=0.008, ha="left", fontsize=11,
    )  # fmt: skip
    handles: list[Any] = [(Patch(**BAND), Line2D([], [], **LINE))]
    handles += [
        Line2D([], [], color=style.colour, linestyle=style.dash, marker=style.marker, linewidth=1.8)
        for style in looks.values()
    ]
    full = [whole(_full(results, panel)) for panel in PANELS]
    vanilla = f"vanilla, {' and '.join(dict.fromkeys(full))} tokens"
    columns = -(-len(handles) // (1 + (len(handles) - 1) // PER_ROW))  # rows of equal length
    figure.legend(
        handles, [vanilla, *looks], loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2
    )  # fmt: skip
