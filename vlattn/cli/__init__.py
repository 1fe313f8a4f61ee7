"""The `vlattn` command: one file per command group."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import vlattn
from vlattn.cli.bench import bench
from vlattn.cli.build_pope import build_pope
from vlattn.cli.calibrate import app as calibrate_app
from vlattn.cli.compare import compare
from vlattn.cli.demo import demo
from vlattn.cli.eval import app as eval_app
from vlattn.cli.gaze import app as gaze_app
from vlattn.cli.methods import methods
from vlattn.cli.models import models
from vlattn.cli.probe import app as probe_app
from vlattn.cli.score import score
from vlattn.cli.sinks import sinks
from vlattn.cli.sweep import sweep
from vlattn.cli.train import app as train_app
from vlattn.cli.vhd import vhd
from vlattn.errors import InputError

app = typer.Typer(
    name="vlattn",
    help="Work on the attention of vision-language models: prune visual tokens, measure hallucination, "
    "count the cost.\n\n"
    "Start with [bold]vlattn demo[/bold]: offline, under three minutes on two cores.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo)
app.add_typer(eval_app, name="eval")
app.command()(score)
app.command()(bench)
app.command("compare")(compare)
app.command("build-pope")(build_pope)
app.add_typer(train_app, name="train")
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(probe_app, name="probe")
app.add_typer(gaze_app, name="gaze")
app.command()(methods)
app.command()(models)
app.command()(sweep)
app.command()(vhd)
app.command()(sinks)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlattn {vlattn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit code 2, never in a traceback."""
    try:
        app()
    except InputError as error:
        print(f"vlattn: {error}", file=sys.stderr)
        raise SystemExit(2) from None
