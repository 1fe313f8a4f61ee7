"""VAR: visual attention redistribution, from sinks to the rest of the image, in heads that look at it.

"See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlattn import ops
from vlattn.checks import require_bool, require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.var_calibrate import check_tau
from vlattn.interventions.var_redistribute import KeySets, Masses, Rule, image_centric, redistribute
from vlattn.interventions.var_sinks import TAU, SinkChannels, known_channels, sink_strength
from vlattn.kernels.dispatch import Backend
from vlattn.models.adapter import Adapter
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.routing import AttentionCall, Plain
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class VAR(Intervention):
    """In rows of attention that look at the image, move part of what sinks hold to the rest of the image.

    "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321. A sink is a position of
    the prompt whose hidden state, as it enters a layer, explodes in a few channels that are fixed for the model: the
    first token, and some visual tokens, mostly background. Sinks are found anew in each layer of each prefill, and hold
    for the answer that follows; what was generated never is one. Rows that may change are the text after the last
    image and every generated token; the image, and text in front of it, keep their attention. Newline tokens of tiled
    images count as text.

    The defaults are those of the released code on its first prompt (on later prompts it goes on with the first one's
    sinks). Where paper and code differ: the paper moves p = 0.6 where the code keeps it (`VAR.paper`), the code also
    changes the last layer (`VAR.released_code`), and by the paper's formula layers without visual sinks change too
    (`require_visual_sink`). In the trace's notes, `sink_dims`, `tau` and `sink_source` say what sinks are; of the last
    prompt, `visual_sinks` is {layer: for each prompt the running indices of its visual tokens that are sinks} and
    `changed` is {layer: for each prompt the share of its (head, row) pairs that were changed}.

    tau: a token is a sink where its largest |x_d| / rms(x) over the sink channels is above this; None is 20, or what
        goes with the channels known for the model.
    rho_nonsink: least share of a row's image attention on tokens that are no sinks; the paper's values are 0.8 for
        general tasks, 0.5 for hallucination, 0.9 for vision-centric ones. The released `rho` is one minus this.
    min_visual_mass: least attention that a row must put on the image, the released `summ`.
    move: share of what sinks hold, text and visual, that is moved; 0 changes nothing. The released `p` is one minus it.
    skip_first_layers: layers at the start that stay as they are.
    skip_last_layer: whether the last layer stays as it is.
    sink_dims: the sink channels; None looks them up by the model's config, `vlattn.calibrate_sinks` finds others.
    require_visual_sink: whether a layer stays as it is in a prompt without visual sinks there.
    eps: what the released code adds to each visual token's attention before it takes the share of sinks, 1e-6.
    """

    tau: float | None = None
    rho_nonsink: float = 0.5
    min_visual_mass: float = 0.2
    move: float = 0.4
    skip_first_layers: int = 2
    skip_last_layer: bool = True
    sink_dims: tuple[int, ...] | None = None
    require_visual_sink: bool = True
    eps: float = 0.0

    place = "decoder"

    @classmethod
    def paper(cls, rho: float = 0.5, p: float = 0.6) -> VAR:
        """As the paper words it: heads keep a non-sink ratio of at least `rho`, the share `p` is moved."""
        return cls(rho_nonsink=rho, move=p)

    @classmethod
    def released_code(cls, rho: float = 0.5, summ: float = 0.2, p: float = 0.6, tau: float | None = None) -> VAR:
        """By the released code's keys: sinks have at most the share `rho` and keep `p`; the last layer changes too."""
        return cls(
            tau=tau, rho_nonsink=1 - rho, min_visual_mass=summ, move=1 - p, skip_last_layer=False, eps=1e-6
        )  # fmt: skip

    def __post_init__(self) -> None:
        if self.tau is not None:
            check_tau(self.tau, math.inf)
        require_number("rho_nonsink", self.rho_nonsink, 0)
        require_number("min_visual_mass", self.min_visual_mass, 0)
        require_number("move", self.move, 0, 1)
        require_count("skip_first_layers", self.skip_first_layers, 0)
        require_bool("skip_last_layer", self.skip_last_layer)
        require_bool("require_visual_sink", self.require_visual_sink)
        require_number("eps", self.eps, 0)
        dims = self.sink_dims
        if dims is None:
            return
        numbers = isinstance(dims, tuple) and all(type(d) is int and d >= 0 for d in dims)
        if not numbers or not dims or len(set(dims)) < len(dims):
            raise InputError(
                f"sink_dims: got {dims!r}; give a tuple of different channel numbers such as (1415, 2533), or None to "
                "look them up by the model's config"
            )

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        if sum(isinstance(member, VAR) for member in session.members) > 1:
            raise InputError("VAR: it is on this model already; leave that context first")
        adapter = session.adapter
        layers = self._layers(adapter)
        channels = self._channels(adapter)
        _refuse_dropout(session)
        trace.notes.update(sink_dims=list(channels.dims), tau=channels.tau, sink_source=channels.source)
        if self.move == 0:
            return
        run = _Run(self, channels, session, trace)
        for layer in layers:
            hooks.before(adapter.decoder_layers[layer], run.detecting(layer))
        session.attention.add(layers, run, hooks)

    def _layers(self, adapter: Adapter) -> list[int]:
        depth = len(adapter.decoder_layers)
        layers = list(range(self.skip_first_layers, depth - int(self.skip_last_layer)))
        if not layers:
            raise InputError(
                f"skip_first_layers: got {self.skip_first_layers} with skip_last_layer={self.skip_last_layer}, which "
                f"leaves none of this decoder's {depth} layers; skip fewer"
            )
        return layers

    def _channels(self, adapter: Adapter) -> SinkChannels:
        """What makes a sink on this model."""
        width = adapter.text_config.hidden_size
        if self.sink_dims is None:
            found = known_channels(adapter.config)
        else:
            found = SinkChannels(self.sink_dims, TAU, "given")
            if max(found.dims) >= width:
                raise InputError(
                    f"sink_dims: got {found.dims}, but this decoder's hidden states have {width} channels; give "
                    f"numbers below {width}, as vlattn.calibrate_sinks(model) finds them"
                )
        tau = found.tau if self.tau is None else float(self.tau)
        check_tau(tau, math.sqrt(width))
        return SinkChannels(found.dims, tau, found.source)

    @property
    def rule(self) -> Rule:
        """The numbers that rows are chosen and changed by."""
        return Rule(self.rho_nonsink, self.min_visual_mass, self.move, self.require_visual_sink, self.eps)


