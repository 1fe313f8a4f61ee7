"""`vlattn probe layers`: one probe after the other on the blocks of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlattn.cli.options import parse_layers
from vlattn.cli.probe_options import (
    WORK,
    BackboneOption,
    BatchOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FinalNormOption,
    RatesOption,
    ValOption,
    WorkOption,
    parse_seeds,
    probe_settings,
    token_sources,
    write_json,
)


def layers(
    backbone: BackboneOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for runs, layers.json and layers.png.")],
    poolers: Annotated[str, typer.Option(help="Separated by spaces.")] = "gap ep:queries=8",
    layers: Annotated[str | None, typer.Option(help="Blocks counted from 0: 0,2,4; default: all.")] = None,
    val: ValOption = None,
    work: WorkOption = WORK,
    final_norm: FinalNormOption = "auto",
    seeds: Annotated[str, typer.Option(help="Runs of each: how many, 3 for seeds 0, 1 and 2, or a list, 0,5,7.")] = "1",
    rates: RatesOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = 256,
    figure: Annotated[bool, typer.Option(help="Draw layers.png and layers.svg; needs matplotlib.")] = True,
    device: DeviceOption = None,
) -> None:
    """Probe block after block: where in the network is the answer? The same command goes on after an interruption."""
    from rich.console import Console

    from vlattn.probing.sweep_layers import probe_layers
    from vlattn.viz.pareto import require_matplotlib
    from vlattn.viz.probe_layers import draw_probe_layers

    if figure:
        require_matplotlib()
    console = Console()
    results = probe_layers(
        lambda layer: token_sources(
            backbone, data, val, work, layer=layer, final_norm=final_norm, batch_size=batch_size, device=device
        ),
        poolers.split(),
        [probe_settings("fast", rates, epochs, False, seed)[0] for seed in parse_seeds(seeds)],
        out,
        layers=parse_layers(layers),
        device=device,
        report=lambda text: console.print(text, highlight=False),
    )
    written = [write_json(out / "layers.json", results), *(draw_probe_layers(results, out) if figure else [])]
    for path in written:
        console.print(str(path), soft_wrap=True, highlight=False)
