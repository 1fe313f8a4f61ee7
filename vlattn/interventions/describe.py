"""What a method is, read from its dataclass: source, place, knobs with their meaning, and the families it works on.

A docstring of a method opens with what it does, quotes its source as `"Title", arXiv 2505.19536` (there, or at the head
of its file) or calls itself a baseline, and has a line `name: meaning` for each field. Fields of a base class are
looked up there; `see `Base`` as a meaning says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.registry import METHODS
from vlattn.models.adapter import Adapter
from vlattn.models.registry import known_adapters

_PAPER = re.compile(r'"([^"]+)"[^"]{0,60}?arXiv[ :](\d{4}\.\d{4,5})')
_FIELD = re.compile(r"(\w+(?:, \w+)*): (.+)")


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str


@dataclasses.dataclass(frozen=True)
class Knob:
    """A field of a method. kind: its type in words, choices spelled out; default is None where it is required."""

    name: str
    kind: str
    required: bool
    default: Any
    meaning: str


@dataclasses.dataclass(frozen=True)
class Description:
    """A method in plain data.

    summary: the first paragraph of its docstring; text: all of its paragraphs, without the lines about fields.
    families: the model types it claims; refused: {model type: why not}.
    """

    name: str
    cls: str
    place: str
    summary: str
    text: str
    paper: Paper | None
    baseline: bool
    knobs: tuple[Knob, ...]
    families: tuple[str, ...]
    refused: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def describe(name: str) -> Description:
    """The description of a registered method.

    Raises:
        InputError: no method has this name.
    """
    if name not in METHODS:
        raise InputError(f"method: {name!r} is unknown; known: {', '.join(sorted(METHODS))}")
    return describe_class(name, METHODS[name])


def describe_class(name: str, cls: type[Intervention]) -> Description:
    """The description of any method class, under the name that commands would use."""
    names = [field.name for field in dataclasses.fields(cls)]
    paragraphs = prose(_own_doc(cls), names)
    head = inspect.getdoc(sys.modules[cls.__module__]) or ""
    refused = {family: cls.refuses(adapter) for family, adapter in family_adapters().items()}
    return Description(
        name=name,
        cls=cls.__name__,
        place=cls.place,
        summary=paragraphs[0] if paragraphs else "",
        text="\n\n".join(paragraphs),
        paper=find_paper(_own_doc(cls)) or find_paper(head),
        baseline="baseline" in f"{head} {_own_doc(cls)}".lower(),
        knobs=_knobs(cls),
        families=tuple(family for family, reason in refused.items() if reason is None),
        refused={family: reason for family, reason in refused.items() if reason is not None},
    )


def family_adapters() -> dict[str, type[Adapter]]:
    """{model type: adapter class}, sorted."""
    return dict(sorted((name, adapter) for adapter in known_adapters() for name in adapter.model_types))


def field_meanings(doc: str, names: Iterable[str]) -> dict[str, str]:
    """{field: meaning} from the lines `name: meaning` or `a, b: meaning`; lines indented below go on with it."""
    wanted = set(names)
    found: dict[str, str] = {}
    current: tuple[str, ...] = ()
    for line in inspect.cleandoc(doc).splitlines():
        start = _FIELD.fullmatch(line)
        named = tuple(start[1].split(", ")) if start else ()
        if start and wanted.issuperset(named):
            current = named
            found |= dict.fromkeys(named, start[2])
        elif line.startswith(" "):
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = ()
    return found


def prose(doc: str, names: Iterable[str]) -> list[str]:
    """The paragraphs of a docstring, each on one line but for list items (`- `), without the lines about `names`."""
    wanted, paragraphs, about_field = set(names), [""], False
    for line in inspect.cleandoc(doc).splitlines():
        start = _FIELD.fullmatch(line)
        about_field = bool(start and wanted.issuperset(start[1].split(", "))) or (about_field and line.startswith(" "))
        if not line.strip():
            paragraphs.append("")
        elif not about_field:
            between = "\n" if line.startswith("- ") else " "
            paragraphs[-1] = f"{paragraphs[-1]}{between}{line.strip()}".strip()
    return [paragraph for paragraph in paragraphs if paragraph]


def find_paper(doc: str) -> Paper | None:
    """The first quoted title that an arXiv number follows."""
    match = _PAPER.search(" ".join(doc.split()))
    return Paper(match[1], match[2]) if match else None


def _own_doc(cls: type) -> str:
    """A class's own docstring; "" for none, and for the signature that dataclass puts in its place."""
    doc = cls.__dict__.get("__doc__") or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def _knobs(cls: type[Intervention]) -> tuple[Knob, ...]:
    fields = dataclasses.fields(cls)
    hints = get_type_hints(cls)
    meanings: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        told = field_meanings(_own_doc(owner), [field.name for field in fields])
        meanings |= {name: text for name, text in told.items() if name not in meanings or not text.startswith("see `")}
    return tuple(
        Knob(field.name, _kind(hints[field.name]), *_default(field), meanings.get(field.name, "")) for field in fields
    )


def _default(field: dataclasses.Field[Any]) -> tuple[bool, Any]:
    """(required, default as plain data)."""
    if field.default_factory is not dataclasses.MISSING:
        return False, field.default_factory()
    return (True, None) if field.default is dataclasses.MISSING else (False, field.default)


def _kind(hint: Any) -> str:
    """A type as a user would say it: `softmax | cosine`, `int | None`."""
    if get_origin(hint) in (Literal, Union, types.UnionType):
        return " | ".join(_kind(one) for one in get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
