"""SparseVLM: text tokens that relate to the image vote, by the decoder's own attention, on which visual tokens stay.

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417; its second
version adds "with Improved Text-Visual Attention Pattern" to the name and is called `+` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.base import positions_for
from vlattn.interventions.decoder_pruner import (
    DecoderPruner,
    as_tuple,
    candidates,
    check_layers,
    is_count,
    is_share,
    layers_of,
    share_of,
    top_visual,
)
from vlattn.interventions.sparsevlm_cluster import arrange, cluster_merge
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Version = Literal["1", "1.5", "+"]

BUDGETS: dict[str, dict[int, tuple[int, ...]]] = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "+": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens left after each stage by version and budget, for 576 visual tokens and cuts after layers 2, 6, 15 of 32. The
budget's name is roughly the mean number of tokens that layers hand on."""

_BLOCK = 128  # rater rows whose attention is held at once


def packed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The True positions of each row, in order: (index int64 [B, R], real bool [B, R]), filler at the end of rows."""
    counts = mask.sum(1)
    longest = max(1, int(counts.max()))
    index = (~mask).int().argsort(dim=1, stable=True)[:, :longest]
    return index, torch.arange(longest, device=mask.device) < counts[:, None]


def text_similarity(embeds: torch.Tensor, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """How strongly the visual tokens relate to each text token: mean over visual of softmax over text of V_i . X_j.

    Args:
        embeds: the decoder's input embeddings [B, N, C]; the products are not scaled.
        visual, text: bool [B, N].

    Returns:
        [B, N], rows with text sum to 1 over it, 0 elsewhere; fp32 for half-precision inputs.
    """
    x = embeds.to(accumulation_dtype(embeds.dtype))
    index, real = packed(text)  # [B, R]
    words = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # [B, R, C]
    logits = (x @ words.transpose(1, 2)).masked_fill(~real[:, None], torch.finfo(x.dtype).min)  # [B, N, R]
    shares = logits.softmax(-1).masked_fill(~visual[..., None], 0).sum(1) / visual.sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(x[..., 0]).scatter(1, index, shares.masked_fill(~real, 0))


def choose_raters(similarity: torch.Tensor, text: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The text tokens above the mean similarity; a prompt without any is rated by its last token.

    Args:
        similarity: from `text_similarity` [B, N].
        text, valid: bool [B, N]; `valid` is False on padding.

    Returns:
        bool [B, N], at least one True in each row.
    """
    # Similarities sum to 1, so their mean is 1 / (text tokens); equal ones must not pass by a rounding error.
    raters = text & (similarity * text.sum(1, keepdim=True) > 1 + 1e-6)
    place = torch.arange(text.shape[1], device=text.device)
    last = place == torch.where(valid, place, -1).amax(1, keepdim=True)
    return torch.where(raters.any(1, keepdim=True), raters, last)


def rater_relevance(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    raters: torch.Tensor,
    visual: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    heads: int | None = None,
) -> torch.Tensor:
    """Mean attention that each visual token gets from the raters.

    Args:
        q: the raters' queries, position turned in [B, H, R, D].
        k: keys, position turned in [B, Hkv, N, D].
        scale: factor on q k^T.
        raters: bool [B, R], False on filler of ragged rows; each row needs one True.
        visual: bool [B, N].
        key_mask: bool [B, R, N], True where a rater may look; the softmax runs over these.
        gain: [B, R, N]; weights are divided by it, see `rotary_gain`.
        heads: only this many heads vote, those with the largest (corrected) weights on visual tokens; None for all.

    Returns:
        [B, N], 0 outside `visual`; fp32 for half-precision inputs.
    """
    votes: torch.Tensor | int = 0
    for start in range(0, q.shape[2], _BLOCK):
        rows = slice(start, start + _BLOCK)
        weights = ops.query_row_attention(
            q[:, :, rows], k, scale=scale, key_mask=None if key_mask is None else key_mask[:, rows]
        )  # [B, H, r, N]
        if gain is not None:
            weights = weights / gain[:, None, rows]
        votes = votes + weights.masked_fill(~raters[:, None, rows, None], 0).sum(2)
    assert isinstance(votes, torch.Tensor)
    votes = votes.masked_fill(~visual[:, None], 0) / raters.sum(1)[:, None, None]  # [B, H, N]
    if heads is not None:
        chosen = votes.sum(-1).sort(dim=-1, descending=True, stable=True).indices[:, :heads]  # [B, heads]
        votes = votes.gather(1, chosen[..., None].expand(-1, -1, votes.shape[-1]))
    return votes.mean(1)


