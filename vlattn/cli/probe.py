"""`vlattn probe`: how much a frozen backbone knows, read out by attentive heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlattn.cli.options import parse_layers
from vlattn.errors import InputError

if TYPE_CHECKING:
    from vlattn.probing.settings import ProbeSettings
    from vlattn.probing.sources import TokenSources

app = typer.Typer(no_args_is_help=True, help="Train and compare attentive probes on frozen backbones.")

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
RecipeOption = Annotated[
    Literal["fast", "published"],
    typer.Option(help="fast: AdamW on kept tokens. published: LARS, 90 epochs, newly augmented images in each."),
]
RatesOption = Annotated[
    str | None, typer.Option(help="Learning rates trained at once: 0.001,0.004 (fast: lr, published: blr).")
]
EpochsOption = Annotated[int | None, typer.Option(help="Default: the recipe's own.")]
BatchOption = Annotated[int, typer.Option(help="Images of an update.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cpu.")]
WORK = Path("vlattn-probe")


@app.command()
def train(
    backbone: BackboneOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the run: log, result and head.")],
    pooler: Annotated[str, typer.Option(help="Such as ep:queries=32, ep_all, cls, gap.")] = "ep",
    val: ValOption = None,
    work: WorkOption = WORK,
    layer: LayerOption = None,
    recipe: RecipeOption = "fast",
    rates: RatesOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = 256,
    augment: Annotated[bool | None, typer.Option(help="New crops in each epoch; default: as the recipe.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    device: DeviceOption = None,
) -> None:
    """Train one probe.

    vlattn probe train --backbone digits-mim --data digits --pooler ep:queries=8 --out run
    """
    from rich.console import Console

    from vlattn.probing.poolers.registry import parse_pooler
    from vlattn.probing.train import train_probe

    kind = parse_pooler(pooler)[2]
    settings, augmented = _settings(recipe, rates, epochs, augment, seed)
    sources = _sources(backbone, data, val, work, layer, batch_size, augmented, device)
    dim = sources.sample(kind).shape[-1]
    result = train_probe(
        sources.train(kind, seed),
        sources.val(kind),
        pooler,
        len(sources.data.classes),
        settings,
        dim=dim,
        grid=sources.backbone.grid,
        out=out,
        resume=resume,
        device=device or "cpu",
        about={**sources.describe(), "asked": _asked(backbone, data, val, layer)},
        progress=True,
    )
    console = Console()
    for rate in result.rates:
        shown = "diverged" if rate.diverged else f"{result.metric} {rate.best:.2f} at epoch {rate.best_epoch}"
        console.print(f"rate {rate.rate:g}: {shown}", highlight=False)
    for departure in result.departures:
        console.print(f"not the published protocol: {departure}", highlight=False)
    console.print(f"{result.trainable} parameters; run: {out}", soft_wrap=True, highlight=False)


@app.command()
def sweep(
    config: Annotated[
        str, typer.Argument(help="YAML file; probe_digits and probe_tiny_coco come with vlattn.")
    ] = "probe_digits",
    out: Annotated[Path, typer.Option(help="Folder for runs, results and figures.")] = Path("vlattn-probe-sweep"),
    work: WorkOption = WORK,
    figure: Annotated[bool, typer.Option(help="Draw accuracy against cost; needs matplotlib.")] = True,
    device: DeviceOption = None,
) -> None:
    """Train every pooler under several seeds, and compare accuracy with parameters and time.

    The same command goes on after an interruption, and adds what has been added to the file.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vlattn.probing.sweep import ProbeSweep
    from vlattn.probing.sweep_config import ProbeSweepConfig
    from vlattn.viz.pareto import require_matplotlib
    from vlattn.viz.probe_pareto import draw_probe_pareto

    if figure:
        require_matplotlib()
    job = ProbeSweep(ProbeSweepConfig.read(config), out, work, device)
    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=job.steps)
        results = job.run(lambda what, done: progress.update(bar, advance=done, description=what or None))
        progress.update(bar, description="done")
    path = _write(out / "probe.json", results)
    for subject in results["subjects"]:
        console.print(sweep_table(subject))
        drawn = draw_probe_pareto(subject, out / f"probe_{subject['name']}") if figure else []
        for one in drawn:
            console.print(str(one), soft_wrap=True, highlight=False)
    console.print(str(path), soft_wrap=True, highlight=False)


