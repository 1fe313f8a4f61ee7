"""`vlattn probe knn`: nearest neighbours on frozen features."""

from __future__ import annotations

from typing import Annotated

import typer

from vlattn.cli.probe_options import (
    WORK,
    BackboneOption,
    DataOption,
    DeviceOption,
    FinalNormOption,
    LayerOption,
    ValOption,
    WorkOption,
    token_sources,
)


def knn(
    backbone: BackboneOption,
    data: DataOption,
    features: Annotated[str, typer.Option(help="cls, gap, or gap_all: a pooler without parameters.")] = "gap",
    val: ValOption = None,
    work: WorkOption = WORK,
    layer: LayerOption = None,
    final_norm: FinalNormOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Classify val images by their nearest training images, without any training."""
    from rich.console import Console

    from vlattn.probing.knn import knn_probe
    from vlattn.probing.poolers.registry import parse_pooler

    kind = parse_pooler(features)[2]
    sources = token_sources(backbone, data, val, work, layer=layer, final_norm=final_norm, device=device)
    train, held_out = (sources.cache(part).batches(256, kind=kind) for part in ("train", "val"))  # type: ignore[arg-type]
    found = knn_probe(train, held_out, features, len(sources.data.classes))
    k, temperature = found.best
    Console().print(
        f"k-NN on {features}: top1 {found.top1[found.best]:.2f}, top5 {found.top5[found.best]:.2f} "
        f"(k {k}, temperature {temperature}, the best of {len(found.top1)} settings)",
        highlight=False,
    )
