"""All that is attached to one model: shared hooks, the visual tokens of the prompt at hand, and the edits to it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.runtime.decoder import DecoderCuts
from vlattn.runtime.hooks import Gate, HookSet, as_keywords, cached_length
from vlattn.runtime.labels import LabelledCall
from vlattn.runtime.routing import AttentionEdits
from vlattn.runtime.sequence import (
    Positions,
    Segment,
    ShortPrompt,
    short_step_mask,
    shorten_prompt,
    shorten_step,
    valid_columns,
)
from vlattn.runtime.tokens import VisualTokens

if TYPE_CHECKING:
    from vlattn.models.adapter import Adapter
    from vlattn.runtime.trace import Trace

# (inputs_embeds [B, T, D], visual tokens, keyword arguments of the multimodal forward)
# -> (what leaves, bool [B, T], new inputs_embeds or None).
PromptChooser = Callable[[torch.Tensor, VisualTokens, dict[str, Any]], tuple[torch.Tensor, torch.Tensor | None]]


class Session:
    """Shared by every intervention on one model, so that nested contexts see each other; gone with the last of them.

    positions: how position ids follow a drop in front of the decoder.
    drops_features: whether somebody marks pruned image features (as NaN), so that a prompt without marks is an error.
    choosers: what decides at the decoder's door which visual tokens leave, features as the decoder would get them.
    cuts: what is dropped inside the decoder.
    attention: what is edited in attention rows.
    gate: shut while the model runs without any intervention, also on prompts without images.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self.members: list[Any] = []
        self.traces: list[Trace] = []
        self.visual: VisualTokens | None = None
        self.positions: Positions = "compact"
        self.drops_features = False
        self.choosers: list[PromptChooser] = []
        self.gate = Gate()
        self.cuts = DecoderCuts(adapter, self.gate)
        self.attention = AttentionEdits(adapter, self.cuts, self.gate)
        self._call: dict[str, Any] = {}
        self._short: ShortPrompt | None = None
        self._mask_is_short = False
        self._warned = False
        self._door = HookSet()  # of no gate: it opens and shuts that of the others
        for module in dict.fromkeys((model, adapter.multimodal)):
            self._door.before(module, self._look_for_images, first=True)
        for tower in adapter.towers:
            self._door.before(tower, self._see_images, first=True)
        self._hooks = HookSet(self.gate)
        self._labels = LabelledCall(model, self)
        self._hooks.before(model, self._labels.take)
        self._hooks.after(model, self._labels.give)
        self._hooks.before(adapter.multimodal, self._read_prompt)
        self._hooks.before(adapter.language_model, self._edit_sequence)
        self._hooks.after(adapter.language_model, self._finish)
        self._hooks.also(adapter.remember_sizes().remove)

    def close(self) -> None:
        self._door.remove()
        self._hooks.remove()
        self.cuts.close()

    @property
    def drops(self) -> bool:
        """Whether positions may leave a prompt."""
        return self.drops_features or bool(self.choosers) or bool(self.cuts.requests)

    @property
    def surviving(self) -> Segment | None:
        """Positions of the full prompt that the logits of the last prefill stand for; None for all."""
        inside = self.cuts.surviving()
        if self._short is None or inside is None:
            return inside if self._short is None else self._short.segment
        return inside.within(self._short.segment)

    def _implementation(self) -> str:
        return self.adapter.text_config._attn_implementation or "eager"

    def _look_for_images(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before anything else: without an image in the whole batch there is nothing to act on, to the last token."""
        if self.gate.held:
            return
        call = as_keywords(module, args, kwargs)
        if cached_length(call):
            if self.gate.blind and self.sees_images(call):
                raise InputError(
                    "cache: an image comes after positions that are cached already, where no intervention can act; "
                    "give the whole prompt at once with an empty cache"
                )
            return
        self.gate.blind = not self.sees_images(call)
        if self.gate.blind and not self._warned:
            self._warned = True
            warnings.warn(
                f"input_ids: the prompt has no visual tokens (placeholder id {self.adapter.image_token_id}), so "
                "interventions leave it as it is",
                stacklevel=2,
            )

    def _see_images(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a vision tower, which newer transformers run before the forward that the features are for."""
        if not self.gate.held:
            self.gate.blind = False

    def sees_images(self, call: dict[str, Any]) -> bool:
        """Whether any prompt of a forward, or of `generate`, has visual tokens."""
        if call.get("inputs") is not None:  # what generate calls its ids
            call = {**call, "input_ids": call["inputs"]}
        return bool(self.adapter.visual_mask(call).any())

    def _read_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before the multimodal forward: a prefill forgets the last prompt and finds the visual tokens of this one."""
        call = as_keywords(module, args, kwargs)
        self._mask_is_short = False
        if cached := cached_length(call):
            return self._shorten_mask_early(call, cached)
        self._short, self._call = None, call
        self.visual = self.adapter.visual_tokens(call)
        mask = call.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise InputError(
                "attention_mask: the prompts are padded on the right; "
                "set processor.tokenizer.padding_side = 'left' and prepare them again"
            )
        return None

    def _shorten_mask_early(self, call: dict[str, Any], cached: int) -> tuple | None:
        """A decode step of a family whose multimodal forward makes the masks, sized by the (shorter) cache."""
        mask = call.get("attention_mask")
        if self._short is None or not self.adapter.masks_above_decoder:
            return None
        if isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.ndim != 2):
            return None
        ids = call.get("input_ids")
        new = (call["inputs_embeds"] if ids is None else ids).shape[1]
        generated = cached - self._short.segment.length
        short = short_step_mask(call, self._short.segment, generated, new, self._implementation())
        self._mask_is_short = True
        return (), {**call, "attention_mask": short}

    def _edit_sequence(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before the language model: drop the placeholders whose feature was pruned (they arrive as NaN)."""
        call = as_keywords(module, args, kwargs)
        if cached := cached_length(call):
            self._refuse_late_images(call)
            self.cuts.begin_step(cached)
            if self._short is None:
                return None
            return (), shorten_step(call, self._short, self._implementation(), mask_is_short=self._mask_is_short)
        embeds = call.get("inputs_embeds")
        if self.visual is None or embeds is None:
            return None
        if self.cuts.requests:
            self._refuse_checkpointing(module)
        drop, call = self._dropped(embeds, call)
        batch, length = drop.shape
        valid = valid_columns(call.get("attention_mask"), batch, length, drop.device)
        full, new = int(valid.sum(1).max()), None if call["inputs_embeds"] is embeds else call
        if bool(drop.any()):
            new, self._short = shorten_prompt(call, drop, self.positions, self._implementation())
        place = None if self._short is None else self._short.segment
        alive = valid if place is None else place.alive
        self.cuts.begin_prefill(alive, self.visual, place)
        for trace in self.traces:
            trace.prompt_length = full
            trace.kept_length = int(alive.sum(1).max())
            trace.visual_full = self.visual.mask.sum(1).tolist()
            trace.visual_tokens = trace.visual_tokens or int(self.visual.image[self.visual.mask].bincount().max())
        if self.cuts.takes_deepstack:
            new = self.cuts.take_deepstack(call if new is None else new)
        return None if new is None else ((), new)

    def _dropped(self, embeds: torch.Tensor, call: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Which positions leave in front of the decoder, bool [B, T], and the call with features as they then are."""
        assert self.visual is not None
        # NaN marks a dropped feature: the mark travels with the data through beams, expansion and reordering.
        drop = self.visual.mask & embeds[..., 0].isnan()
        if self.drops_features and not bool(drop.any()):
            raise InputError(
                "pixel_values: the image features were computed outside this context, so they are not pruned; "
                "give pixel_values (not precomputed features) inside the context"
            )
        for choose in self.choosers:
            leaves, replaced = choose(call["inputs_embeds"], self.visual, self._call)
            if replaced is None:
                drop = drop | leaves
            else:
                drop, call = leaves, {**call, "inputs_embeds": replaced}
        return drop, call

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the language model: tell what happened at prefill, and let go of the prompt's tensors."""
        cuts = self.cuts
        if cuts.prefill and cuts.now is not None:
            lengths, visual, kept = cuts.lengths(), cuts.visual_by_layer(), cuts.kept()
            for trace in self.traces:
                trace.decoder_lengths, trace.visual_by_layer, trace.kept_in_decoder = lengths, visual, kept
                trace.masked = trace.masked or cuts.hides
        cuts.end()
        self._call = {}

    def _refuse_checkpointing(self, module: Any) -> None:
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise InputError(
                "model: gradient checkpointing runs layers again in backward, which cuts inside the decoder cannot "
                "follow; call model.gradient_checkpointing_disable()"
            )

    def _refuse_late_images(self, call: dict[str, Any]) -> None:
        """A prompt in pieces: features after cached positions would reach the decoder with their NaN marks."""
        embeds = call.get("inputs_embeds")
        if self.drops_features and embeds is not None and embeds.shape[1] > 1 and bool(embeds[..., 0].isnan().any()):
            raise InputError(
                "cache: an image comes after positions that are cached already, where its tokens cannot be dropped; "
                "give the whole prompt at once with an empty cache"
            )


# By multimodal module, so that a model and the same model without its head share one. The hooks on the model keep a
# session alive; held strongly here, it would keep the model alive too.
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def session_of(model: nn.Module, make_adapter: Callable[[nn.Module], Adapter]) -> Session:
    """The session of a model, opened on first use."""
    adapter = make_adapter(model)
    known = _SESSIONS.get(adapter.multimodal)
    session = known() if known is not None else None
    if session is None:
        session = Session(model, adapter)
        _SESSIONS[adapter.multimodal] = weakref.ref(session)
    return session


def is_attached(multimodal: nn.Module) -> bool:
    """Whether an intervention is attached to a model, given by its multimodal module."""
    known = _SESSIONS.get(multimodal)
    return known is not None and known() is not None


def close_if_empty(session: Session) -> None:
    """Close a session that nobody uses any more."""
    if not session.members:
        session.close()
        _SESSIONS.pop(session.adapter.multimodal, None)
