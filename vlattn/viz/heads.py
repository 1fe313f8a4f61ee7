"""A heat-map of layers and heads: one cell per head, with marks on those that were chosen."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.viz.pareto import require_matplotlib

COLOURS = "cividis"
"""Even steps of brightness, for any colour vision and in grey print."""


def draw_heads(
    panels: Mapping[str, Sequence[Sequence[float]]],
    out: Path,
    *,
    label: str = "VHD",
    chosen: Mapping[str, Sequence[Sequence[bool]]] | None = None,
) -> Path:
    """Write values of heads as a PNG: layers upwards, heads to the right, all panels on one scale from 0.

    Args:
        panels: {title: [L][H]} finite values of at least 0, such as before and after an intervention; of equal shape.
        out: the file, ending in .png; its folder is made.
        label: what the values are, beside the scale.
        chosen: {title of a panel: [L][H]}, heads that get a mark.

    Returns:
        `out`.

    Raises:
        InputError: matplotlib is missing, or values that cannot be drawn.
    """
    require_matplotlib()
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if out.suffix != ".png":
        raise InputError(f"out: got {str(out)!r}; give a file that ends in .png")
    values = {title: np.asarray(table, dtype=float) for title, table in panels.items()}
    marks = {title: np.asarray(table, dtype=bool) for title, table in (chosen or {}).items()}
    _check(values, marks)
    layers, heads = next(iter(values.values())).shape
    high = max(float(table.max()) for table in values.values()) or 1.0
    wide, tall = max(2.6, 0.22 * heads + 0.8), max(2.2, 0.22 * layers + 0.9)
    figure = Figure(figsize=(wide * len(values) + 0.9, tall + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    image: Any = None
    for axes, (title, table) in zip(row, values.items(), strict=True):
        image = axes.imshow(table, cmap=COLOURS, vmin=0, vmax=high, origin="lower", aspect="equal")
        if title in marks:
            layer, head = marks[title].nonzero()
            bright = table[layer, head] > 0.6 * high
            axes.scatter(head, layer, s=12, c=["black" if one else "white" for one in bright], linewidths=0)
        axes.set_title(textwrap.fill(title, int(11 * wide)), fontsize=10)
        axes.set_xlabel("head")
        axes.set_xticks(_ticks(heads))
        axes.set_yticks(_ticks(layers))
    row[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(row), label=label, shrink=0.9, pad=0.02)
    if marks:
        figure.supxlabel("dots: heads that are reinforced", fontsize=8, color="#444444")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160, bbox_inches="tight")
    return out


def _check(values: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
    import numpy as np

    if not values:
        raise InputError("panels: got none; give at least one title with its values")
    shape = next(iter(values.values())).shape
    for title, table in [*values.items(), *marks.items()]:
        if table.ndim != 2 or not table.size or table.shape != shape:
            raise InputError(
                f"panels: {title!r} has shape {list(table.shape)}; give all panels and marks as [L][H] of one shape"
            )
    for title, table in values.items():
        if not np.isfinite(table).all() or (table < 0).any():
            raise InputError(f"panels: {title!r} has values that are negative or not finite; give numbers from 0 on")
    for title in marks:
        if title not in values:
            raise InputError(f"chosen: {title!r} is the title of no panel; give {' or '.join(map(repr, values))}")


def _ticks(count: int) -> list[int]:
    """At most nine numbers, evenly spaced from 0."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, count) if count / step <= 9)
    return list(range(0, count, step))
