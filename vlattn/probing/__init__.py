"""Probing: how much a frozen backbone knows, read out by a small trained head.

backbone = load_backbone("timm/vit_small_patch14_dinov2.lvd142m")
train, val = (TokenCache.write(backbone, images[part], f"tokens/{part}") for part in ("train", "val"))  # once
result = train_probe(train.batches(256, shuffle=True), val.batches(256), "ep:queries=32", 1000, fast_settings())

The published recipe is `ProbeSettings()`, and its search over learning rates `ProbeSettings(blr=BLR_GRID)`.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlattn.probing.backbones.base import Backbone as Backbone
    from vlattn.probing.backbones.load import load_backbone as load_backbone
    from vlattn.probing.cache import TokenCache as TokenCache
    from vlattn.probing.head import ProbeHead as ProbeHead
    from vlattn.probing.head import load_head as load_head
    from vlattn.probing.knn import KNNResult as KNNResult
    from vlattn.probing.knn import knn_probe as knn_probe
    from vlattn.probing.poolers.base import Pooler as Pooler
    from vlattn.probing.poolers.registry import POOLERS as POOLERS
    from vlattn.probing.poolers.registry import make_pooler as make_pooler
    from vlattn.probing.poolers.registry import parse_pooler as parse_pooler
    from vlattn.probing.settings import BLR_GRID as BLR_GRID
    from vlattn.probing.settings import ProbeSettings as ProbeSettings
    from vlattn.probing.settings import fast_settings as fast_settings
    from vlattn.probing.tokens import Tokens as Tokens
    from vlattn.probing.train import train_probe as train_probe
    from vlattn.probing.train_result import ProbeResult as ProbeResult
    from vlattn.probing.train_source import TokenBatches as TokenBatches
    from vlattn.probing.train_state import load_result as load_result

# Imported on first use: a command that only reads tokens must not pay for poolers. No name here may be that of a module
# of this package (knn, train_seeds), which would take its place once it is imported.
_HOMES = {
    "BLR_GRID": "vlattn.probing.settings",
    "Backbone": "vlattn.probing.backbones.base",
    "KNNResult": "vlattn.probing.knn",
    "POOLERS": "vlattn.probing.poolers.registry",
    "Pooler": "vlattn.probing.poolers.base",
    "ProbeHead": "vlattn.probing.head",
    "ProbeResult": "vlattn.probing.train_result",
    "ProbeSettings": "vlattn.probing.settings",
    "TokenBatches": "vlattn.probing.train_source",
    "TokenCache": "vlattn.probing.cache",
    "Tokens": "vlattn.probing.tokens",
    "fast_settings": "vlattn.probing.settings",
    "knn_probe": "vlattn.probing.knn",
    "load_backbone": "vlattn.probing.backbones.load",
    "load_head": "vlattn.probing.head",
    "load_result": "vlattn.probing.train_state",
    "make_pooler": "vlattn.probing.poolers.registry",
    "parse_pooler": "vlattn.probing.poolers.registry",
    "train_probe": "vlattn.probing.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlattn.probing' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
