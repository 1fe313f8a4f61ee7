"""Options that the probing commands share, and what they make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlattn.errors import InputError

if TYPE_CHECKING:
    from vlattn.probing.settings import ProbeSettings
    from vlattn.probing.sources import TokenSources

Recipe = Literal["fast", "published"]
FinalNorm = Literal["auto", "on", "off"]

BackboneOption = Annotated[
    str,
    typer.Option(
        help='"timm/NAME", "open_clip/NAME:TAG", "hf/REPO_OR_FOLDER", "lvlm/NAME" ("lvlm/tiny" is embedded), or '
        '"digits-mim[:STEPS]", a small masked-image model that is trained on digits on first use.'
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        help='"digits[:SIZE]", "tiny-coco[:shift]", a folder with train/ and val/, a CSV with a column split, or '
        '"INSTANCES.json::IMAGES" (then also --val).'
    ),
]
ValOption = Annotated[str | None, typer.Option(help='"INSTANCES.json::IMAGES" of val, for COCO data.')]
WorkOption = Annotated[Path, typer.Option(help="Folder for tokens and trained backbones, shared by runs.")]
LayerOption = Annotated[int | None, typer.Option(help="Block to read, counted from 0; default: the model's own end.")]
FinalNormOption = Annotated[
    FinalNorm,
    typer.Option(
        help="Whether tokens pass the model's final norm; auto: as the model itself has it at its end, none at a block "
        "that is named. Results record which."
    ),
]
RecipeOption = Annotated[
    Recipe,
    typer.Option(help="fast: AdamW on kept tokens. published: LARS, 90 epochs, newly augmented images in each."),
]
RatesOption = Annotated[
    str | None, typer.Option(help="Learning rates trained at once: 0.001,0.004 (fast: lr, published: blr).")
]
EpochsOption = Annotated[int | None, typer.Option(help="Default: the recipe's own.")]
BatchOption = Annotated[int, typer.Option(help="Images of an update.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")]
WORK = Path("vlattn-probe")


def parse_seeds(text: str) -> list[int]:
    """Seeds written as how many, "3" for 0, 1 and 2, or as a list, "0,5,7".

    Raises:
        InputError: anything else, no seed, or one twice.
    """
    words = text.split(",")
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    seeds = list(range(numbers[0])) if len(numbers) == 1 else numbers
    if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds: got {text!r}; give how many, such as 3, or a list, such as 0,1,2, each once")
    return seeds


def probe_settings(
    recipe: Recipe, rates: str | None, epochs: int | None, augment: bool | None, seed: int
) -> tuple[ProbeSettings, bool]:
    """How to train, and whether on augmented images, as a sweep of one run would."""
    from vlattn.probing.sweep_config import ProbeSweepConfig

    try:
        given = None if rates is None else tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        raise InputError(f"rates: got {rates!r}; give learning rates such as 0.001,0.004") from None
    subject = {"backbone": "", "data": ""}
    one = ProbeSweepConfig([subject], ["gap"], recipe=recipe, rates=given, epochs=epochs, augment=augment)
    return one.settings(seed), one.augmented


def token_sources(
    backbone: str,
    data: str,
    val: str | None,
    work: Path,
    *,
    layer: int | None = None,
    final_norm: FinalNorm = "auto",
    batch_size: int = 256,
    augment: bool = False,
    shots: int | None = None,
    device: str | None = None,
) -> TokenSources:
    """Backbone and data, loaded, with a line that tells of a backbone being trained."""
    from rich.progress import Progress
    from transformers.utils import logging

    from vlattn.probing.data.named import named_data
    from vlattn.probing.named_backbone import named_backbone
    from vlattn.probing.sources import TokenSources

    logging.disable_progress_bar()
    named = named_data(data, val)
    with Progress(transient=True) as progress:
        bar = progress.add_task(backbone, total=None)
        loaded = named_backbone(
            backbone,
            work,
            layer=layer,
            final_norm="auto" if final_norm == "auto" else final_norm == "on",
            device=device,
            progress=lambda step, loss: progress.update(bar, description=f"{backbone}: step {step}, loss {loss:.3f}"),
        )
    return TokenSources(loaded, named, work / "tokens", batch_size=batch_size, augment=augment, shots=shots)


def asked_for(backbone: str, data: str, val: str | None, layer: int | None, final_norm: FinalNorm) -> dict[str, Any]:
    """What `show` needs to find backbone and data again; of the norm nothing for auto, as in older runs."""
    asked: dict[str, Any] = {"backbone": backbone, "data": data, "val": val, "layer": layer}
    return asked if final_norm == "auto" else {**asked, "final_norm": final_norm}


def write_json(path: Path, results: dict[str, Any]) -> Path:
    """Write plain data, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