def _refuse_dropout(session: Session) -> None:
    rate = getattr(session.adapter.text_config, "attention_dropout", 0.0)
    if session.model.training and rate:
        raise InputError(
            f"model: it is in training mode with attention_dropout={rate:g}, and rows that are computed again would "
            "have none; call model.eval(), or set attention_dropout to 0"
        )


@dataclass(frozen=True)
class _Prompt:
    """The prompt at hand in one sequence. now: the sequence. rows: of the longest text after the image.

    after: int64 [B], positions behind the last visual token; 0 where there is none.
    image: bool [B, n], visual tokens that show some of the image, hidden ones too.
    newline: bool [B, n], the other visual tokens.
    """

    now: Any
    rows: int
    after: torch.Tensor
    image: torch.Tensor
    newline: torch.Tensor

    @classmethod
    def of(cls, now: Any, visual: VisualTokens) -> _Prompt:
        slot = now.tokens.slot  # [B, n]
        slots = int(visual.mask.sum(1).max())
        # By running index: one column more, where all text goes.
        is_newline = visual.mask.new_zeros(slot.shape[0], slots + 1)
        is_newline.scatter_(1, visual.slot.where(visual.mask, slots), visual.mask & (visual.tile < 0))
        newline = is_newline.to(slot.device).gather(1, slot.where(slot >= 0, slots))
        places = torch.arange(slot.shape[1], device=slot.device)
        last = torch.where(slot != -1, places, -1).amax(1)  # [B]
        after = torch.where(last >= 0, slot.shape[1] - 1 - last, 0)
        return cls(now, int(after.max()), after, (slot != -1) & ~newline, newline)


@dataclass(frozen=True)
class _Layer:
    """A layer in the prompt at hand. sink: bool [B, n]. busy: whether there is anything to move."""

    prompt: _Prompt
    sink: torch.Tensor
    busy: bool


