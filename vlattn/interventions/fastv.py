"""FastV: rank visual tokens once, by attention in an early decoder layer, and drop the rest from there on.

"An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
arXiv 2403.06764.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.base import positions_for
from vlattn.interventions.decoder_pruner import DecoderPruner, is_count, keep_best
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Query = Literal["last", "mean"]
Mode = Literal["drop", "mask"]


def last_query_score(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the last prompt token to every position, heads averaged, as the released code ranks.

    Args:
        q: the query of the last token, position turned in [B, H, 1, D].
        k: keys, position turned in [B, Hkv, N, D].
        scale: factor on q k^T.
        key_mask: bool [B, N] or [B, 1, N], True where the token may look; the softmax runs over these.

    Returns:
        [B, N], rows sum to 1; fp32 for half-precision inputs.
    """
    return ops.query_row_attention(q, k, scale=scale, key_mask=key_mask)[:, :, -1].mean(1)


def mean_query_score(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention that each position receives, averaged over heads and over all queries, as the paper defines it.

    A query before the position cannot see it and counts as 0, so early positions rank higher than they would by the
    queries that do see them.

    Args:
        q, k: queries [B, H, N, D] and keys [B, Hkv, N, D] of the whole prompt, positions turned in.
        scale: factor on q k^T.
        key_mask: bool [B, N], False on padding, which neither looks nor is seen.

    Returns:
        [B, N], rows sum to 1; fp32 for half-precision inputs. No [N, N] matrix is made.
    """
    received = ops.received_attention(q, k, scale=scale, causal=True, key_mask=key_mask, query_mask=key_mask)
    queries = k.shape[2] if key_mask is None else key_mask.sum(1, keepdim=True)
    return received.mean(1) / queries


def keep_by_ratio(visual: int, ratio: float) -> int:
    """How many of `visual` tokens stay where the share `ratio` is dropped: round(n (1 - R)), half to even."""
    return round(visual * (1 - ratio))


def keep_by_average(visual: int, average: float, layer: int, layers: int) -> int:
    """How many of `visual` tokens may stay so that decoder layers process `average` of them in the mean.

    One cut before layer K of Nl layers: (K n0 + (Nl - K) n) / Nl = average, solved for n and rounded.

    Raises:
        InputError: the layers in front of the cut alone exceed the average, or it exceeds what the prompt has.
    """
    keep = round((layers * average - layer * visual) / (layers - layer))
    if not 1 <= keep <= visual:
        least = (layer * visual + layers - layer) / layers
        raise InputError(
            f"average_keep: got {average:g}; with {visual} visual tokens and a cut before layer {layer} of {layers}, "
            f"averages from {least:.4g} to {visual} can be had: change average_keep or cut at an earlier layer"
        )
    return keep


@dataclass(frozen=True)
class FastV(DecoderPruner):
    """Rank visual tokens by the attention they get in an early decoder layer, and go on with the best.

    "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
    arXiv 2403.06764. Layers 0 to K - 1 see everything; attention in layer K - 1 ranks; layers from K on see what is
    left. One row of attention is computed beside the layer, which stays on sdpa or flash attention. Budgets count all
    visual tokens of a prompt together; a prompt that has no more than its budget keeps them all.

    keep: visual tokens of a prompt that are left. Exactly one of keep, ratio and average_keep is given.
    ratio: share of the visual tokens that is dropped, 0.5 in the paper; n (1 - R) is rounded half to even.
    average_keep: visual tokens that a decoder layer processes in the mean; solved for the number that is left.
    layer: K, the first layer that runs on fewer tokens, at least 1.
    query: `last` ranks by the attention of the last prompt token, as the released code does; `mean` by the mean over
        all queries, as the paper defines it, which favours early tokens.
    mode: `drop` removes tokens at prefill, for good; `mask` keeps them and hides them from attention in layers from K
        on, choosing anew at each decode step by the newest token, as the authors' ablations did (no time is saved).
    positions: `preserve` keeps position ids, as the released code does; `compact` renumbers; `auto` is preserve.
    """

    keep: int | None = None
    ratio: float | None = None
    average_keep: float | None = None
    layer: int = 2
    query: Query = "last"
    mode: Mode = "drop"
    positions: Positions = "preserve"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("keep", "ratio", "average_keep")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            got = ", ".join(given) or "none of them"
            raise InputError(f"keep, ratio, average_keep: got {got}; give exactly one, such as keep=64")
        if self.keep is not None and not is_count(self.keep):
            raise InputError(f"keep: got {self.keep!r}; give the number of visual tokens to keep, at least 1")
        if self.ratio is not None and not (_is_number(self.ratio) and 0 <= self.ratio < 1):
            raise InputError(f"ratio: got {self.ratio!r}; give the share of visual tokens to drop, 0 <= ratio < 1")
        if self.average_keep is not None and not (_is_number(self.average_keep) and self.average_keep > 0):
            raise InputError(f"average_keep: got {self.average_keep!r}; give a positive number of visual tokens")
        if not is_count(self.layer):
            raise InputError(f"layer: got {self.layer!r}; give the first layer with fewer tokens, at least 1")
        if self.query not in ("last", "mean"):
            raise InputError(f"query: got {self.query!r}; give 'last' or 'mean'")
        if self.mode not in ("drop", "mask"):
            raise InputError(f"mode: got {self.mode!r}; give 'drop' or 'mask'")
        if self.positions not in ("auto", "compact", "preserve"):
            raise InputError(f"positions: got {self.positions!r}; give 'auto', 'compact' or 'preserve'")
        if self.mode == "mask" and self.query == "mean":
            raise InputError(
                "query: 'mean' needs the queries of all positions, which decode steps do not have, so it "
                "does not go with mode='mask'; give query='last' or mode='drop'"
            )
        if self.mode == "mask" and self.positions == "compact":
            raise InputError(
                "positions: 'compact' does not go with mode='mask', where all positions stay; "
                "give positions='preserve' or mode='drop'"
            )

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        depth = len(session.adapter.decoder_layers)
        if self.layer >= depth:
            raise InputError(
                f"layer: got {self.layer}, but this decoder has layers 0 to {depth - 1}; give 1 <= layer <= {depth - 1}"
            )
        hide = self.mode == "mask"
        request = Request(
            self.layer - 1,
            lambda state: self._choose(state, depth),
            positions=positions_for("FastV", self.positions, "preserve", session.adapter),
            hide=hide,
            projections="qk",
            every_step=hide,
        )
        session.cuts.after(request, hooks)

    def _choose(self, state: LayerState, depth: int) -> Cut:
        batch, queries = state.hidden.shape[:2]
        if self.query == "last":
            rows = torch.full((batch, 1), state.last, device=state.hidden.device)
            score = last_query_score(state.query(rows), state.key, scale=state.scaling, key_mask=state.key_mask(rows))
        else:
            rows = torch.arange(queries, device=state.hidden.device).expand(batch, -1)
            score = mean_query_score(state.query(rows), state.key, scale=state.scaling, key_mask=state.seen)
        return keep_best(score, state, [self._count(n, depth) for n in state.visual.sum(1).tolist()])

    def _count(self, visual: int, depth: int) -> int:
        if self.keep is not None:
            return self.keep
        if self.ratio is not None:
            return keep_by_ratio(visual, self.ratio)
        assert self.average_keep is not None
        return keep_by_average(visual, self.average_keep, self.layer, depth) if visual else 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
