"""`vlattn score`: numbers from a records file, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlattn.eval.report import score_file, write_report
from vlattn.eval.tables import score_table, show


def score(
    records: Annotated[Path, typer.Argument(help="Records of a run (.jsonl), or a file of captions or answers.")],
    task: Annotated[
        str | None, typer.Option(help="pope or chair. Read from the run's sidecar when there is one.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="How answers are read: chair-legacy (default) or chair-fixed; pope-official (default), pope-opera, "
            "pope-lmms, pope-vlmeval or pope-strict."
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="chair: the COCO instances file. pope: the question file or folder, to check completeness."),
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="chair: the COCO captions file of the same images.")] = None,
    truncate: Annotated[
        str,
        typer.Option(
            help="chair: none, or drop_partial_sentence to drop the unfinished last sentence of captions cut by length."
        ),
    ] = "none",
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    details: Annotated[bool, typer.Option("--details", help="Put every scored item into the report.")] = False,
    n_boot: Annotated[int, typer.Option(help="Bootstrap samples for the intervals.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Score a records file: POPE (accuracy, F1, ...) or CHAIR (hallucinated objects), with intervals by image.

    Nothing is generated and no model is loaded: the same records give the same report on any machine.
    """
    report = score_file(records, task, profile, annotations, captions, truncate, n_boot, seed, details=details)
    if out is not None:
        write_report(report, out)
    show(report, score_table(report))
