"""Attention sinks by the attention that tokens receive: column means of chosen heads, and which columns stand out.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", arXiv 2406.15765. Rows that count and columns that too few rows see are choices of ours, for prompts with
hundreds of image rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlattn.kernels.reference import ROW_BLOCK, accumulation_dtype
from vlattn.runtime.routing import scaled_logits

Spare = Literal["first_token", "first_detected"]


@dataclass(frozen=True)
class Sight:
    """Which keys each query row of a layer may look at, without a [Q, K] matrix where attention has none.

    mask: attention's own: 4-D, bool or additive; in any other form attention is causal.
    alive: bool [B, K], keys that are there at all. The last query stands at the last of them.
    queries: how many query rows there are.
    window: how many keys a row sees at most, itself included, where the 4-D mask does not say so; None for all.
    """

    mask: Any
    alive: torch.Tensor
    queries: int
    window: int | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Bool [B, stop - start, K] of query rows `start` to `stop`."""
        keys = self.alive.shape[1]
        if isinstance(self.mask, torch.Tensor) and self.mask.ndim == 4:
            block = self.mask[:, 0, start:stop, :keys]
            seen = block if block.dtype == torch.bool else block > torch.finfo(block.dtype).min / 2
            return seen & self.alive[:, None]
        places = torch.arange(keys, device=self.alive.device)
        end = torch.where(self.alive.any(0), places, -1).max() + 1  # behind it a static cache is empty
        own = (end - self.queries + torch.arange(start, stop, device=places.device))[:, None]  # [r, 1]
        seen = places <= own if self.window is None else (places <= own) & (places > own - self.window)
        return seen & self.alive[:, None]


