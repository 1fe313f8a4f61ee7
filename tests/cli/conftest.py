"""One command at a time, as the shell would call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

Invoke = Callable[..., Any]


@pytest.fixture
def invoke() -> Invoke:
    """invoke(command, *arguments) -> typer's result; an InputError is its `exception`."""

    def call(command: Callable[..., Any], *arguments: object) -> Any:
        app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
        app.command()(command)
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140", "TERM": "dumb"})

    return call
