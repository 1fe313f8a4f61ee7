"""The `vlattn` command: one file per command group."""

from __future__ import annotations

import sys

import typer

from vlattn.errors import InputError

app = typer.Typer(
    name="vlattn",
    help="Work on the attention of vision-language models: prune tokens, measure hallucination, account for cost.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit code 2, never in a traceback."""
    try:
        app()
    except InputError as error:
        print(f"vlattn: {error}", file=sys.stderr)
        raise SystemExit(2) from None
