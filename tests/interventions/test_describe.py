"""Every registered method says where it comes from, what its settings mean, and where it works."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.describe import (
    Paper,
    describe,
    describe_class,
    field_meanings,
    find_paper,
    prose,
)
from vlattn.interventions.registry import METHODS
from vlattn.models.llava import LlavaAdapter
from vlattn.models.registry import families

DOC = """Drop what nobody looks at.

    "A Title over
    Two Lines", arXiv 2401.01234. It does this: and that.

    keep: how many stay
        (the paper: 64), counted
        per image.
    low, high: ends of the range.
    Note: not a field.
        And neither is this.
    - one thing
      goes on
    - another
    """


@dataclass(frozen=True)
class Plain(Intervention):
    """A base.

    keep: how many stay.
    mode: see `Plain`.
    """

    keep: int
    mode: Literal["fast", "slow"] = "fast"
    place = "decoder"

    def _attach(self, session: Any, hooks: Any, trace: Any) -> None: ...


@dataclass(frozen=True)
class Derived(Plain):
    """From "Looking Twice" (ECCV 2024, arXiv 2402.00001).

    keep: see `Plain`.
    mode: how fast.
    layers: which ones.
    """

    layers: tuple[int, ...] = (2, 5)
    share: float | None = None


@dataclass(frozen=True)
class Bare(Plain):
    extra: int = 0


@pytest.mark.parametrize("name", METHODS)
def test_a_registered_method_cites_a_paper_or_says_that_it_is_a_baseline(name: str) -> None:
    found = describe(name)
    assert found.paper is not None or found.baseline
    assert found.summary


@pytest.mark.parametrize("name", METHODS)
def test_a_registered_method_has_a_meaning_for_every_field(name: str) -> None:
    found = describe(name)
    assert [knob.name for knob in found.knobs] == [field.name for field in dataclasses.fields(METHODS[name])]
    assert {knob.name: knob.meaning for knob in found.knobs if len(knob.meaning) < 5} == {}
    assert [knob.name for knob in found.knobs if knob.meaning.startswith("see ")] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_registered_method_claims_families_and_gives_a_reason_for_the_others(name: str) -> None:
    found = describe(name)
    assert set(found.families) | set(found.refused) == set(families())
    assert not set(found.families) & set(found.refused)
    assert all(len(reason) > 10 for reason in found.refused.values())
    assert ("llava" in found.families) == (METHODS[name].refuses(LlavaAdapter) is None)
    assert found.families


@pytest.mark.parametrize("name", METHODS)
def test_a_described_method_is_plain_data(name: str) -> None:
    data = describe(name).to_json()
    assert json.loads(json.dumps(data))["name"] == name


def test_meanings_are_the_lines_of_known_fields_with_what_is_indented_below() -> None:
    assert field_meanings(DOC, ["keep", "low", "high", "absent"]) == {
        "keep": "how many stay (the paper: 64), counted per image.",
        "low": "ends of the range.",
        "high": "ends of the range.",
    }


def test_prose_is_what_remains_by_paragraph() -> None:
    assert prose(DOC, ["keep", "low", "high"]) == [
        "Drop what nobody looks at.",
        '"A Title over Two Lines", arXiv 2401.01234. It does this: and that.',
        "Note: not a field. And neither is this.\n- one thing goes on\n- another",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DOC, Paper("A Title over Two Lines", "2401.01234")),
        ('"Title" (NeurIPS 2024, arXiv:2403.06764) and "Other", arXiv 2403.00001', Paper("Title", "2403.06764")),
        ('keep "all" of it; arXiv is not numbered', None),
        ('a word "quoted" far ' + "away " * 20 + 'from "Real", arXiv 2403.00001', Paper("Real", "2403.00001")),
        ("", None),
    ],
)
def test_a_paper_is_a_quoted_title_with_its_number(text: str, expected: Paper | None) -> None:
    assert find_paper(text) == expected


def test_fields_of_a_base_are_looked_up_there_and_a_subclass_may_word_them_anew() -> None:
    base, derived = describe_class("plain", Plain), describe_class("derived", Derived)
    assert [k.meaning for k in base.knobs] == ["how many stay.", "see `Plain`."]
    assert [k.meaning for k in derived.knobs] == ["how many stay.", "how fast.", "which ones.", ""]
    assert derived.paper == Paper("Looking Twice", "2402.00001")
    assert derived.place == "decoder"


def test_knobs_tell_types_choices_and_defaults() -> None:
    found = {k.name: (k.kind, k.required, k.default) for k in describe_class("derived", Derived).knobs}
    assert found == {
        "keep": ("int", True, None),
        "mode": ("fast | slow", False, "fast"),
        "layers": ("tuple[int, ...]", False, (2, 5)),
        "share": ("float | None", False, None),
    }


def test_the_signature_that_dataclass_writes_is_no_docstring() -> None:
    found = describe_class("bare", Bare)
    assert found.summary == found.text == ""
    assert not found.baseline


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'flowcuts' is unknown; known: .*flowcut"):
        describe("flowcuts")
