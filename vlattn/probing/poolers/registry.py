"""Poolers by name, and their short form: `ep:queries=32,d=2`, or `ep_all` for CLS in front of the patches."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import yaml

from vlattn.errors import InputError
from vlattn.probing.poolers.abmilp import AbMILP
from vlattn.probing.poolers.acmil import ABMILPool, ACMILPool
from vlattn.probing.poolers.acmil_mha import ACMILMHAPool, MHABagPool
from vlattn.probing.poolers.aim import AIM
from vlattn.probing.poolers.bag import MaxBagPool, MeanBagPool
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.cae import CAEPool
from vlattn.probing.poolers.cait import CaiTPool
from vlattn.probing.poolers.cbam import CBAMPool
from vlattn.probing.poolers.clip import CLIPPool
from vlattn.probing.poolers.coca import CoCaPool
from vlattn.probing.poolers.dinovit import DINOViTPool
from vlattn.probing.poolers.dolg import DOLGPool
from vlattn.probing.poolers.ep import EP
from vlattn.probing.poolers.gem import GMP, LSE, GeM
from vlattn.probing.poolers.linear import CLS, GAP
from vlattn.probing.poolers.mhca import MHCA
from vlattn.probing.poolers.siglip import SigLIPPool
from vlattn.probing.poolers.simpool import ESimPool, SimPool
from vlattn.probing.poolers.vit import ViTPool
from vlattn.probing.poolers.vjepa import VJEPAPool

Kind = Literal["patch", "all", "cls"]

POOLERS: dict[str, type[Pooler]] = {
    "abmil": ABMILPool,
    "abmilp": AbMILP,
    "acmil": ACMILPool,
    "acmil_mha": ACMILMHAPool,
    "aim": AIM,
    "bag_max": MaxBagPool,
    "bag_mean": MeanBagPool,
    "bag_mha": MHABagPool,
    "cae": CAEPool,
    "cait": CaiTPool,
    "cbam": CBAMPool,
    "clip": CLIPPool,
    "cls": CLS,
    "coca": CoCaPool,
    "dinovit": DINOViTPool,
    "dolg": DOLGPool,
    "ep": EP,
    "esimpool": ESimPool,
    "gap": GAP,
    "gem": GeM,
    "gmp": GMP,
    "lse": LSE,
    "mhca": MHCA,
    "siglip": SigLIPPool,
    "simpool": SimPool,
    "vit": ViTPool,
    "vjepa": VJEPAPool,
}


def make_pooler(name: str, dim: int, *, grid: tuple[int, int] | None = None, **settings: Any) -> Pooler:
    """A new pooler.

    Args:
        name: a key of `POOLERS`.
        dim: width D of the tokens.
        grid: (rows, columns) of the patch tokens; goes to poolers that have places, the others do without.
        settings: the pooler's own settings, by name.

    Raises:
        InputError: an unknown name or setting, a value out of range, or no grid where one is needed.
    """
    cls = _find(name)
    known = _settings(cls)
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise InputError(f"pooler: {unknown[0]!r} is no setting of {name}; known: {', '.join(known) or 'none'}")
    if cls.needs_grid and grid is None:
        raise InputError(f"grid: got None, but {name} needs the places of the patch tokens; give (rows, columns)")
    if "grid" in inspect.signature(cls).parameters:
        settings["grid"] = grid
    return cls(dim, **settings)


def parse_pooler(text: str) -> tuple[str, dict[str, Any], Kind]:
    """`ep_all:queries=32,d=2` as ("ep", {"queries": 32, "d": 2}, "all").

    The third says which tokens the pooler is to get: `patch` tokens, `all` with CLS in front of them, which the suffix
    `_all` asks for, or the `cls` token alone. Values are read as YAML scalars.

    Raises:
        InputError: an unknown name or setting, or tokens that the pooler cannot take.
    """
    head, _, tail = text.strip().partition(":")
    name = head.removesuffix("_all")
    known = _settings(_find(name))
    kind: Kind = "all" if head != name else "cls" if name == "cls" else "patch"
    if (name, kind) == ("cls", "all"):
        raise InputError("pooler: cls is the CLS token alone; write cls, or gap_all for the mean of all tokens")
    settings: dict[str, Any] = {}
    for pair in filter(None, tail.split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or key not in known:
            wanted = f"; write field=value with {', '.join(known)}" if known else ", which has none"
            raise InputError(f"pooler: {pair!r} is no setting of {name}{wanted}")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"pooler: cannot read the value in {pair!r}; write a number or a word") from None
    if kind != "all" and settings.get("content") == "patch":
        raise InputError(
            f"content: got 'patch', which leaves out the first token, a patch here; write {name}_all:{tail}"
        )
    return name, settings, kind


def _find(name: str) -> type[Pooler]:
    if name not in POOLERS:
        raise InputError(
            f"pooler: {name!r} is unknown; known: {', '.join(POOLERS)}, most also with _all behind the name"
        )
    return POOLERS[name]


def _settings(cls: type[Pooler]) -> list[str]:
    """Names of the settings of a pooler, its keyword-only parameters but for the grid, which callers give apart."""
    given = inspect.signature(cls).parameters.values()
    return [p.name for p in given if p.kind is p.KEYWORD_ONLY and p.name != "grid"]
