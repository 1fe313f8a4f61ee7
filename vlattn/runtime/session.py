"""All that is attached to one model: shared hooks, the visual tokens of the prompt at hand, and the edit at place 0."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.runtime.hooks import HookSet, as_keywords, cached_length
from vlattn.runtime.sequence import Positions, ShortPrompt, shorten_prompt, shorten_step
from vlattn.runtime.tokens import VisualTokens

if TYPE_CHECKING:
    from vlattn.models.adapter import Adapter
    from vlattn.runtime.trace import Trace


class Session:
    """Shared by every intervention on one model, so that nested contexts see each other; gone with the last of them."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self.members: list[Any] = []
        self.traces: list[Trace] = []
        self.visual: VisualTokens | None = None
        self.positions: Positions = "compact"
        self.drops_features = False
        self._short: ShortPrompt | None = None
        self._hooks = HookSet()
        self._hooks.before(model, self._refuse_labels)
        self._hooks.before(adapter.multimodal, self._read_prompt)
        self._hooks.before(adapter.language_model, self._edit_sequence)

    def close(self) -> None:
        self._hooks.remove()

    def _refuse_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.drops_features and as_keywords(module, args, kwargs).get("labels") is not None:
            raise InputError(
                "labels: they count the full prompt, and the logits of a pruned one are fewer; "
                "leave labels out and take the loss over the last positions of the logits yourself"
            )

    def _read_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the multimodal forward: a prefill forgets the last prompt and finds the visual tokens of this one."""
        call = as_keywords(module, args, kwargs)
        if cached_length(call):
            return
        self._short = None
        self.visual = self.adapter.visual_tokens(call)
        mask = call.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise InputError(
                "attention_mask: the prompts are padded on the right; "
                "set processor.tokenizer.padding_side = 'left' and prepare them again"
            )
        if not bool(self.visual.mask.any()):
            raise InputError(
                f"input_ids: the prompt has no visual tokens (placeholder id {self.adapter.image_token_id}); "
                "give an image, or leave the context for text-only prompts"
            )

    def _edit_sequence(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before the language model: drop the placeholders whose feature was pruned (they arrive as NaN)."""
        call = as_keywords(module, args, kwargs)
        if cached_length(call):
            self._refuse_late_images(call)
            return None if self._short is None else ((), shorten_step(call, self._short, self.positions))
        if self.visual is None or call.get("inputs_embeds") is None:
            return None
        # NaN marks a dropped feature: the mark travels with the data through beams, expansion and reordering.
        drop = self.visual.mask & call["inputs_embeds"][..., 0].isnan()
        drops = bool(drop.any())
        if self.drops_features and not drops:
            raise InputError(
                "pixel_values: the image features were computed outside this context, so they are not pruned; "
                "give pixel_values (not precomputed features) inside the context"
            )
        valid, new = call.get("attention_mask"), None
        full = int(valid.sum(-1).max()) if isinstance(valid, torch.Tensor) and valid.ndim == 2 else drop.shape[1]
        if drops:
            new, self._short = shorten_prompt(call, drop, self.positions)
        for trace in self.traces:
            trace.prompt_length = full
            trace.kept_length = full if new is None else new["inputs_embeds"].shape[1]
        return None if new is None else ((), new)

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


def close_if_empty(session: Session) -> None:
    """Close a session that nobody uses any more."""
    if not session.members:
        session.close()
        _SESSIONS.pop(session.adapter.multimodal, None)
