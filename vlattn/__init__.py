"""vlattn: work on the attention of vision-language models people already run.

model, processor = vlattn.load("tiny")
with vlattn.FlowCut(keep=36)(model) as trace:
    out = model.generate(**inputs, max_new_tokens=32)
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout, assets/, configs/, eval/ and kernels/ sit beside this package; in a wheel they are inside it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlattn.assets.paths import tiny_coco as tiny_coco
    from vlattn.errors import InputError as InputError
    from vlattn.interventions.act import ACT as ACT
    from vlattn.interventions.act_heads import calibrate_heads as calibrate_heads
    from vlattn.interventions.base import Handle as Handle
    from vlattn.interventions.base import Intervention as Intervention
    from vlattn.interventions.base import attach as attach
    from vlattn.interventions.base import compose as compose
    from vlattn.interventions.divprune import DivPrune as DivPrune
    from vlattn.interventions.dyvte import DyVTE as DyVTE
    from vlattn.interventions.fastv import FastV as FastV
    from vlattn.interventions.flowcut import FlowCut as FlowCut
    from vlattn.interventions.hiprune import HiPrune as HiPrune
    from vlattn.interventions.icd import ICD as ICD
    from vlattn.interventions.m3id import M3ID as M3ID
    from vlattn.interventions.opera import OPERA as OPERA
    from vlattn.interventions.pai import PAI as PAI
    from vlattn.interventions.paint import PAINT as PAINT
    from vlattn.interventions.prumerge import PruMerge as PruMerge
    from vlattn.interventions.pyramiddrop import PyramidDrop as PyramidDrop
    from vlattn.interventions.random_prune import RandomPrune as RandomPrune
    from vlattn.interventions.sid import SID as SID
    from vlattn.interventions.sparsevlm import SparseVLM as SparseVLM
    from vlattn.interventions.tome import ToMe as ToMe
    from vlattn.interventions.tvhd import tvhd as tvhd
    from vlattn.interventions.uniform_prune import UniformPrune as UniformPrune
    from vlattn.interventions.var import VAR as VAR
    from vlattn.interventions.var_calibrate import calibrate_sinks as calibrate_sinks
    from vlattn.interventions.vcd import VCD as VCD
    from vlattn.interventions.vhd import vhd as vhd
    from vlattn.interventions.vhd_knockout import vhd_knockout as vhd_knockout
    from vlattn.interventions.vhr import VHR as VHR
    from vlattn.interventions.visionzip import VisionZip as VisionZip
    from vlattn.interventions.vispruner import VisPruner as VisPruner
    from vlattn.models.load import load as load
    from vlattn.runtime.tokens import VisualTokens as VisualTokens
    from vlattn.runtime.trace import Trace as Trace

# Imported on first use: scoring must not pay for torch.
_HOMES = {
    "InputError": "vlattn.errors",
    "ACT": "vlattn.interventions.act",
    "Handle": "vlattn.interventions.base",
    "Intervention": "vlattn.interventions.base",
    "attach": "vlattn.interventions.base",
    "calibrate_heads": "vlattn.interventions.act_heads",
    "calibrate_sinks": "vlattn.interventions.var_calibrate",
    "compose": "vlattn.interventions.base",
    "DivPrune": "vlattn.interventions.divprune",
    "DyVTE": "vlattn.interventions.dyvte",
    "FastV": "vlattn.interventions.fastv",
    "FlowCut": "vlattn.interventions.flowcut",
    "PyramidDrop": "vlattn.interventions.pyramiddrop",
    "HiPrune": "vlattn.interventions.hiprune",
    "ICD": "vlattn.interventions.icd",
    "M3ID": "vlattn.interventions.m3id",
    "PAI": "vlattn.interventions.pai",
    "OPERA": "vlattn.interventions.opera",
    "PAINT": "vlattn.interventions.paint",
    "PruMerge": "vlattn.interventions.prumerge",
    "RandomPrune": "vlattn.interventions.random_prune",
    "SID": "vlattn.interventions.sid",
    "SparseVLM": "vlattn.interventions.sparsevlm",
    "ToMe": "vlattn.interventions.tome",
    "UniformPrune": "vlattn.interventions.uniform_prune",
    "VAR": "vlattn.interventions.var",
    "VCD": "vlattn.interventions.vcd",
    "VHR": "vlattn.interventions.vhr",
    "VisionZip": "vlattn.interventions.visionzip",
    "VisPruner": "vlattn.interventions.vispruner",
    "tvhd": "vlattn.interventions.tvhd",
    "vhd": "vlattn.interventions.vhd",
    "vhd_knockout": "vlattn.interventions.vhd_knockout",
    "load": "vlattn.models.load",
    "VisualTokens": "vlattn.runtime.tokens",
    "Trace": "vlattn.runtime.trace",
    "tiny_coco": "vlattn.assets.paths",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlattn' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
