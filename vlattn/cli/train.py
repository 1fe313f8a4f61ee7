"""`vlattn train`: train what a method needs, on a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlattn.training.dyvte import DyVTETrainer

app = typer.Typer(no_args_is_help=True, help="Train what a method needs; the model itself stays frozen.")


@app.callback()
def _group() -> None:
    """Keeps `dyvte` a word of its own while it is the only command."""


@app.command()
def dyvte(
    data: Annotated[
        str,
        typer.Option(
            help='JSON Lines of {"image", "question", "answer"}, image paths relative to the file; or tiny:val, the '
            "third of tiny COCO val that is set aside for training."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the gates, their log and the checkpoint.")],
    model: Annotated[str, typer.Option(help='"tiny" (embedded, offline), a local folder, or a hub id.')] = "tiny",
    gate_hidden: Annotated[int, typer.Option(help="Width of each gate's hidden layer.")] = 2048,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Batches in all, in place of --epochs.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW at the end of the warm-up.")] = 6e-5,
    batch_size: Annotated[int, typer.Option()] = 16,
    layers_per_step: Annotated[
        int, typer.Option(help="Layers drawn for each batch; each costs another run of the layers above it.")
    ] = 1,
    agreement: Annotated[
        float, typer.Option(help="Exit label: share of equal answer tokens must be above this.")
    ] = 0.99,
    loss_ratio: Annotated[float, typer.Option(help="Exit label: the loss may grow by less than this factor.")] = 1.03,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="Folder for gate inputs and labels of all examples and layers, made once and read from then on: for "
            "several epochs or gate sizes."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and layers.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")] = None,
) -> None:
    """Train the exit gates of DyVTE: after which layer does the answer stay the same without visual tokens?

    "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
    arXiv 2411.19628.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    import vlattn
    from vlattn.training.dyvte import DyVTETrainer, DyVTETraining
    from vlattn.training.examples import load_examples

    settings = DyVTETraining(
        gate_hidden=gate_hidden, epochs=epochs, steps=steps, lr=lr, batch_size=batch_size, seed=seed,
        layers_per_step=layers_per_step, agreement=agreement, loss_ratio=loss_ratio, save_every=save_every,
    )  # fmt: skip
    examples = load_examples(data)
    logging.disable_progress_bar()
    loaded, processor = vlattn.load(model, dtype=dtype, device=device)
    names = {"name": Path(model).name if Path(model).is_dir() else model, "data": Path(data).name}
    trainer = DyVTETrainer(loaded, processor, examples, out, settings, resume=resume, **names)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        if tasks is not None:
            collecting = progress.add_task("examples", total=len(examples))
            trainer.collect(tasks, lambda n: progress.advance(collecting, n))
        bar = progress.add_task("gates", total=trainer.steps, completed=trainer.first)
        trainer.run(lambda s: progress.update(bar, completed=s.step, description=f"loss {s.loss:.3f}"))
    console.print(balance_table(trainer))
    console.print(f"gates: {out}")


def balance_table(trainer: DyVTETrainer) -> Any:
    """By layer: how many labels, how many of them exit, and how often the gate was right while it learned."""
    from rich import box
    from rich.table import Table

    table = Table(title="labels by layer", box=box.SIMPLE_HEAD)
    for name in ("layer", "labels", "exit", "gate right"):
        table.add_column(name, justify="right")
    for layer, count in trainer.balance.items():
        seen = max(1, count.examples)
        table.add_row(str(layer), str(count.examples), f"{count.exits / seen:.1%}", f"{count.right / seen:.1%}")
    return table
