"""Curves over the token budget as inline SVG: one series per family of arms, vanilla as the reference line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlattn.viz.page_html import Html, element, join
from vlattn.viz.page_numbers import NA, finite, look, number, span, times

WIDTH, HEIGHT = 384, 288
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 14, 48
DODGE = 9
SERIES = 4
"""How many families have a colour of their own; more repeat them."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """What one chart draws: where its value and the ends of its bar lie in an arm, and how it is worded."""

    title: str
    note: str
    path: tuple[str, ...]
    keys: tuple[str, str, str]
    word: Callable[[Any], str]


PANELS = (
    Panel("POPE mean F1", "higher is better", ("pope", "mean_f1"), ("value", "low", "high"), number),
    Panel("CHAIR-i", "lower is better", ("chair", "chair_i"), ("value", "low", "high"), number),
    Panel("Prefill time", "vanilla is 1×, lower is faster", ("cost", "prefill_ratio"), ("median", "q1", "q3"), times),
)


@dataclass(frozen=True)
class Point:
    """One arm in one chart."""

    name: str
    tokens: int
    value: float
    low: float | None
    high: float | None
    tip: str


def families(arms: Sequence[Record]) -> dict[str, list[Record]]:
    """The arms that are drawn as series, by family in order of appearance, each by budget."""
    found: dict[str, list[Record]] = {}
    for arm in arms:
        if arm["family"] != "vanilla":
            found.setdefault(arm["family"], []).append(arm)
    return {family: sorted(members, key=lambda arm: arm["visual_tokens"]) for family, members in found.items()}


def stem(arm: Record) -> str:
    """An arm's name without the budget at its end: "FlowCut 36" is "FlowCut"."""
    return str(arm["name"]).removesuffix(str(arm["visual_tokens"])).strip() or str(arm["name"])


def charts(arms: Sequence[Record]) -> Html:
    """The legend and one figure per panel."""
    return join([_legend(arms), element("div", *(_figure(panel, arms) for panel in PANELS), class_="charts")])


def _point(arm: Record, panel: Panel) -> Point | None:
    measured = look(arm, *panel.path)
    value, low, high = (finite(look(measured, key)) for key in panel.keys)
    if value is None:
        return None
    ends = span(low, high, 2 if panel.word is times else 3)
    tip = f"{arm['name']}: {panel.word(value)}" + ("" if ends == NA else f" ({ends})")
    return Point(str(arm["name"]), int(arm["visual_tokens"]), value, low, high, tip)


def _points(arms: Sequence[Record], panel: Panel) -> list[Point]:
    return [point for arm in arms if (point := _point(arm, panel))]


def _figure(panel: Panel, arms: Sequence[Record]) -> Html:
    heading = element("figcaption", element("strong", panel.title), " ", element("span", panel.note))
    return element("figure", heading, _plot(panel, arms))


