"""`vlattn eval pope` and `vlattn eval chair`: run a model under a method, record every answer, score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlattn.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    help="Run a model under a method on a benchmark; every answer is recorded, a cut-off run resumes.",
)

EMBEDDED_POPE_IMAGES = {"val": 300, "shift": 150}

Model = Annotated[str, typer.Option(help='"tiny" (embedded, offline), a local folder, or a hub id.')]
Method = Annotated[str, typer.Option(help="vanilla, or a method such as flowcut:keep=64; joined by + to compose.")]
Data = Annotated[
    Literal["val", "shift"], typer.Option(help="Embedded set, used where --annotations and --images are left out.")
]
Annotations = Annotated[
    Path | None, typer.Option(help="COCO instances file (pope: or a POPE question file or folder).")
]
Images = Annotated[Path | None, typer.Option(help="Folder with the images that the annotations name.")]
Out = Annotated[Path, typer.Option(help="Records file (.jsonl) to write or resume; settings go beside it.")]
Seed = Annotated[int, typer.Option(help="Seed of the image draw.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass; 1 reproduces best.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")]
OnErrorOption = Annotated[
    Literal["raise", "skip"], typer.Option(help="A missing or corrupt image: stop, or record it as failed and go on.")
]


def _run(task: str, items: list[Any], model: str, dtype: str, device: str | None, **run: Any) -> None:
    """Load, answer with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    import vlattn
    from vlattn.eval.run import run_items

    logging.disable_progress_bar()
    loaded, processor = vlattn.load(model, dtype=dtype, device=device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(f"{task} {run['method']}", total=len(items))
        run["settings"] = {"model": model, **run["settings"]}
        run_items(loaded, processor, items, task=task, advance=lambda n: progress.advance(bar, n), **run)


def _paths(data: str, annotations: Path | None, images: Path | None) -> tuple[Path, Path, Path | None]:
    """(annotations, images, captions of the embedded set or None)."""
    if (annotations is None) != (images is None):
        raise InputError("annotations and images: give both, or neither to use the embedded set")
    if annotations is not None and images is not None:
        if not images.is_dir():
            raise InputError(f"images: {images} is not a folder; give the folder that holds the image files")
        return annotations, images, None
    from vlattn.assets.paths import tiny_coco

    embedded = tiny_coco(data)
    return embedded.instances, embedded.images, embedded.captions


@app.command()
def pope(
    out: Out,
    model: Model = "tiny",
    method: Method = "vanilla",
    data: Data = "val",
    annotations: Annotations = None,
    images: Images = None,
    n_images: Annotated[
        int | None,
        typer.Option(
            help="Images asked about, where questions are built (default: 500; embedded: 300 of val, 150 of shift)."
        ),
    ] = None,
    seed: Seed = 0,
    suffix: Annotated[str, typer.Option(help="Text after each question, on its own line.")] = "",
    profile: Annotated[str, typer.Option(help="How answers are read.")] = "pope-official",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: BatchSize = 1,
    dtype: Dtype = "auto",
    device: Device = None,
    on_error: OnErrorOption = "raise",
) -> None:
    """POPE: "Is there a X in the image?", three splits of questions with random, popular and adversarial negatives.

    "Evaluating Object Hallucination in Large Vision-Language Models", arXiv 2305.10355.
    """
    from vlattn.eval.items import pope_items
    from vlattn.eval.report import score_file
    from vlattn.eval.tables import score_table, show

    found, folder, embedded = _paths(data, annotations, images)
    if n_images is None:  # images with fewer than three objects are not asked about, so embedded sets have fewer
        n_images = EMBEDDED_POPE_IMAGES[data] if embedded else 500
    items = pope_items(found, n_images, seed, suffix)
    settings = {"annotations": found.name, "n_images": n_images, "seed": seed, "suffix": suffix}
    _run(
        "pope", items, model, dtype, device, method=method, images=folder, out=out, batch_size=batch_size,
        max_new_tokens=max_new_tokens, on_error=on_error, settings=settings,
    )  # fmt: skip
    report = score_file(out, "pope", profile)
    show(report, score_table(report))


@app.command()
def chair(
    out: Out,
    model: Model = "tiny",
    method: Method = "vanilla",
    data: Data = "val",
    annotations: Annotations = None,
    images: Images = None,
    captions: Annotated[Path | None, typer.Option(help="COCO captions file; part of CHAIR's ground truth.")] = None,
    n_images: Annotated[int | None, typer.Option(help="Images to describe, drawn by --seed; default all.")] = None,
    seed: Seed = 0,
    prompt: Annotated[str, typer.Option()] = "Please describe this image in detail.",
    profile: Annotated[str, typer.Option(help="chair-legacy (published tables) or chair-fixed.")] = "chair-legacy",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    batch_size: BatchSize = 1,
    dtype: Dtype = "auto",
    device: Device = None,
    on_error: OnErrorOption = "raise",
) -> None:
    """CHAIR: objects that captions mention and the image does not show.

    "Object Hallucination in Image Captioning", arXiv 1809.02156.
    """
    from vlattn.eval.coco import read_coco
    from vlattn.eval.items import chair_items
    from vlattn.eval.report import score_file
    from vlattn.eval.tables import score_table, show

    found, folder, embedded_captions = _paths(data, annotations, images)
    captions = captions or embedded_captions
    items = chair_items(read_coco(found), n_images, seed, prompt)
    settings = {"annotations": found.name, "n_images": n_images, "seed": seed}
    _run(
        "chair", items, model, dtype, device, method=method, images=folder, out=out, batch_size=batch_size,
        max_new_tokens=max_new_tokens, on_error=on_error, settings=settings,
    )  # fmt: skip
    report = score_file(out, "chair", profile, annotations=found, captions=captions)
    show(report, score_table(report))
