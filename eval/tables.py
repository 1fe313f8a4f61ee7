"""Reports as tables for a terminal. Only here do fractions become percent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

TITLES = {
    **{"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes ratio"},
    **{"chair_s": "CHAIR_s", "chair_i": "CHAIR_i", "len": "Len"},
}


def number(name: str, value: float | None, signed: bool = False) -> str:
    """A metric's value: percent with one decimal, Len in tokens, "n/a" for 0/0."""
    if value is None:
        return "n/a"
    shown = value if name == "len" else 100 * value
    return f"{shown:+.1f}" if signed else f"{shown:.1f}"


def _range(name: str, found: Mapping[str, Any], signed: bool = False, dash: str = "") -> str:
    if found["low"] is None:
        return ""
    low, high = (number(name, found[side], signed) for side in ("low", "high"))
    return f"{low}{dash}{high}" if dash else f"[{low}, {high}]"


def _p(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"


def score_table(report: Mapping[str, Any]) -> RenderableType:
    """The metrics of one run with their intervals."""
    records, boot = report["records"], report["bootstrap"]
    scored = f"{records['n_scored']} items, {boot['n_images']} images"
    title = Text(f"{report['profile']}: {records['file']} ({scored})")
    percent = "%, Len in tokens" if report["task"] == "chair" else "%"
    caption = Text(f"{percent}; {boot['level']:.0%} bootstrap intervals by image")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if report["task"] == "chair":
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column("interval")
        for name, found in report["metrics"].items():
            table.add_row(TITLES[name], number(name, found["value"]), Text(_range(name, found)))
        return Group(title, table, caption)
    names = list(report["metrics"])
    table.add_column("split", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in names:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    rows = [(split, part["counts"]["n"], part["metrics"]) for split, part in report["splits"].items()]
    rows += [("mean", records["n_scored"], report["metrics"]), ("pooled", records["n_scored"], report["pooled"])]
    for split, n, metrics in rows:
        # the interval on a line of its own and without blanks: seven columns fit 80 characters
        cells = [Text(f"{number(name, m['value'])}\n{_range(name, m, dash='-')}") for name, m in metrics.items()]
        table.add_row(split, str(n), *cells)
    unread = Text(f"unparsed (pope-strict): {100 * report['unparsed_rate']:.1f} %")
    return Group(title, table, caption, unread)


def compare_table(report: Mapping[str, Any]) -> RenderableType:
    """The differences between two runs."""
    boot, exact = report["bootstrap"], report["mcnemar"]
    title = Text(f"{report['profile']}: B {report['b']['file']} against A {report['a']['file']}")
    caption = Text(f"{report['n_items']} items, {boot['n_images']} images; %; paired bootstrap by image")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("metric", "A", "B", "B - A", f"{boot['level']:.0%} interval", "p", "p (Holm)"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, found in report["metrics"].items():
        table.add_row(
            TITLES[name],
            number(name, found["a"]),
            number(name, found["b"]),
            number(name, found["difference"], signed=True),
            Text(_range(name, found, signed=True)),
            _p(found["p_value"]),
            _p(found["p_holm"]),
        )
    line = (
        f"McNemar: right in A only {exact['only_a_right']}, in B only {exact['only_b_right']}, p {_p(exact['p_value'])}"
    )
    return Group(title, table, caption, Text(line))


def show(report: Mapping[str, Any], table: RenderableType) -> None:
    """Print a table on stdout and the report's warnings on stderr."""
    Console().print(table)
    warnings = Console(stderr=True)
    for warning in report["warnings"]:
        warnings.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