def _plot(panel: Panel, arms: Sequence[Record]) -> Html:
    everything = _points(arms, panel)
    spoken = f"{panel.title} against visual tokens kept. " + "; ".join(point.tip for point in everything)
    frame = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"}
    if not everything:
        middle = element("text", NA, x=WIDTH / 2, y=HEIGHT / 2, text_anchor="middle")
        return element("svg", middle, **frame, aria_label=f"{panel.title}: {NA}")
    budgets = sorted({point.tokens for point in everything})
    ticks = _ticks([end for p in everything for end in (p.value, p.low, p.high) if end is not None])
    bottom, top = ticks[0], ticks[-1]

    def x(tokens: int) -> float:
        first, last = (math.log2(max(b, 1)) for b in (budgets[0], budgets[-1]))
        share = (math.log2(max(tokens, 1)) - first) / (last - first) if last > first else 0.5
        return LEFT + 22 + share * (WIDTH - LEFT - RIGHT - 44)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    drawn = [_grid(ticks, y, panel), _axis(budgets, x)]
    for point in _points([arm for arm in arms if arm["family"] == "vanilla"], panel):
        drawn.append(_reference(point, x, y))
    series = list(families(arms).values())
    for i, members in enumerate(series):
        drawn.append(_series(i, (i - (len(series) - 1) / 2) * DODGE, _points(members, panel), x, y))
    return element("svg", *drawn, **frame, aria_label=spoken)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, 4 to 7 of them, from at or below the least value to at or above the greatest."""
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(room / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if room / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _grid(ticks: Sequence[float], y: Callable[[float], float], panel: Panel) -> Html:
    step = ticks[1] - ticks[0]
    digits = next((d for d in range(1, 8) if math.isclose(round(step, d), step)), 8)
    unit = "×" if panel.word is times else ""
    lines = [
        join(
            [
                element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_r(y(tick)), y2=_r(y(tick))),
                element("text", number(tick, digits) + unit, x=LEFT - 8, y=_r(y(tick) + 4), text_anchor="end"),
            ]
        )
        for tick in ticks
    ]
    return element("g", *lines, class_="grid")


def _axis(budgets: Sequence[int], x: Callable[[int], float]) -> Html:
    labels, last = [], -math.inf
    for budget in budgets:
        if x(budget) - last >= 28:
            last = x(budget)
            labels.append(element("text", budget, x=_r(last), y=HEIGHT - BOTTOM + 20, text_anchor="middle"))
    middle = _r((LEFT + WIDTH - RIGHT) / 2)
    title = element("text", "visual tokens kept", x=middle, y=HEIGHT - 6, text_anchor="middle", class_="axis")
    return element("g", *labels, title, class_="grid")


def _reference(point: Point, x: Callable[[int], float], y: Callable[[float], float]) -> Html:
    band = None
    if point.low is not None and point.high is not None:
        width, height = WIDTH - LEFT - RIGHT, _r(y(point.low) - y(point.high))
        band = element("rect", x=LEFT, y=_r(y(point.high)), width=width, height=height, class_="band")
    line = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_r(y(point.value)), y2=_r(y(point.value)), class_="curve")
    marker = element("path", d=_diamond(x(point.tokens), y(point.value)), class_="marker")
    return element("g", element("title", point.tip), band, line, marker, class_="vanilla")


def _series(
    index: int, shift: float, points: Sequence[Point], x: Callable[[int], float], y: Callable[[float], float]
) -> Html:
    curve = " ".join(f"{_r(x(p.tokens) + shift)},{_r(y(p.value))}" for p in points)
    marks = []
    for p in points:
        at, whisker = x(p.tokens) + shift, None
        if p.low is not None and p.high is not None:
            low, high = _r(y(p.low)), _r(y(p.high))
            a, b, mid = _r(at - 4), _r(at + 4), _r(at)
            whisker = element("path", d=f"M{a} {low}H{b}M{mid} {low}V{high}M{a} {high}H{b}", class_="whisker")
        marks.append(element("g", element("title", p.tip), whisker, _marker(index, at, y(p.value))))
    line = element("polyline", points=curve, class_="curve")
    return element("g", line, *marks, class_=f"series series-{index % SERIES}")


def _marker(index: int, x: float, y: float) -> Html:
    """A shape of its own for each series, so that colour is never the only difference."""
    if index % SERIES == 0:
        return element("circle", cx=_r(x), cy=_r(y), r=5, class_="marker")
    shapes = ("", f"M{_r(x - 4.5)} {_r(y - 4.5)}h9v9h-9z", f"M{_r(x)} {_r(y - 6)}l6 10.4h-12z", _diamond(x, y))
    return element("path", d=shapes[index % SERIES], class_="marker")


def _diamond(x: float, y: float) -> str:
    return f"M{_r(x)} {_r(y - 6)}l6 6l-6 6l-6 -6z"


def _legend(arms: Sequence[Record]) -> Html:
    keys = []
    for i, members in enumerate(families(arms).values()):
        sample = [element("line", x1=0, x2=36, y1=8, y2=8, class_="curve"), _marker(i, 18, 8)]
        keys.append((stem(members[0]), element("g", *sample, class_=f"series series-{i % SERIES}")))
    for arm in arms:
        if arm["family"] == "vanilla":
            line = element("line", x1=0, x2=36, y1=8, y2=8, class_="curve")
            marker = element("path", d=_diamond(18, 8), class_="marker")
            keys.append((str(arm["name"]), element("g", line, marker, class_="vanilla")))
    items = [
        element("li", element("svg", sample, viewBox="0 0 36 16", width=36, height=16, aria_hidden="true"), name)
        for name, sample in keys
    ]
    return element("ul", *items, class_="legend")


def _r(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
