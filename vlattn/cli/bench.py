"""`vlattn bench`: what a method costs and saves on this machine, by the clock."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlattn.errors import InputError


def bench(
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method such as flowcut:keep=36; repeat for several. Vanilla is always measured."),
    ] = None,
    model: Annotated[str, typer.Option(help='"tiny" (embedded, offline), a local folder, or a hub id.')] = "tiny",
    random_weights_shape: Annotated[
        Literal["llava-1.5-7b", "llava-next-7b"] | None,
        typer.Option(help="In place of --model: random weights of this size, random inputs; nothing is fetched."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers of that model; all 32 take 14 GB in half precision.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch; weights are read once for all of them.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated in every run, never fewer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of all arms, A B A B.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them that do not count.")] = 5,
    stage_repeats: Annotated[int, typer.Option(min=1, help="Rounds that are split into stages.")] = 5,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="An image file, or a folder of them; repeat for several. Default: embedded scenes."),
    ] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Distinct inputs to go through, images in turn.")] = 20,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Resize images to this square first, where tokens follow the resolution."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What is asked about each image.")] = (
        "Please describe this image in detail."
    ),
    real_length: Annotated[
        bool, typer.Option("--real-length", help="Also time answers that end where the model ends them.")
    ] = False,
    check: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting that should change nothing, such as flowcut:keep=144 on the tiny model: its tokens are "
            "compared with vanilla's, and exit code 1 says that they differ. Repeat for several."
        ),
    ] = None,
    attn: Annotated[str | None, typer.Option(help="Attention of every arm: eager, sdpa, flash_attention_2.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default torch's choice.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every figure here as JSON.")] = None,
) -> None:
    """Time methods against the model as it is: prefill, decode, memory, FLOPs, the machine's floor.

    One process, one set of weights, the same attention and the same inputs for all arms.
    Arms take turns, and ratios are taken round by round.
    A method that only masks tokens is told apart from one that removes them.

        vlattn bench --method flowcut:keep=36 --method random:keep=36
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from vlattn.eval import bench as measure
    from vlattn.eval.bench_tables import bench_tables
    from vlattn.eval.report import write_report

    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "attn": attn, "batch": batch, "inputs": inputs}
    if random_weights_shape is not None:
        loaded, made, about = _random(random_weights_shape, layers, **options)
    elif layers is not None:
        raise InputError("layers: it shortens a model of random weights; give --random-weights-shape too")
    else:
        loaded, made, about = _real(model, images, image_size, prompt, **options)
    methods, console = method or [], Console()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        steps = measure.bench_steps(len(methods), inputs, repeats, warmup, stage_repeats, real_length)
        bar = progress.add_task("starting", total=steps)

        def step(what: str, done: int) -> None:
            progress.update(bar, advance=done, description=what or None)

        results = measure.bench(
            loaded, made, methods, new_tokens=new_tokens, repeats=repeats, warmup=warmup, stage_repeats=stage_repeats,
            real_length=real_length, neutral=check or [], step=step,
        )  # fmt: skip
        progress.update(bar, description="done", completed=steps)
    results["settings"] |= about
    for table in bench_tables(results):
        console.print(table)
    if out is not None:
        write_report(results, out)
        console.print(str(out), soft_wrap=True, highlight=False)
    if not all(found["same_ids"] for found in results["neutral"]):
        raise typer.Exit(1)


def _real(
    model: str,
    images: list[Path] | None,
    image_size: int | None,
    prompt: str,
    *,
    dtype: str,
    device: str | None,
    attn: str | None,
    batch: int,
    inputs: int,
) -> tuple[Any, list[Any], dict[str, Any]]:
    """(model, inputs, what the results say about them)."""
    from transformers.utils import logging

    import vlattn
    from vlattn.assets.paths import tiny_coco
    from vlattn.eval.bench_inputs import find_images, make_inputs
    from vlattn.runtime.timing import Spread

    logging.disable_progress_bar()
    loaded, processor = vlattn.load(model, dtype=dtype, device=device, attn_implementation=attn)
    files = find_images(images or [tiny_coco("val").images])
    made, seconds = make_inputs(
        processor, files, prompt, device=loaded.device, dtype=loaded.dtype, batch=batch, count=inputs,
        image_size=image_size,
    )  # fmt: skip
    about = {
        "name": model,
        "prompt": prompt,
        "image_size": image_size,
        "preprocess_seconds": asdict(Spread.of(seconds)),
    }
    return loaded, made, about


def _random(
    shape: str, layers: int | None, *, dtype: str, device: str | None, attn: str | None, batch: int, inputs: int
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The same for a model of random weights, bf16 unless said otherwise."""
    import torch

    from vlattn.eval.bench_shapes import random_inputs, random_model

    kind = getattr(torch, "bfloat16" if dtype == "auto" else dtype, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(f"dtype: {dtype!r} is not a torch dtype; give float32, bfloat16, float16 or auto")
    loaded = random_model(shape, layers=layers, dtype=kind, device=device or "cpu", attn=attn)
    about = {"name": f"{shape}, random weights", "layers": layers}
    return loaded, random_inputs(loaded, batch=batch, count=inputs), about
