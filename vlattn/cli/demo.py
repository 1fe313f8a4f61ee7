"""`vlattn demo`: the main job in one offline command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json, the records and the page.")] = Path("vlattn-demo"),
) -> None:
    """Prune a trained LLaVA with FlowCut and random pruning; measure POPE, CHAIR, time, memory; write a page.

    Offline, on the embedded model and data, in under three minutes on two CPU cores.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from transformers.utils import logging

    from vlattn.eval.demo import Demo
    from vlattn.eval.report import write_report
    from vlattn.viz.page import write_page

    logging.disable_progress_bar()
    console = Console()
    job = Demo(out)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=job.steps)

        def step(what: str, done: int) -> None:
            progress.update(bar, advance=done, description=what or None)

        results = job.run(step)
        progress.update(bar, description="done")
    write_report(results, out / "results.json")
    page = write_page(results, job.examples(), job.data.images, out)
    console.print(demo_table(results))
    for c in results["comparisons"]:
        console.print(
            f"{c['b']} minus {c['a']}: {c['metric']} {c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
        )
    console.print(f"\n{results['seconds']:.0f} s. Every figure: {out / 'results.json'}\nOpen the page: {page}")


def demo_table(results: dict[str, Any]) -> Any:
    """The rich table of the arms, readable at 80 columns: intervals stand under their figure."""
    from rich import box
    from rich.table import Table

    data, model = results["data"], results["model"]
    table = Table(
        title=f"{data['name']}: {data['images']} images, {data['questions']} questions; model {model['name']}, "
        f"{model['parameters'] / 1e6:.1f}M parameters, {model['visual_tokens']} visual tokens",
        caption="95% bootstrap intervals by image; x: ratio to vanilla, medians of interleaved runs",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for name in ("POPE F1", "CHAIR_i", "recall", "prefill", "total", "KV KiB", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in results["arms"]:
        chair, cost = arm["chair"], arm["cost"]
        table.add_row(
            arm["name"],
            _with_interval(arm["pope"]["mean_f1"]),
            _with_interval(chair["chair_i"]),
            _number(chair["recall"]["value"]),
            f"{cost['prefill_ratio']['median']:.2f}x",
            f"{cost['total_ratio']['median']:.2f}x",
            f"{cost['kv_bytes'] / 1024:.0f}",
            f"{cost['flops_ratio']:.2f}x",
        )
    return table


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _with_interval(metric: dict[str, float | None]) -> str:
    return f"{_number(metric['value'])}\n[dim]{_number(metric['low'])}-{_number(metric['high'])}[/dim]"
