"""What the probing commands print of results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlattn.probing.train_result import ProbeResult


def sweep_table(subject: dict[str, Any]) -> Any:
    """The rich table of one subject's arms, for 100 columns; best first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    counts = subject["images"]
    table = Table(
        title=f"{subject['name']}: {counts['train']} images to train on, {counts['val']} to judge by",
        caption=f"{subject['metric']} in percent, 95% t intervals over seeds; difference to {subject['linear']}, the "
        "better linear probe; parameters and MACs with the classifier; ms: a training step, measured",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("pooler", overflow="fold")
    for name in (subject["metric"], f"- {subject['linear']}", "parameters", "kMACs", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in sorted(subject["arms"], key=lambda one: -one["value"]["mean"]):
        table.add_row(
            Text(arm["pooler"]),
            _spread(arm["value"]),
            "" if arm["difference"] is None else _spread(arm["difference"], "+"),
            f"{arm['parameters']:,}",
            f"{arm['macs'] / 1e3:,.0f}",
            f"{arm['step']['median']:.1f}",
        )
    return table


def _spread(value: dict[str, Any], sign: str = "") -> str:
    if value["low"] is None:
        return f"{value['mean']:{sign}.2f}"
    return f"{value['mean']:{sign}.2f} [dim]({value['low']:{sign}.2f} {value['high']:{sign}.2f})[/dim]"


def seeds_lines(results: Mapping[int, ProbeResult], summary: Mapping[str, Any]) -> list[str]:
    """A line for each seed, and one for their mean with its interval, with rich's markup."""
    metric, value = summary["metric"], summary["value"]
    lines = [
        f"seed {seed}: {metric} {one.best.best:.2f} at epoch {one.best.best_epoch}, rate {one.best.rate:g}"
        for seed, one in results.items()
    ]
    told = f"{summary['level']:.0%} t interval over seeds" if value["low"] is not None else "one seed, no interval"
    return [*lines, f"mean: {metric} {_spread(value)}, {told}"]
