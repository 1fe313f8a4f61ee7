"""Where the time of one `generate` goes: set-up, vision tower, projector, prefill, decode."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlattn.eval.layer_lengths import towers
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import as_keywords, cached_length
from vlattn.runtime.timing import Clock, synchronize

STAGES = ("setup", "vision", "projector", "prefill", "decode")


class StageClock:
    """A context around one call of `model.generate` that shares its time out among `STAGES`, without overlap.

    vision: inside the tower, with what a method does there. projector: inside the projector, with what a method does at
    its doors. setup: everything else before the model is first called. prefill: the rest of that first call, up to the
    logits of the first token. decode: everything after it. Their sum is the whole time in the context.

    The device is waited for at every boundary, which costs time of its own: take totals from runs without this clock.
    Enter it after the interventions are attached, so that their hooks fall inside the parts they act on.
    """

    def __init__(
        self, model: nn.Module, *, clock: Clock = time.perf_counter_ns, wait: Callable[[], None] = synchronize
    ) -> None:
        self._model, self._clock, self._wait = model, clock, wait
        self._handles: list[RemovableHandle] = []
        self._inside: list[str] = []
        self._last = 0
        self.nanoseconds = dict.fromkeys(STAGES, 0)

    def __enter__(self) -> StageClock:
        adapter = adapter_for(self._model)
        self._inside = ["setup"]
        self._around(self._model, "prefill", then="decode")
        for tower in towers(adapter):
            self._around(tower, "vision")
        self._around(adapter.projector, "projector")
        self._wait()
        self._last = self._clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._credit()
        while self._handles:
            self._handles.pop().remove()

    def _around(self, module: nn.Module, stage: str, then: str | None = None) -> None:
        """Time inside `module` belongs to `stage`, but for what parts inside it claim; `then`: what follows it."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if then is None or not cached_length(as_keywords(module, args, kwargs)):
                self._credit()
                self._inside.append(stage)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._inside[-1] == stage:
                self._credit()
                self._inside.pop()
                if then is not None:
                    self._inside = [then]

        # First in and last out, around whatever else is hooked to the module.
        self._handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave))

    def _credit(self) -> None:
        """What has passed since the last boundary goes to the innermost stage."""
        self._wait()
        now = self._clock()
        self.nanoseconds[self._inside[-1]] += now - self._last
        self._last = now
