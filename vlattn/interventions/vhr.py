"""VHR: make the heads that look at the image speak louder, chosen for each prompt by their VHD.

"Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn import ops
from vlattn.checks import require_bool
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.decoder_pruner import as_tuple
from vlattn.interventions.text_only import (
    TextPrompt,
    TextStream,
    head_outputs,
    output_projection,
    split_heads,
    unseen,
)
from vlattn.interventions.vhd import select_heads, vhd_scores, without_outliers
from vlattn.runtime.hooks import HookSet, as_keywords, cached_length
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


def default_layers(depth: int) -> tuple[int, ...]:
    """The paper's choice for 32 layers, {1} and the last 14, at any depth: the second and the last round(14 L / 32)."""
    last = max(1, round(14 / 32 * depth))
    return tuple(sorted({min(1, depth - 1), *range(depth - last, depth)}))


@dataclass(frozen=True)
class VHR(Intervention):
    """Multiply the outputs of vision-aware heads by alpha: in each layer those whose VHD is above the median.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949. Heads are chosen
    once for each prompt, at its last position, layer by layer: when a layer's heads are compared with those of the same
    prompt without the image, the layers below are reinforced already. They are scaled at all positions of the prompt
    and of what is generated. No attention weights are needed; the cost is one text-only prefill. In the trace's notes,
    `vhd` is {layer: [B, H]} as measured and `heads` {layer: bool [B, H]}, the choice. Other methods act on the prompt
    with images alone. Heads are chosen at the end of the prompt, so it must come in one piece: chunked prefill, prefix
    caches and assisted generation are refused.

    alpha: factor, 2 in the paper; 1 changes nothing, and text breaks down from about 4 on.
    layers: 0-based decoder layers; None is the second and the last 14 of 32, in proportion at other depths (ours). The
        second layer does not help everywhere: leave it out to be careful.
    reinforce_both: scale the chosen heads in the text-only prompt too, so that VHD goes on measuring nothing but the
        image; the paper does not say. False leaves it as the model has it.
    two_pass: measure VHD in the model as it is, in every layer, and only then reinforce; another method than the
        paper's, which some code follows. `reinforce_both` has no meaning then.
    remove_outliers: never choose heads that surge when the image disappears.
    """

    alpha: float = 2
    layers: tuple[int, ...] | None = None
    reinforce_both: bool = True
    two_pass: bool = False
    remove_outliers: bool = True

    place = "decoder"

    def __post_init__(self) -> None:
        alpha = self.alpha
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
        if not number or alpha < 0:
            raise InputError(f"alpha: got {alpha!r}; give a finite number of at least 0, such as 2 (1 changes nothing)")
        for name in ("reinforce_both", "two_pass", "remove_outliers"):
            require_bool(name, getattr(self, name))
        if self.layers is not None:
            layers = as_tuple("layers", self.layers)
            whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
            if not whole or len(set(layers)) < len(layers):
                raise InputError(f"layers: got {self.layers!r}; give different 0-based layers, or None for the default")
            object.__setattr__(self, "layers", tuple(sorted(layers)))

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        adapter = session.adapter
        depth = len(adapter.decoder_layers)
        layers = default_layers(depth) if self.layers is None else self.layers
        if layers[-1] >= depth:
            raise InputError(
                f"layers: got {layers[-1]}, but this model's decoder has layers 0 to {depth - 1}; give some of them"
            )
        if sum(isinstance(member, VHR) for member in session.members) > 1:
            raise InputError(
                "VHR: it is on this model already, and would choose among heads that it has scaled itself; "
                "leave the other context first"
            )
        projections = [output_projection(adapter, layer) for layer in layers]
        if self.alpha == 1:
            return
        run = _Run(self, session, trace, layers)
        hooks.before(adapter.multimodal, run.begin)
        if self.two_pass:
            hooks.before(adapter.language_model, run.choose_beforehand)
        for layer, projection in zip(layers, projections, strict=True):
            hooks.before(projection, run.reinforce(layer))


