"""Options that the commands of trained gaze models share, and what they make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlattn.errors import InputError

if TYPE_CHECKING:
    from vlattn.gaze.oat import OAT
    from vlattn.gaze.oat_batch import OATData
    from vlattn.gaze.splits import GazeSplit
    from vlattn.gaze.trial import GazeSet

CNN = "cnn"
Part = Literal["train", "val", "test", "all"]

RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run, as `vlattn gaze train` makes it.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help='"tiny-gaze[:shelf|:coco]" (embedded), a gaze file (.json), "amazon:FILE.json::IMAGES", '
        '"shelf:TABLE.xlsx::IMAGES" or "coco-search:FIXATIONS.json::INSTANCES.json::IMAGES"; default: what it was '
        "trained on."
    ),
]
PartOption = Annotated[Part, typer.Option(help="Of data that it was trained on; other data is taken whole.")]
WorkOption = Annotated[Path, typer.Option(help="Folder for backbones that are trained on first use.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")]
WORK = Path("vlattn-gaze")


@dataclass(frozen=True)
class Loaded:
    """A trained model, the scenes it is asked about, and the trials of one part of the data.

    train, val: other parts; None of data that it was not trained on.
    """

    model: OAT
    data: OATData
    gaze: GazeSet
    train: GazeSet | None
    val: GazeSet | None
    text: str


def load_split(text: str, by: str, seed: int, outside: str) -> GazeSplit:
    """Data by its text, parted."""
    from vlattn.gaze.data.named import named_gaze
    from vlattn.gaze.splits import split_gaze

    return split_gaze(named_gaze(text, outside), by, seed=seed)  # type: ignore[arg-type]


def load_backbone(text: str, work: Path, device: str | None) -> Any:
    """The backbone that --appearance names; None for the paper's CNN."""
    if text == CNN:
        return None
    from transformers.utils import logging

    from vlattn.probing.named_backbone import named_backbone

    logging.disable_progress_bar()
    return named_backbone(text, work, device=device)


def load_run(run: Path, data: str | None, part: Part, work: Path, device: str | None) -> Loaded:
    """What `vlattn gaze train` left in a folder, with the data it was trained on or other data.

    Raises:
        InputError: the run does not say what it was trained on.
    """
    from vlattn.gaze.data.named import named_gaze
    from vlattn.gaze.oat_batch import OATData
    from vlattn.gaze.oat_file import load_oat, make_looks

    model, about = load_oat(run, device or "cpu")
    asked = about.get("asked")
    if asked is None:
        raise InputError(f"run: {str(run)!r} does not say what it was trained on; give one that vlattn gaze made")
    text = data or asked["data"]
    if text == asked["data"]:
        split = load_split(text, asked["split"], asked["split_seed"], asked["outside"])
        whole = named_gaze(text, asked["outside"]) if part == "all" else getattr(split, part)
        train, val = split.train, split.val
    else:
        whole, train, val = named_gaze(text, asked["outside"]), None, None
    backbone = load_backbone(asked["appearance"], work, device)
    looks = make_looks(whole, model.config, backbone)
    return Loaded(model, OATData(whole, looks, model.config.rows), whole, train, val, text)
