"""`vlattn gaze eval`: a trained model beside people, baselines and the best there can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlattn.cli.gaze_options import WORK, DataOption, DeviceOption, PartOption, RunArgument, WorkOption, load_run

EMBEDDED = "tiny-gaze"


def evaluate(
    run: RunArgument,
    data: DataOption = None,
    part: PartOption = "test",
    samples: Annotated[int, typer.Option(min=1, help="Paths for each scene and target.")] = 20,
    metrics: Annotated[str | None, typer.Option(help="Names with commas, as `vlattn gaze score` takes them.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help='Of random, centre, saliency, similarity, searcher, or "none"; default: all but searcher, which is '
            "only for the embedded data that it made, and there the ceiling."
        ),
    ] = None,
    n_boot: Annotated[int, typer.Option(min=0, help="Bootstrap samples over stimuli; 0 for no intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and bootstrap.")] = 0,
    parity: Annotated[bool, typer.Option("--parity", help="SIM with the reference's softmax along the path.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    work: WorkOption = WORK,
    device: DeviceOption = None,
) -> None:
    """Score sampled and greedy paths against people's, with baselines beside them."""
    from rich.console import Console

    from vlattn.gaze.data.named import gaze_name
    from vlattn.gaze.metrics.score_settings import ScoreSettings
    from vlattn.gaze.oat_report import METRICS, report_oat
    from vlattn.runtime.machine import describe_machine

    loaded = load_run(run, data, part, work, device)
    console = Console()
    with console.status("OAT") as status:
        report = report_oat(
            loaded.model,
            loaded.data,
            loaded.gaze,
            loaded.train,
            _baselines(baselines, loaded.text, loaded.train is not None),
            samples=samples,
            metrics=METRICS if metrics is None else [name.strip() for name in metrics.split(",")],
            settings=ScoreSettings(n_boot=n_boot, seed=seed),
            seed=seed,
            parity=parity,
            heard=status.update,
        )
    report = {"data": gaze_name(loaded.text), "part": part, "samples": samples, **report}
    report["machine"] = describe_machine(device or "cpu")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(eval_table(report))


def eval_table(report: dict[str, Any]) -> Any:
    """The rich table of a report: a row for each metric, a column for each model, people last."""
    from rich import box
    from rich.table import Table

    counts, models = report["counts"], report["models"]
    table = Table(
        title=f"{counts['stimuli']} scenes with targets, {counts['human_paths']} human paths",
        caption="+ higher is better, - lower; people: each against the others; loss: nats a step, the end included; "
        "sim: mean chance of the next fixation",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("metric", no_wrap=True)
    table.add_column("")
    for name in (*models, "people"):
        table.add_column(name, justify="right", overflow="fold", min_width=5)
    for name, about in report["about"].items():
        if name.startswith("multimatch.") and name != "multimatch.mean4":
            continue  # the file has them
        cells = [_value(one["metrics"][name]) for one in models.values()]
        sign = "+" if about["better"] == "higher" else "-"
        table.add_row(name, sign, *cells, _value(report["human"].get(name)))
    for name, sign in (("loss", "-"), ("sim", "+")):
        cells = ["" if one.get(name) is None else f"{one[name]:.3f}" for one in models.values()]
        table.add_row(name, sign, *cells, "")
    return table


def _baselines(text: str | None, data: str, fitted: bool) -> list[str]:
    if text == "none" or (text is None and not fitted):
        return []
    if text is not None:
        return [name.strip() for name in text.split(",")]
    return ["random", "centre", "saliency", "similarity"] + (["searcher"] if data.startswith(EMBEDDED) else [])


def _value(cell: dict[str, Any] | None) -> str:
    return "" if cell is None or cell["value"] is None else f"{cell['value']:.3f}"