def rotary_gain(query_ones: torch.Tensor, key_ones: torch.Tensor) -> torch.Tensor:
    """The attention logit that all-ones queries and keys would get from their positions alone.

    For the usual rotary embedding it is 2 / sqrt(D) * sum_d cos((i - j) theta_d): sqrt(D) at distance 0, falling with
    distance. Dividing attention weights by it takes out what tokens lose by being far away. At D = 128 it stays above a
    tenth of its value at 0 over the first 700 distances; in narrow heads it comes near 0 and below, so it is held at
    that tenth.

    Args:
        query_ones, key_ones: vectors of ones with positions turned in [B, R, D] and [B, N, D].

    Returns:
        [B, R, N].
    """
    width = query_ones.shape[-1]
    return (query_ones @ key_ones.transpose(1, 2) / width**0.5).clamp(min=0.1 * width**0.5)


def rank_count(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    raters: torch.Tensor,
    visual: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    rank_scale: float = 13.5,
    rank_bias: float = 0.0,
) -> torch.Tensor:
    """The first version's count: visual tokens to keep grow with the rank of the raters' attention to them.

    keep = int(rank * rank_scale + rank_bias), at most n - 1 and at least 1; where the rank is n, all n stay. The other
    arguments are those of `rater_relevance`.

    Returns:
        int64 [B].
    """
    weights = ops.query_row_attention(q, k, scale=scale, key_mask=key_mask).mean(1)  # [B, R, N]
    keep = []
    for votes, raise_hand, seen in zip(weights, raters, visual, strict=True):
        among, total = votes[raise_hand][:, seen].float(), int(seen.sum())
        rank = int(torch.linalg.matrix_rank(among)) if total else 0
        keep.append(total if rank == total else max(1, min(int(rank * rank_scale + rank_bias), total - 1)))
    return torch.tensor(keep, device=visual.device)


def recycle_counts(pruned: int, recycle: float = 0.3, cluster: float = 0.1) -> tuple[int, int]:
    """(tokens to recycle, clusters to merge them into) when `pruned` tokens leave: int(share) + 1 each."""
    if not pruned or not recycle:
        return 0, 0
    tokens = min(pruned, int(pruned * recycle) + 1)
    return tokens, min(tokens, int(tokens * cluster) + 1)


@dataclass
class _Prompt:
    """What stages of one prefill hand on.

    voters: bool [B, W], which of the text tokens of each prompt, in order and packed to the left, are raters.
    total: visual tokens of each prompt at the decoder's door.
    """

    voters: torch.Tensor
    total: list[int]


