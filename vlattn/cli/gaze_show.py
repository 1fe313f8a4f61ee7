"""`vlattn gaze show`: pictures of predicted scanpaths beside people's, and of what the model attended to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlattn.cli.gaze_options import WORK, DataOption, DeviceOption, PartOption, RunArgument, WorkOption, load_run


def show(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, one a scene and target.")] = Path("scanpaths"),
    data: DataOption = None,
    part: PartOption = "test",
    scenes: Annotated[int, typer.Option(min=1, help="How many scenes with targets, the first ones.")] = 6,
    people: Annotated[int, typer.Option(min=0, help="Paths of people to show of each, at most.")] = 2,
    mode: Annotated[Literal["greedy", "sample"], typer.Option(help="How paths are predicted.")] = "greedy",
    samples: Annotated[int, typer.Option(min=1, help="Of sample.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Steps to show attention of, at most; 0 for none.")] = 8,
    columns: Annotated[int, typer.Option(min=1, help="Pictures a row.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    work: WorkOption = WORK,
    device: DeviceOption = None,
) -> None:
    """Draw scanpaths with numbered fixations, predicted beside human, and attention over objects step by step.

    Attention is along the first predicted path: how likely each object was to be next.
    """
    from rich.console import Console

    from vlattn.gaze.decode import Decoding
    from vlattn.gaze.decode_trials import predict_trials
    from vlattn.gaze.metrics.gaze_paths import stimulus_of
    from vlattn.gaze.oat_batch import searches_of
    from vlattn.gaze.oat_chances import step_chances
    from vlattn.image_file import read_rgb
    from vlattn.viz.scanpath import Panel, attention_panels, draw_sheet, in_rows

    loaded = load_run(run, data, part, work, device)
    _, trials = searches_of(loaded.gaze.trials)
    by: dict[tuple[str, str], list[int]] = {}
    for place, trial in enumerate(trials):
        by.setdefault(stimulus_of(trial), []).append(place)
    console = Console()
    for (name, target), places in list(by.items())[:scenes]:
        scene, first = loaded.gaze.scenes[name], trials[places[0]]
        decoding = Decoding(mode, samples if mode == "sample" else 1, seed=seed)
        predicted = predict_trials(loaded.model, loaded.data, [first], decoding).trials
        picture = read_rgb(loaded.gaze.image_path(scene), f"image: scene {name!r}:")
        screen = (scene.width, scene.height)
        shown = [(f"{target}: subject {trials[place].subject}", trials[place]) for place in places[:people]]
        shown += [(f"{target}: OAT, {mode}", trial) for trial in predicted]
        panels = [
            Panel(title, picture, trial.points(), scene.boxes(), screen, first.target_object) for title, trial in shown
        ]
        rows = in_rows(panels, columns)
        if steps:
            (search,), _ = searches_of(predicted[:1])
            (chances,) = step_chances(loaded.model, loaded.data, [search])
            seen = attention_panels(picture, scene.boxes(), screen, search.path or (), chances, first.target_object)
            rows += in_rows(seen[:steps], columns)
        file = out / f"{_plain(name)}_{_plain(target)}.png"
        console.print(str(draw_sheet(rows, file)), soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    """For a file name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in text)
