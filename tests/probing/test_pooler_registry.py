"""Poolers by name."""

from __future__ import annotations

from typing import Any

import pytest

from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.ep import EP
from vlattn.probing.poolers.registry import POOLERS, make_pooler, parse_pooler

KEYS = """abmil abmilp acmil acmil_mha aim bag_max bag_mean bag_mha cae cait cbam clip cls coca dinovit dolg ep esimpool
gap gem gmp lse mhca siglip simpool vit vjepa"""


def test_every_published_pooler_has_its_key_and_is_made_with_the_defaults() -> None:
    assert list(POOLERS) == sorted(KEYS.split())
    for name, cls in POOLERS.items():
        made = make_pooler(name, 96, grid=(3, 3))
        assert type(made) is cls
        assert isinstance(made, Pooler)
        assert made.dim == 96
        assert made.width > 0
        assert cls.__doc__


def test_a_key_is_no_other_key_with_all_behind_it() -> None:
    """Or the short form of one would be the other's with CLS in front."""
    assert not [name for name in POOLERS if name.removesuffix("_all") != name]


def test_settings_reach_the_pooler() -> None:
    made = make_pooler("ep", 96, queries=8, d=2, form="direct")
    assert isinstance(made, EP)
    assert (made.queries, made.width, made.direct) == (8, 48, True)


def test_a_pooler_with_places_is_refused_without_a_grid() -> None:
    with_places = [name for name, cls in POOLERS.items() if cls.needs_grid]
    assert "clip" in with_places
    for name in with_places:
        with pytest.raises(InputError, match=f"grid: got None, but {name} needs the places of the patch tokens"):
            make_pooler(name, 96)


def test_a_grid_is_passed_on_where_a_setting_needs_it() -> None:
    assert len(make_pooler("abmilp", 96, grid=(2, 3), cond="pe").position) == 6
    with pytest.raises(InputError, match="grid: got None"):
        make_pooler("abmilp", 96, cond="pe")


@pytest.mark.parametrize(
    ("text", "name", "settings", "kind"),
    [
        ("ep", "ep", {}, "patch"),
        ("ep_all", "ep", {}, "all"),
        (" ep_all:queries=16,d=2 ", "ep", {"queries": 16, "d": 2}, "all"),
        ("ep: queries = 8 , form = direct", "ep", {"queries": 8, "form": "direct"}, "patch"),
        ("cls", "cls", {}, "cls"),
        ("gap", "gap", {}, "patch"),
        ("gap_all", "gap", {}, "all"),
        ("simpool:gamma=1.25,beta=true", "simpool", {"gamma": 1.25, "beta": True}, "patch"),
        ("bag_mean_all", "bag_mean", {}, "all"),
        ("acmil:w_branch=0.5,w_div=0", "acmil", {"w_branch": 0.5, "w_div": 0}, "patch"),
        ("abmilp_all:content=patch", "abmilp", {"content": "patch"}, "all"),
    ],
)
def test_a_short_form_names_a_pooler_its_settings_and_its_tokens(
    text: str, name: str, settings: dict[str, Any], kind: str
) -> None:
    assert parse_pooler(text) == (name, settings, kind)
    make_pooler(name, 96, **settings)


def test_every_key_can_be_written_alone() -> None:
    for name in POOLERS:
        assert parse_pooler(name) == (name, {}, "cls" if name == "cls" else "patch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epp", "'epp' is unknown; known: abmil, abmilp, acmil, acmil_mha, aim"),
        ("", "'' is unknown"),
        ("_all", "'' is unknown"),
        ("ep_all_all", "'ep_all' is unknown"),
        ("cls_all", "cls is the CLS token alone; write cls, or gap_all"),
        ("ep:heads=2", "'heads=2' is no setting of ep; write field=value with queries, d, form"),
        ("ep:queries", "'queries' is no setting of ep"),
        ("gap:p=3", "'p=3' is no setting of gap, which has none"),
        ("ep:queries=[3", "cannot read the value in 'queries=\\[3'"),
        ("clip:grid=[3,3]", "is no setting of clip"),
        ("abmilp:content=patch", "leaves out the first token, a patch here; write abmilp_all:content=patch"),
    ],
)
def test_a_wrong_short_form_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_pooler(text)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_settings_are_refused_when_made() -> None:
    with pytest.raises(InputError, match="'ep_all' is unknown"):
        make_pooler("ep_all", 96)
    with pytest.raises(InputError, match="'heads' is no setting of ep; known: queries, d, form"):
        make_pooler("ep", 96, heads=2)
    with pytest.raises(InputError, match="'p' is no setting of gap; known: none"):
        make_pooler("gap", 96, p=2)


def test_a_value_out_of_range_is_refused_by_the_pooler_itself() -> None:
    name, settings, _ = parse_pooler("ep:queries=7")
    with pytest.raises(InputError, match="queries: got 7, which does not divide dim / d=96"):
        make_pooler(name, 96, **settings)
