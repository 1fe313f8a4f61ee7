"""The model families that have an adapter, by the `model_type` of their config."""

from __future__ import annotations

from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.llava import LlavaAdapter

_FAMILIES: dict[str, type[Adapter]] = {}


def register(family: type[Adapter]) -> type[Adapter]:
    """Make a family known by its `model_types`; usable as a class decorator."""
    for name in family.model_types:
        _FAMILIES[name] = family
    return family


register(LlavaAdapter)


def families() -> tuple[str, ...]:
    """The model types that have an adapter."""
    return tuple(sorted(_FAMILIES))


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a live model, chosen by its config's model_type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _FAMILIES:
        known = ", ".join(families())
        raise InputError(
            f"model: no adapter for {type(model).__name__} (model_type {model_type!r}); known: {known}. "
            "Subclass vlattn.models.adapter.Adapter and decorate it with vlattn.models.registry.register"
        )
    return _FAMILIES[model_type](model)
