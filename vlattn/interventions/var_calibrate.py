"""Finding the sink channels of a model that no table knows, by where its hidden states are concentrated.

"See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321, says what to look for: the
channels in which the first token's state explodes. How they are found here is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.interventions.var_sinks import RMS_EPS, TAU
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.session import close_if_empty, session_of

PROMPTS, LENGTH = 32, 24
"""Prompts that are drawn where none are given, and their tokens."""
MOST = 3


@dataclass(frozen=True)
class SinkCalibration:
    """Which channels of a decoder carry its sinks.

    dims: channels whose mean |x_d| / rms(x) is above tau, the largest first, at most three; empty where none is: then
        the model has no massive channel at this threshold, and `strongest` says how far it is from having one.
    tau: the threshold, of the means here and of tokens in `VAR`.
    means: those of `dims`.
    strongest: (channel, mean) of the five largest.
    layers: first and last of the layers whose inputs were averaged.
    first_layer: the first layer of all whose input passes tau in one of `dims` in the mean; None where none does.
    limit: sqrt(D), which no |x_d| / rms(x) can pass.
    """

    dims: tuple[int, ...]
    tau: float
    means: tuple[float, ...]
    strongest: tuple[tuple[int, float], ...]
    layers: tuple[int, int]
    first_layer: int | None
    limit: float


def calibrate_sinks(
    model: nn.Module,
    prompts: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    tau: float = TAU,
    tokens: Literal["first", "visual"] = "first",
    seed: int = 0,
) -> SinkCalibration:
    """Measure the sink channels of a live model; interventions on it are out of play meanwhile.

    Averages |x_d| / rms(x) in the inputs of the middle layers (L/4 to 3L/4) over some tokens.

    Args:
        model: as `VAR` takes it.
        prompts: keyword arguments of its forward, such as what its processor returns; one batch or several, padded on
            either side. None draws 32 prompts of random words behind the config's BOS; the first token's channels
            hardly depend on what follows.
        tau: what a channel's mean must pass; 20 in the paper, always below sqrt(D).
        tokens: average over the `first` token of each prompt, which is a sink in most decoders, or over all `visual`
            tokens, for models whose first token is none.
        seed: of the prompts that are drawn.

    Returns:
        What was found; give `VAR(sink_dims=found.dims, tau=found.tau)`.

    Raises:
        InputError: tau that no token can pass, visual tokens of prompts that have none, or an unknown model family.
    """
    adapter = adapter_for(model)
    limit = math.sqrt(adapter.text_config.hidden_size)
    check_tau(tau, limit)
    require_choice("tokens", tokens, ("first", "visual"))
    if tokens == "visual" and prompts is None:
        raise InputError("prompts: tokens='visual' needs prompts with images; give what the model's processor returns")
    depth = len(adapter.decoder_layers)
    first, last = math.ceil(depth / 4), math.floor(3 * depth / 4)
    last = max(first, min(last, depth - 1))
    means = _means(model, adapter, prompts, tokens, seed)  # [L, D]
    middle = means[first : last + 1].mean(0)  # [D]
    order = middle.sort(descending=True, stable=True).indices.tolist()
    dims = tuple(d for d in order[:MOST] if middle[d] > tau)
    passing = (means[:, list(dims)] > tau).any(1).nonzero().flatten().tolist() if dims else []
    return SinkCalibration(
        dims=dims,
        tau=float(tau),
        means=tuple(float(middle[d]) for d in dims),
        strongest=tuple((d, float(middle[d])) for d in order[:5]),
        layers=(first, last),
        first_layer=passing[0] if passing else None,
        limit=limit,
    )


def check_tau(tau: object, limit: float) -> None:
    """Refuse a threshold that is no positive number or that no token of this model can pass."""
    if not isinstance(tau, int | float) or isinstance(tau, bool) or not tau > 0:
        raise InputError(f"tau: got {tau!r}; give a positive number, 20 in the paper")
    if tau >= limit:
        raise InputError(
            f"tau: got {tau:g}, but in hidden states of this width no channel can pass sqrt(D) = {limit:.4g} times "
            "the root mean square, so no token would be a sink; give a smaller tau, as calibrate_sinks(model, tau=...) "
            "finds it"
        )


@torch.no_grad()
def _means(model: nn.Module, adapter: Adapter, prompts: Any, tokens: str, seed: int) -> torch.Tensor:
    """Mean |x_d| / rms(x) of the chosen tokens in the input of each layer, fp64 [L, D]."""
    session = session_of(model, adapter_for)
    hooks = HookSet()
    wanted = torch.empty(0, dtype=torch.bool)
    total = torch.zeros(len(adapter.decoder_layers), adapter.text_config.hidden_size, dtype=torch.float64)
    count = 0

    def reading(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = as_keywords(module, args, kwargs)["hidden_states"]
            x = hidden[wanted.to(hidden.device)].float()  # [tokens, D]
            y = x * (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
            total[layer] += y.abs().double().sum(0).cpu()

        return hook

    try:
        for index, layer in enumerate(adapter.decoder_layers):
            hooks.before(layer, reading(index))
        with session.gate.shut():
            if prompts is None:
                ids = _drawn(adapter, seed)
                wanted = torch.zeros_like(ids, dtype=torch.bool)
                wanted[:, 0] = True
                count = int(wanted.sum())
                adapter.language_model(input_ids=ids, use_cache=False)
            for call in _calls(prompts):
                wanted = _wanted(adapter, call, tokens)
                count += int(wanted.sum())
                adapter.multimodal(**call, use_cache=False)
    finally:
        hooks.remove()
        close_if_empty(session)
    if not count:
        raise InputError("prompts: they have no visual tokens; give prompts with images, or tokens='first'")
    return total / count


def _calls(prompts: Any) -> Iterator[Mapping[str, Any]]:
    if prompts is not None:
        yield from [prompts] if isinstance(prompts, Mapping) else prompts


def _wanted(adapter: Adapter, call: Mapping[str, Any], tokens: str) -> torch.Tensor:
    """Which positions of a batch of prompts count, bool [B, T]."""
    if tokens == "visual":
        return adapter.visual_mask(call)
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    shape = (call["inputs_embeds"] if ids is None else ids).shape[:2]
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    return real & (real.cumsum(1) == 1)


def _drawn(adapter: Adapter, seed: int) -> torch.Tensor:
    """Random prompts of words [32, 24], without placeholders, behind BOS where the config has one."""
    text, table = adapter.text_config, adapter.language_model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor([i for i in range(3, text.vocab_size) if i not in adapter.placeholder_ids])
    ids = words[torch.randint(len(words), (PROMPTS, LENGTH), generator=generator)]
    if isinstance(text.bos_token_id, int):
        ids[:, 0] = text.bos_token_id
    return ids.to(table.device)