class _Run(Plain):
    """The method on one model, and the sinks of the prompt at hand."""

    def __init__(self, method: VAR, channels: SinkChannels, session: Session, trace: Trace) -> None:
        self.rule, self.channels, self.session = method.rule, channels, session
        self.strong: dict[int, torch.Tensor] = {}  # {layer: bool [B, n]}, until its attention takes it
        self.layers: dict[int, _Layer] = {}
        self.prompt: _Prompt | None = None
        self.visual_sinks: dict[int, list[list[int]]] = {}
        self.changed: dict[int, list[float]] = {}
        trace.notes.update(visual_sinks=self.visual_sinks, changed=self.changed)

    def detecting(self, layer: int) -> Callable[..., None]:
        """Before a layer of a prefill: which positions of the residual stream are strong in the sink channels."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.session.cuts.prefill:
                hidden = as_keywords(module, args, kwargs)["hidden_states"].detach()
                self.strong[layer] = sink_strength(hidden, self.channels.dims) > self.channels.tau

        return hook

    # As an edit of attention rows -------------------------------------------------------------------------------------
    def rows(self, call: AttentionCall) -> int:
        """At prefill the text after the image, later every new token; none in layers without sinks."""
        if call.prefill:
            self.layers[call.layer] = self._begin(call.layer)
        layer = self.layers[call.layer]
        if not layer.busy:
            return 0
        return layer.prompt.rows if call.prefill else call.query.shape[2]

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        sets = self._sets(call)
        masses = Masses.of(weights, sets)
        chosen = image_centric(masses, sets, self.rule)  # [B, H, R]
        eligible = self._eligible(call, weights.shape[2])
        if eligible is not None:
            chosen &= eligible[:, None]
            self._note(call, chosen)
        return redistribute(weights, sets, masses, chosen, self.rule.move), chosen

    def fused(
        self, call: AttentionCall, allowed: torch.Tensor, scaling: float | None, backend: Backend | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eligible = self._eligible(call, allowed.shape[2])
        made = ops.grouped_attention(
            **call.last_rows(allowed, scaling),
            groups=self._sets(call).groups,
            edited_rows=eligible,
            redistribution=self.rule,
            backend=backend,
        )
        assert made.chosen is not None
        if eligible is not None:
            self._note(call, made.chosen)
        return made.output, made.chosen

    def _sets(self, call: AttentionCall) -> KeySets:
        layer, device = self.layers[call.layer], call.visual.device
        behind = (0, call.visual.shape[1] - call.prompt)
        sink = F.pad(layer.sink.to(device), behind)  # [B, K]: nothing generated is a sink
        return KeySets(sink, call.visual & ~F.pad(layer.prompt.newline.to(device), behind))

    def _eligible(self, call: AttentionCall, rows: int) -> torch.Tensor | None:
        """Which of the last rows are behind the image of their own prompt: bool [B, R]; None behind the prompt, for
        all."""
        if not call.prefill:
            return None
        after = self.layers[call.layer].prompt.after.to(call.visual.device)[:, None]  # [B, 1]
        return torch.arange(rows, 0, -1, device=after.device) <= after

    def _note(self, call: AttentionCall, chosen: torch.Tensor) -> None:
        pairs = self.layers[call.layer].prompt.after.to(chosen.device).clamp(min=1) * chosen.shape[1]
        self.changed[call.layer] = (chosen.sum((1, 2)).double() / pairs).tolist()

    def _begin(self, layer: int) -> _Layer:
        """A layer of a new prompt: where its sinks are."""
        now, visual = self.session.cuts.at(layer), self.session.visual
        assert now is not None
        assert visual is not None
        if self.prompt is None or self.prompt.now is not now:
            self.prompt = _Prompt.of(now, visual)
        sink = self.strong.pop(layer).to(now.alive.device) & now.alive  # padding looks like a first token
        visual_sink = sink & self.prompt.image
        self.visual_sinks[layer] = [s[at].tolist() for s, at in zip(now.tokens.slot, visual_sink, strict=True)]
        self.changed[layer] = [0.0] * len(sink)
        busy = any(self.visual_sinks[layer]) if self.rule.require_visual_sink else bool(sink.any())
        return _Layer(self.prompt, sink, busy)
