"""`vlattn compare`: is run B better than run A, or is it chance?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlattn.eval.compare import compare_files
from vlattn.eval.report import write_report
from vlattn.eval.tables import compare_table, show


def compare(
    a: Annotated[Path, typer.Argument(help="Records of run A (the baseline).")],
    b: Annotated[Path, typer.Argument(help="Records of run B, on the same items.")],
    annotations: Annotated[
        Path | None, typer.Option(help="chair: the COCO instances file. pope: the question file or folder.")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="chair: the COCO captions file of the same images.")] = None,
    task: Annotated[str | None, typer.Option(help="pope or chair. Read from the sidecars when they are there.")] = None,
    profile: Annotated[str | None, typer.Option(help="How answers are read; as for `vlattn score`.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric to compare; repeat for several. Default for pope: accuracy, f1 (means over splits); for "
            "chair: chair_s, chair_i, recall, len."
        ),
    ] = None,
    truncate: Annotated[str, typer.Option(help="chair: none or drop_partial_sentence.")] = "none",
    out: Annotated[Path | None, typer.Option(help="Write the comparison here as JSON.")] = None,
    n_boot: Annotated[int, typer.Option(help="Bootstrap samples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two runs on the same items: paired bootstrap by image, Holm-adjusted p-values, and McNemar's exact test.

    Runs on different items are refused.
    """
    report = compare_files(a, b, annotations, captions, task, profile, metric or (), truncate, n_boot, seed)
    if out is not None:
        write_report(report, out)
    show(report, compare_table(report))
