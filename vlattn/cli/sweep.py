"""`vlattn sweep`: methods at several budgets on the same images, as numbers and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def sweep(
    config: Annotated[
        str, typer.Argument(help="YAML file with model, data and methods; sweep_tiny comes with vlattn.")
    ] = "sweep_tiny",
    out: Annotated[Path, typer.Option(help="Folder for sweep.json, the records and the figure.")] = Path(
        "vlattn-sweep"
    ),
    budget: Annotated[
        Literal["final", "average", "counted"],
        typer.Option(
            help="How visual tokens are counted, for the x axis and for equal budgets: left at the end, mean of what "
            "enters each decoder layer, or mean of what each hands on."
        ),
    ] = "average",
    figure: Annotated[bool, typer.Option(help="Draw pareto.png and pareto.svg; needs matplotlib.")] = True,
) -> None:
    """Run POPE and CHAIR for methods at several budgets, and draw both against the visual tokens that are left.

    Every answer is recorded as it comes: the same command goes on after an interruption, and a finished sweep is
    only scored and drawn again, so --budget can be changed at no cost.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from vlattn.eval.report import write_report
    from vlattn.eval.sweep import Sweep
    from vlattn.eval.sweep_config import SweepConfig
    from vlattn.viz.pareto import draw_pareto, require_matplotlib

    if figure:
        require_matplotlib()
    logging.disable_progress_bar()
    job = Sweep(SweepConfig.read(config), out)
    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=job.steps)

        def step(what: str, done: int) -> None:
            progress.update(bar, advance=done, description=what or None)

        results = job.run(step, budget)
        progress.update(bar, description="done")
    write_report(results, out / "sweep.json")
    console.print(sweep_table(results))
    for path in [out / "sweep.json", *(draw_pareto(results, out) if figure else [])]:
        console.print(str(path), soft_wrap=True, highlight=False)


def sweep_table(results: dict[str, Any]) -> Any:
    """The rich table of the arms, for 100 columns; intervals stand under their figure."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    data, budget = results["data"], results["budget"]
    table = Table(
        title=f"{data['name']}: {data['images']} images, {data['questions']} questions; model "
        f"{results['model']['name']}",
        caption=f"tokens: {budget}, {results['budgets'][budget]}; F1: mean of the POPE splits; 95% bootstrap intervals "
        "by image; - random: difference to random pruning of the same budget",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("setting", overflow="fold")
    for name in ("tokens", "F1", "- random", "CHAIR_i", "- random", "recall"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in results["arms"]:
        table.add_row(
            Text(arm["setting"]),
            _tokens(arm, budget),
            _interval(arm["pope"]["mean_f1"]),
            _difference(arm, "pope", "f1"),
            _interval(arm["chair"]["chair_i"]),
            _difference(arm, "chair", "chair_i"),
            _number(arm["chair"]["recall"]["value"]),
        )
    return table


def _tokens(arm: dict[str, Any], budget: str) -> str:
    """One number where both tasks leave as many, else POPE's and CHAIR's."""
    shown = dict.fromkeys(f"{arm['budget'][task][budget]:.1f}" for task in ("pope", "chair"))
    return "\n".join(shown)


def _difference(arm: dict[str, Any], task: str, metric: str) -> str:
    found = arm["against"]["random"][task]
    if found is None:
        return ""
    one = found["metrics"][metric]
    return f"{_number(one['difference'], '+')}\n[dim]{_number(one['low'], '+')} {_number(one['high'], '+')}[/dim]"


def _interval(metric: dict[str, Any]) -> str:
    return f"{_number(metric['value'])}\n[dim]{_number(metric['low'])}-{_number(metric['high'])}[/dim]"


def _number(value: float | None, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}.3f}"
