"""The model families that have an adapter, by the `model_type` of their config."""

from __future__ import annotations

from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.gemma3 import Gemma3Adapter
from vlattn.models.idefics3 import Idefics3Adapter
from vlattn.models.internvl import InternVLAdapter
from vlattn.models.llava import LlavaAdapter
from vlattn.models.llava_next import LlavaNextAdapter
from vlattn.models.llava_onevision import LlavaOnevisionAdapter
from vlattn.models.qwen2_5_vl import Qwen2_5VLAdapter
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.models.qwen3_vl import Qwen3VLAdapter
from vlattn.models.video_llava import VideoLlavaAdapter

_FAMILIES: dict[str, type[Adapter]] = {}


def register(family: type[Adapter]) -> type[Adapter]:
    """Make a family known by its `model_types`; usable as a class decorator."""
    for name in family.model_types:
        _FAMILIES[name] = family
    return family


for _family in (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    VideoLlavaAdapter,
    Qwen2VLAdapter,
    Qwen2_5VLAdapter,
    Qwen3VLAdapter,
    InternVLAdapter,
    Idefics3Adapter,
    Gemma3Adapter,
):
    register(_family)


def families() -> tuple[str, ...]:
    """The model types that have an adapter."""
    return tuple(sorted(_FAMILIES))


def known_adapters() -> tuple[type[Adapter], ...]:
    """The registered adapter classes, each once."""
    return tuple(dict.fromkeys(_FAMILIES.values()))


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
