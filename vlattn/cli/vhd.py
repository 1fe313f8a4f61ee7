"""`vlattn vhd`: which heads look at an image, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlattn.errors import InputError


def vhd(
    image: Annotated[Path | None, typer.Option(help="An image file; default: an embedded scene.")] = None,
    prompt: Annotated[str, typer.Option(help="What is asked about it.")] = "Please describe this image in detail.",
    model: Annotated[str, typer.Option(help='"tiny" (embedded, offline), a local folder, or a hub id.')] = "tiny",
    out: Annotated[Path, typer.Option(help="The heat-map, a PNG; its folder is made. Needs matplotlib.")] = Path(
        "vhd.png"
    ),
    knockout: Annotated[
        bool, typer.Option("--knockout", help="Hide image keys from the last row instead: one forward, another metric.")
    ] = False,
    reinforced: Annotated[
        str | None,
        typer.Option(help="A second map under VHR with these settings, such as alpha=2 or alpha=3,layers=[1,4,5]."),
    ] = None,
    attn: Annotated[str | None, typer.Option(help="Attention: eager, sdpa, flash_attention_2.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")] = None,
) -> None:
    """Draw how far each attention head's output moves when the image is taken out of the prompt (VHD).

    Dots mark the heads that VHR would reinforce for this image and prompt, layer by layer.

        vlattn vhd --image photo.jpg --prompt "What is this?" --reinforced alpha=2 --out map.png
    """
    import torch
    from rich.console import Console
    from transformers.utils import logging

    import vlattn
    from vlattn.assets.paths import tiny_coco
    from vlattn.eval.bench_inputs import find_images, make_inputs
    from vlattn.interventions.registry import parse_method
    from vlattn.interventions.vhr import VHR
    from vlattn.viz.heads import draw_heads
    from vlattn.viz.pareto import require_matplotlib

    require_matplotlib()
    if out.suffix != ".png":
        raise InputError(f"out: got {str(out)!r}; give a file that ends in .png")
    method = parse_method("vhr" if reinforced is None else f"vhr:{reinforced}")
    if not isinstance(method, VHR) or method.alpha == 1:
        raise InputError(f"reinforced: got {reinforced!r}; give settings of VHR alone, with alpha other than 1")
    logging.disable_progress_bar()
    loaded: Any
    loaded, processor = vlattn.load(model, dtype=dtype, device=device, attn_implementation=attn)
    files = find_images([image or find_images([tiny_coco("val").images])[0]])
    (inputs,), _ = make_inputs(processor, files[:1], prompt, device=loaded.device, dtype=loaded.dtype, count=1)
    measure = vlattn.vhd_knockout if knockout else vlattn.vhd
    label = "knock-out VHD" if knockout else "VHD"
    panels = {f"{label}, the model as it is": measure(loaded, inputs)[0]}
    with torch.no_grad(), method(loaded) as trace:
        loaded(**inputs)
        heads = _marks(trace.notes["heads"], *panels[f"{label}, the model as it is"].shape)
        if reinforced is not None:
            panels[f"{label}, under VHR ({', '.join(reinforced.split(','))})"] = measure(loaded, inputs)[0]
    draw_heads(
        {title: table.tolist() for title, table in panels.items()},
        out,
        label=label,
        chosen=dict.fromkeys(panels, heads),
    )
    console = Console()
    for title, table in panels.items():
        console.print(_strongest(title, table), highlight=False)
    console.print(f"{sum(map(sum, heads))} of {table.numel()} heads are reinforced", highlight=False)
    console.print(str(out), soft_wrap=True, highlight=False)


def _marks(chosen: Any, layers: int, heads: int) -> list[list[bool]]:
    """The heads of the only prompt [L][H]; none in layers that are not reinforced."""
    return [chosen[layer][0].tolist() if layer in chosen else [False] * heads for layer in range(layers)]


def _strongest(title: str, table: Any, count: int = 5) -> str:
    """A line about the heads of a map [L, H] that move most."""
    values, places = table.flatten().topk(min(count, table.numel()))
    names = [
        f"{place // table.shape[1]}.{place % table.shape[1]} ({value:.3g})"
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]
    return f"{title}: mean {table.mean().item():.3g}; most in layer.head {', '.join(names)}"
