"""`vlattn probe show`: where the queries of a trained head look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlattn.cli.probe_options import WORK, DeviceOption, WorkOption, token_sources
from vlattn.errors import InputError


def show(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, as `probe train` or a sweep makes it.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("query_maps.png"),
    images: Annotated[int, typer.Option(min=1, help="Val images to draw, the first ones.")] = 6,
    groups: Annotated[int, typer.Option(min=1, help="Colours at most.")] = 8,
    work: WorkOption = WORK,
    device: DeviceOption = None,
) -> None:
    """Draw where the queries of a trained head look, and print how widely they look and how much they differ."""
    from rich.console import Console

    from vlattn.probing.query_attention import head_attention
    from vlattn.probing.train_state import load_result
    from vlattn.viz.query_maps import draw_query_maps, summarise

    result = load_result(run)
    asked = result.about.get("asked")
    if asked is None:
        raise InputError(f"run: {str(run)!r} does not say its backbone and data; give one that vlattn probe made")
    sources = token_sources(
        asked["backbone"],
        asked["data"],
        asked["val"],
        work,
        layer=asked["layer"],
        final_norm=asked.get("final_norm", "auto"),
        batch_size=64,
        device=device,
    )
    found = head_attention(result, sources, images)
    draw_query_maps(found.pictures, found.patches, found.grid, out, groups=groups)
    told = summarise(found.patches)
    console = Console()
    console.print(
        f"{found.patches.shape[1]} queries: entropy {told['entropy']:.3f} nats ({told['entropy_share']:.1%} of even), "
        f"mean pairwise cosine {told['mean_cosine']:.3f}",
        highlight=False,
    )
    if found.cls_mass is not None:
        console.print(f"attention mass on CLS: {found.cls_mass:.1%}", highlight=False)
    console.print(str(out), soft_wrap=True, highlight=False)
