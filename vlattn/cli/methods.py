"""`vlattn methods`: what there is, where it comes from, what can be set, and which models it works on."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlattn.interventions.describe import Description, Knob


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to read about it in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")] = False,
) -> None:
    """List the methods: source, place in the network, settings with their defaults, model families.

    What is listed here can be given to --method, for example flowcut:keep=64.
    """
    from rich.console import Console

    from vlattn.interventions.describe import describe
    from vlattn.interventions.registry import METHODS

    found = [describe(one) for one in ([name] if name is not None else METHODS)]
    if as_json:
        plain = [description.to_json() for description in found]
        typer.echo(json.dumps(plain if name is None else plain[0], indent=2, ensure_ascii=False))
        return
    console = Console()
    for description in found:
        console.print(_entry(description) if name is None else _page(description))
    if name is None:
        console.print(
            f"{len(found)} methods. In full: vlattn methods {found[0].name}. For commands: "
            f"--method {_command(found[0])}; joined by + to compose.",
            soft_wrap=True,
            highlight=False,
        )


def _entry(about: Description) -> Any:
    """A method in the list: every setting on one line."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    return Group(
        _title(about),
        Padding(Text(_source(about)), (0, 0, 0, 2)),
        Padding(_knob_table(about, in_full=False), (0, 0, 0, 2)),
        Padding(Text(f"families: {_families(about)}\n", style="dim"), (0, 0, 0, 2)),
    )


def _page(about: Description) -> Any:
    """A method on its own: everything its docstring says."""
    from rich.console import Group
    from rich.text import Text

    reasons: dict[str, list[str]] = {}
    for family, reason in about.refused.items():
        reasons.setdefault(reason, []).append(family)
    refused = "\n".join(f"  not {', '.join(those)}: {reason}" for reason, those in reasons.items())
    return Group(
        _title(about),
        Text(f"{_source(about)}\n"),
        Text(f"{about.text}\n"),
        _knob_table(about, in_full=True),
        Text(f"families: {_families(about)}"),
        *([Text(refused)] if refused else []),
        Text(f"\ncommands:  --method {_command(about)}"),
        Text(f"Python:    with vlattn.{_call(about)}(model) as trace: ..."),
    )


def _title(about: Description) -> Any:
    from rich.text import Text

    return Text.assemble((about.name, "bold"), f"  {about.cls}, acts in the {about.place}")


def _source(about: Description) -> str:
    if about.paper is not None:
        return f"{about.paper.title}, arXiv {about.paper.arxiv}"
    told = "baseline" in about.summary.lower() or not about.baseline
    return about.summary if told else f"baseline: {about.summary}"


def _knob_table(about: Description, in_full: bool) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=not in_full, max_width=24)
    table.add_column()  # only the meaning gives way where the terminal is narrow
    for knob in about.knobs:
        if in_full:
            meaning = Text(knob.meaning)
        else:
            meaning = Text(first_sentence(knob.meaning), no_wrap=True, overflow="ellipsis")
        table.add_row(Text(knob.name, style="cyan"), _default(knob, in_full), meaning)
    return table


def _default(knob: Knob, in_full: bool) -> Any:
    """What a setting is when left out, and in full its type."""
    from rich.text import Text

    shown = Text("required", style="bold") if knob.required else Text(f"= {knob.default}")
    return shown.append(f"\n({knob.kind})", style="dim") if in_full else shown


def first_sentence(text: str) -> str:
    """A text up to its first full stop, semicolon or aside in brackets."""
    return re.split(r"(?<=[^.]{3})\.\s|;\s| \(|\.$", text, maxsplit=1)[0]


def _families(about: Description) -> str:
    return ", ".join(about.families) or "none" if about.refused else f"all {len(about.families)} (vlattn models)"


def _example(about: Description) -> dict[str, object]:
    """Settings that make the method: none, what is required, or one of those of which one has to be chosen."""
    from vlattn.errors import InputError
    from vlattn.interventions.registry import METHODS

    names = {knob.name for knob in about.knobs}
    required: dict[str, object] = {knob.name: 64 for knob in about.knobs if knob.required}
    choices: list[dict[str, object]] = [required, {"keep": 64}, {"heads": "all"}, {"disturbance": [5, 6, 7]}]
    for settings in choices:
        if names.issuperset(settings):
            try:
                METHODS[about.name](**settings)
            except InputError:
                continue
            return settings
    return required


def _command(about: Description) -> str:
    """How --method takes it."""
    settings = ",".join(f"{name}={str(value).replace(' ', '')}" for name, value in _example(about).items())
    return f"{about.name}:{settings}" if settings else about.name


def _call(about: Description) -> str:
    """How Python takes it."""
    return f"{about.cls}({', '.join(f'{name}={value!r}' for name, value in _example(about).items())})"
