"""FlowCut's second stage: one cut inside the decoder, for models whose images come in several tiles.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
"""

from __future__ import annotations

import torch

from vlattn import ops
from vlattn.interventions.decoder_pruner import keep_best
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.decoder import Cut
from vlattn.runtime.layer_state import LayerState

DECODER_LAYER = 1
"""The decoder layer whose output is cut: the second."""


def decoder_flow_score(
    q: torch.Tensor, k: torch.Tensor, last_value: torch.Tensor, value: torch.Tensor, visual: torch.Tensor, scale: float
) -> torch.Tensor:
    """Importance of each visual token to the last prompt token: (attention + value similarity) x L1 norm of the value.

    Unlike in the encoder, both softmaxes run over visual tokens alone and both are scaled, and nothing is averaged over
    layers.

    Args:
        q: the last prompt token's query, position turned in [B, H, 1, D].
        k: keys, position turned in [B, Hkv, N, D].
        last_value: the last prompt token's value [B, Hkv, 1, D].
        value: values [B, Hkv, N, D].
        visual: bool [B, N], the tokens that compete; each row needs at least one.
        scale: factor on both products, D ** -0.5.

    Returns:
        [B, N], 0 outside `visual`; fp32 for half-precision inputs.
    """
    relevance = ops.query_row_attention(q, k, scale=scale, key_mask=visual)[:, :, 0].mean(1)  # [B, N]
    # Each key-value head serves equally many query heads, so the mean over the former is the mean over the latter.
    semantic = ops.query_row_attention(last_value, value, scale=scale, key_mask=visual)[:, :, 0].mean(1)
    size = value.to(accumulation_dtype(value.dtype)).mean(1).abs().sum(-1)  # heads first, then the norm
    # Means over heads of rows that sum to 1 sum to 1 themselves: there is nothing to normalise again.
    return ((relevance + semantic) * size).masked_fill(~visual, 0)


def decoder_flow_cut(state: LayerState, target: int) -> Cut:
    """The cut that leaves the best `target` visual tokens of each prompt; a prompt with no more keeps them all.

    For a request after `DECODER_LAYER` with projections "qkv". The released code renumbers positions after it, but
    gathers them where they have three dimensions.
    """
    rows = torch.full((state.hidden.shape[0], 1), state.last, device=state.hidden.device)
    value = state.value
    score = decoder_flow_score(state.query(rows), state.key, value[:, :, -1:], value, state.visual, state.scaling)
    return keep_best(score, state, [target] * state.hidden.shape[0])
