"""A VHD from one forward: what each head's output would be had its last step not seen the image.

Not the published metric: queries, text keys and text values still carry what earlier layers took from the image. It
rests on the split of a softmax over image keys V and all other keys R: with a the weight that V gets, and O_V and O_R
the outputs of the softmax over either set alone, O - O_R = a (O_V - O_R).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlattn import ops
from vlattn.interventions.vhd import joined, require_image, without_outliers
from vlattn.kernels.dispatch import Backend
from vlattn.runtime.routing import AttentionCall, Plain, weighted_values


def knockout_outputs(
    logits: torch.Tensor, allowed: torch.Tensor, visual: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How knocking out the image keys moves each head's output, and the output without them.

    Args:
        logits: [B, H, R, K], scaled q k^T of R query rows in fp32 or fp64.
        allowed: bool [B or 1, 1, R, K], where a row may look.
        visual: bool [B, K], image keys.
        value: [B, H_kv, K, d].

    Returns:
        (a ||O_V - O_R|| [B, H, R], O_R [B, H, R, d]). A row that sees no image has 0; one that sees nothing else has
        O_R = 0.
    """
    image = allowed & visual[:, None, None]
    mass, outputs = [], []
    for keys in (image, allowed & ~image):
        own = logits.masked_fill(~keys, -torch.inf)
        mass.append(own.logsumexp(-1))
        # Outputs are compared: in the weights' precision, not in what they are used in.
        outputs.append(weighted_values(own.softmax(-1).nan_to_num(0), value.to(own.dtype)))
    share = (mass[0] - mass[1]).sigmoid().nan_to_num(0)  # [B, H, R]; both masses are -inf on padding
    return share * (outputs[0] - outputs[1]).norm(dim=-1), outputs[1]


class KnockOut(Plain):
    """An attention edit that measures and changes nothing.

    found: {layer: one [B, H, R] for each forward}, at the last position of a prompt and at every one behind it.
    """

    def __init__(self, *, remove_outliers: bool = False) -> None:
        self.remove_outliers = remove_outliers
        self.found: dict[int, list[torch.Tensor]] = {}

    def rows(self, call: AttentionCall) -> int:
        return 1 if call.prefill else call.query.shape[2]

    def logits(self, call: AttentionCall, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        self._note(call, *knockout_outputs(logits, allowed, call.visual, call.value))
        return logits

    def fused(
        self, call: AttentionCall, allowed: torch.Tensor, scaling: float | None, backend: Backend | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, groups = call.last_rows(allowed, scaling), call.visual.to(torch.uint8)
        made = ops.grouped_attention(**rows, groups=groups, knockout=True, backend=backend)
        assert made.shift is not None
        assert made.without is not None
        self._note(call, made.shift, made.without)
        return made.output, torch.zeros_like(made.shift, dtype=torch.bool)

    def _note(self, call: AttentionCall, scores: torch.Tensor, rest: torch.Tensor) -> None:
        """Keep scores [B, H, R]; rest: outputs without image keys [B, H, R, d]."""
        if self.remove_outliers:
            scores = without_outliers(scores.transpose(1, 2), rest.transpose(1, 2)).transpose(1, 2)
        self.found.setdefault(call.layer, []).append(scores)


@torch.no_grad()
def vhd_knockout(model: nn.Module, inputs: Mapping[str, Any], *, remove_outliers: bool = False) -> torch.Tensor:
    """The knock-out VHD of every head at the last position of each prompt, from one forward and no second cache.

    Ours, after "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949: image
    keys are left out of the softmax of the last row alone, in each layer by itself. Positions and earlier layers keep
    what they have of the image, so this is another metric than `vhd`. It follows pruning: image keys are those that a
    layer still has.

    Args:
        model: a model with an adapter, on sdpa, eager or flash attention.
        inputs: keyword arguments of its forward, left-padded, with images; no labels.
        remove_outliers: set heads to 0 that stand out both here and in the squared norm of their output without the
            image, as VHR does with VHD.

    Returns:
        [B, L, H]; fp32 for half-precision models.
    """
    with joined(model) as (session, hooks):
        require_image(session, inputs)
        layers = list(range(len(session.adapter.decoder_layers)))
        edit = KnockOut(remove_outliers=remove_outliers)
        session.attention.add(layers, edit, hooks)
        session.adapter.multimodal(**inputs, use_cache=False)
    home = edit.found[0][0].device
    return torch.stack([edit.found[layer][0][..., -1].to(home) for layer in layers], 1)
