"""Accuracy of probes block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlattn.viz import figure_files
from vlattn.viz.pareto import COLOURS, DASHES, MARKERS, require_matplotlib


def draw_probe_layers(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Write out/layers.png and out/layers.svg: one line per pooler, bars are 95% t intervals over seeds.

    Args:
        results: of `vlattn.probing.sweep_layers.probe_layers`, or read from `layers.json`.
        out: a folder.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(figure_files.style()):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for number, (pooler, points) in enumerate(results["lines"].items()):
            points = sorted(points, key=lambda point: point["layer"])
            bars = None
            if points[0]["low"] is not None:
                bars = [[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]
            drawn = axes.errorbar(
                [point["layer"] for point in points],
                [point["mean"] for point in points],
                yerr=bars,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
                capsize=2.5,
                elinewidth=1,
                label=pooler,
            )
            drawn[0].set_gid(f"layers-{pooler}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block, counted from 0; tokens before the final norm")
        axes.set_ylabel(f"{results['metric']} in percent")
        axes.set_title(f"{results['backbone']['name']} on {results['data']}", loc="left", fontweight="bold")
        axes.grid(axis="y", color="#000000", alpha=0.1, linewidth=0.8)
        axes.legend(frameon=False)
        return figure_files.save(figure, out, "layers")