@app.command()
def layers(
    backbone: BackboneOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for runs, layers.json and layers.png.")],
    poolers: Annotated[str, typer.Option(help="Separated by spaces.")] = "gap ep:queries=8",
    layers: Annotated[str | None, typer.Option(help="Blocks counted from 0: 0,2,4; default: all.")] = None,
    val: ValOption = None,
    work: WorkOption = WORK,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, under seeds 0, 1, ...")] = 1,
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
        lambda layer: _sources(backbone, data, val, work, layer, batch_size, False, device),
        poolers.split(),
        [_settings("fast", rates, epochs, False, seed)[0] for seed in range(seeds)],
        out,
        layers=parse_layers(layers),
        device=device,
        report=lambda text: console.print(text, highlight=False),
    )
    written = [_write(out / "layers.json", results), *(draw_probe_layers(results, out) if figure else [])]
    for path in written:
        console.print(str(path), soft_wrap=True, highlight=False)


@app.command()
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
    sources = _sources(asked["backbone"], asked["data"], asked["val"], work, asked["layer"], 64, False, device)
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


@app.command()
def knn(
    backbone: BackboneOption,
    data: DataOption,
    features: Annotated[str, typer.Option(help="cls, gap, or gap_all: a pooler without parameters.")] = "gap",
    val: ValOption = None,
    work: WorkOption = WORK,
    layer: LayerOption = None,
    device: DeviceOption = None,
) -> None:
    """Classify val images by their nearest training images, without any training."""
    from rich.console import Console

    from vlattn.probing.knn import features_of
    from vlattn.probing.knn import knn as nearest
    from vlattn.probing.poolers.registry import parse_pooler

    kind = parse_pooler(features)[2]
    sources = _sources(backbone, data, val, work, layer, 256, False, device)
    parts = [features_of(sources.cache(part).batches(256, kind=kind), features) for part in ("train", "val")]  # type: ignore[arg-type]
    found = nearest(*parts[0], *parts[1], classes=len(sources.data.classes))
    k, temperature = found.best
    Console().print(
        f"k-NN on {features}: top1 {found.top1[found.best]:.2f}, top5 {found.top5[found.best]:.2f} "
        f"(k {k}, temperature {temperature}, the best of {len(found.top1)} settings)",
        highlight=False,
    )


def sweep_table(subject: dict[str, Any]) -> Any:
    """The rich table of one subject's arms, for 100 columns; best first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    counts = subject["images"]
    table = Table(
        title=f"{subject['name']}: {counts['train']} images to train on, {counts['val']} to judge by",
        caption=f"{subject['metric']} in percent, 95% t intervals over seeds; difference to {subject['linear']}, the "
        "better linear probe; parameters and MACs with the classifier; ms: a training step, measured",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("pooler", overflow="fold")
    for name in (subject["metric"], f"- {subject['linear']}", "parameters", "kMACs", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in sorted(subject["arms"], key=lambda one: -one["value"]["mean"]):
        table.add_row(
            Text(arm["pooler"]),
            _spread(arm["value"]),
            "" if arm["difference"] is None else _spread(arm["difference"], "+"),
            f"{arm['parameters']:,}",
            f"{arm['macs'] / 1e3:,.0f}",
            f"{arm['step']['median']:.1f}",
        )
    return table


def _spread(value: dict[str, Any], sign: str = "") -> str:
    if value["low"] is None:
        return f"{value['mean']:{sign}.2f}"
    return f"{value['mean']:{sign}.2f} [dim]({value['low']:{sign}.2f} {value['high']:{sign}.2f})[/dim]"


def _settings(
    recipe: Literal["fast", "published"], rates: str | None, epochs: int | None, augment: bool | None, seed: int
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


def _sources(
    backbone: str,
    data: str,
    val: str | None,
    work: Path,
    layer: int | None,
    batch_size: int,
    augment: bool,
    device: str | None,
) -> TokenSources:
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
            device=device,
            progress=lambda step, loss: progress.update(bar, description=f"{backbone}: step {step}, loss {loss:.3f}"),
        )
    return TokenSources(loaded, named, work / "tokens", batch_size=batch_size, augment=augment)


def _asked(backbone: str, data: str, val: str | None, layer: int | None) -> dict[str, Any]:
    """What `show` needs to find backbone and data again."""
    return {"backbone": backbone, "data": data, "val": val, "layer": layer}


def _write(path: Path, results: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