@dataclass(frozen=True)
class SparseVLM(DecoderPruner):
    """Text tokens that relate to the image vote on which visual tokens stay; the best of the others are merged.

    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417. Raters are
    chosen once, from the embeddings that enter the decoder: all text behind the first image whose share of the visual
    tokens' similarity is above the mean. After a few layers the visual tokens with most of the raters' attention stay;
    of the rest, the best are clustered by density peaks, and the clusters' means follow behind the tokens that stay.
    All visual tokens of a prompt are ranked together; a stage that would keep all of them or more does nothing.

    keep: a budget by the authors' name: 192, 128, 96 or 64, for 576 visual tokens and 32 layers. It is close to the
        mean number of tokens that layers hand on (`Trace.budget()["counted"]`), not the number left at the end.
    layers: after which layers tokens leave; None is (2, 6, 15), and 19 as well in version 1. A number in (0, 1) is a
        share of the depth.
    counts: visual tokens kept at each stage, clusters not counted, instead of `keep`: numbers, or shares in (0, 1] of
        the prompt's first count; or `rank`, the first version's way: by the rank of the raters' attention.
    version: `1.5`; `1` counts by rank; `+` (or `plus`) preserves positions, merges nothing, divides attention by what
        distance alone would give, and lets only the heads vote that look at the image most.
    recycle: share of the pruned tokens that are merged, rounded down, and one more; 0 merges none. Not in version +.
    cluster: clusters for each merged token, rounded down, and one more.
    noise: amplitude of the noise that decides between equal densities, from a fixed seed (the released code: 1e-6,
        unseeded); 0 decides by rank.
    rank_scale, rank_bias: tokens kept with counts='rank': int(rank * rank_scale + rank_bias).
    heads: share of the heads that vote in version +, rounded down, at least one.
    positions: `compact` renumbers after each stage, as the released code does; `preserve` keeps position ids, and a
        cluster then stands at the place of its centre; `auto` is the version's own, and preserve where positions have
        three dimensions (Qwen-VL).
    """

    keep: int = 192
    layers: tuple[float, ...] | None = None
    counts: tuple[float, ...] | Literal["rank"] | None = None
    version: Version = "1.5"
    recycle: float = 0.3
    cluster: float = 0.1
    noise: float = 0.0
    rank_scale: float = 13.5
    rank_bias: float = 0.0
    heads: float = 0.5
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        # A number where it comes from YAML.
        version = {"plus": "+"}.get(str(self.version), str(self.version))
        if version not in ("1", "1.5", "+"):
            raise InputError(f"version: got {self.version!r}; give '1', '1.5' or '+'")
        object.__setattr__(self, "version", version)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if self.counts is not None and self.counts != "rank":
            object.__setattr__(self, "counts", as_tuple("counts", self.counts))
        self._plan()
        for name in ("recycle", "cluster"):
            value = getattr(self, name)
            if value != 0 and not is_share(value):
                raise InputError(f"{name}: got {value!r}; give a share from 0 to 1")
        if not is_share(self.heads):
            raise InputError(f"heads: got {self.heads!r}; give the share of heads that vote, in (0, 1]")
        if not isinstance(self.noise, int | float) or isinstance(self.noise, bool) or self.noise < 0:
            raise InputError(f"noise: got {self.noise!r}; give an amplitude of at least 0")
        if self.positions not in ("auto", "compact", "preserve"):
            raise InputError(f"positions: got {self.positions!r}; give 'auto', 'compact' or 'preserve'")

    def _plan(self) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        """(after which layers tokens leave, how many stay each time); None for counts by rank."""
        layers = self.layers if self.layers is not None else (2, 6, 15, 19) if self.version == "1" else (2, 6, 15)
        counts = self.counts
        if counts == "rank" or (counts is None and self.version == "1"):
            return layers, None
        if counts is None:
            known = BUDGETS[self.version]
            if self.keep not in known:
                names = ", ".join(map(str, sorted(known)))
                raise InputError(
                    f"keep: got {self.keep!r}; version {self.version} has lists for {names} (of 576 visual tokens): "
                    "give one of these, or counts with the tokens to keep at each stage"
                )
            counts = known[self.keep]
        assert isinstance(counts, tuple)
        if not all(is_count(count) or (isinstance(count, float) and is_share(count)) for count in counts):
            raise InputError(f"counts: got {counts}; give numbers of visual tokens, shares in (0, 1], or 'rank'")
        if len(counts) != len(layers):
            raise InputError(
                f"counts: {len(counts)} for {len(layers)} layers; give one for each entry of layers={layers}"
            )
        return layers, counts

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        depth = len(session.adapter.decoder_layers)
        given, counts = self._plan()
        layers = layers_of("layers", given, depth, 0, depth - 2)
        positions = positions_for(
            "SparseVLM", self.positions, "preserve" if self.version == "+" else "compact", session.adapter
        )
        prompt: list[_Prompt] = []

        def look(state: LayerState) -> None:
            prompt[:] = [_read(state, trace)]

        def stage(number: int) -> Request:
            count = None if counts is None else counts[number]

            def select(state: LayerState) -> Cut:
                return self._cut(state, prompt[0], count, in_place=positions == "preserve")

            return Request(layers[number], select, positions=positions, projections="qk")

        session.cuts.after(Request(0, look), hooks)
        for number in range(len(layers)):
            session.cuts.after(stage(number), hooks)

    def _cut(self, state: LayerState, prompt: _Prompt, count: float | None, in_place: bool) -> Cut:
        """The cut of one stage; count: see `_plan`."""
        words, real = packed(_words(state))
        raters = torch.zeros_like(state.alive).scatter(1, words, prompt.voters & real)
        rows, real = packed(raters)  # [B, R]
        visual = candidates(state)
        votes: dict[str, Any] = {
            "scale": state.scaling,
            "raters": real,
            "visual": visual,
            "key_mask": state.key_mask(rows),
        }
        q, k = state.query(rows), state.key
        if self.version == "+":
            ones = _turned_ones(state, k)  # [B, n, D]
            votes["gain"] = rotary_gain(ones.gather(1, rows[..., None].expand(-1, -1, ones.shape[-1])), ones)
            votes["heads"] = max(1, share_of(q.shape[1], self.heads))
        relevance = rater_relevance(q, k, **votes)
        if count is None:
            wanted = {name: votes[name] for name in ("scale", "raters", "visual", "key_mask")}
            keep = rank_count(q, k, **wanted, rank_scale=self.rank_scale, rank_bias=self.rank_bias)
        else:
            left = [max(1, share_of(n, count)) if isinstance(count, float) else count for n in prompt.total]
            keep = torch.tensor(left, device=rows.device)
        kept = top_visual(relevance, visual, keep)
        pruned = visual & ~kept
        recycle = 0.0 if self.version == "+" else self.recycle
        amounts = [recycle_counts(n, recycle, self.cluster) for n in pruned.sum(1).tolist()]
        if not any(clusters for _, clusters in amounts):
            return Cut(~visual | kept)
        tokens, clusters = (torch.tensor(each, device=rows.device) for each in zip(*amounts, strict=True))
        best = relevance.masked_fill(~pruned, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        best = best[:, : int(tokens.max())]  # [B, M], by rank
        merged, _, centre = cluster_merge(
            state.hidden.gather(1, best[..., None].expand(-1, -1, state.hidden.shape[-1])),
            clusters.clamp(min=1),
            torch.arange(best.shape[1], device=best.device) < tokens[:, None],
            noise=self.noise,
            generator=torch.Generator().manual_seed(0),
        )
        keep_mask, source = arrange(
            visual, kept, state.image, clusters, best.gather(1, centre.clamp(min=0)) if in_place else None
        )
        hidden = torch.cat([state.hidden, merged], 1)
        hidden = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))
        slot = torch.cat([state.slot, torch.full_like(centre, -2)], 1).gather(1, source)
        return Cut(keep_mask, hidden, slot)


