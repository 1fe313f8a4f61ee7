"""Hooks that leave with their owner."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Gate:
    """Lets hooks through, or not.

    held: shut while a model runs for somebody's own purposes, such as a second stream that no intervention touches.
    blind: shut while a model answers a prompt without any image, where there is nothing to act on.
    """

    def __init__(self, held: bool = False) -> None:
        self.held, self.blind = held, False

    @property
    def closed(self) -> bool:
        return self.held or self.blind

    @contextmanager
    def shut(self) -> Iterator[None]:
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before


class HookSet:
    """Forward hooks registered together and removed together, newest first. Behind a shut gate none of them runs."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        """`hook(module, args, kwargs)` runs before `module`; it may return new (args, kwargs).

        first: before the hooks that are already there.
        """
        self._handles.append(module.register_forward_pre_hook(self._gated(hook), with_kwargs=True, prepend=first))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(module, args, output)` runs after `module`, before hooks that are already there; it may replace output.

        First in line, so that whatever records hidden states sees the edited ones, as the next layer does.
        """
        self._handles.append(module.register_forward_hook(self._gated(hook), prepend=True))

    def _gated(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def gated(*args: Any) -> Any:
            return None if self.gate.closed else hook(*args)

        return gated

    def also(self, undo: Callable[[], None]) -> None:
        """Call `undo()` when the hooks are removed."""
        self._undo.append(undo)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._undo:
            self._undo.pop()()


def as_keywords(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, whichever way they were given."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cache_of(arguments: dict[str, Any]) -> Any:
    """The KV cache among keyword arguments: `cache` in newer transformers, `past_key_values` in older ones."""
    cache = arguments.get("cache")
    return cache if cache is not None else arguments.get("past_key_values")


def cached_length(arguments: dict[str, Any]) -> int:
    """How many positions the cache among `arguments` holds already; 0 for none: the call is a prefill."""
    cache = cache_of(arguments)
    return int(cache.get_seq_length()) if cache is not None else 0


def cache_argument(module: nn.Module) -> str:
    """What this module's forward calls its KV cache."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
