"""Raising attention logits: s + gamma |s| on the keys of visual tokens, in the rows of the tokens being generated.

The step that "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", arXiv
2407.21771, and "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv
2501.12206, share; they differ in the keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn import functional as F

from vlattn import ops
from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.kernels.dispatch import Backend
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.routing import AttentionCall, Plain
from vlattn.runtime.session import Session


def modulate(logits: torch.Tensor, gamma: float | torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """s + gamma |s| where a key may be looked at.

    For 0 <= gamma < 1 no logit falls and none changes its sign: positive ones grow by 1 + gamma, negative ones shrink
    by 1 - gamma. Scaling all logits by c > 0 scales the result by c.

    Args:
        logits: scaled logits s [..., R, K], behind a soft-cap where there is one.
        gamma: strength by key, broadcast to the logits; 0 leaves a logit as it is.
        allowed: bool, broadcast to the logits; others stay as they are, -inf among them.

    Returns:
        [..., R, K] in the dtype that logits and gamma make together.
    """
    return logits + gamma * logits.masked_fill(~allowed, 0).abs()


class Boost(Plain, ABC):
    """The edit of attention rows that raises some visual keys: the last row of a prompt, and every row behind it.

    at_prefill: whether the last row of the prompt is edited too, so that the first generated token feels it.
    """

    def __init__(self, session: Session, at_prefill: bool = True) -> None:
        self._session, self._at_prefill = session, at_prefill
        # By layer: the sequence that the layer runs on, and the strengths of its keys; None where none is above 0.
        self._known: dict[int, tuple[Any, torch.Tensor | None]] = {}

    @abstractmethod
    def strength(self, tokens: Any, dtype: torch.dtype) -> torch.Tensor:
        """gamma of each prompt key of a layer [B, n]; tokens: what stands there (`visual`, `slot`, `image`)."""

    def head_weights(self, call: AttentionCall, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor | None:
        """What each head's strength is multiplied by [B, H]; None for 1."""
        return None

    def rows(self, call: AttentionCall) -> int:
        if call.prefill and not self._at_prefill:
            return 0
        if self._strength(call) is None:
            return 0
        return 1 if call.prefill else call.query.shape[2]

    def logits(self, call: AttentionCall, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        found = self._strength(call)
        assert found is not None
        gamma = F.pad(found, (0, call.key.shape[2] - call.prompt))[:, None, None].to(logits.dtype)  # [B, 1, 1, K]
        weights = self.head_weights(call, logits, allowed)
        if weights is not None:
            gamma = gamma * weights[..., None, None]  # [B, H, 1, K]
        return modulate(logits, gamma, allowed)

    def fused(
        self, call: AttentionCall, allowed: torch.Tensor, scaling: float | None, backend: Backend | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._fused(call, allowed, scaling, backend)

    def _fused(
        self,
        call: AttentionCall,
        allowed: torch.Tensor,
        scaling: float | None,
        backend: Backend | None,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fused` with the weights of heads that are known."""
        found = self._strength(call)
        assert found is not None
        rows = call.last_rows(allowed, scaling)
        gamma = F.pad(found, (0, call.key.shape[2] - call.prompt))  # [B, K]
        made = ops.grouped_attention(
            **rows, groups=call.visual.to(torch.uint8), gamma=gamma, head_weights=weights, backend=backend
        )
        return made.output, (gamma > 0).any(1)[:, None, None].expand(made.output.shape[:3])

    def _strength(self, call: AttentionCall) -> torch.Tensor | None:
        now = self._session.cuts.at(call.layer)
        assert now is not None
        known = self._known.get(call.layer)
        if known is None or known[0] is not now:
            # Layers between two cuts run on one sequence.
            known = next((other for other in self._known.values() if other[0] is now), None)
            self._known[call.layer] = known = known or (now, self._made(now.tokens, call.query.dtype))
        return known[1]

    def _made(self, tokens: Any, dtype: torch.dtype) -> torch.Tensor | None:
        made = self.strength(tokens, accumulation_dtype(dtype))
        return made if bool(made.any()) else None


# Settings -------------------------------------------------------------------------------------------------------------
def require_strength(name: str, value: object) -> None:
    """Refuse what is no number in [0, 1): from 1 on, negative logits would change their sign."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"{name}: got {value!r}; give a number from 0 (off) to below 1")


def require_layers(start_layer: object, end_layer: object) -> None:
    """Refuse what is no range of decoder layers: start_layer <= l < end_layer, None for all that follow."""
    require_count("start_layer", start_layer, least=0)
    if end_layer is not None:
        assert isinstance(start_layer, int)
        require_count("end_layer", end_layer, least=start_layer + 1)


def layers_between(start_layer: int, end_layer: int | None, depth: int) -> list[int]:
    """start_layer ... end_layer - 1 on a decoder of `depth` layers.

    Raises:
        InputError: the decoder does not have them.
    """
    if start_layer >= depth or (end_layer is not None and end_layer > depth):
        raise InputError(
            f"start_layer, end_layer: got {start_layer}, {end_layer}, but this decoder has layers 0 to {depth - 1}; "
            f"give 0 <= start_layer < end_layer <= {depth}, or end_layer=None for all from start_layer on"
        )
    return list(range(start_layer, depth if end_layer is None else end_layer))
