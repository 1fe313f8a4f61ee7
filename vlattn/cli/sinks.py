"""`vlattn sinks`: where an image's sinks are, and what VAR does about them, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlattn.cli.options import parse_layers
from vlattn.errors import InputError


def sinks(
    image: Annotated[Path | None, typer.Option(help="An image file; default: an embedded scene.")] = None,
    prompt: Annotated[str, typer.Option(help="What is asked about it.")] = "Please describe this image in detail.",
    model: Annotated[str, typer.Option(help='"tiny" (embedded, offline), a local folder, or a hub id.')] = "tiny",
    method: Annotated[str, typer.Option(help="VAR with its settings, such as var:move=0.6.")] = "var",
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers to draw: 2,3. Default: all that VAR acts on.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture, .png, .svg or .pdf. Needs matplotlib.")] = Path("sinks.png"),
    attn: Annotated[str | None, typer.Option(help="Attention: eager, sdpa, flash_attention_2.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")] = None,
) -> None:
    """Draw an image's visual sinks in each decoder layer, and where text looks before and after VAR.

    vlattn sinks --image photo.jpg --method var:move=0.6 --layers 2,3 --out sinks.png
    """
    import torch
    from PIL import Image
    from rich.console import Console
    from transformers.utils import logging

    import vlattn
    from vlattn.assets.paths import tiny_coco
    from vlattn.eval.bench_inputs import find_images, make_inputs
    from vlattn.interventions.registry import parse_method
    from vlattn.interventions.var import VAR
    from vlattn.viz.pareto import require_matplotlib
    from vlattn.viz.sinks import draw_sinks, sink_map

    require_matplotlib()
    chosen = parse_method(method)
    if not isinstance(chosen, VAR):
        raise InputError(f"method: got {method!r}; give VAR with its settings, such as var:move=0.6")
    wanted = parse_layers(layers)
    logging.disable_progress_bar()
    loaded: Any
    loaded, processor = vlattn.load(model, dtype=dtype, device=device, attn_implementation=attn)
    files = find_images([image or find_images([tiny_coco("val").images])[0]])
    (inputs,), _ = make_inputs(processor, files[:1], prompt, device=loaded.device, dtype=loaded.dtype, count=1)
    if wanted is None:
        with torch.no_grad(), chosen(loaded) as trace:
            loaded(**inputs)
        found: Any = trace.notes["visual_sinks"]
        wanted = sorted(found)
    maps = [sink_map(loaded, inputs, chosen, layer) for layer in wanted]
    with Image.open(files[0]) as picture:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        seen = picture.convert("RGB")
        # Towers with one square view look at the middle of a picture.
        draw_sinks(maps, seen.crop((left, top, left + side, top + side)) if _square(maps) else seen, out)
    console = Console()
    for one in maps:
        before, after = (100 * float(values.double().nansum()) for values in (one.before, one.after))
        console.print(
            f"layer {one.layer}: {int(one.sinks.sum())} sinks of {one.sinks.numel()}, text's attention on the image "
            f"{before:.1f}% before and {after:.1f}% after",
            highlight=False,
        )
    console.print(str(out), soft_wrap=True, highlight=False)


def _square(maps: Any) -> bool:
    return all(one.sinks.shape[0] == one.sinks.shape[1] for one in maps)
