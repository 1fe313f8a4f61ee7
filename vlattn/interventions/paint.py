"""PAINT: in the decoder, look harder at the image tokens that the vision tower found informative.

"Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv 2501.12206,
whose third version is titled "PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large
Vision-Language Model".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vlattn.checks import require_number
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.flowcut import FlowCut
from vlattn.interventions.modulate import Boost, layers_between, require_layers, require_strength
from vlattn.interventions.pai import refine_without_image
from vlattn.interventions.paint_select import Informed, at_tokens
from vlattn.interventions.paint_watch import watch_tower
from vlattn.interventions.prumerge import PruMerge
from vlattn.interventions.tome import ToMe
from vlattn.interventions.visionzip import VisionZip
from vlattn.kernels.dispatch import Backend
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.runtime.hooks import HookSet, as_keywords, cached_length
from vlattn.runtime.routing import AttentionCall
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace

HeadWeights = Literal["visual_mass"]


@dataclass(frozen=True)
class PAINT(Intervention):
    """PAINT: raise the attention logits of informed visual keys, local ones by alpha and summary ones by beta.

    "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv 2501.12206.
    Local tokens get the most attention from CLS in the tower's first layer; summary tokens are the outliers of that
    attention in the layer whose output is the image feature, and win where a token is both. Logits s of these keys
    become s + alpha |s| or s + beta |s| in the last row of the prompt and in each generated row; no other row is
    computed again. Each encoder image (tile) is chosen from by itself, in batches too.

    Ours, where the paper has only CLIP and LLaVA-1.5: without CLS, attention received from all patches takes the place
    of its row; merged patches add up, so that the choice is among visual tokens; tokens that mix tiles (LLaVA-OneVision
    with many) are never chosen. Of tokens that a pruner drops nothing remains; one that works inside the tower also
    leaves the late layer fewer tokens to find outliers among.

    `PAINT.published()` has the refinement by a second stream without the image, as all published results have.

    alpha: strength for local tokens, in [0, 1).
    beta: strength for summary tokens, in [0, 1); 0.4 is best in the paper, the released code's default is 0.3.
    local_ratio: share of a tile's tokens that are local, in [0, 1].
    spatial_ratio: share that joins the local ones by attention received from all patches in the first layer. The
        released code, meant to do this, sums rows that are all 1 and so picks at random; its results use 0.
    iqr: how many interquartile ranges above the third quartile outliers begin.
    start_layer: first decoder layer whose attention is edited.
    end_layer: the layer behind the last one edited; None for all from `start_layer` on.
    head_weights: None for all heads alike, as the released code does. `visual_mass` (ours) multiplies the strengths of
        a head by its attention to the image over the mean of its layer's heads, 2 at most, measured for each prompt in
        its last row.
    cfg: at least 1; logits become cfg l + (1 - cfg) l' with l' from a second stream without the image, which is not
        edited, as in PAI (arXiv 2407.21771). 1 for no second stream.
    cutoff: in [0, 1], with `cfg`: tokens less probable than this share of the best one's probability are left out.
    """

    alpha: float = 0.7
    beta: float = 0.4
    local_ratio: float = 0.25
    spatial_ratio: float = 0.0
    iqr: float = 1.5
    start_layer: int = 2
    end_layer: int | None = None
    head_weights: HeadWeights | None = None
    cfg: float = 1.0
    cutoff: float = 0.1

    place = "decoder"

    @classmethod
    def published(cls) -> PAINT:
        """The setting of the published results: alpha 0.7, beta 0.4, and cfg 1.1."""
        return cls(cfg=1.1)

    def __post_init__(self) -> None:
        require_strength("alpha", self.alpha)
        require_strength("beta", self.beta)
        require_number("local_ratio", self.local_ratio, 0.0, 1.0)
        require_number("spatial_ratio", self.spatial_ratio, 0.0, 1.0)
        require_number("iqr", self.iqr, 0.0)
        require_layers(self.start_layer, self.end_layer)
        if self.head_weights not in (None, "visual_mass"):
            raise InputError(f"head_weights: got {self.head_weights!r}; give None or 'visual_mass'")
        require_number("cfg", self.cfg, 1.0)
        require_number("cutoff", self.cutoff, 0.0, 1.0)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        layers = layers_between(self.start_layer, self.end_layer, len(session.adapter.decoder_layers))
        if self.alpha or self.beta:
            _refuse_mixed_tokens(session)
            choice = _Choice(self, session, hooks, trace)
            session.attention.add(layers, _InformedVisual(session, self, choice), hooks)
        refine_without_image(session, hooks, self.cfg, self.cutoff)


def _refuse_mixed_tokens(session: Session) -> None:
    """Raise beside methods whose tokens are no patches at places of their own."""
    for member in session.members:
        packed = isinstance(member, FlowCut) and isinstance(session.adapter, Qwen2VLAdapter)
        if isinstance(member, ToMe | PruMerge | VisionZip) or (packed and not member.group_aligned):
            how = "give FlowCut group_aligned=True" if packed else "use a method that only selects, such as FlowCut"
            raise InputError(
                f"PAINT: {type(member).__name__} mixes patches into new tokens, so those that the vision tower found "
                f"informative have no place in the prompt any more; {how}, or leave one context"
            )


class _Choice:
    """Hooks that find, at each prefill, which positions of the prompts hold informed tokens."""

    def __init__(self, method: PAINT, session: Session, hooks: HookSet, trace: Trace) -> None:
        self._method, self._session, self._trace = method, session, trace
        self._watch = watch_tower(session, hooks, received=method.spatial_ratio > 0)
        self._call: Mapping[str, Any] = {}
        self.local: torch.Tensor | None = None  # bool [B, slots], by running index of the visual token
        self.summary: torch.Tensor | None = None
        hooks.before(session.adapter.multimodal, self._note)
        hooks.before(session.adapter.language_model, self._choose)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = as_keywords(module, args, kwargs)

    def _choose(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, self._call = self._call, {}
        visual = self._session.visual
        if not call or visual is None or cached_length(as_keywords(module, args, kwargs)):
            return
        _refuse_mixed_tokens(self._session)
        self._refuse_two_kinds(call)
        scores, method = self._watch.scores(call), self._method
        chosen = scores.choose(method.local_ratio, method.spatial_ratio, method.iqr)
        placed = Informed(*(at_tokens(each, scores.sizes, visual) for each in chosen))  # bool [B, T]
        self._trace.notes.update(local=placed.local.cpu(), summary=placed.summary.cpu())
        self.local, self.summary = (_by_slot(each, visual) for each in placed)

    def _refuse_two_kinds(self, call: Mapping[str, Any]) -> None:
        if int(self._session.adapter.visual_kinds(call).unique().ge(0).sum()) > 1:
            raise InputError(
                "pixel_values, pixel_values_videos: PAINT reads one pass through the vision tower, and images and "
                "videos of one batch take two; give them in separate batches"
            )


def _by_slot(chosen: torch.Tensor, visual: VisualTokens) -> torch.Tensor:
    """Positions [B, T] as running indices of visual tokens: bool [B, most visual tokens of a prompt]."""
    slot = visual.slot
    found = chosen.new_zeros(chosen.shape[0], int(slot.max()) + 2)
    return found.scatter(1, torch.where(visual.mask, slot, found.shape[1] - 1), chosen)[:, :-1]


class _InformedVisual(Boost):
    """alpha for local tokens, beta for summary tokens, wherever they are left."""

    def __init__(self, session: Session, method: PAINT, choice: _Choice) -> None:
        super().__init__(session)
        self._method, self._choice = method, choice
        self._heads: dict[int, torch.Tensor] = {}

    def strength(self, tokens: Any, dtype: torch.dtype) -> torch.Tensor:
        local, summary = self._choice.local, self._choice.summary
        assert local is not None
        assert summary is not None
        by_slot = local.to(dtype) * self._method.alpha + summary.to(dtype) * self._method.beta  # [B, slots]
        one = tokens.visual & (tokens.slot >= 0)  # merged tokens are nobody's
        return by_slot.gather(1, tokens.slot.clamp(min=0)) * one

    def rows(self, call: AttentionCall) -> int:
        if call.prefill:
            self._heads.pop(call.layer, None)
        return super().rows(call)

    def fused(
        self, call: AttentionCall, allowed: torch.Tensor, scaling: float | None, backend: Backend | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._method.head_weights and call.layer not in self._heads:
            return None  # they are measured on weights
        return self._fused(call, allowed, scaling, backend, self._heads.get(call.layer))

    def head_weights(self, call: AttentionCall, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor | None:
        if self._method.head_weights is None:
            return None
        if call.layer not in self._heads:
            self._heads[call.layer] = visual_mass_weights(logits, call.visual, allowed)
        return self._heads[call.layer]


def visual_mass_weights(logits: torch.Tensor, visual: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """How much more a head looks at the image than the heads of its layer do in the mean (ours).

    Args:
        logits: scaled logits of some rows [B, H, R, K].
        visual: bool [B, K], keys of visual tokens.
        allowed: bool [B or 1, 1, R, K].

    Returns:
        [B, H]: mean over rows of the attention on visual keys, divided by its mean over heads, 2 at most; 1 for all
        heads of a prompt whose heads all look elsewhere.
    """
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)  # [B, H, R, K]
    mass = (weights * visual[:, None, None]).sum(-1).mean(-1)  # [B, H]
    mean = mass.mean(1, keepdim=True)
    return torch.where(mean > 0, mass / mean, 1).clamp(max=2)
