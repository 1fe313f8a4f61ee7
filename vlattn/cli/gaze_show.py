"""`vlattn gaze show`: pictures of predicted scanpaths beside people's, and of what the model attended to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    from vlattn.gaze.decode import Decoding
    from vlattn.gaze.trial import Trial
    from vlattn.viz.scanpath_page import SearchShown


def show(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Folder for the page and the pictures of each search.")] = Path("scanpaths"),
    data: DataOption = None,
    part: PartOption = "test",
    scenes: Annotated[int, typer.Option(min=1, help="How many scenes with targets, spread over all.")] = 6,
    people: Annotated[int, typer.Option(min=0, help="Paths of people to show of each, at most.")] = 2,
    mode: Annotated[Literal["greedy", "sample"], typer.Option(help="How paths are predicted.")] = "greedy",
    samples: Annotated[int, typer.Option(min=1, help="Of sample.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Steps to show attention of, at most; 0 for none.")] = 8,
    columns: Annotated[int, typer.Option(min=1, help="Pictures a row, in the PNG files.")] = 4,
    side: Annotated[int, typer.Option(min=64, help="Pixels of a picture's longer side, in the PNG files.")] = 420,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    work: WorkOption = WORK,
    device: DeviceOption = None,
) -> None:
    """Draw scanpaths with numbered fixations, predicted beside human, and attention over objects step by step.

    Leaves a PNG for each search and a page with all of them, which opens from disk. Attention is along the first
    predicted path: how likely each object was to be next.
    """
    from rich.console import Console

    from vlattn.gaze.data.named import gaze_name
    from vlattn.gaze.decode import Decoding
    from vlattn.gaze.metrics.gaze_paths import stimulus_of
    from vlattn.gaze.oat_batch import searches_of
    from vlattn.viz.scanpath import draw_sheet, in_rows
    from vlattn.viz.scanpath_page import write_scanpath_page

    loaded = load_run(run, data, part, work, device)
    by: dict[tuple[str, str], list[Trial]] = {}
    for trial in searches_of(loaded.gaze.trials)[1]:
        by.setdefault(stimulus_of(trial), []).append(trial)
    count = min(scenes, len(by))
    groups = list(by.values())
    decoding = Decoding(mode, samples if mode == "sample" else 1, seed=seed)
    console, shown = Console(), []
    for place in range(count):
        trials = groups[place * len(groups) // count]
        one = _shown(loaded, trials, decoding, people, steps)
        shown.append(one)
        file = out / f"{_plain(trials[0].scene)}_{_plain(trials[0].target)}.png"
        rows = [*in_rows(one.paths, columns), *in_rows(one.steps, columns)]
        console.print(str(draw_sheet(rows, file, side)), soft_wrap=True, highlight=False)
    setting = [
        f"{gaze_name(loaded.text)}, {part}: {count} of {len(groups)} searches",
        f"{sum(p.numel() for p in loaded.model.parameters()):,} parameters",
        f"{mode} paths",
    ]
    page = write_scanpath_page("Where people looked, and where OAT would", setting, shown, out)
    console.print(str(page), soft_wrap=True, highlight=False)


def _shown(loaded: Loaded, trials: list[Trial], decoding: Decoding, people: int, steps: int) -> SearchShown:
    """What there is to see of one search, whose trials these are."""
    from vlattn.gaze.decode_trials import predict_trials
    from vlattn.gaze.oat_batch import searches_of
    from vlattn.gaze.oat_chances import step_chances
    from vlattn.image_file import read_rgb
    from vlattn.viz.scanpath import Panel, attention_panels
    from vlattn.viz.scanpath_page import SearchShown

    first = trials[0]
    scene = loaded.gaze.scene_of(first)
    predicted = predict_trials(loaded.model, loaded.data, [first], decoding).trials
    picture = read_rgb(loaded.gaze.image_path(scene), f"image: scene {scene.id!r}:")
    boxes, screen = scene.boxes(), (scene.width, scene.height)
    titled = [(f"{trial.target}: subject {trial.subject}", trial) for trial in trials[:people]]
    titled += [(f"{first.target}: OAT, {decoding.mode}", trial) for trial in predicted]
    paths = [Panel(title, picture, trial.points(), boxes, screen, first.target_object) for title, trial in titled]
    attended: list[Panel] = []
    if steps:
        (search,), _ = searches_of(predicted[:1])
        (chances,) = step_chances(loaded.model, loaded.data, [search])
        labels = [one.label for one in scene.objects]
        attended = attention_panels(picture, boxes, screen, search.path or (), chances, first.target_object, labels)
    return SearchShown(f"{first.target} in {scene.id}", paths, attended[:steps])


def _plain(text: str) -> str:
    """For a file name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in text)
