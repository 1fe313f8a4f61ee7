"""`vlattn probe train`: one probe, under one seed or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlattn.cli.probe_options import (
    WORK,
    BackboneOption,
    BatchOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FinalNormOption,
    LayerOption,
    RatesOption,
    RecipeOption,
    ValOption,
    WorkOption,
    asked_for,
    parse_seeds,
    probe_settings,
    token_sources,
    write_json,
)
from vlattn.errors import InputError


def train(
    backbone: BackboneOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the run: log, result and head.")],
    pooler: Annotated[str, typer.Option(help="Such as ep:queries=32, ep_all, cls, gap.")] = "ep",
    val: ValOption = None,
    work: WorkOption = WORK,
    layer: LayerOption = None,
    final_norm: FinalNormOption = "auto",
    recipe: RecipeOption = "fast",
    rates: RatesOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = 256,
    augment: Annotated[bool | None, typer.Option(help="New crops in each epoch; default: as the recipe.")] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train on so many images of each class, drawn by the seed, for as many updates as all images get; "
            "default: all images.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and shots; default 0.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Several runs, in folders seed_K of --out: how many, 3 for seeds 0, 1 and 2, or a list, 0,5,7. "
            "seeds.json gets their mean and its 95% t interval."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that --out holds; with --seeds, with all of them.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Train one probe.

    vlattn probe train --backbone digits-mim --data digits --pooler ep:queries=8 --out run
    """
    from rich.console import Console

    from vlattn.cli.probe_tables import seeds_lines
    from vlattn.probing.poolers.registry import parse_pooler
    from vlattn.probing.train import train_probe
    from vlattn.probing.train_seeds import summarise_seeds, train_seeds

    if seed is not None and seeds is not None:
        raise InputError(f"seed, seeds: got {seed} and {seeds!r}; give one of them")
    several = None if seeds is None else parse_seeds(seeds)
    kind = parse_pooler(pooler)[2]
    settings, augmented = probe_settings(recipe, rates, epochs, augment, seed or 0)
    sources = token_sources(
        backbone,
        data,
        val,
        work,
        layer=layer,
        final_norm=final_norm,
        batch_size=batch_size,
        augment=augmented,
        shots=shots,
        device=device,
    )
    settings, classes = sources.settings(settings), len(sources.data.classes)
    options: dict[str, Any] = {
        "dim": sources.sample(kind).shape[-1],
        "grid": sources.backbone.grid,
        "device": device or "cpu",
        "about": {**sources.describe(), "asked": asked_for(backbone, data, val, layer, final_norm)},
        "departures": sources.departures(),
        "progress": True,
    }
    console = Console()
    if several is None:
        batches = sources.train(kind, settings.seed), sources.val(kind)
        result = train_probe(*batches, pooler, classes, settings, out=out, resume=resume, **options)
        for rate in result.rates:
            shown = "diverged" if rate.diverged else f"{result.metric} {rate.best:.2f} at epoch {rate.best_epoch}"
            console.print(f"rate {rate.rate:g}: {shown}", highlight=False)
    else:
        found = train_seeds(
            several,
            lambda one: (sources.train(kind, one), sources.val(kind)),
            pooler,
            classes,
            settings,
            out=out,
            resume=resume,
            **options,
        )
        result, summary = next(iter(found.values())), summarise_seeds(found)
        write_json(out / "seeds.json", summary)
        for line in seeds_lines(found, summary):
            console.print(line, highlight=False)
    for departure in result.departures:
        console.print(f"not the published protocol: {departure}", highlight=False, markup=False)
    console.print(f"{parameters(result)}; run: {out}", soft_wrap=True, highlight=False)


def parameters(result: Any) -> str:
    """How many parameters were trained, and how many of them no prediction needs."""
    only = f", {result.training_only} of them for training only" if result.training_only else ""
    return f"{result.trainable} parameters{only}"
