"""The arms of a benchmark: one model object each on one set of weights, every method attached for good."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from vlattn.errors import InputError
from vlattn.interventions.base import Handle, Intervention, attach
from vlattn.interventions.registry import parse_method
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for
from vlattn.runtime.session import is_attached
from vlattn.runtime.timing import Clock, synchronize
from vlattn.runtime.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Any]
"""Keyword arguments of `generate`, as a processor returns them."""


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model object on the same weights, so that hooks on one do not touch the other."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class FirstToken(StoppingCriteria):
    """Notes when `generate` has its first token; as a stopping criterion it is asked after each, and never stops.

    nanoseconds: from the making of this object to the first token.
    """

    def __init__(self, clock: Clock = time.perf_counter_ns, wait: Callable[[], None] = synchronize) -> None:
        self._clock, self._wait = clock, wait
        self._start, self.nanoseconds = clock(), 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.nanoseconds:
            self._wait()
            self.nanoseconds = self._clock() - self._start
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class Arm:
    """One row of a benchmark. handle: None for the model as it is."""

    name: str
    model: Any
    handle: Handle | None = None

    @property
    def adapter(self) -> Adapter:
        return adapter_for(self.model)

    @property
    def trace(self) -> Trace | None:
        return None if self.handle is None else self.handle.trace

    @property
    def attention(self) -> dict[str, str]:
        """The attention implementation of the decoder and of the tower."""
        parts = {"decoder": self.adapter.language_model, "tower": self.adapter.tower}
        return {name: str(_config(part, self.model)._attn_implementation) for name, part in parts.items()}

    @torch.inference_mode()
    def prefill(self, inputs: Inputs) -> Any:
        """One forward pass over the prompt, filling a cache, as the first step of `generate` runs it."""
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def generate(
        self, inputs: Inputs, new_tokens: int, *, fixed: bool = True, watch: FirstToken | None = None
    ) -> torch.Tensor:
        """Greedy tokens behind the prompt [B, N].

        fixed: exactly `new_tokens`, the end of a sequence suppressed. watch: told when the first token is there.
        """
        options: dict[str, Any] = {"min_new_tokens": new_tokens} if fixed else {}
        if watch is not None:
            options["stopping_criteria"] = [watch]
        ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1, **options)
        new = ids[:, inputs["input_ids"].shape[1] :]
        if fixed and new.shape[1] != new_tokens:
            raise InputError(
                f"new_tokens: {self.name} generated {new.shape[1]} instead of {new_tokens}; the model's generation "
                "config stops it in another way (stop strings, a time limit), so unset that"
            )
        return new


class BenchArms:
    """A context that attaches vanilla and every method to a twin of its own, and detaches them at the end."""

    def __init__(self, model: PreTrainedModel, methods: Sequence[str | Intervention]) -> None:
        if is_attached(adapter_for(model).multimodal):
            raise InputError("model: an intervention is attached to it; leave its context, and give it as a method")
        self._model = model
        self._wanted: dict[str, Intervention | None] = {"vanilla": None}
        for given in methods:
            name, method = (given.strip(), parse_method(given)) if isinstance(given, str) else (repr(given), given)
            if method is None:
                continue
            if name in self._wanted:
                raise InputError(f"methods: {name!r} is given twice; give each once")
            self._wanted[name] = method
        self._arms: list[Arm] = []

    def __enter__(self) -> list[Arm]:
        try:
            for name, method in self._wanted.items():
                arm = Arm(name, twin(self._model))
                self._arms.append(arm)
                if method is not None:
                    arm.handle = attach(arm.model, method)
        except BaseException:
            self._detach()
            raise
        return self._arms

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._detach()

    def _detach(self) -> None:
        for arm in self._arms:
            if arm.handle is not None:
                arm.handle.detach()


def _config(part: Any, model: Any) -> Any:
    config = getattr(part, "config", None)
    return config if hasattr(config, "_attn_implementation") else model.config
