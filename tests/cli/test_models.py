"""`vlattn models` tells of every family what its adapter tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import LlavaConfig

from vlattn.cli.models import model_families, models, tower_type
from vlattn.interventions.registry import METHODS
from vlattn.models import registry
from vlattn.models.llava import LlavaAdapter

Invoke = Callable[..., Any]


class Merging(LlavaAdapter):
    """A family of the test's own.

    More about it.
    """

    model_types = ("merging_llava",)
    patchwise = False


@pytest.fixture
def custom() -> Iterator[type[LlavaAdapter]]:
    registry.register(Merging)
    yield Merging
    registry._FAMILIES.pop("merging_llava")


def test_every_family_is_listed_with_its_adapter_and_methods(invoke: Invoke) -> None:
    shown = invoke(models).output
    for family in registry.families():
        assert f"{family}  {registry._FAMILIES[family].__name__}" in shown
    llava = next(family for family in model_families() if family["model_type"] == "llava")
    assert llava["about"].startswith("LLaVA and LLaVA-1.5: one CLIP or SigLIP tower")
    assert llava["about"] in " ".join(shown.split())
    assert "flowcut" in llava["methods"]


def test_the_tower_is_what_transformers_builds_by_default() -> None:
    vision: Any = LlavaConfig().vision_config
    assert tower_type("llava") == vision.model_type == "clip_vision_model"
    assert tower_type("merging_llava") is None


def test_json_holds_every_family_and_each_method_once(invoke: Invoke) -> None:
    found = json.loads(invoke(models, "--json").output)
    assert [family["model_type"] for family in found] == list(registry.families())
    for family in found:
        assert sorted([*family["methods"], *family["refused"]]) == sorted(METHODS)
        assert family["about"]


def test_a_family_that_a_user_registers_is_listed_with_what_refuses_it(
    invoke: Invoke, custom: type[LlavaAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "it has no such tokens"
    for cls in METHODS.values():
        monkeypatch.setattr(cls, "refuses", lambda adapter: reason if adapter is Merging else None)
    found = {family["model_type"]: family for family in model_families()}
    own, stock = found["merging_llava"], found["llava"]
    assert (own["about"], own["tower"]) == ("A family of the test's own.", None)
    assert own["tokens"] != stock["tokens"] == "one visual token per patch"
    assert own["methods"] == []
    assert set(own["refused"].values()) == {reason}
    assert stock["methods"] == list(METHODS)
    assert "methods: none" in invoke(models).output


def test_the_documented_table_is_what_the_classes_say() -> None:
    from pathlib import Path

    from vlattn.cli.models import as_markdown, model_families

    documented = Path(__file__).parents[2] / "docs" / "families.md"
    assert documented.read_text() == as_markdown(model_families()), "run: vlattn models --markdown > docs/families.md"
