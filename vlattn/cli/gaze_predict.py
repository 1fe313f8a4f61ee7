"""`vlattn gaze predict`: scanpaths of a trained model, as a gaze file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlattn.cli.gaze_options import WORK, DataOption, DeviceOption, PartOption, RunArgument, WorkOption, load_run


def predict(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Gaze file for the predictions, which `vlattn gaze score` takes.")],
    data: DataOption = None,
    part: PartOption = "test",
    mode: Annotated[
        Literal["greedy", "sample", "beam"], typer.Option(help="The likeliest step each time, samples, or beams.")
    ] = "sample",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Paths a trial; default: 100 for sample, 1 for greedy and beam.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of sample.")] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Of beam.")] = 5,
    length_penalty: Annotated[float, typer.Option(min=0, help="Of beam: how far to make up for length.")] = 0.0,
    longest: Annotated[int | None, typer.Option(min=1, help="Fixations at most; default: as in training.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    name: Annotated[str, typer.Option(help="Subject of the predictions.")] = "OAT",
    work: WorkOption = WORK,
    device: DeviceOption = None,
) -> None:
    """Predict scanpaths for trials, whose own fixations are not looked at."""
    from rich.console import Console
    from rich.progress import Progress

    from vlattn.gaze.decode import Decoding
    from vlattn.gaze.decode_trials import predict_trials
    from vlattn.gaze.trial import write_gaze

    decoding = Decoding(
        mode, samples or (100 if mode == "sample" else 1), temperature, beams, length_penalty, longest, seed
    )
    loaded = load_run(run, data, part, work, device)
    trials = list(loaded.gaze.trials)
    with Progress(transient=True) as progress:
        bar = progress.add_task("paths", total=len(trials))
        found = predict_trials(
            loaded.model, loaded.data, trials, decoding, name=name, progress=lambda n: progress.update(bar, completed=n)
        )
    absent = sum(trial.target_object is None for trial in trials)
    left_out = f"; {absent} trials left out, whose target is not in the scene" if absent else ""
    write_gaze(found, out)
    Console().print(
        f"{len(found.trials)} paths for {len(trials) - absent} trials{left_out}: {out}", soft_wrap=True, highlight=False
    )