@dataclass(frozen=True)
class HeadScores:
    """Queries and keys of the chosen heads of one layer, and how their product becomes attention.

    query: [B, H, Q, d]; key: [B, H, K, d], one for each query head, positions turned in.
    scale: factor on q k^T.
    sight: which keys a row sees.
    softcap: bound of the logits, cap * tanh(x / cap); None for none.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    sight: Sight
    softcap: float | None = None

    def logits(self, start: int, stop: int, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, H, r, K or C] of query rows `start` to `stop`, -inf where a row does not look; fp32 (fp64 stays).

        columns: int64 [C], keys to take; None for all.
        """
        key, seen = self.key, self.sight.rows(start, stop)
        if columns is not None:
            key, seen = key[:, :, columns], seen[..., columns]
        logits = scaled_logits(self.query[:, :, start:stop], key, self.scale)
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits.masked_fill(~seen[:, None], -torch.inf)

    def blocks(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """(start, stop) of blocks of query rows, from row `first` on."""
        queries = self.query.shape[2]
        for start in range(first, queries, ROW_BLOCK):
            yield start, min(start + ROW_BLOCK, queries)


@dataclass(frozen=True)
class Received:
    """What the keys of a layer receive from the rows that count.

    sums: [B, H, K], attention added up over these rows.
    counts: int64 [B, K], how many of these rows see the key.
    rows: int64 [B], how many there are.
    lse: [B, H, Q - first], log-sum-exp of all rows from the first that was asked for.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor
    lse: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the rows that see the key [B, H, K]; 0 where none does."""
        return self.sums / self.counts.clamp(min=1)[:, None]


def received(scores: HeadScores, counted: torch.Tensor, first: int = 0) -> Received:
    """Column sums of attention over the rows in `counted`, in blocks of rows: no [Q, K] matrix is made.

    Args:
        scores: of the chosen heads.
        counted: bool [B, Q], rows that count; none before `first`.
        first: the row to start at.

    Returns:
        Sums accumulated in fp32 for half precisions: fp16 would lose a thousandth over 600 rows.
    """
    batch, heads, _, _ = scores.query.shape
    keys, dtype = scores.key.shape[2], accumulation_dtype(scores.query.dtype)
    sums = scores.query.new_zeros(batch, heads, keys, dtype=dtype)
    counts = torch.zeros(batch, keys, dtype=torch.int64, device=sums.device)
    lse = [sums[..., :0]]
    for start, stop in scores.blocks(first):
        logits = scores.logits(start, stop)  # [B, H, r, K]
        here = counted[:, start:stop]
        # Rows of padding may see nothing: NaN, which is filled and not multiplied.
        sums += logits.softmax(-1).masked_fill(~here[:, None, :, None], 0).sum(2)
        counts += (scores.sight.rows(start, stop) & here[..., None]).sum(1)
        lse.append(logits.logsumexp(-1))
    return Received(sums, counts, counted.sum(1), torch.cat(lse, -1))


def find_sinks(
    mean: torch.Tensor,
    counts: torch.Tensor,
    alive: torch.Tensor,
    threshold: float | torch.Tensor,
    min_rows: int = 1,
    spare: Spare = "first_token",
) -> torch.Tensor:
    """Later sinks: columns whose mean attention is above a threshold, but for the one that every head needs.

    Args:
        mean: [B, H, K], mean attention that a key receives from the rows that see it.
        counts: int64 [B, K], how many those are.
        alive: bool [B, K], keys that are no padding.
        threshold: one number, or [B].
        min_rows: columns that fewer rows see are no sinks: the last ones mostly see themselves. 1 in the released code.
        spare: `first_token` leaves out the first token; `first_detected` the first column above the threshold, as the
            released code does, which is another one where the first token is below.

    Returns:
        bool [B, H, K].
    """
    if isinstance(threshold, torch.Tensor):
        threshold = threshold[:, None, None]
    found = (mean > threshold) & (alive & (counts >= min_rows))[:, None]
    if spare == "first_token":
        return found & ~first_token(alive)[:, None]
    return found & (found.cumsum(-1) > 1)


def first_token(alive: torch.Tensor) -> torch.Tensor:
    """The first position of each row that is no padding, bool [B, K]."""
    return alive & (alive.cumsum(1) == 1)


# Which rows count, and what was found ---------------------------------------------------------------------------------
def count_behind_image(visual: torch.Tensor) -> torch.Tensor:
    """How many text tokens follow the first visual token of each prompt, int64 [B]; 0 in a prompt without any.

    With several images that is also what stands between them.

    Args:
        visual: bool [B, T] of the full prompt, padded on the left; newline tokens of tiled images count as visual.
    """
    return ((visual.cumsum(1) > 0) & ~visual).sum(1)


def last_text(text: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The last `count[b]` text positions of each prompt, bool [B, n]: those behind the image, whatever has left of it.

    Args:
        text: bool [B, n], text at hand, no padding.
        count: int64 [B], as `count_behind_image` tells.
    """
    return text & (text.flip(1).cumsum(1).flip(1) <= count[:, None])


@dataclass(frozen=True)
class LayerSinks:
    """The later sinks of a prompt in the chosen heads of one layer, for the trace.

    heads: the chosen query heads.
    found: bool [B, H, n], later sinks among the positions of the prompt that the layer ran on.
    share: [B, H, n], mean attention that each position gets from a row that counts, whether or not it sees it.
    first: bool [B, n], the first token.
    visual: bool [B, n]; image: int64 [B, n], -1 for text; slot: int64 [B, n], running index of a visual token within
        its prompt, -1 for text.
    """

    heads: tuple[int, ...]
    found: torch.Tensor
    share: torch.Tensor
    first: torch.Tensor
    visual: torch.Tensor
    image: torch.Tensor
    slot: torch.Tensor

    def counts(self) -> dict[str, torch.Tensor]:
        """How many sinks are text and how many visual, {"text": int64 [B, H], "visual": int64 [B, H]}."""
        visual = (self.found & self.visual[:, None]).sum(-1)
        return {"text": self.found.sum(-1) - visual, "visual": visual}

    def mass(self) -> dict[str, torch.Tensor]:
        """Share of attention that goes to the first token, to text sinks and to visual sinks, [B, H] each."""
        masks = {
            "first": self.first[:, None],
            "text": self.found & ~self.visual[:, None],
            "visual": self.found & self.visual[:, None],
        }
        return {name: self.share.masked_fill(~mask, 0).sum(-1) for name, mask in masks.items()}

    def by_image(self) -> dict[int, torch.Tensor]:
        """How many sinks each image of the batch holds, {image: int64 [H]}."""
        images = sorted(set(self.image[self.visual].tolist()))
        return {image: (self.found & (self.image == image)[:, None]).sum((0, -1)) for image in images}
