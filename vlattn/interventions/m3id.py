"""M3ID: amplify what the image contributes to the logits, the more the longer the text has grown.

"Multi-Modal Hallucination Control by Visual Information Grounding", arXiv 2403.14003.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlattn.checks import require_number
from vlattn.interventions.base import Intervention
from vlattn.interventions.contrast import contrast
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.second_prompt import without_image
from vlattn.runtime.second_stream import SecondStream
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

# e^60 l is far from overflow in fp32, and long before that l - l' alone decides.
_LARGEST_EXPONENT = 60.0


def image_weight(step: int, lam: float, most: float | None = None) -> float:
    """(1 - gamma_t) / gamma_t = e^(lam t) - 1 for gamma_t = e^(-lam t), at most `most`; t = `step` counts from 1."""
    weight = math.expm1(min(lam * step, _LARGEST_EXPONENT))
    return weight if most is None else min(weight, most)


def unsure(logits: torch.Tensor, confidence: float) -> torch.Tensor:
    """Rows of logits [..., V] whose largest probability is below `confidence`: bool [..., 1]."""
    return logits.log_softmax(-1).amax(-1, keepdim=True).exp() < confidence


@dataclass(frozen=True)
class M3ID(Intervention):
    """Baseline: add to the logits what the image contributes to them, with a weight that grows with each token.

    "Multi-Modal Hallucination Control by Visual Information Grounding", arXiv 2403.14003. l is the model's logits, l'
    those of the same text without the image: l + w (l - l') with w = e^(lam t) - 1 at the t-th generated token, where
    l >= max l + log beta. There is no official code. The paper corrects only where the model is unsure; how unsure is
    not known to us, so `confidence` is off by default and VCD's plausibility mask stands in for it, as in a public
    re-implementation. Short answers are nearly unchanged by construction. A new call of generate starts at t = 1.

    Methods that prune or edit act on the model's own stream.

    lam: lambda, how fast the weight grows with each token: 0.02 gives 0.02 at t = 1, 1 at 35, 1.7 at 50. 0 leaves the
        model as it is, the mask included.
    confidence: correct only where the largest probability is below this; None corrects everywhere.
    beta: a token needs at least this share of the largest probability, 0 to 1; 0 keeps all tokens.
    max_weight: cap on w (ours), 10 say for long answers; None lets it grow.
    """

    place = "decoder"

    lam: float = 0.02
    confidence: float | None = None
    beta: float = 0.1
    max_weight: float | None = None

    def __post_init__(self) -> None:
        require_number("lam", self.lam, 0)
        require_number("beta", self.beta, 0, 1)
        if self.confidence is not None:
            require_number("confidence", self.confidence, 0, 1)
        if self.max_weight is not None:
            require_number("max_weight", self.max_weight, 0)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        if self.lam == 0:
            return

        def combine(main: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
            weight = image_weight(step, self.lam, self.max_weight)
            out = contrast(main, second, 1 + weight, -weight, self.beta)
            return out if self.confidence is None else torch.where(unsure(main, self.confidence), out, main)

        SecondStream(session, without_image, combine).attach(hooks)
