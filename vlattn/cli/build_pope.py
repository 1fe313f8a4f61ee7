"""`vlattn build-pope`: POPE questions from any COCO-format annotation file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlattn.eval.coco import read_coco
from vlattn.eval.pope import write_pope
from vlattn.eval.pope_build import build_pope as build


def build_pope(
    instances: Annotated[Path, typer.Argument(help="COCO-format instances file (.json).")],
    out: Annotated[Path, typer.Option(help="Folder for pope_random.json, pope_popular.json, pope_adversarial.json.")],
    n_images: Annotated[int, typer.Option(help="Images to ask about.")] = 500,
    per_image: Annotated[int, typer.Option(help="Objects asked about per image; as many absent ones are added.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the image draw and of the random negatives.")] = 0,
    universe: Annotated[
        str,
        typer.Option(help="What absent objects are drawn from: observed (in the counted images) or all categories."),
    ] = "observed",
    freq_scope: Annotated[
        str, typer.Option(help="Count frequencies over the sample (as the released files do) or over all images.")
    ] = "sample",
) -> None:
    """Build the three POPE question files (random, popular, adversarial) and a sidecar with seed, image ids, digests.

    The same file, seed and options give the same bytes.
    """
    coco = read_coco(instances)
    questions = build(coco.image_objects(), n_images, per_image, seed, universe, freq_scope, coco.categories)
    settings = {
        "instances": instances.name,
        "instances_sha256": coco.sha256["instances"],
        "n_images": n_images,
        "per_image": per_image,
        "seed": seed,
        "universe": universe,
        "freq_scope": freq_scope,
    }
    for split, path in write_pope(questions, out, settings).items():
        typer.echo(f"{path}: {len(questions[split])} questions")
