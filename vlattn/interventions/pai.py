"""PAI: look harder at the image, and subtract what the language model would say without it.

"Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", arXiv 2407.21771.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlattn.checks import require_bool, require_number
from vlattn.interventions.base import Intervention
from vlattn.interventions.contrast import contrast
from vlattn.interventions.modulate import Boost, layers_between, require_layers, require_strength
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.second_prompt import without_image
from vlattn.runtime.second_stream import SecondStream
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class PAI(Intervention):
    """PAI: raise the attention logits of all visual keys for the token being generated, and contrast with no image.

    "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", ECCV 2024, arXiv
    2407.21771. Logits s of visual keys become s + alpha |s| in the last row of the prompt and in each generated row; no
    other row is computed again. The logits of a second stream without the image, with a cache of its own and no edit,
    then refine those of the model: gamma l + (1 - gamma) l', tokens below cutoff times the best probability left out.
    alpha = 0 and gamma = 1 each switch their half off. Sequences may be padded on the left.

    alpha: strength in [0, 1); 0.2 is the released code's default, 0.5 is reported for LLaVA-1.5.
    gamma: at least 1; 1 for no second stream. 1.1 in the authors' commands.
    start_layer: first decoder layer whose attention is edited.
    end_layer: the layer behind the last one edited; None for all from `start_layer` on.
    cutoff: in [0, 1], tokens less probable than this share of the best one's probability are left out; 0 keeps all.
    released_code: leave the prompt's last row alone, as the released code does by the way it counts its streams, so
        that the first generated token does not feel the edit.
    """

    alpha: float = 0.5
    gamma: float = 1.1
    start_layer: int = 2
    end_layer: int | None = None
    cutoff: float = 0.1
    released_code: bool = False

    place = "decoder"

    def __post_init__(self) -> None:
        require_strength("alpha", self.alpha)
        require_number("gamma", self.gamma, 1.0)
        require_layers(self.start_layer, self.end_layer)
        require_number("cutoff", self.cutoff, 0.0, 1.0)
        require_bool("released_code", self.released_code)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        layers = layers_between(self.start_layer, self.end_layer, len(session.adapter.decoder_layers))
        if self.alpha:
            session.attention.add(layers, _AllVisual(session, self.alpha, not self.released_code), hooks)
        refine_without_image(session, hooks, self.gamma, self.cutoff)


class _AllVisual(Boost):
    """The same strength for every visual key."""

    def __init__(self, session: Session, alpha: float, at_prefill: bool) -> None:
        super().__init__(session, at_prefill)
        self._alpha = alpha

    def strength(self, tokens: Any, dtype: torch.dtype) -> torch.Tensor:
        return tokens.visual.to(dtype) * self._alpha


def refine_without_image(session: Session, hooks: HookSet, gamma: float, cutoff: float) -> None:
    """Contrast the model's logits with those of the prompt without its image; nothing is installed for gamma = 1."""
    if gamma == 1:
        return

    def refine(main: torch.Tensor, bare: torch.Tensor, step: int) -> torch.Tensor:
        return contrast(main, bare, gamma, 1 - gamma, cutoff)

    SecondStream(session, without_image, refine).attach(hooks)