def _words(state: LayerState) -> torch.Tensor:
    """Text tokens, bool [B, n], which are the same ones at every stage; the last position is one whatever it holds."""
    words = state.alive & (state.slot == -1)
    words[:, -1] = True
    return words


def _read(state: LayerState, trace: Trace) -> _Prompt:
    """Choose the raters, from what entered layer 0."""
    embeds = state.arguments["hidden_states"]
    if embeds.shape[1] != state.hidden.shape[1]:
        raise InputError(
            "SparseVLM: another method has cut the sequence after decoder layer 0, where raters are chosen; "
            "enter SparseVLM before it"
        )
    places = torch.arange(embeds.shape[1], device=embeds.device)
    first = torch.where(state.visual, places, embeds.shape[1]).amin(1, keepdim=True)
    text = state.alive & (state.slot == -1) & (places > first)
    raters = choose_raters(text_similarity(embeds, state.visual, text), text, state.alive)
    trace.notes["raters"] = [row.nonzero().flatten().tolist() for row in raters]
    words, real = packed(_words(state))
    return _Prompt(raters.gather(1, words) & real, state.visual.sum(1).tolist())


def _turned_ones(state: LayerState, like: torch.Tensor) -> torch.Tensor:
    """Vectors of ones with their positions turned in [B, n, D]; like: keys, for device and width."""
    cos, sin = state.arguments["position_embeddings"]
    ones = torch.ones_like(like[:, :1])
    turned = state.adapter.rotate(state.layer, ones, ones[:, :0], cos, sin)[0][:, 0]
    return turned.to(accumulation_dtype(turned.dtype))
