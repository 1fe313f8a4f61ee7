"""Sequence editing: which positions of a sequence are left, and what masks and positions that makes.

The cache then simply holds shorter layers. The user's input_ids never change, so each decode step arrives with masks
and positions of the full prompt and is rewritten from what the prefill stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.runtime.hooks import cache_of, cached_length

Positions = Literal["auto", "compact", "preserve"]


@dataclass(frozen=True)
class Segment:
    """A shorter sequence inside the one above it: rows of one length N, shorter ones padded on the left.

    index: int64 [B, N], places in the sequence above.
    alive: bool [B, N], False on left padding.
    keys: bool [B, N], where attention may look; less than `alive` where tokens are hidden instead of removed.
    full: length of the sequence above, at prefill.
    dense: whether every key is visible in every row, so that no mask is needed.
    """

    index: torch.Tensor
    alive: torch.Tensor
    keys: torch.Tensor
    full: int
    dense: bool

    @classmethod
    def of(cls, keep: torch.Tensor) -> Segment:
        """The positions in `keep` (bool [B, T]), in order, padded on the left to the longest row."""
        full, lengths = keep.shape[1], keep.sum(1)
        longest = int(lengths.max())
        # Stable sort of False < True: kept positions end up last, in order; what precedes them becomes left padding.
        index = keep.int().argsort(dim=1, stable=True)[:, full - longest :]  # [B, N]
        alive = torch.arange(longest, device=keep.device) >= (longest - lengths)[:, None]
        return cls(index, alive, alive, full, bool(alive.all()))

    @classmethod
    def whole(cls, alive: torch.Tensor) -> Segment:
        """Every position of the sequence above."""
        index = torch.arange(alive.shape[1], device=alive.device).expand(alive.shape[0], -1)
        return cls(index, alive, alive, alive.shape[1], bool(alive.all()))

    def within(self, above: Segment) -> Segment:
        """The same positions, counted in the sequence above `above`."""
        keys = above.take(above.keys, self) & self.alive
        return Segment(above.index.gather(1, self.index), self.alive, keys, above.full, bool(keys.all()))

    def hiding(self, hidden: torch.Tensor) -> Segment:
        """The same sequence with the positions in `hidden` (bool [B, N]) out of attention's sight."""
        keys = self.keys & ~hidden
        return Segment(self.index, self.alive, keys, self.full, bool(keys.all()))

    @property
    def length(self) -> int:
        return self.index.shape[1]

    def take(self, x: torch.Tensor, by: Segment | None = None) -> torch.Tensor:
        """Rows of x [B or 1, T, ...] at these places [B, N, ...]; what stands on padding is left to the caller."""
        index = (by or self).index
        shape = [*index.shape, *x.shape[2:]]
        return x.expand(index.shape[0], *x.shape[1:]).gather(
            1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand(shape)
        )

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] at these places, zero on padding."""
        taken = self.take(x)
        return taken if self.dense else taken.masked_fill(~self.alive[..., None], 0)

    def take_positions(self, x: torch.Tensor, token_dim: int) -> torch.Tensor:
        """Gather along `token_dim` of a tensor whose batch dimension stands just before it (size B or 1)."""
        batch_dim = token_dim % x.ndim - 1
        target = list(x.shape)
        target[batch_dim] = self.index.shape[0]
        view = [1] * x.ndim
        view[batch_dim], view[batch_dim + 1] = self.index.shape
        shape = [*target]
        shape[batch_dim + 1] = self.length
        return x.expand(target).gather(batch_dim + 1, self.index.view(view).expand(shape))

    def mask(
        self, mask: Any, *, generated: int, new: int, width: int | None, implementation: str, dtype: torch.dtype
    ) -> Any:
        """The attention mask of the sequence above, as this sequence needs it.

        Args:
            mask: None, 2-D [B, T], 4-D [B or 1, H or 1, Q, T] bool or additive, or a dict of such.
            generated: positions cached behind the prompt.
            new: positions of this step behind the prompt; 0 at prefill, where the prompt's own are the queries.
            width: columns that the cache wants (static caches: more than there are positions); None for no cache.
            implementation: the attention implementation, which decides the form where a mask must be made.
            dtype: of the hidden states.
        """
        if isinstance(mask, dict):
            how: dict[str, Any] = {"width": width, "implementation": implementation, "dtype": dtype}
            return {name: self.mask(one, generated=generated, new=new, **how) for name, one in mask.items()}
        behind = generated + new
        tail = torch.arange(self.full, self.full + behind, device=self.index.device)
        columns = torch.cat([self.index, tail.expand(self.index.shape[0], -1)], 1)  # [B, N + behind]
        keys = F.pad(self.keys, (0, behind), value=True)
        if mask is None:
            return None if self.dense and (new <= 1) else self.made(keys, new, width, implementation, dtype)
        if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
            raise InputError(
                f"attention_mask: dropping visual tokens cannot follow a {type(mask).__name__}; "
                "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
            )
        if mask.shape[-1] < self.full + behind:
            raise InputError(
                f"attention_mask: expected {self.full + behind} columns for the full prompt and what was generated, "
                f"got {list(mask.shape)}; pass the unpruned prompt's mask, grown by one column a step"
            )
        batch = self.index.shape[0]
        if mask.ndim == 2:
            taken = mask.expand(batch, -1).gather(1, columns)
            return (
                taken if self.dense else torch.where(keys, taken, torch.zeros((), dtype=taken.dtype).to(taken.device))
            )
        heads = mask.shape[1]
        taken = mask.expand(batch, -1, -1, -1)
        if not new:
            rows = self.index[:, None, :, None].expand(-1, heads, -1, mask.shape[-1])
            taken = taken.gather(2, rows)
        taken = taken.gather(3, columns[:, None, None].expand(-1, heads, taken.shape[2], -1))
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        if not self.dense:
            taken = taken.masked_fill(~keys[:, None, None], closed)
            if not new:  # a row that may look at nothing looks at itself, so that its softmax is a number
                taken = _open_diagonal(taken, ~self.keys)
        return _widen(taken, width, closed)

    def step_mask(
        self, generated: int, new: int, *, width: int | None, implementation: str, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The mask of a decode step from nothing but what is known here; arguments as in `mask`.

        The mask that stock code makes for a step is sized by some layer's cache, and no other layer need be as long.
        """
        static = width is not None and width > self.length + generated + new
        if self.dense and new == 1 and not static:
            return None
        keys = F.pad(self.keys, (0, generated + new), value=True)
        return self.made(keys, new, width, implementation, dtype)

    def made(self, keys: torch.Tensor, new: int, width: int | None, implementation: str, dtype: torch.dtype) -> Any:
        """A causal mask over `keys` (bool [B, K]) in the form that an implementation wants; see `mask`."""
        if "flash" in implementation:
            return keys.long()
        if "flex" in implementation:
            raise InputError(
                "attn_implementation: flex attention is not supported where rows of a batch keep different numbers of "
                "tokens; load the model with attn_implementation='sdpa'"
            )
        queries, columns = new or self.length, keys.shape[1]
        causal = torch.ones(queries, columns, dtype=torch.bool, device=keys.device).tril(columns - queries)
        made = causal & keys[:, None, None]
        if not new:
            made = _open_diagonal(made, ~self.keys)
        if "eager" in implementation:
            least = torch.finfo(dtype).min
            return _widen(torch.where(made, 0.0, least).to(dtype), width, least)
        return _widen(made, width, False)


