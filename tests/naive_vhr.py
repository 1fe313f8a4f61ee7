"""VHR from its definition: whole forwards over and over, one prompt at a time, heads compared in plain loops.

Loaded by the fixture `naive_vhr`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Heads = dict[int, list[bool]]
"""{layer: which heads are reinforced}."""


def text_only(inputs: dict[str, Any], gone: Sequence[int]) -> dict[str, torch.Tensor]:
    """One unpadded prompt without the tokens in `gone`."""
    ids = torch.tensor([[token for token in inputs["input_ids"][0].tolist() if token not in gone]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _projection(model: Any, layer: int) -> Any:
    decoder = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
    return decoder.layers[layer].self_attn.o_proj


@contextmanager
def scaling(model: Any, heads: Heads, alpha: float, width: int = 8) -> Iterator[None]:
    """Multiply the outputs of `heads` (of `width` each), at every position."""
    handles = []
    for layer, chosen in heads.items():

        def hook(module: Any, args: Any, chosen: list[bool] = chosen) -> Any:
            x = args[0].clone()
            for head, wanted in enumerate(chosen):
                if wanted:
                    x[..., head * width : (head + 1) * width] *= alpha
            return (x,)

        handles.append(_projection(model, layer).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(model: Any, call: dict[str, Any], layer: int, width: int = 8) -> list[list[list[float]]]:
    """What each head of a layer puts out at each position of one prompt, before it is scaled: [N][H][d]."""
    seen = []
    handle = _projection(model, layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]), prepend=True)
    try:
        with torch.no_grad():
            model(**call, use_cache=False)
    finally:
        handle.remove()
    return seen[0][0].unflatten(-1, (-1, width)).tolist()


def divergence(seeing: list[list[float]], blind: list[list[float]]) -> list[float]:
    """The VHD of each head, from its output with and without the image."""
    return [math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True))) for x, y in zip(seeing, blind, strict=True)]


def drop_outliers(vhd: list[float], blind: list[list[float]]) -> list[float]:
    strength = [sum(value * value for value in head) for head in blind]

    def high(values: list[float]) -> float:
        return statistics.mean(values) + statistics.stdev(values)

    return [0.0 if v > high(vhd) and s > high(strength) else v for v, s in zip(vhd, strength, strict=True)]


def above_median(vhd: list[float]) -> list[bool]:
    return [v > statistics.median_low(vhd) for v in vhd]


def choose(
    model: Any,
    inputs: dict[str, Any],
    blind: dict[str, Any],
    layers: Sequence[int],
    *,
    alpha: float = 2,
    both: bool = True,
    two_pass: bool = False,
    outliers: bool = True,
) -> tuple[Heads, dict[int, list[float]]]:
    """The heads and VHD of one prompt: for each layer anew, two whole forwards with what was chosen below it.

    inputs, blind: keyword arguments of the model, with the image and without.
    """
    heads: Heads = {}
    measured: dict[int, list[float]] = {}
    for layer in sorted(layers):
        with scaling(model, {} if two_pass else heads, alpha):
            seeing = outputs(model, inputs, layer)[-1]
        with scaling(model, heads if both and not two_pass else {}, alpha):
            without = outputs(model, blind, layer)[-1]
        measured[layer] = divergence(seeing, without)
        heads[layer] = above_median(drop_outliers(measured[layer], without) if outliers else measured[layer])
    return heads, measured


def t_vhd(model: Any, seeing: dict[str, Any], blind: dict[str, Any], new: int, layers: int, k: int) -> list[float]:
    """T-VHD of the last `new` tokens of two whole sequences, of which the second has no image."""
    totals = [0.0] * new
    for layer in range(layers):
        a, b = outputs(model, seeing, layer), outputs(model, blind, layer)
        for t in range(new):
            at = t - new - 1  # the position before a token predicts it
            totals[t] += sum(sorted(divergence(a[at], b[at]), reverse=True)[:k])
    return totals


def double_batch(
    decoder: Any, seeing: torch.Tensor, blind: torch.Tensor, layers: Sequence[int], alpha: float, both: bool
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """The paper's algorithm in one forward of twice the batch: with the image above, without it below, left-padded.

    seeing, blind: embeddings [B, T, D] and [B, N, D] of prompts without padding.

    Returns:
        ({layer: which heads, bool [B, H]}, hidden states after the last layer and norm [B, T, D]).
    """
    batch, length = seeing.shape[:2]
    pad = length - blind.shape[1]
    embeds = torch.cat([seeing, torch.nn.functional.pad(blind, (0, 0, pad, 0))])
    mask = torch.ones(2 * batch, length, dtype=torch.long)
    mask[batch:, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found: dict[int, torch.Tensor] = {}

    def reinforce(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            x = args[0].view(2 * batch, length, 4, 8)
            with_image, without = x[:batch, -1], x[batch:, -1]
            vhd = (with_image - without).pow(2).sum(-1).sqrt()
            strength = without.pow(2).sum(-1)
            for b in range(batch):
                limit, most = vhd[b].mean() + vhd[b].std(), strength[b].mean() + strength[b].std()
                for head in range(4):
                    if vhd[b, head] > limit and strength[b, head] > most:
                        vhd[b, head] = 0
            found[layer] = vhd > vhd.sort(dim=-1).values[:, 1:2]
            factor = 1 + (alpha - 1) * found[layer].to(x.dtype)
            factor = torch.cat([factor, factor if both else torch.ones_like(factor)])
            return ((x * factor[:, None, :, None]).flatten(2),)

        return hook

    handles = [decoder.layers[layer].self_attn.o_proj.register_forward_pre_hook(reinforce(layer)) for layer in layers]
    try:
        with torch.no_grad():
            output = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found, output.last_hidden_state[:batch]
