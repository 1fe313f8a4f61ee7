"""`vlattn gaze score`: predicted against human scanpaths, without torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer


def score(
    predicted: Annotated[Path, typer.Argument(help="Gaze file of predictions; its subjects are the models.")],
    human: Annotated[Path, typer.Argument(help="Gaze file of people on the same scenes.")],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Names with commas, such as ss,ed,scanmatch,multimatch. All that the files allow by default; those of "
            "clusters (ss_clusters, fed) only if named."
        ),
    ] = None,
    compare: Annotated[
        str, typer.Option(help="With all people on the same scene and target (stimulus), or with its own trial.")
    ] = "stimulus",
    over: Annotated[str, typer.Option(help="mean over people, or best: the most similar one.")] = "mean",
    average: Annotated[str, typer.Option(help="tasks: the mean of targets' means; trials: all alike.")] = "tasks",
    max_step: Annotated[int, typer.Option(help="Fixations after the first that count in search metrics.")] = 6,
    truncate: Annotated[int | None, typer.Option(help="Only the first so many fixations count.")] = None,
    truncate_human: Annotated[bool, typer.Option(help="Of human paths too.")] = True,
    n_boot: Annotated[int, typer.Option(help="Bootstrap samples over stimuli for intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of the random paths.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
) -> None:
    """Score predicted scanpaths: sequence scores, edit distances, ScanMatch, MultiMatch, warping, search and behaviour.

    Beside each value are people against each other and random paths of the same lengths. docs/scanpath_metrics.md says
    what each metric is.
    """
    from vlattn.gaze.metrics.score import score_gaze
    from vlattn.gaze.metrics.score_settings import ScoreSettings
    from vlattn.gaze.trial import read_gaze

    settings = ScoreSettings(
        compare=compare,  # type: ignore[arg-type]
        over=over,  # type: ignore[arg-type]
        average=average,  # type: ignore[arg-type]
        max_step=max_step,
        truncate=truncate,
        truncate_human=truncate_human,
        n_boot=n_boot,
        seed=seed,
    )
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    files = read_gaze(predicted), read_gaze(human)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "durations:")  # reading has warned, and named the file
        report = score_gaze(*files, metrics=names, settings=settings)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, human = Console(), report["human"]
    for name, model in report["models"].items():
        told = f"{model['paths']} paths on {model['stimuli']} stimuli, {model['pairs']} pairs with people"
        if model["unmatched"]:
            told += f", {model['unmatched']} paths without people left out"
        level = report["settings"]["level"]
        table = Table(
            title=f"{name}: {told}",
            caption=f"+ higher is better, - lower; {level:.0%} bootstrap intervals over stimuli; people: each against "
            "the others; random: anywhere on the screen; valid: pairs (or paths) where it is defined",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("metric", no_wrap=True)
        table.add_column("")
        for column in ("value", "interval", "people", "random", "valid"):
            table.add_column(column, justify="right", no_wrap=True)
        for metric, cell in model["metrics"].items():
            table.add_row(
                metric,
                "+" if report["about"][metric]["better"] == "higher" else "-",
                _number(cell),
                "" if cell["low"] is None else f"{_short(cell['low'])} {_short(cell['high'])}",
                _number(human.get(metric)),
                _number(model["random"].get(metric)),
                f"{cell['n_valid'] / max(1, cell['n_total']):.1%}",
            )
        console.print(table)
    for metric, why in report["skipped"].items():
        console.print(f"{metric}: not scored, {why}", highlight=False)


def _number(cell: dict[str, Any] | None) -> str:
    return "" if cell is None or cell["value"] is None else _short(cell["value"])


def _short(number: float) -> str:
    return f"{number:.3f}" if abs(number) < 100 else f"{number:,.0f}"