def _open_diagonal(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Let the rows in `rows` (bool [B, N]) of a mask [B, H, N, N + ...] see themselves."""
    n = rows.shape[1]
    diagonal = torch.zeros(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    diagonal[:, :n].fill_diagonal_(True)
    return mask.masked_fill(diagonal & rows[:, None, :, None], True if mask.dtype == torch.bool else 0)


def _widen(mask: torch.Tensor, width: int | None, closed: Any) -> torch.Tensor:
    missing = 0 if width is None else width - mask.shape[-1]
    return F.pad(mask, (0, missing), value=closed) if missing > 0 else mask


def cache_width(arguments: dict[str, Any], new: int, layer: int = 0) -> int | None:
    """Columns that the cache wants a mask to have for `new` positions more in `layer`; None without a cache."""
    cache = cache_of(arguments)
    if cache is None or not hasattr(cache, "get_mask_sizes"):
        return None
    return int(cache.get_mask_sizes(new, layer)[0])


def valid_columns(mask: Any, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of the first `length` positions are no padding, bool [B, length], read off any mask of a prefill."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise InputError(
            f"attention_mask: dropping visual tokens cannot follow a {type(mask).__name__}; "
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    row = mask if mask.ndim == 2 else mask[:, 0, length - 1]
    # The last position may see every one that is no padding.
    return (row.bool() if row.dtype == torch.bool or mask.ndim == 2 else row == 0)[:, :length].expand(batch, -1)


@dataclass(frozen=True)
class ShortPrompt:
    """A prefill after a drop in front of the decoder.

    segment: what is left.
    shift: int64 [B], by how much later position ids are lowered; None where they are preserved.
    end: int64 [B], the first position id behind the full prompt; None where positions have three dimensions.
    """

    segment: Segment
    shift: torch.Tensor | None
    end: torch.Tensor | None


def shorten_prompt(
    arguments: dict[str, Any], drop: torch.Tensor, positions: Positions, implementation: str
) -> tuple[dict[str, Any], ShortPrompt]:
    """Rewrite a prefill call of the language model without the positions in `drop`.

    Args:
        arguments: keyword arguments with inputs_embeds [B, T, D], attention_mask, position_ids, ...
        drop: bool [B, T], True where a position leaves.
        positions: `compact` renumbers what follows a dropped position, `preserve` keeps the original ids.
        implementation: the decoder's attention implementation.

    Returns:
        The new arguments (left-padded to the longest row) and what decode steps need to know.
    """
    embeds, mask = arguments["inputs_embeds"], arguments.get("attention_mask")
    batch, full = drop.shape
    valid = valid_columns(mask, batch, full, drop.device)
    segment = Segment.of(valid & ~drop)
    new = dict(arguments)
    new["inputs_embeds"] = segment.rows(embeds)
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        # Without a mask, transformers would take the gaps that `preserve` leaves for the seams of packed sequences.
        if mask is not None or positions == "preserve" or not segment.dense:
            new["attention_mask"] = segment.alive.to(torch.long if mask is None else mask.dtype)
    else:
        width = cache_width(arguments, segment.length)
        new["attention_mask"] = segment.mask(
            mask, generated=0, new=0, width=width, implementation=implementation, dtype=embeds.dtype
        )
    ids = arguments.get("position_ids")
    end = None
    if ids is None or ids.ndim == 2:
        end = valid.sum(1) if ids is None else ids[:, -1].expand(batch) + 1
        if ids is None and positions == "preserve":
            ids = torch.arange(full, device=drop.device)[None]
        if ids is not None:
            ids = ids.expand(batch, full)
            if positions == "compact":
                ids = ids - (drop & valid).cumsum(1)
            new["position_ids"] = segment.take(ids).clamp(min=0)
    else:
        if positions == "compact":
            raise InputError("positions: 'compact' has no meaning for three-dimensional positions; give 'preserve'")
        new["position_ids"] = segment.take_positions(ids, -1)
    _follow_deepstack(new, drop, segment)
    return new, ShortPrompt(segment, (drop & valid).sum(1) if positions == "compact" else None, end)


def _follow_deepstack(arguments: dict[str, Any], drop: torch.Tensor, segment: Segment) -> None:
    """Features that join in later layers (Qwen3-VL) leave with the positions they belong to."""
    where, features = arguments.get("visual_pos_masks"), arguments.get("deepstack_visual_embeds")
    if where is None or features is None:
        return
    stays = ~drop[where]
    arguments["visual_pos_masks"] = segment.take(where) & segment.alive
    arguments["deepstack_visual_embeds"] = [feature[stays] for feature in features]


def shorten_step(
    arguments: dict[str, Any], prompt: ShortPrompt, implementation: str, *, mask_is_short: bool = False
) -> dict[str, Any]:
    """Rewrite a decode call: mask and positions of the full prompt become those of the short one."""
    batch, new_tokens = arguments["inputs_embeds"].shape[:2]
    segment = prompt.segment
    generated = cached_length(arguments) - segment.length
    if batch != segment.index.shape[0] or generated < 0:
        raise InputError(
            f"cache: this step (batch {batch}, {generated + segment.length} cached positions) does not continue the "
            f"last prompt (batch {segment.index.shape[0]}, {segment.length} kept positions); "
            "start each generation with an empty cache"
        )
    new = dict(arguments)
    if not mask_is_short:
        new["attention_mask"] = short_step_mask(arguments, segment, generated, new_tokens, implementation)
    ids = arguments.get("position_ids")
    if (
        prompt.end is not None
        and ids is not None
        and ids.ndim == 2
        and new_tokens > 1
        and bool((ids[:, 0] < prompt.end + generated).any())
    ):
        raise InputError(
            "cache: this step repeats positions that are cached already, as generate does when it is given the cache "
            "of a pruned prompt together with the whole sequence; start each generation with an empty cache"
        )
    if ids is not None and prompt.shift is not None:
        new["position_ids"] = ids - prompt.shift[:, None]
    elif ids is None and prompt.shift is None:
        first = segment.full + generated
        ids = torch.arange(first, first + new_tokens, device=segment.index.device)
        new["position_ids"] = ids.expand(batch, -1)
    return new


def short_step_mask(arguments: dict[str, Any], segment: Segment, generated: int, new: int, implementation: str) -> Any:
    """The mask of a decode step in front of the decoder: 2-D where it was, so that stock code makes its own of it."""
    mask = arguments.get("attention_mask")
    if mask is None:
        if segment.dense:
            return None
        return F.pad(segment.keys, (0, generated + new), value=True).long()
    length = segment.full + generated + new
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] != length:
        raise InputError(
            f"attention_mask: expected [{mask.shape[0]}, {length}] for the full prompt and what was generated, "
            f"got {list(mask.shape)}; pass the unpruned prompt's mask, grown by one column a step"
        )
    embeds, width = arguments.get("inputs_embeds"), cache_width(arguments, new)
    how: dict[str, Any] = {
        "width": width,
        "implementation": implementation,
        "dtype": torch.float32 if embeds is None else embeds.dtype,
    }
    if width is not None and width > segment.length + generated + new:
        # Generation with a static cache made this mask by the short cache and the full prompt's padding: neither fits.
        made = segment.step_mask(generated, new, **how)
        return dict.fromkeys(mask, made) if isinstance(mask, dict) else made
    return segment.mask(mask, generated=generated, new=new, **how)
