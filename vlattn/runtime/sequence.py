"""Sequence editing at place 0: drop prompt positions before the decoder, and keep every later step consistent.

The cache then simply holds shorter layers. The user's input_ids never change, so each decode step arrives with masks
and positions of the full prompt and is rewritten from what the prefill stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlattn.errors import InputError
from vlattn.runtime.hooks import cached_length

Positions = Literal["compact", "preserve"]


@dataclass(frozen=True)
class ShortPrompt:
    """A prefill after the drop.

    mask: bool [B, N], False on left padding.
    dropped: int64 [B], positions that left.
    full: length before.
    end: int64 [B], the first position id after the full prompt.
    """

    mask: torch.Tensor
    dropped: torch.Tensor
    full: int
    end: torch.Tensor


def shorten_prompt(
    arguments: dict[str, Any], drop: torch.Tensor, positions: Positions
) -> tuple[dict[str, Any], ShortPrompt]:
    """Rewrite a prefill call of the language model without the positions in `drop`.

    Args:
        arguments: keyword arguments with inputs_embeds [B, T, D], attention_mask [B, T] or None, position_ids or None.
        drop: bool [B, T], True where a position leaves.
        positions: `compact` renumbers what follows a dropped position, `preserve` keeps the original ids.

    Returns:
        The new arguments (left-padded to the longest row) and what decode steps need to know.
    """
    embeds, mask = arguments["inputs_embeds"], arguments.get("attention_mask")
    batch, full = drop.shape
    _refuse_prepared_mask(mask)
    valid = torch.ones_like(drop) if mask is None else mask.bool()
    keep = valid & ~drop
    lengths = keep.sum(1)
    longest = int(lengths.max())
    # Stable sort of False < True: kept positions end up last, in order; what precedes them becomes left padding.
    index = keep.int().argsort(dim=1, stable=True)[:, full - longest :]  # [B, N]
    alive = torch.arange(longest, device=drop.device) >= (longest - lengths)[:, None]

    new = dict(arguments)
    gathered = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
    new["inputs_embeds"] = gathered.masked_fill(~alive[..., None], 0)
    # Without a mask, transformers would take the gaps that `preserve` leaves for the seams of packed sequences.
    if mask is not None or positions == "preserve" or not alive.all():
        new["attention_mask"] = alive.to(torch.long if mask is None else mask.dtype)
    ids = arguments.get("position_ids")
    end = valid.sum(1) if ids is None else ids[:, -1].expand(batch) + 1
    if ids is None and positions == "preserve":
        ids = torch.arange(full, device=drop.device)[None]
    if ids is not None:
        ids = ids.expand(batch, full)
        if positions == "compact":
            ids = ids - (drop & valid).cumsum(1)
        new["position_ids"] = ids.gather(1, index).clamp(min=0)
    return new, ShortPrompt(alive, (drop & valid).sum(1), full, end)


def _refuse_prepared_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise InputError(
            "attention_mask: dropping visual tokens needs a 2-D mask [B, T]; got a prepared mask, "
            "as static caches and hand-made 4-D masks give. Use the default dynamic cache and a 2-D mask"
        )


def shorten_step(arguments: dict[str, Any], prompt: ShortPrompt, positions: Positions) -> dict[str, Any]:
    """Rewrite a decode call: mask and positions of the full prompt become those of the short one."""
    batch, new_tokens = arguments["inputs_embeds"].shape[:2]
    kept = prompt.mask.shape[1]
    generated = cached_length(arguments) - kept
    if batch != prompt.mask.shape[0] or generated < 0:
        raise InputError(
            f"cache: this step (batch {batch}, {generated + kept} cached positions) does not continue the last prompt "
            f"(batch {prompt.mask.shape[0]}, {kept} kept positions); start each generation with an empty cache"
        )
    new, mask = dict(arguments), arguments.get("attention_mask")
    _refuse_prepared_mask(mask)
    length = prompt.full + generated + new_tokens
    if mask is not None:
        if mask.shape[1] != length:
            raise InputError(
                f"attention_mask: expected [{batch}, {length}] for the full prompt and what was generated, "
                f"got {list(mask.shape)}; pass the unpruned prompt's mask, grown by one column a step"
            )
        new["attention_mask"] = torch.cat([prompt.mask.to(mask.dtype), mask[:, prompt.full :]], 1)
    elif not prompt.mask.all():
        seen = prompt.mask.new_ones(batch, generated + new_tokens)
        new["attention_mask"] = torch.cat([prompt.mask, seen], 1).long()
    ids = arguments.get("position_ids")
    if ids is not None and new_tokens > 1 and bool((ids[:, 0] < prompt.end + generated).any()):
        raise InputError(
            "cache: this step repeats positions that are cached already, as generate does when it is given the cache "
            "of a pruned prompt together with the whole sequence; start each generation with an empty cache"
        )
    if ids is not None and positions == "compact":
        new["position_ids"] = ids - prompt.dropped[:, None]
    elif ids is None and positions == "preserve":
        first = prompt.full + generated
        ids = torch.arange(first, first + new_tokens, device=prompt.mask.device)
        new["position_ids"] = ids.expand(batch, -1)
    return new
