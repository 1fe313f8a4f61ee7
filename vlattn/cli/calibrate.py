"""`vlattn calibrate`: find what a method needs to know about a model, on held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlattn.cli.options import parse_layers
from vlattn.errors import InputError

if TYPE_CHECKING:
    from vlattn.interventions.act_heads import HeadCalibration

app = typer.Typer(no_args_is_help=True, help="Find what a method needs to know about a model; nothing is trained.")


@app.callback()
def _group() -> None:
    """Keeps `act` a word of its own while it is the only command."""


@app.command()
def act(
    data: Annotated[
        str,
        typer.Option(
            help='JSON Lines of {"image", "question", "answer"} with answers yes and no, image paths relative to the '
            "file; or tiny:val, the third of tiny COCO val that is set aside for training. Never the questions of an "
            "evaluation."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON file for the heads; a run that was cut off is gone on with.")],
    model: Annotated[str, typer.Option(help='"tiny" (embedded, offline), a local folder, or a hub id.')] = "tiny",
    settings: Annotated[
        str, typer.Option(help="Settings of ACT to calibrate for, as in --method: theta=0.05,recipients=visual")
    ] = "",
    layers: Annotated[str | None, typer.Option(help="Layers to look in: 2,3,4. Default: 2 to L - 2.")] = None,
    share: Annotated[float, typer.Option(help="Pass over heads with sinks in fewer of the questions.")] = 0.1,
    verify: Annotated[int, typer.Option(help="Heads to try at most.")] = 64,
    slopes: Annotated[bool, typer.Option(help="Rank heads by slopes, which takes a backward pass.")] = True,
    rule: Annotated[str, typer.Option(help="What a head alone must gain: gain, or standard_error.")] = "standard_error",
    answers: Annotated[str, typer.Option(help="How the model writes the two answers.")] = "yes,no",
    limit: Annotated[int | None, typer.Option(help="Take the first questions alone.")] = None,
    batch_size: Annotated[int, typer.Option()] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")] = None,
) -> None:
    """Find the heads in which attention calibration helps: each alone, then the best together.

    "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
    Calibration", arXiv 2406.15765.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    import vlattn
    from vlattn.interventions.act import ACT
    from vlattn.interventions.act_heads import calibrate_heads
    from vlattn.interventions.registry import parse_method
    from vlattn.training.examples import load_examples
    from vlattn.training.yes_no import yes_no_batches

    method = parse_method(f"act:heads=all,{settings}")
    assert isinstance(method, ACT)
    written = tuple(word.strip() for word in answers.split(","))
    if len(written) != 2:
        raise InputError(f"answers: got {answers!r}; give how the model writes yes and no, such as Yes,No")
    examples = [e for e in load_examples(data) if e.answer.strip().rstrip(".").lower() in ("yes", "no")][:limit]
    logging.disable_progress_bar()
    loaded, processor = vlattn.load(model, dtype=dtype, device=device)
    items = yes_no_batches(processor, examples, batch_size, loaded.device, (written[0], written[1]))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        found = calibrate_heads(
            loaded,
            items,
            method=method,
            layers=parse_layers(layers),
            share=share,
            verify=verify,
            slopes=slopes,
            rule=rule,  # type: ignore[arg-type]
            out=out,
            name=Path(model).name if Path(model).is_dir() else model,
            report=report,
        )
    console.print(gains_table(found))
    chosen = ", ".join(f"{layer}: {list(heads)}" for layer, heads in found.heads.items())
    console.print(
        f"heads: {{{chosen}}}" if found.heads else "no head helps: the file names none, and ACT changes nothing"
    )
    console.print(f"file: {out}")


def gains_table(found: HeadCalibration) -> Any:
    """The model as it is, heads tried alone, and the best together."""
    from rich import box
    from rich.table import Table

    table = Table(title="margin of the right answer", box=box.SIMPLE_HEAD)
    for name in ("heads", "gain", "standard error", "accuracy"):
        table.add_column(name, justify="left" if name == "heads" else "right")
    table.add_row(f"none (margin {found.margin:.3f})", "", f"{found.error:.3f}", f"{found.accuracy:.3f}")
    for gain in [*sorted(found.single, key=lambda gain: -gain.gain), *found.joint]:
        names = " ".join(f"{layer}.{head}" for layer, head in gain.heads)
        table.add_row(names, f"{gain.gain:+.4f}", f"{gain.error:.4f}", f"{gain.accuracy:.3f}")
    return table
