"""`vlattn probe sweep`: poolers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlattn.cli.probe_options import WORK, DeviceOption, WorkOption, write_json


def sweep(
    config: Annotated[
        str, typer.Argument(help="YAML file; probe_digits and probe_tiny_coco come with vlattn.")
    ] = "probe_digits",
    out: Annotated[Path, typer.Option(help="Folder for runs, results and figures.")] = Path("vlattn-probe-sweep"),
    work: WorkOption = WORK,
    figure: Annotated[bool, typer.Option(help="Draw accuracy against cost; needs matplotlib.")] = True,
    device: DeviceOption = None,
) -> None:
    """Train every pooler under several seeds, and compare accuracy with parameters and time.

    The same command goes on after an interruption, and adds what has been added to the file.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vlattn.cli.probe_tables import sweep_table
    from vlattn.probing.sweep import ProbeSweep
    from vlattn.probing.sweep_config import ProbeSweepConfig
    from vlattn.viz.pareto import require_matplotlib
    from vlattn.viz.probe_pareto import draw_probe_pareto

    if figure:
        require_matplotlib()
    job = ProbeSweep(ProbeSweepConfig.read(config), out, work, device)
    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=job.steps)
        results = job.run(lambda what, done: progress.update(bar, advance=done, description=what or None))
        progress.update(bar, description="done")
    path = write_json(out / "probe.json", results)
    for subject in results["subjects"]:
        console.print(sweep_table(subject))
        drawn = draw_probe_pareto(subject, out / f"probe_{subject['name']}") if figure else []
        for one in drawn:
            console.print(str(one), soft_wrap=True, highlight=False)
    console.print(str(path), soft_wrap=True, highlight=False)
