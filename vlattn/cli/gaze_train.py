"""`vlattn gaze train`: an OAT on searches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlattn.cli.gaze_options import CNN, WORK, DeviceOption, WorkOption, load_backbone, load_split


def train(
    out: Annotated[Path, typer.Option(help="Folder for the run: checkpoint, log, result and model.")],
    data: Annotated[
        str,
        typer.Option(
            help='"tiny-gaze[:shelf|:coco]" (embedded), a gaze file (.json), "amazon:FILE.json::IMAGES", '
            '"shelf:TABLE.xlsx::IMAGES" or "coco-search:FIXATIONS.json::INSTANCES.json::IMAGES".'
        ),
    ] = "tiny-gaze",
    split: Annotated[
        Literal["trial", "scene", "target", "subject", "pair"],
        typer.Option(help="What val and test do not share with training; trial is the published split."),
    ] = "scene",
    split_seed: Annotated[int, typer.Option(min=0, help="Of the split, 80 : 10 : 10.")] = 0,
    outside: Annotated[
        Literal["drop", "nearest", "raise"], typer.Option(help="What becomes of fixations on no object.")
    ] = "drop",
    size: Annotated[
        Literal["small", "published"], typer.Option(help="small trains on one core in minutes.")
    ] = "published",
    appearance: Annotated[
        str,
        typer.Option(help='"cnn", the paper\'s, or a frozen backbone as `vlattn probe` takes it: lvlm/tiny, timm/...'),
    ] = CNN,
    positions: Annotated[
        Literal["distance", "learned", "sinusoidal"], typer.Option(help="Table of positions.")
    ] = "distance",
    hide_target: Annotated[
        bool, typer.Option("--hide-target", help="Do not tell where the target is; published models know.")
    ] = False,
    dropout: Annotated[float, typer.Option(min=0, max=1)] = 0.1,
    lr: Annotated[float | None, typer.Option(help="Default: 1e-4 for published, 5e-4 for small.")] = None,
    optimizer: Annotated[Literal["adam", "adamw"], typer.Option()] = "adam",
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Searches of an update.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="At most.")] = 500,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better val score before it stops.")] = 30,
    select: Annotated[
        Literal["delta", "loss"], typer.Option(help="The val score that chooses the best epoch; delta is published.")
    ] = "delta",
    seed: Annotated[int, typer.Option(min=0, help="Of order and dropout.")] = 1234,
    init_seed: Annotated[int, typer.Option(min=0, help="Of the first weights.")] = 0,
    parity: Annotated[
        bool,
        typer.Option("--parity", help="The reference's loss (padding among the choices), and its last weights tested."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    work: WorkOption = WORK,
    device: DeviceOption = None,
) -> None:
    """Train an Object-Level Attention Transformer (arXiv 2407.13335), and test its best epoch.

    vlattn gaze train --size small --appearance lvlm/tiny --out run
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from vlattn.gaze.data.named import gaze_name
    from vlattn.gaze.oat_config import OATConfig
    from vlattn.gaze.train import train_oat
    from vlattn.gaze.train_settings import OATTraining

    changes: dict[str, Any] = {
        "positions": positions,
        "reveal_target_position": not hide_target,
        "dropout": dropout,
        "parity": parity,
    }
    config = OATConfig.small(**changes) if size == "small" else OATConfig(**changes)
    training = OATTraining(
        optimizer=optimizer, lr=lr or (5e-4 if size == "small" else 1e-4), weight_decay=weight_decay, batch=batch_size,
        epochs=epochs, patience=patience, select=select, seed=seed, init_seed=init_seed, test_last=parity,
    )  # fmt: skip
    parted = load_split(data, split, split_seed, outside)
    asked = {"data": data, "split": split, "split_seed": split_seed, "outside": outside, "appearance": appearance}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(gaze_name(data), total=epochs)

        def heard(share: float, record: dict[str, Any] | None) -> None:
            progress.update(bar, completed=share)
            if record is not None:
                val = record["val"]
                text = f"epoch {record['epoch']}: loss {record['loss']:.3f}, val {val['loss']:.3f}"
                progress.update(bar, description=f"{text}, delta {val['delta']:.3f}")

        result = train_oat(
            parted, config, training, out=out, resume=resume, backbone=load_backbone(appearance, work, device),
            device=device or "cpu", about={"asked": asked}, heard=heard,
        ).record  # fmt: skip
    told = result["trials"]
    console.print(
        f"{result['parameters']:,} parameters; {told['train']} + {told['val']} + {told['test']} searches, "
        f"{sum(result['left_out'].values())} left out",
        highlight=False,
    )
    for name in ("val", "test"):
        scores = ", ".join(f"{key} {_short(value)}" for key, value in result[name].items())
        console.print(f"{name}: {scores}", highlight=False)
    kept = "last weights" if result["tested"] == "last" else f"best epoch, {result['best_epoch']}"
    console.print(f"tested: {kept} of {result['epochs']}; run: {out}", soft_wrap=True, highlight=False)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
