"""Figures of probes: every arm is drawn where its numbers are, and named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vlattn.viz.pareto import COLOURS
from vlattn.viz.probe_layers import draw_probe_layers
from vlattn.viz.probe_pareto import KINDS, draw_probe_pareto, kind_of, place_labels

NAMES = ("cls", "gap", "ep:queries=8", "ep_all:queries=8,d=2", "aim", "gem", "siglip", "dinovit")


def subject() -> dict[str, Any]:
    arms = [
        {
            "pooler": name,
            "value": {"mean": 50.0 + i, "low": 48.0 + i, "high": 52.0 + i},
            "parameters": 1000 * (i + 1),
            "step": {"median": 2.0 + i, "lower": 1.5 + i, "upper": 3.0 + i, "batch": 64},
        }
        for i, name in enumerate(NAMES)
    ]
    return {"backbone": {"name": "some tower"}, "data": "pets", "metric": "top1", "arms": arms}


def test_every_pooler_is_named_in_both_panels_and_equal_results_give_equal_files(tmp_path: Path) -> None:
    png, svg = draw_probe_pareto(subject(), tmp_path / "a")
    assert Image.open(png).format == "PNG"
    text = svg.read_text()
    for name in NAMES:
        assert len(re.findall(f">{re.escape(name)}</text>", text)) == 2
    assert "batches of 64" in text
    assert text == draw_probe_pareto(subject(), tmp_path / "b")[1].read_text()


def test_one_seed_is_drawn_without_intervals(tmp_path: Path) -> None:
    one = subject()
    for arm in one["arms"]:
        arm["value"] |= {"low": None, "high": None}
    assert draw_probe_pareto(one, tmp_path)[0].is_file()


def test_kinds_differ_in_colour_and_in_marker() -> None:
    assert [kind_of(name) for name in ("cls", "gap_all", "ep:queries=8", "ep_all", "aim", "gem")] == [
        "linear probe",
        "linear probe",
        "efficient probing",
        "efficient probing",
        "other attentive poolers",
        "poolers without attention",
    ]
    for column in zip(*KINDS.values(), strict=True):
        assert len(set(column)) == len(KINDS)


def test_names_of_crowded_points_do_not_overlap() -> None:
    figure = Figure(figsize=(8, 6))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    xs, ys = [1.0, 1.01, 1.0, 1.02, 5.0], [1.0, 1.0, 1.01, 1.01, 5.0]
    axes.plot(xs, ys, "o")
    canvas.draw()
    labels = place_labels(axes, xs, ys, ["first pooler", "second pooler", "third pooler", "fourth pooler", "far"])
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize("low", [None, 40.0])
def test_layers_are_a_line_for_each_pooler(low: float | None, tmp_path: Path) -> None:
    points = [
        {"layer": layer, "mean": 50.0, "low": low, "high": None if low is None else 60.0, "values": [50.0]}
        for layer in (3, 0, 1)
    ]
    results = {
        "metric": "top1",
        "backbone": {"name": "some tower"},
        "data": "pets",
        "lines": {"gap": points, "ep:queries=8": points},
    }
    png, svg = draw_probe_layers(results, tmp_path)
    assert Image.open(png).format == "PNG"
    text = svg.read_text()
    for number, name in enumerate(results["lines"]):
        line = re.search(rf'id="layers-{re.escape(name)}">.*?<path d="(.*?)".*?stroke: (#\w+)', text, re.DOTALL)
        assert line is not None
        across = [float(x) for x in re.findall(r"[ML] ([\d.]+)", line[1])]
        assert len(across) == 3
        assert across == sorted(across)
        assert line[2] == COLOURS[number].lower()
