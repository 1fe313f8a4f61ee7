"""Which visual tokens are informed: local ones by an early layer of the vision tower, summary ones by a late layer.

"Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv 2501.12206.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlattn.errors import InputError
from vlattn.interventions.decoder_pruner import share_of
from vlattn.runtime.tokens import VisualTokens


class Informed(NamedTuple):
    """local, summary: bool, of one shape, never both True."""

    local: torch.Tensor
    summary: torch.Tensor


def choose_informed(
    early: torch.Tensor,
    late: torch.Tensor,
    received: torch.Tensor | None = None,
    local_ratio: float = 0.25,
    spatial_ratio: float = 0.0,
    iqr: float = 1.5,
) -> Informed:
    """The informed tokens of N encoder images, each by itself; a score of NaN stands for a token that is not there.

    Args:
        early: attention of each token in an early layer [N, n]; the best floor(n * local_ratio) are local, ties going
            to the lower id.
        late: the same in a late layer [N, n]; outliers above Q3 + iqr * (Q3 - Q1) are summary tokens, however many.
        received: attention that each token receives from all [N, n]; the best floor(n * spatial_ratio) join the local
            ones. None: `early` serves.
        local_ratio, spatial_ratio: in [0, 1].
        iqr: factor on the interquartile range.

    Returns:
        bool [N, n] each. A token that is both is a summary token.
    """
    n = early.shape[-1]
    local = _best(early, share_of(n, local_ratio))
    if spatial_ratio:
        local |= _best(early if received is None else received, share_of(n, spatial_ratio))
    summary = outliers(late, iqr)
    return Informed(local & ~summary, summary)


def outliers(score: torch.Tensor, iqr: float = 1.5) -> torch.Tensor:
    """Entries of each row [..., n] above Q3 + iqr * (Q3 - Q1), quartiles interpolated linearly; bool [..., n]."""
    low, high = score.nanquantile(score.new_tensor([0.25, 0.75]), dim=-1, keepdim=True).unbind()
    return score > high + iqr * (high - low)


def _best(score: torch.Tensor, count: int) -> torch.Tensor:
    there = ~score.isnan()
    # A stable sort, so that ties fall alike on every device.
    order = score.masked_fill(~there, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(there).scatter(-1, order[..., :count], True) & there


@dataclass(frozen=True)
class TileScores:
    """Scores of the visual tokens of some encoder images (tiles), one after the other; see `choose_informed`.

    early, late: [total]. received: [total], or None. sizes: tokens of each tile.
    """

    early: torch.Tensor
    late: torch.Tensor
    received: torch.Tensor | None
    sizes: list[int]

    def choose(self, local_ratio: float, spatial_ratio: float, iqr: float) -> Informed:
        """The informed tokens of every tile, bool [total] each."""
        local, summary = (torch.zeros_like(self.early, dtype=torch.bool) for _ in range(2))
        for index in _places_by_size(self.sizes, self.early.device):  # [tiles of one size, n]
            received = None if self.received is None else self.received[index]
            found = choose_informed(self.early[index], self.late[index], received, local_ratio, spatial_ratio, iqr)
            local[index], summary[index] = found
        return Informed(local, summary)


def _places_by_size(sizes: list[int], device: torch.device) -> list[torch.Tensor]:
    """Where the tokens of tiles of each size stand, int64 [tiles, n] for each size n."""
    sized = torch.tensor(sizes, device=device)
    starts = sized.cumsum(0) - sized
    return [starts[sized == n, None] + torch.arange(n, device=device) for n in sorted(set(sizes))]


def at_tokens(chosen: torch.Tensor, sizes: list[int], visual: VisualTokens) -> torch.Tensor:
    """What was chosen by tile, at the positions of the prompts.

    Args:
        chosen: bool [total], tiles one after the other.
        sizes: tokens of each tile.
        visual: the visual tokens of the prompts; several beams of a prompt share its tiles.

    Returns:
        bool [B, T]; False for text, CLS, newlines, and tokens that mix patches of several tiles.
    """
    named = visual.mask & (visual.tile >= 0) & (visual.patch >= 0)
    sized = torch.tensor(sizes, device=named.device)
    starts = sized.cumsum(0) - sized
    source = torch.where(named, _computed_tiles(visual, named, len(sizes)), 0)
    patch = torch.where(named, visual.patch, 0)
    if bool((patch >= sized[source]).any()):
        raise _other_images(visual, len(sizes))
    return named & chosen.to(named.device)[starts[source] + patch]


def _computed_tiles(visual: VisualTokens, named: torch.Tensor, computed: int) -> torch.Tensor:
    """For each named position, which of the `computed` tiles it belongs to, int64 [B, T].

    Features may be computed before generation repeats every prompt for its beams: then there are fewer of them.
    """
    mixed = bool((visual.mask & (visual.tile < 0) & (visual.row >= 0)).any())  # of tiles that nothing names
    batch, total = named.shape[0], int(visual.tile.max()) + 1
    times = max(1, -(-total // computed))
    if batch % times or (total != computed * times and not mixed):
        raise _other_images(visual, computed)
    first = visual.tile.masked_fill(~named, torch.iinfo(visual.tile.dtype).max).amin(1)  # [B]
    rows = torch.arange(batch, device=named.device)
    group = first[rows - rows % times].div(times, rounding_mode="floor")
    return visual.tile - first[:, None] + group[:, None]


def _other_images(visual: VisualTokens, computed: int) -> InputError:
    return InputError(
        f"pixel_values: the prompts have {int(visual.tile.max()) + 1} image tiles, which do not match the {computed} "
        "that went through the vision tower in this context; give each prompt its own images, as pixels"
    )
