"""`vlattn gaze eval`: a trained model beside people, baselines and the best there can be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlattn.cli.gaze_options import (
    WORK,
    DataOption,
    DeviceOption,
    Loaded,
    PartOption,
    RunArgument,
    WorkOption,
    load_run,
)

if TYPE_CHECKING:
    from vlattn.gaze.trial import GazeSet

EMBEDDED = "tiny-gaze"
OTHERS = ("direct", "bridge")
"""Predictors of paths that say no probabilities of steps."""
SIDE_BY_SIDE = 7
"""Models in one table, so that it can be read in 80 columns."""


def evaluate(
    run: RunArgument,
    data: DataOption = None,
    part: PartOption = "test",
    samples: Annotated[int, typer.Option(min=1, help="Paths for each scene and target.")] = 20,
    metrics: Annotated[
        str | None, typer.Option(help="Names with commas, as `vlattn gaze score` takes them, or all; default: eight.")
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Of random, centre, saliency, similarity; searcher, the ceiling on the embedded data, which it made; "
            "direct, one fixation on the target; bridge, a language model's attention; or none. Default: the first "
            "four, and searcher on the embedded data."
        ),
    ] = None,
    lvlm: Annotated[str, typer.Option(help="Of bridge: the model whose attention is read.")] = "tiny",
    attention: Annotated[
        str,
        typer.Option(
            help="Of bridge: ROWS:LAYER[:area], such as target:0, or auto: prompt or target, the layer and the order "
            "with the best Sequence Score on the val part. Rows: prompt is its last one, target those of its name, "
            "answer those that the answer comes from; :area orders by attention per token."
        ),
    ] = "auto",
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
    from vlattn.gaze.oat_report import report_oat
    from vlattn.runtime.machine import describe_machine

    loaded = load_run(run, data, part, work, device)
    names = _baselines(baselines, loaded.text, loaded.train is not None)
    console = Console()
    with console.status("OAT") as status:
        others, bridge = _others(names, loaded, lvlm, attention, n_boot, seed, device, status.update)
        report = report_oat(
            loaded.model,
            loaded.data,
            loaded.gaze,
            loaded.train,
            [name for name in names if name not in OTHERS],
            others=others,
            samples=samples,
            metrics=_metrics(metrics),
            settings=ScoreSettings(n_boot=n_boot, seed=seed),
            seed=seed,
            parity=parity,
            heard=status.update,
        )
    report = {"data": gaze_name(loaded.text), "part": part, "samples": samples, **report}
    if bridge is not None:
        report["bridge"] = bridge
    report["machine"] = describe_machine(device or "cpu")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    names = list(report["models"])
    for first in range(0, len(names), SIDE_BY_SIDE):
        console.print(eval_table(report, names[first : first + SIDE_BY_SIDE]))
    if bridge is not None:
        found = bridge["grounding"]
        console.print(
            f"bridge: attention of {bridge['lvlm']}, {bridge['reading']}; per token it is highest on the target in "
            f"{found['per_area']:.1%} of {found['n_valid']} searches (chance {found['chance_per_area']:.1%})",
            highlight=False,
        )


def eval_table(report: dict[str, Any], names: Sequence[str]) -> Any:
    """The rich table of a report: a row for each metric, a column for each of these models, people last."""
    from rich import box
    from rich.table import Table

    counts, models = report["counts"], {name: report["models"][name] for name in names}
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


def _others(
    names: list[str],
    loaded: Loaded,
    lvlm: str,
    attention: str,
    n_boot: int,
    seed: int,
    device: str | None,
    heard: Callable[[str], object],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Paths of those that are no search models, by name, and what there is to say of the bridge."""
    from dataclasses import replace

    import vlattn
    from vlattn.gaze.baselines import direct_paths
    from vlattn.gaze.bridge_choice import Reading
    from vlattn.gaze.bridge_report import ask_bridge
    from vlattn.gaze.metrics.gaze_paths import one_of_each
    from vlattn.gaze.oat_batch import searches_of

    def usable(gaze: GazeSet) -> GazeSet:
        return replace(gaze, trials=tuple(searches_of(gaze.trials)[1]))

    questions = one_of_each(usable(loaded.gaze))
    others: dict[str, Any] = {}
    told = None
    if "direct" in names:
        others["direct"] = direct_paths(questions)
    if "bridge" in names:
        reading = None if attention == "auto" else Reading.parse(attention)
        val = None if loaded.val is None else usable(loaded.val)
        model: Any
        model, processor = vlattn.load(lvlm)
        others["bridge"], told = ask_bridge(
            model.to(device or "cpu"),
            processor,
            questions,
            val,
            reading,
            n_boot=n_boot,
            seed=seed,
            heard=heard,
        )
        told = {"lvlm": Path(lvlm).name, **told}
    return others, told


def _metrics(text: str | None) -> Sequence[str] | None:
    from vlattn.gaze.oat_report import METRICS

    if text is None:
        return METRICS
    return None if text == "all" else [name.strip() for name in text.split(",")]


def _baselines(text: str | None, data: str, fitted: bool) -> list[str]:
    if text == "none" or (text is None and not fitted):
        return []
    if text is not None:
        return [name.strip() for name in text.split(",")]
    return ["random", "centre", "saliency", "similarity"] + (["searcher"] if data.startswith(EMBEDDED) else [])


def _value(cell: dict[str, Any] | None) -> str:
    return "" if cell is None or cell["value"] is None else f"{cell['value']:.3f}"
