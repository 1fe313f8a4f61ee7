"""The definition of `vlattn.ops.grouped_attention` and of `head_scale`, a block of rows at a time."""

from __future__ import annotations

import torch

from vlattn.kernels.grouped_types import (
    GROUPS,
    TEXT_SINK,
    VISUAL,
    VISUAL_SINK,
    GroupedAttention,
    Redistribution,
    image_keys,
    sink_slack,
)

CPU_BLOCK, DEVICE_BLOCK = 2**19, 2**25
"""Weights that exist at one time: on a CPU what its cache holds, elsewhere more."""


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    edited_rows: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    head_weights: torch.Tensor | None = None,
    redistribution: Redistribution | None = None,
    head_scale: torch.Tensor | None = None,
    lse: bool = False,
    mass: bool = False,
    partial: bool = False,
    knockout: bool = False,
) -> GroupedAttention:
    """Attention over keys in groups; see `vlattn.ops.grouped_attention`."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    dtype = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    groups = groups.long() & 3
    gate = q.new_ones(batch, rows, dtype=torch.bool) if edited_rows is None else edited_rows
    slack = None if redistribution is None else sink_slack(groups, redistribution, dtype)
    limit = CPU_BLOCK if q.device.type == "cpu" else DEVICE_BLOCK
    step = min(rows, max(1, limit // max(batch * heads * keys, 1))) or 1
    found: list[dict[str, torch.Tensor]] = []
    for start in range(0, max(rows, 1), step):
        here = slice(start, start + step)
        stop = min(start + step, rows)
        # Under a causal mask no row of this block sees beyond its last.
        end = max(stop + keys - rows, 0) if causal else keys
        logits = _logits(q[:, :, here].to(dtype), k[:, :, :end].to(dtype), scale)  # [B, H, r, n]
        if gamma is not None:
            strength = gamma[:, None, None, :end].to(dtype) * gate[:, None, here, None]
            if head_weights is not None:
                strength = strength * head_weights[:, :, None, None].to(dtype)
            logits = logits + strength * logits.abs()
        seen = logits.new_ones(batch, stop - start, end, dtype=torch.bool)
        if causal:
            own = torch.arange(start, stop, device=q.device)[:, None] + keys - rows
            seen &= torch.arange(end, device=q.device) <= own
        if key_mask is not None:
            seen &= key_mask[:, None, :end] if key_mask.ndim == 2 else key_mask[:, here, :end]
        block = _Block(logits, seen[:, None], v[:, :, :end].to(dtype), groups[:, :end])
        made = {"lse": block.lse} if lse else {}
        if mass:
            made["mass"] = block.mass
        if partial:
            made["partial"] = torch.stack([block.over(block.of(group)) for group in GROUPS], 3)
        if knockout:
            made["without"], made["shift"] = block.knocked_out()
        factors = None
        if redistribution is not None:
            assert slack is not None
            factors, made["chosen"] = _redistributed(block.mass, slack, gate[:, here], redistribution)
        made["output"] = block.output(factors)
        found.append(made)
    joined = {name: torch.cat([made[name] for made in found], 2) for name in found[0]}
    if head_scale is not None:
        joined["output"] = joined["output"] * head_scale[:, :, None, None].to(dtype)
    return GroupedAttention(**{**joined, "output": joined["output"].to(q.dtype)})


def _logits(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * q k^T [B, H, r, n]; query heads that share a key head become rows of one product."""
    batch, heads, rows, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, width) @ k.transpose(-1, -2)
    return (grouped * scale).view(batch, heads, rows, k.shape[2])


class _Block:
    """Some rows: logits [B, H, r, n], where they may look [B, 1, r, n], values [B, Hkv, n, D], groups [B, n]."""

    def __init__(self, logits: torch.Tensor, seen: torch.Tensor, v: torch.Tensor, groups: torch.Tensor) -> None:
        self.logits, self.seen, self.v, self.groups = logits, seen, v, groups
        self.weights = self._softmax(seen)

    def _softmax(self, seen: torch.Tensor) -> torch.Tensor:
        """0, not NaN, in a row that may attend to nothing."""
        return self.logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)

    def of(self, group: int) -> torch.Tensor:
        return self.weights * (self.groups == group)[:, None, None]

    def over(self, weights: torch.Tensor) -> torch.Tensor:
        """weights @ v [B, H, r, D]."""
        batch, heads, rows, keys = weights.shape
        grouped = weights.reshape(batch, self.v.shape[1], heads // self.v.shape[1] * rows, keys)
        return (grouped @ self.v).view(batch, heads, rows, -1)

    @property
    def lse(self) -> torch.Tensor:
        return self.logits.masked_fill(~self.seen, -torch.inf).logsumexp(-1)

    @property
    def mass(self) -> torch.Tensor:
        """[B, H, r, 4]."""
        return torch.stack([self.of(group).sum(-1) for group in GROUPS], -1)

    def output(self, factors: torch.Tensor | None) -> torch.Tensor:
        """Weights of each group times its factor [B, H, r, 4] (None for 1), times v."""
        if factors is None:
            return self.over(self.weights)
        place = self.groups[:, None, None].expand_as(self.weights)
        return self.over(self.weights * factors.gather(3, place))

    def knocked_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output without image keys, and how far it is from the one with them: mass times |O_image - O_others|."""
        image = image_keys(self.groups)[:, None, None]
        without = self.over(self._softmax(self.seen & ~image))
        share = (self.weights * image).sum(-1)  # [B, H, r]
        return without, share * (self.over(self._softmax(self.seen & image)) - without).norm(dim=-1)


def _redistributed(
    mass: torch.Tensor, slack: torch.Tensor, gate: torch.Tensor, rule: Redistribution
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each group's weights are multiplied by [B, H, r, 4], and the rows where that is not 1 [B, H, r]."""
    sinks, free = mass[..., VISUAL_SINK] + mass[..., TEXT_SINK], mass[..., VISUAL]
    image = mass[..., VISUAL_SINK] + free
    chosen = mass[..., VISUAL_SINK] <= (1 - rule.rho_nonsink) * (image + slack[:, None, None])
    chosen = chosen & (image >= rule.min_visual_mass) & (free > 0) & gate[:, None]
    gain = 1 + rule.move * sinks / free.where(chosen, torch.ones_like(free))
    one = torch.ones_like(free)
    factors = torch.stack([one, gain, (1 - rule.move) * one, (1 - rule.move) * one], -1)  # in the order of GROUPS
    return torch.where(chosen[..., None], factors, torch.ones_like(factors)), chosen


def head_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [B, T, H D] with head h of prompt b times scale [B, H]; see `vlattn.ops.head_scale`."""
    batch, heads = scale.shape
    by_head = x.reshape(batch, x.shape[1], heads, x.shape[2] // heads)
    return (by_head * scale.to(x.dtype)[:, None, :, None]).reshape(x.shape)
