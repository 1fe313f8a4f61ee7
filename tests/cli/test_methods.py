"""`vlattn methods` tells of every method what its file tells."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import vlattn
from vlattn.cli.methods import first_sentence, methods
from vlattn.errors import InputError
from vlattn.interventions.registry import METHODS, parse_method
from vlattn.models.registry import families

Invoke = Callable[..., Any]


def test_the_list_names_every_method_with_class_settings_and_defaults(invoke: Invoke) -> None:
    shown = invoke(methods).output
    for name, cls in METHODS.items():
        start = shown.index(f"{name}  {cls.__name__}, acts in the {cls.place}")
        entry = shown[start : shown.index("families:", start)]
        for field in dataclasses.fields(cls):
            default = "required" if field.default is dataclasses.MISSING else f"= {field.default}"
            line = next(line for line in entry.splitlines() if line.split()[:1] == [field.name])
            assert default in line
    assert "FlowCut: Rethinking Redundancy via Information Flow" in shown
    assert "arXiv 2505.19536" in shown


def test_one_method_is_told_in_full_with_an_example(invoke: Invoke) -> None:
    shown = " ".join(invoke(methods, "flowcut").output.split())
    lines = [line for line in (inspect.getdoc(METHODS["flowcut"]) or "").splitlines() if "see `" not in line]
    words = {word.strip('",.():') for line in lines for word in line.split()}
    assert len(words) > 40
    assert {word for word in words if word not in shown} == set()
    assert "(int)" in shown
    assert "--method flowcut:keep=64" in shown
    assert "vlattn.FlowCut(keep=64)(model)" in shown
    assert "RandomPrune" not in shown


def test_families_that_a_method_refuses_are_shown_with_the_reason(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["flowcut"], "refuses", lambda adapter: "its tower has no CLS token")
    shown = invoke(methods, "flowcut").output
    assert "families: none" in shown
    refused = f"not {', '.join(families())}: its tower has no CLS token"
    assert refused in " ".join(shown.split())


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_every_method_is_one_that_commands_and_python_take(invoke: Invoke, name: str) -> None:
    shown = invoke(methods, name).output
    example = re.search(r"--method (\S+)", shown)
    call = re.search(r"with vlattn\.(.+)\(model\)", shown)
    assert example
    assert call
    assert parse_method(example[1]) == eval(f"vlattn.{call[1]}", {"vlattn": vlattn})  # what a reader would paste


def test_json_holds_the_same_as_plain_data(invoke: Invoke) -> None:
    found = {entry["name"]: entry for entry in json.loads(invoke(methods, "--json").output)}
    assert list(found) == list(METHODS)
    assert found["flowcut"]["paper"]["arxiv"] == "2505.19536"
    assert found["random"]["paper"] is None
    assert found["random"]["baseline"]
    assert [k["name"] for k in found["random"]["knobs"]] == [f.name for f in dataclasses.fields(METHODS["random"])]
    assert json.loads(invoke(methods, "flowcut", "--json").output) == found["flowcut"]


def test_an_unknown_name_is_refused(invoke: Invoke) -> None:
    error = invoke(methods, "flowcuts").exception
    assert isinstance(error, InputError)
    assert "known: " in str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokens to keep (the paper: 64).", "tokens to keep"),
        ("one; two. three", "one"),
        ("One thing. Another", "One thing"),
        ("the ratio 0.5 of all", "the ratio 0.5 of all"),
        ("ends here.", "ends here"),
    ],
)
def test_the_list_shows_the_first_sentence_of_a_meaning(text: str, expected: str) -> None:
    assert first_sentence(text) == expected
