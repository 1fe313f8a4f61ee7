"""The one idea: an intervention is a dataclass of hyper-parameters that you enter as a context on a live model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Literal

from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for, known_adapters
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session, close_if_empty, session_of
from vlattn.runtime.trace import Trace

Place = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Intervention(ABC):
    """Base of every method. Subclasses are frozen dataclasses whose fields are the paper's hyper-parameters.

    `method(model)` is a context manager whose target is a `Trace`; leaving it, by an exception too, removes every hook.
    """

    place: ClassVar[Place]
    selects_features: ClassVar[bool] = False
    """Whether it decides which image features reach the decoder; only one such method can act on a model."""
    ranks_in_decoder: ClassVar[bool] = False
    """Whether it ranks visual tokens inside the decoder and cuts them; only one such method can act on a model."""

    @classmethod
    def refuses(cls, family: type[Adapter]) -> str | None:
        """Why the method cannot work on a model family; None where it can. What a family lacks belongs here, settings
        that do not fit one model belong into `_attach`."""
        return None

    @classmethod
    def ranks_on(cls, family: type[Adapter]) -> bool:
        """Whether it ranks in the decoder of a model family; `ranks_in_decoder` says whether it does on all."""
        return cls.ranks_in_decoder

    @abstractmethod
    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        """Check the settings against the model and register hooks; state goes into closures, never into self."""

    def _parts(self) -> tuple[Intervention, ...]:
        return (self,)

    def __call__(self, model: nn.Module) -> Handle:
        return Handle(model, self)


class Handle:
    """An intervention on a model: a context manager, or attached by `attach` until `detach()`."""

    def __init__(self, model: nn.Module, intervention: Intervention) -> None:
        self.model, self.intervention, self.trace = model, intervention, Trace()
        self._session: Session | None = None
        self._members: list[Intervention] = []
        self._hooks = HookSet()

    def attach(self) -> Handle:
        if self._session is not None:
            raise InputError("handle: it is attached already; call detach() first, or make another one")
        session = session_of(self.model, adapter_for)
        self._session = session
        self._hooks.gate = session.gate
        try:
            for part in self.intervention._parts():
                refuse_family(part, type(session.adapter))
                refuse_conflicts(part, session.members, type(session.adapter))
                session.members.append(part)
                self._members.append(part)
                part._attach(session, self._hooks, self.trace)
            session.traces.append(self.trace)
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Remove every hook of this intervention; the model is as it was. Calling it twice is harmless."""
        session, self._session = self._session, None
        if session is None:
            return
        self._hooks.remove()
        while self._members:
            # By identity and once each: another handle may have attached an equal one, or this very one.
            mine = self._members.pop()
            del session.members[next(i for i, member in enumerate(session.members) if member is mine)]
        session.traces = [trace for trace in session.traces if trace is not self.trace]
        if not any(member.selects_features for member in session.members):
            session.drops_features = False
        close_if_empty(session)

    def __enter__(self) -> Trace:
        return self.attach().trace

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach()


def refuse_conflicts(new: Intervention, members: list[Intervention], family: type[Adapter] | None = None) -> None:
    """Raise where `new` cannot act beside what is already there, on a model family or (None) on any."""

    def ranks(one: Intervention) -> bool:
        return one.ranks_in_decoder if family is None else one.ranks_on(family)

    for member in members:
        if new.selects_features and member.selects_features:
            raise InputError(
                f"{type(new).__name__}: {type(member).__name__} already chooses the image features of this model; "
                "two methods cannot both choose them, so leave one context or drop one from compose"
            )
        if ranks(new) and ranks(member):
            raise InputError(
                f"{type(new).__name__}: {type(member).__name__} already ranks visual tokens in this model's decoder; "
                "their scores would not be those of either paper, so leave one context or drop one from compose"
            )


def refuse_family(new: Intervention, family: type[Adapter]) -> None:
    """Raise where a method cannot work on a model family."""
    reason = new.refuses(family)
    if reason is not None:
        known = sorted(
            {name for adapter in known_adapters() if not new.refuses(adapter) for name in adapter.model_types}
        )
        raise InputError(
            f"{type(new).__name__}: not supported on {', '.join(family.model_types)}: {reason}; "
            f"supported: {', '.join(known)}"
        )


def positions_for(name: str, given: Positions, default: Positions, adapter: Adapter) -> Positions:
    """What the setting `positions` comes to on a model: "auto" is the method's own way, or `preserve` with M-RoPE."""
    if given not in ("auto", "compact", "preserve"):
        raise InputError(f"positions: got {given!r}; give 'auto', 'compact' or 'preserve'")
    if not adapter.mrope:
        return default if given == "auto" else given
    if given == "compact":
        raise InputError(
            f"positions: 'compact' has no meaning for {name} on {', '.join(adapter.model_types)}, whose positions have "
            "three dimensions; give 'preserve' or 'auto'"
        )
    return "preserve"


@dataclass(frozen=True)
class Composed(Intervention):
    """Several interventions as one; made by `compose`."""

    members: tuple[Intervention, ...]
    place = "encoder"

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        raise AssertionError("a composition attaches its parts")

    def _parts(self) -> tuple[Intervention, ...]:
        return self.members


def compose(*interventions: Intervention) -> Intervention:
    """Combine methods into one: ordered by place in the network (encoder first), refused where they contradict.

    Raises:
        InputError: nothing to compose, something that is no intervention, or two methods that cannot act together.
    """
    parts: list[Intervention] = []
    for given in interventions:
        if not isinstance(given, Intervention):
            raise InputError(f"compose: {given!r} is no intervention; give instances such as FlowCut(keep=64)")
        for part in given._parts():
            refuse_conflicts(part, parts)
            parts.append(part)
    if not parts:
        raise InputError("compose: got nothing; give at least one intervention")
    order: dict[Place, int] = {"encoder": 0, "decoder": 1}
    return Composed(tuple(sorted(parts, key=lambda part: order[part.place])))


def attach(model: nn.Module, intervention: Intervention) -> Handle:
    """Attach without a context: `handle = attach(model, FlowCut(keep=64))`, `handle.trace`, `handle.detach()`."""
    if not isinstance(intervention, Intervention):
        raise InputError(f"intervention: got {intervention!r}; give an instance such as FlowCut(keep=64)")
    return Handle(model, intervention).attach()
