"""The tables of the page: every figure with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlattn.viz.page_html import Html, element
from vlattn.viz.page_numbers import NA, finite, look, number, probability, signed, size, span, times, whole

Record = dict[str, Any]
Cell = tuple[str, str | None]
"""A figure, and the smaller line under it."""

SPLITS = ("random", "popular", "adversarial")


def quality_table(arms: Sequence[Record]) -> Html:
    """POPE and CHAIR of every arm."""
    heads = [("POPE", ["mean F1", "mean accuracy"]), ("CHAIR", ["CHAIR-s", "CHAIR-i", "recall", "F1", "length"])]
    paths = [
        *(("pope", key) for key in ("mean_f1", "mean_accuracy")),
        *(("chair", key) for key in ("chair_s", "chair_i", "recall", "f1")),
    ]
    rows = [[*(_estimate(look(arm, *path)) for path in paths), _plain(look(arm, "chair", "length"), 1)] for arm in arms]
    return _arm_table("Answers and captions", arms, heads, rows)


def cost_table(arms: Sequence[Record]) -> Html:
    """Time, memory and arithmetic of every arm as a multiple of vanilla's."""
    heads = [("Time", ["prefill", "whole answer"]), ("KV cache", ["ratio", "size"]), ("FLOPs", ["ratio"])]
    rows = []
    for arm in arms:
        cost = look(arm, "cost")
        flat: list[Cell] = [(times(look(cost, key)), None) for key in ("kv_ratio", "flops_ratio")]
        ratios = [_quartiles(look(cost, key)) for key in ("prefill_ratio", "total_ratio")]
        rows.append([*ratios, flat[0], (size(look(cost, "kv_bytes")), None), flat[1]])
    return _arm_table("Cost, relative to vanilla", arms, heads, rows)


def split_table(arms: Sequence[Record]) -> Html:
    """POPE per split: how the absent objects that are asked about were chosen."""
    heads = [(f"{split} objects", ["F1", "accuracy", "says yes"]) for split in SPLITS]
    rows = []
    for arm in arms:
        row: list[Cell] = []
        for split in SPLITS:
            found = look(arm, "pope", "splits", split)
            row += [_estimate(look(found, key)) for key in ("f1", "accuracy")]
            row.append(_plain(look(found, "yes_ratio"), 2))
        rows.append(row)
    return _arm_table("POPE by split", arms, heads, rows)


def comparison_table(comparisons: Sequence[Record]) -> Html:
    """Paired differences, b minus a."""
    names = ("compared", "metric", "difference", "95% interval", "p", "reading")
    head = element("tr", *(element("th", name, scope="col") for name in names))
    rows = []
    for entry in comparisons:
        cells = (
            entry["metric"],
            signed(look(entry, "difference")),
            span(look(entry, "low"), look(entry, "high"), between=" to "),
            probability(look(entry, "p")),
            reading(entry),
        )
        pair = element("th", f"{entry['b']} minus {entry['a']}", scope="row")
        rows.append(element("tr", pair, *(element("td", cell) for cell in cells)))
    return _scroll("Paired comparisons", element("thead", head), rows, "comparisons")


def reading(entry: Record) -> str:
    """What the interval of a difference says, without saying whether that is good."""
    low, high = finite(look(entry, "low")), finite(look(entry, "high"))
    if low is None or high is None:
        return NA
    return f"{entry['b']} is {'higher' if low > 0 else 'lower'}" if low > 0 or high < 0 else "no clear difference"


def _estimate(measured: Any) -> Cell:
    return number(look(measured, "value")), _ends(look(measured, "low"), look(measured, "high"), 3)


def _quartiles(measured: Any) -> Cell:
    return times(look(measured, "median")), _ends(look(measured, "q1"), look(measured, "q3"), 2)


def _ends(low: Any, high: Any, digits: int) -> str | None:
    shown = span(low, high, digits)
    return None if shown == NA else shown


def _plain(value: Any, digits: int) -> Cell:
    return number(value, digits), None


def _arm_table(
    caption: str, arms: Sequence[Record], groups: Sequence[tuple[str, list[str]]], rows: Sequence[Sequence[Cell]]
) -> Html:
    fixed = [element("th", name, scope="col", rowspan=2) for name in ("arm", "tokens")]
    spans = [
        element("th", element("span", name), scope="colgroup", colspan=len(columns), class_="over")
        for name, columns in groups
    ]
    top = element("tr", *fixed, *spans)
    starts = {sum(len(c) for _, c in groups[:i]) for i in range(len(groups))}
    names = [name for _, columns in groups for name in columns]
    low = element("tr", *(_head(name, i in starts) for i, name in enumerate(names)))
    body = []
    for arm, row in zip(arms, rows, strict=True):
        cells = [_cell(cell, i in starts) for i, cell in enumerate(row)]
        name = element("th", arm["name"], scope="row")
        body.append(element("tr", name, element("td", whole(arm["visual_tokens"])), *cells))
    return _scroll(caption, element("thead", top, low), body, "arms")


def _head(name: str, first: bool) -> Html:
    return element("th", name, scope="col", class_="first" if first else None)


def _cell(cell: Cell, first: bool) -> Html:
    value, small = cell
    return element("td", value, small and element("small", small), class_="first" if first else None)


def _scroll(caption: str, head: Html, rows: Sequence[Html], class_: str) -> Html:
    """A table that scrolls sideways in a box of its own where the screen is narrow."""
    table = element("table", element("caption", caption), head, element("tbody", *rows), class_=class_)
    return element("div", table, class_="scroll", role="region", aria_label=caption, tabindex=0)
