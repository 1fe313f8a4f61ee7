"""`vlattn models`: the model families with an adapter, and the methods that work on each."""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlattn.models.adapter import Adapter


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/families.md.")] = False,
) -> None:
    """List the model families that methods can be put on, by the model_type in a model's config.json.

    A model of another family is an error that says how to add an adapter.
    """
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.text import Text

    found = model_families()
    if markdown:
        typer.echo(as_markdown(found), nl=False)
        return
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = Console()
    for family in found:
        tower = family["tower"] or "as the model's config says"
        lines = [family["about"], f"vision tower: {tower}; {family['tokens']}", f"methods: {_names(family['methods'])}"]
        title = Text.assemble((family["model_type"], "bold"), f"  {family['adapter']}")
        console.print(Group(title, Padding(Text("\n".join(lines)), (0, 0, 1, 2))))
    console.print(f"{len(found)} families. What each method does: vlattn methods.", highlight=False)


def model_families() -> list[dict[str, Any]]:
    """The families in plain data: model_type, adapter, about, tower, tokens, methods, refused {method: why}."""
    from vlattn.interventions.describe import family_adapters
    from vlattn.interventions.registry import METHODS

    found = []
    for model_type, adapter in family_adapters().items():
        reasons = {name: cls.refuses(adapter) for name, cls in METHODS.items()}
        found.append(
            {
                "model_type": model_type,
                "adapter": adapter.__name__,
                "about": _first_line(adapter),
                "tower": tower_type(model_type),
                "tokens": "one visual token per patch"
                if adapter.patchwise
                else "patches are merged into visual tokens",
                "methods": [name for name, reason in reasons.items() if reason is None],
                "refused": {name: reason for name, reason in reasons.items() if reason is not None},
            }
        )
    return found


def as_markdown(families: list[dict[str, Any]]) -> str:
    """Methods against families, and under the table why the empty cells are empty."""
    from vlattn.interventions.registry import METHODS

    names = [family["model_type"] for family in families]
    lines = [
        "# Which method works on which model family",
        "",
        "Printed by `vlattn models --markdown`. A test puts every method on a random model of every family marked `x`, "
        "in left-padded batches, on eager and sdpa attention, in fp32 and bf16, with cached generation; where there is "
        "no `x`, attaching raises an error with the reason below.",
        "",
        f"| method | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    why: dict[tuple[str, str], list[str]] = {}
    for method in METHODS:
        cells = []
        for family in families:
            reason = family["refused"].get(method)
            cells.append("" if reason else "x")
            if reason:
                why.setdefault((method, reason), []).append(family["model_type"])
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "Why not:", ""]
    lines += [f"- {method} on {', '.join(on)}: {reason}." for (method, reason), on in why.items()]
    return "\n".join(lines) + "\n"


def tower_type(model_type: str) -> str | None:
    """The model_type of the vision tower in transformers' default config of a family; None where there is none."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    return getattr(getattr(CONFIG_MAPPING[model_type](), "vision_config", None), "model_type", None)


def _first_line(adapter: type[Adapter]) -> str:
    """Of its docstring, or of its file's."""
    doc = adapter.__dict__.get("__doc__") or sys.modules[adapter.__module__].__doc__ or ""
    return inspect.cleandoc(doc).partition("\n")[0]


def _names(methods: list[str]) -> str:
    return ", ".join(methods) or "none"
