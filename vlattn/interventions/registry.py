"""Methods by name, and the short form that commands take: `flowcut:keep=64`, several joined by `+`."""

from __future__ import annotations

import dataclasses
import re

import yaml

from vlattn.errors import InputError
from vlattn.interventions.act import ACT
from vlattn.interventions.base import Intervention, compose
from vlattn.interventions.divprune import DivPrune
from vlattn.interventions.dyvte import DyVTE
from vlattn.interventions.fastv import FastV
from vlattn.interventions.flowcut import FlowCut
from vlattn.interventions.hiprune import HiPrune
from vlattn.interventions.icd import ICD
from vlattn.interventions.m3id import M3ID
from vlattn.interventions.opera import OPERA
from vlattn.interventions.pai import PAI
from vlattn.interventions.paint import PAINT
from vlattn.interventions.prumerge import PruMerge
from vlattn.interventions.pyramiddrop import PyramidDrop
from vlattn.interventions.random_prune import RandomPrune
from vlattn.interventions.sid import SID
from vlattn.interventions.sparsevlm import SparseVLM
from vlattn.interventions.tome import ToMe
from vlattn.interventions.uniform_prune import UniformPrune
from vlattn.interventions.var import VAR
from vlattn.interventions.vcd import VCD
from vlattn.interventions.vhr import VHR
from vlattn.interventions.visionzip import VisionZip
from vlattn.interventions.vispruner import VisPruner

METHODS: dict[str, type[Intervention]] = {
    "act": ACT,
    "divprune": DivPrune,
    "dyvte": DyVTE,
    "fastv": FastV,
    "flowcut": FlowCut,
    "hiprune": HiPrune,
    "icd": ICD,
    "m3id": M3ID,
    "opera": OPERA,
    "pai": PAI,
    "paint": PAINT,
    "prumerge": PruMerge,
    "pyramiddrop": PyramidDrop,
    "random": RandomPrune,
    "sid": SID,
    "sparsevlm": SparseVLM,
    "tome": ToMe,
    "uniform": UniformPrune,
    "var": VAR,
    "vcd": VCD,
    "vhr": VHR,
    "visionzip": VisionZip,
    "vispruner": VisPruner,
}


def parse_method(text: str) -> Intervention | None:
    """`flowcut:keep=64,count=per_image` as an intervention; `vanilla` as None.

    Values are read as YAML scalars or lists, as in `layers=[2,6]`. Unknown methods and fields are errors that list what
    there is.
    """
    if text.strip() == "vanilla":
        return None
    parts = [_parse_one(part.strip()) for part in text.split("+")]
    return parts[0] if len(parts) == 1 else compose(*parts)


def _parse_one(text: str) -> Intervention:
    name, _, settings = text.partition(":")
    if name == "vanilla":
        raise InputError("method: vanilla is the model as it is; it takes no settings and joins no other method")
    if name not in METHODS:
        raise InputError(f"method: {name!r} is unknown; known: vanilla, {', '.join(sorted(METHODS))}")
    cls = METHODS[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", settings)):  # commas inside [...] belong to a list
        key, equals, value = pair.partition("=")
        if not equals or key.strip() not in fields:
            raise InputError(f"method: {pair!r} is no setting of {name}; write field=value with {', '.join(fields)}")
        try:
            read = yaml.safe_load(value)
            given[key.strip()] = tuple(read) if isinstance(read, list) else read
        except yaml.YAMLError:
            raise InputError(f"method: cannot read the value in {pair!r}; write a number or a word") from None
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise InputError(f"method: {name} needs {', '.join(missing)}; write {name}:{missing[0]}=VALUE")
    return cls(**given)