class _Run:
    """The method on one model, and the factors of the prompts at hand.

    scale: {layer: [B, H]}, what each head in the input of a layer's output projection is multiplied by.
    """

    def __init__(self, method: VHR, session: Session, trace: Trace, layers: tuple[int, ...]) -> None:
        self.method, self.session, self.trace, self.layers = method, session, trace, layers
        self.scale: dict[int, torch.Tensor] = {}
        self.without: dict[int, torch.Tensor] = {}
        self.stream: TextStream | None = None
        self.prompt: TextPrompt | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the multimodal forward: a prefill forgets the last prompt and starts the text-only one."""
        call = as_keywords(module, args, kwargs)
        if cached_length(call):
            self._check_step(call)
            return
        self.scale, self.without, self.stream, self.prompt = {}, {}, None, None
        self.trace.notes.update(vhd={}, heads={})
        self.prompt = TextPrompt.of(call, self.session)
        if self.method.two_pass:
            return  # when the language model is called
        if self.method.reinforce_both:
            self.stream = TextStream(self.session, self.prompt)
        else:
            self.without = self.prompt.run(self.session, self.layers)

    def _check_step(self, call: dict[str, Any]) -> None:
        ids = call.get("input_ids")
        batch, new = (call["inputs_embeds"] if ids is None else ids).shape[:2]
        if len(self.scale) < len(self.layers):
            raise InputError(
                "cache: it holds positions of a prompt that VHR has not seen, so their heads are not reinforced; "
                "start the generation inside the context, with an empty cache"
            )
        if new != 1:
            raise InputError(
                f"input_ids: {new} positions behind a cached prompt; VHR chooses heads at the end of the prompt, so "
                "give it in one piece (no prefill_chunk_size, prefix cache, assisted generation or prompt lookup)"
            )
        known = len(self.scale[self.layers[0]])
        if batch % known:
            raise InputError(
                f"cache: a step of batch {batch} does not continue the last prompts (batch {known}); "
                "start each generation with an empty cache"
            )
        if batch != known:  # each prompt was repeated, as before a search
            self.scale = {layer: scale.repeat_interleave(batch // known, 0) for layer, scale in self.scale.items()}

    def choose_beforehand(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the language model's prefill: run both prompts on the decoder as it is, and choose in all layers."""
        prompt = self.prompt
        if prompt is None or self.scale:
            return
        if self.session.cuts.takes_deepstack:
            raise InputError(
                "two_pass: a method that cuts tokens while deepstack features still join the decoder holds these back, "
                "so the model as it is cannot be run; give two_pass=False"
            )
        call = _without_cache(as_keywords(module, args, kwargs))
        adapter = self.session.adapter
        seeing = head_outputs(adapter, self.layers, lambda: unseen(self.session, lambda: module(**call)))
        blind = prompt.run(self.session, self.layers)
        for layer in self.layers:
            self._choose(layer, seeing[layer][:, -1], blind[layer])

    def reinforce(self, layer: int) -> Callable[..., tuple]:
        """The hook before a layer's output projection."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple:
            x = args[0]  # [B, N, H * d]
            if layer not in self.scale:
                self._choose_now(layer, split_heads(self.session.adapter, layer, x[:, -1:].detach())[:, -1])
            return (ops.head_scale(x, self.scale[layer]), *args[1:]), kwargs

        return hook

    def _choose_now(self, layer: int, seeing: torch.Tensor) -> None:
        """Choose the heads of a layer in which the main stream is; the text-only stream catches up."""
        if self.stream is None:
            self._choose(layer, seeing, self.without.pop(layer))
            return

        def edit(x: torch.Tensor) -> torch.Tensor:
            self._choose(layer, seeing, split_heads(self.session.adapter, layer, x[:, -1:])[:, -1])
            return ops.head_scale(x, self.scale[layer])

        self.stream.run_through(layer, edit)

    @torch.no_grad()
    def _choose(self, layer: int, seeing: torch.Tensor, blind: torch.Tensor) -> None:
        """Heads and factors of a layer, from head outputs at the last position [B, H, d] with and without the image."""
        assert self.prompt is not None
        measured = self.prompt.only_where_image(vhd_scores(seeing, blind))  # [B, H]
        heads = select_heads(without_outliers(measured, blind) if self.method.remove_outliers else measured)
        self.scale[layer] = torch.ones_like(seeing[..., 0]).masked_fill(heads, self.method.alpha)
        notes: Any = self.trace.notes
        notes["vhd"][layer], notes["heads"][layer] = measured, heads
        if len(self.scale) == len(self.layers):
            self.prompt = self.stream = None  # no longer needed: let go of its tensors


def _without_cache(call: dict[str, Any]) -> dict[str, Any]:
    """A prefill of the language model with no cache; masks made for a static cache lose its empty columns."""
    length = call["inputs_embeds"].shape[1]

    def cut(mask: Any) -> Any:
        if isinstance(mask, dict):
            return {kind: cut(one) for kind, one in mask.items()}
        return mask[..., :length] if isinstance(mask, torch.Tensor) else mask

    kept = {name: value for name, value in call.items() if name not in ("cache", "past_key_values")}
    return {**kept, "attention_mask": cut(call.get("attention_mask")), "use_cache": False}
