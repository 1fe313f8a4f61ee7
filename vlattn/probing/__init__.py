"""Probing: how much a frozen backbone knows, read out by a small trained head."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlattn.probing.poolers.base import Pooler as Pooler
    from vlattn.probing.poolers.registry import POOLERS as POOLERS
    from vlattn.probing.poolers.registry import make_pooler as make_pooler
    from vlattn.probing.poolers.registry import parse_pooler as parse_pooler

# Imported on first use: a command that only reads tokens must not pay for poolers.
_HOMES = {
    "POOLERS": "vlattn.probing.poolers.registry",
    "Pooler": "vlattn.probing.poolers.base",
    "make_pooler": "vlattn.probing.poolers.registry",
    "parse_pooler": "vlattn.probing.poolers.registry",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlattn.probing' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
