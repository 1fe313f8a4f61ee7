"""Methods by name."""

from __future__ import annotations

import pytest

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.base import Composed
from vlattn.interventions.random_prune import RandomPrune
from vlattn.interventions.registry import METHODS, parse_method
from vlattn.interventions.uniform_prune import UniformPrune


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vanilla", None),
        (" vanilla ", None),
        ("flowcut:keep=64", vlattn.FlowCut(keep=64)),
        ("flowcut:keep=64,count=per_image", vlattn.FlowCut(keep=64, count="per_image")),
        (
            "flowcut:keep=3,semantic=cosine,positions=preserve",
            vlattn.FlowCut(keep=3, semantic="cosine", positions="preserve"),
        ),
        ("random:keep=9,seed=5", RandomPrune(keep=9, seed=5)),
        (" uniform:keep=9 ", UniformPrune(keep=9)),
        ("sparsevlm:layers=[1,2],counts=[5,3]", vlattn.SparseVLM(layers=(1, 2), counts=(5, 3))),
        (
            "pyramiddrop:layers=[1, 2],ratios=[0.5, 0.25],positions=preserve",
            vlattn.PyramidDrop(layers=(1, 2), ratios=(0.5, 0.25), positions="preserve"),
        ),
    ],
)
def test_a_short_form_is_the_intervention_it_names(text: str, expected: object) -> None:
    assert parse_method(text) == expected


def test_every_method_can_be_named_and_is_exported() -> None:
    needed = {
        "fastv": ":keep=4",
        "flowcut": ":keep=4",
        "random": ":keep=4",
        "uniform": ":keep=4",
        "divprune": ":keep=4",
    }
    needed |= {"act": ":heads=all", "icd": ":disturbance=[5,6]", "tome": ":keep=4"}
    for name, cls in METHODS.items():
        assert type(parse_method(name + needed.get(name, ""))) is cls
        assert getattr(vlattn, cls.__name__) is cls


def test_methods_joined_by_plus_are_composed_or_refused_as_compose_does() -> None:
    assert isinstance(vlattn.compose(vlattn.FlowCut(keep=4)), Composed)
    with pytest.raises(InputError, match="RandomPrune: FlowCut already chooses"):
        parse_method("flowcut:keep=4+random:keep=4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastvv:keep=3", "'fastvv' is unknown; known: vanilla, act, divprune, dyvte, fastv, flowcut, hiprune"),
        ("", "'' is unknown"),
        ("flowcut", "flowcut needs keep; write flowcut:keep=VALUE"),
        ("flowcut:count=per_image", "needs keep"),
        ("flowcut:keep", "'keep' is no setting of flowcut; write field=value with keep, positions, semantic, count"),
        ("random:keep=3,semantic=cosine", "'semantic=cosine' is no setting of random"),
        ("flowcut:keep=0", "keep: got 0"),
        ("flowcut:keep=many", "keep: got 'many'"),
        ("flowcut:keep=true", "keep: got True"),
        ("flowcut:keep=", "keep: got None"),
        ("flowcut:keep=[3", "cannot read the value in 'keep=\\[3'"),
        ("flowcut:keep=3,count=mean", "count: got 'mean'"),
        ("random:keep=3,seed=x", "seed: got 'x'"),
        ("vanilla+flowcut:keep=3", "vanilla is the model as it is"),
        ("vanilla:keep=3", "vanilla is the model as it is"),
    ],
)
def test_a_wrong_short_form_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)
