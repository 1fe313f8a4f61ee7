"""Features that carry the image sizes they were computed with, and the call that computed them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_CARRIED = "vlattn_sizes"
_CALL = "vlattn_call"


@dataclass(frozen=True)
class FeatureCall:
    """How features were computed.

    arguments: what was given, pixels included.
    entries: how many images or tiles came out; generation may repeat them afterwards, for beams and the like.
    """

    arguments: dict[str, Any]
    entries: int


class SizeMemory:
    """Wraps one module's get_image_features and get_video_features, so that what they return carries their call.

    They are no forwards, so no hook sees them. The wrappers are attributes of this instance alone; `remove()` takes
    them away. Kept with the features and not in a variable, sizes can never belong to another prompt.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._before = module, {}
        for method in ("get_image_features", "get_video_features"):
            if hasattr(module, method):
                self._before[method] = vars(module).get(method)
                setattr(module, method, _carrying(getattr(module, method), names))

    def remove(self) -> None:
        """Undo the wrapping; doing it twice is harmless."""
        for method, before in self._before.items():
            delattr(self._module, method)
            if before is not None:
                setattr(self._module, method, before)
        self._before = {}


def remembered(features: Any) -> dict[str, Any]:
    """The sizes that a features output carries; empty for none."""
    return getattr(features, _CARRIED, {})


def call_of(features: Any) -> FeatureCall | None:
    """The call that computed a features output; None where it was computed outside any context."""
    return getattr(features, _CALL, None)


def size_of(name: str, value: Any) -> Any:
    """What to remember of an argument: of pixels their shape alone."""
    return tuple(value.shape) if name.startswith("pixel_values") else value


def _carrying(method: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        sizes = {name: size_of(name, given[name]) for name in names if given.get(name) is not None}
        if isinstance(output, tuple):
            return output
        if sizes:
            setattr(output, _CARRIED, {**remembered(output), **sizes})
        features = getattr(output, "pooler_output", None)
        if features is not None:
            told = {**given.pop("kwargs", {}), **given}
            setattr(output, _CALL, FeatureCall(told, len(features)))
        return output

    return wrapper
