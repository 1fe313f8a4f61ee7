"""VAR's arithmetic: which attention rows look at the image, and how they give the mass of sinks to the rest of it.

"See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321. Twice: on weights that are
there (`image_centric`, `redistribute`), and on attention that was computed apart over sets of keys, each with its
log-sum-exp, as fused kernels return it (`merge`). The two agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlattn.kernels.grouped_types import Redistribution as Rule


@dataclass(frozen=True)
class KeySets:
    """What the keys are to a row. sink: bool [B, K], text and visual sinks. image: bool [B, K], visual tokens."""

    sink: torch.Tensor
    image: torch.Tensor

    @property
    def visual_sink(self) -> torch.Tensor:
        return self.sink & self.image

    @property
    def text_sink(self) -> torch.Tensor:
        return self.sink & ~self.image

    @property
    def free(self) -> torch.Tensor:
        """Visual tokens that are no sinks."""
        return self.image & ~self.sink

    @property
    def groups(self) -> torch.Tensor:
        """uint8 [B, K], as `vlattn.ops.grouped_attention` names them."""
        sink = self.sink.to(torch.uint8)
        return torch.where(self.image, 1 + sink, 3 * sink)


@dataclass(frozen=True)
class Masses:
    """Attention that each row puts on the sets [B, H, R]."""

    visual_sink: torch.Tensor
    text_sink: torch.Tensor
    free: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor, sets: KeySets) -> Masses:
        """weights: [B, H, R, K] behind the softmax, fp32 or wider: half precision flips rows near a threshold."""
        keys = torch.stack([sets.visual_sink, sets.text_sink, sets.free], -1)  # [B, K, 3]
        found = weights @ keys[:, None].to(weights.dtype)  # [B, H, R, 3]
        return cls(*found.unbind(-1))


def image_centric(masses: Masses, sets: KeySets, rule: Rule) -> torch.Tensor:
    """Which rows of which heads look at the image, and at more of it than its sinks: bool [B, H, R].

    A row is one where at least `min_visual_mass` is on the image and at least the share `rho_nonsink` of that on tokens
    that are no sinks. Never one without mass on such tokens: there would be nowhere to move to.
    """
    image = masses.visual_sink + masses.free  # [B, H, R]
    # A quotient would be 0/0 where a row does not see the image.
    counted = image + rule.eps * sets.image.sum(1)[:, None, None]
    chosen = masses.visual_sink <= (1 - rule.rho_nonsink) * counted
    chosen &= (image >= rule.min_visual_mass) & (masses.free > 0)
    if rule.require_visual_sink:
        chosen &= sets.visual_sink.any(1)[:, None, None]
    return chosen


def redistribute(
    weights: torch.Tensor, sets: KeySets, masses: Masses, chosen: torch.Tensor, move: float
) -> torch.Tensor:
    """Take the share `move` of what each chosen row puts on sinks, and give it to the free visual tokens.

    They get it in proportion to what they have, so every row still sums to what it summed to, and masked keys stay 0.

    Args:
        weights: [B, H, R, K] behind the softmax.
        sets: of the keys.
        masses: of the weights on the sets.
        chosen: bool [B, H, R]; rows that are not keep their weights bit for bit.
        move: from 0 to 1.

    Returns:
        [B, H, R, K].
    """
    budget = move * (masses.visual_sink + masses.text_sink)
    gain = (1 + budget / masses.free.where(chosen, torch.ones_like(budget)))[..., None]  # [B, H, R, 1]
    sink, free = sets.sink[:, None, None], sets.free[:, None, None]  # [B, 1, 1, K]
    factor = torch.where(free, gain, 1 - move * sink.to(gain.dtype))  # [B, H, R, K]
    return torch.where(chosen[..., None], weights * factor, weights)


# Without weights ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """Attention over one set of keys. output: [B, H, R, d]. lse: [B, H, R], -inf where a row sees none of them."""

    output: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, value: torch.Tensor, keys: torch.Tensor) -> Part:
        """logits: [B, H, R, K] scaled, -inf where masked; value: [B, H_kv, K, d]; keys: bool [B, K], the set."""
        logits = logits.masked_fill(~keys[:, None, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0)  # an empty set puts out 0
        grouped = weights.reshape(weights.shape[0], value.shape[1], -1, weights.shape[3])  # [B, H_kv, G * R, K]
        output = (grouped @ value.to(weights.dtype)).view(*weights.shape[:3], -1)
        return cls(output, logits.logsumexp(-1))


@dataclass(frozen=True)
class Parts:
    """Attention over disjoint sets of keys, which together are all of them; `rest` is text that is no sink."""

    visual_sink: Part
    text_sink: Part
    free: Part
    rest: Part

    @classmethod
    def of(cls, logits: torch.Tensor, value: torch.Tensor, sets: KeySets) -> Parts:
        """Arguments as in `Part.of`."""
        rest = ~(sets.sink | sets.image)
        return cls(*(Part.of(logits, value, keys) for keys in (sets.visual_sink, sets.text_sink, sets.free, rest)))


def merge(parts: Parts, sets: KeySets, rule: Rule, eligible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """VAR as a transfer of mass between softmaxes.

    Args:
        parts: attention over the sets.
        sets: of the keys.
        rule: the numbers of the method.
        eligible: bool broadcastable to [B, H, R], rows that may change at all.

    Returns:
        (output [B, H, R, d], chosen bool [B, H, R]).
    """
    every = (parts.visual_sink, parts.text_sink, parts.free, parts.rest)
    total = torch.stack([part.lse for part in every]).logsumexp(0)  # [B, H, R]
    total = total.masked_fill(total.isinf(), 0)  # a row that sees nothing puts out 0
    visual_sink, text_sink, free, rest = [(part.lse - total).exp() for part in every]
    chosen = image_centric(Masses(visual_sink, text_sink, free), sets, rule) & eligible
    moved = rule.move * chosen.to(total.dtype)  # [B, H, R]
    given = moved * (visual_sink + text_sink)
    new = ((1 - moved) * visual_sink, (1 - moved) * text_sink, free + given, rest)
    return torch.stack([share[..., None] * part.output for share, part in zip(new, every, strict=True)]).sum(0), chosen
