"""The figure shows each method's points where they belong, and files that other programs can read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from vlattn.errors import InputError
from vlattn.viz.pareto import PANELS, draw_pareto, lines, styles

SVG = "{http://www.w3.org/2000/svg}"


def arm(method: str, tokens: float, f1: float | None, *, paper: bool = True, masked: bool = False) -> dict[str, Any]:
    budget = {"full": 144.0, "final": tokens / 2, "average": tokens, "counted": tokens, "masked": masked}
    metric = {"value": f1, "low": None if f1 is None else f1 - 0.02, "high": None if f1 is None else f1 + 0.02}
    return {
        "method": method,
        "papers": [{"title": "T", "arxiv": "2401.00001"}] if paper else [],
        "budget": {"pope": budget, "chair": budget},
        "pope": {"mean_f1": metric},
        "chair": {"chair_i": metric},
    }


def results(*arms: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"name": "tiny"},
        "data": {"name": "tiny COCO val", "images": 140, "questions": 2520},
        "bootstrap": {"level": 0.95},
        "budget": "average",
        "budgets": {"final": "left at the end", "average": "entering layers"},
        "arms": [arm("vanilla", 144, 0.9, paper=False), *arms],
    }


SMALL = results(
    arm("random", 18, 0.5, paper=False), arm("flow<cut>", 36, 0.8), arm("flow<cut>", 18, 0.7), arm("flow<cut>", 72, 0.9)
)


def places(svg: Path, line: str) -> list[tuple[float, float]]:
    """Where the SVG puts the markers of a line, (x, y) with y downwards."""
    root = ElementTree.parse(svg).getroot()
    group = next(g for g in root.iter(f"{SVG}g") if g.get("id") == line)
    return [(float(use.get("x", "nan")), float(use.get("y", "nan"))) for use in group.iter(f"{SVG}use")]


def test_lines_are_the_arms_of_a_method_by_rising_tokens() -> None:
    found = lines(SMALL, PANELS[0], "average")
    assert [(p.tokens, p.value) for p in found["flow<cut>"]] == [(18, 0.7), (36, 0.8), (72, 0.9)]
    assert [p.tokens for p in lines(SMALL, PANELS[0], "final")["flow<cut>"]] == [9, 18, 36]
    assert (found["vanilla"][0].low, found["vanilla"][0].high) == pytest.approx((0.88, 0.92))


def test_an_undefined_metric_leaves_its_point_out() -> None:
    found = lines(results(arm("a", 36, None), arm("a", 18, 0.5)), PANELS[1], "average")
    assert [point.tokens for point in found["a"]] == [18]


def test_twenty_methods_have_twenty_looks_and_baselines_are_grey() -> None:
    many = results(*(arm(f"m{i}", 36, 0.5) for i in range(18)), *(arm(b, 36, 0.4, paper=False) for b in ("r", "u")))
    found = styles(many)
    assert len({(look.colour, look.dash) for look in found.values()}) == len(found) == 20
    for name, look in found.items():
        red, green, blue = (look.colour[i : i + 2] for i in (1, 3, 5))
        assert (red == green == blue) == (name in ("r", "u"))


def test_the_files_are_a_picture_wide_enough_and_an_svg_with_its_words_as_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png, svg = draw_pareto(SMALL, tmp_path / "new")
    with Image.open(png) as picture:
        assert picture.width >= 1200
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    words = " ".join(ElementTree.parse(svg).getroot().itertext())
    for text in ("visual tokens, average: entering layers", "flow<cut>", "random", "vanilla, 144 tokens", "2,520 POPE"):
        assert text in words
    assert "Hollow" not in words


def test_markers_lie_at_their_tokens_on_a_log_axis_and_higher_values_higher(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg = draw_pareto(SMALL, tmp_path)[1]
    for panel in ("pope", "chair"):
        (x0, y0), (x1, y1), (x2, y2) = places(svg, f"{panel}-flow<cut>")
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)  # 18, 36, 72: equal steps
        assert y0 - y1 == pytest.approx(y1 - y2, abs=0.01)  # 0.7, 0.8, 0.9
        assert min(x1 - x0, y0 - y1) > 20
        ((x, _),) = places(svg, f"{panel}-random")
        assert 0 < x0 - x < 10  # the same 18 tokens, set aside


def test_equal_results_give_the_same_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = (draw_pareto(SMALL, tmp_path / name)[1].read_text() for name in "ab")
    assert first == second


def test_an_arm_that_ends_without_tokens_is_drawn_on_a_linear_axis(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    exits = results(*(arm("exit", tokens, 0.8) for tokens in (0, 36, 72)))
    (x0, _), (x1, _), (x2, _) = places(draw_pareto(exits, tmp_path)[1], "pope-exit")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)


def test_masked_arms_are_hollow_and_the_figure_says_what_that_means(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg = draw_pareto(results(arm("hides", 36, 0.8, masked=True)), tmp_path)[1]
    text = svg.read_text()
    assert "masked, not removed" in text
    group = text[text.index('id="pope-hides"') :]
    assert "fill: #ffffff" in group[: group.index("</g>")]


def test_another_budget_can_be_drawn_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "visual tokens, final: left at the end" in draw_pareto(SMALL, tmp_path, "final")[1].read_text()
    with pytest.raises(InputError, match="budget: got 'mean'; give final, average"):
        draw_pareto(SMALL, tmp_path, "mean")


def test_without_matplotlib_the_error_tells_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'vlattn\[viz\]'"):
        draw_pareto(SMALL, tmp_path)
