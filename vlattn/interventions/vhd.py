"""Vision-aware Head Divergence: how far each attention head's output moves when the image is taken out of the prompt.

"Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, equations 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.text_only import TextPrompt, head_outputs
from vlattn.kernels.reference import accumulation_dtype
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet, as_keywords, cached_length
from vlattn.runtime.session import Session, close_if_empty, session_of


def vhd_scores(with_image: torch.Tensor, without_image: torch.Tensor) -> torch.Tensor:
    """VHD (equation 4): the Euclidean distance between a head's output with and without the image.

    Args:
        with_image, without_image: [..., H, d], softmax(qk)V of H query heads at one position, before the output
            projection; the last position of either prompt, which predicts the same next token.

    Returns:
        [..., H], at least 0; fp32 for half-precision inputs.
    """
    dtype = accumulation_dtype(with_image.dtype)
    return (with_image.to(dtype) - without_image.to(dtype)).norm(dim=-1)


def without_outliers(vhd: torch.Tensor, without_image: torch.Tensor) -> torch.Tensor:
    """VHD with negatively vision-sensitive heads at 0 (equation 6): those that surge when the image disappears.

    They are the heads whose VHD and whose squared activation without the image both exceed mean + standard deviation
    over the heads of their layer. The paper does not say which deviation; this is the unbiased one.

    Args:
        vhd: [..., H].
        without_image: [..., H, d], the heads' outputs without the image.

    Returns:
        [..., H], nowhere above `vhd`.
    """
    strength = without_image.to(vhd.dtype).square().sum(-1)  # [..., H]
    return vhd.masked_fill(_stands_out(vhd) & _stands_out(strength), 0)


def _stands_out(x: torch.Tensor) -> torch.Tensor:
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)


def select_heads(vhd: torch.Tensor) -> torch.Tensor:
    """The vision-aware heads of a layer (equation 7): those strictly above the (lower) median.

    Of an even number of heads with distinct values this is exactly half. Ties, as among heads at 0, can leave fewer.

    Args:
        vhd: [..., H].

    Returns:
        bool [..., H].
    """
    return vhd > vhd.median(-1, keepdim=True).values


@contextmanager
def joined(model: nn.Module) -> Iterator[tuple[Session, HookSet]]:
    """The model's session and hooks that leave with the context, for those who only watch."""
    session = session_of(model, adapter_for)
    hooks = HookSet(session.gate)
    try:
        yield session, hooks
    finally:
        hooks.remove()
        close_if_empty(session)


def require_image(session: Session, inputs: Mapping[str, Any]) -> None:
    """Raise where no prompt of the batch has an image."""
    if not session.sees_images(dict(inputs)):
        raise InputError("inputs: the prompts have no visual tokens; give at least one with an image")


def watch_prompt(session: Session, hooks: HookSet) -> list[TextPrompt]:
    """A list that each prefill from here on adds its text-only prompt to."""
    prompts: list[TextPrompt] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = as_keywords(module, args, kwargs)
        if not cached_length(call):
            prompts.append(TextPrompt.of(call, session))

    hooks.before(session.adapter.multimodal, hook)
    return prompts


@torch.no_grad()
def vhd(model: nn.Module, inputs: Mapping[str, Any], *, remove_outliers: bool = False) -> torch.Tensor:
    """The VHD of every head at the last position of each prompt.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949. Two forwards: of
    the prompts, and of the same prompts without their visual tokens (and what a family wraps around them), positions
    counted anew. Inside a context the prompt with images goes through the model as the context leaves it, and heads are
    read before VHR scales them; the text-only prompt never meets an intervention. A prompt without images has VHD 0.

    Args:
        model: a model with an adapter.
        inputs: keyword arguments of its forward, left-padded, with images; no labels.
        remove_outliers: set negatively vision-sensitive heads to 0, as VHR does before it chooses.

    Returns:
        [B, L, H] for L decoder layers of H query heads; fp32 for half-precision models.

    Raises:
        InputError: no image in the whole batch, padding on the right, or a prompt that has no text.
    """
    with joined(model) as (session, hooks):
        require_image(session, inputs)
        adapter, prompts = session.adapter, watch_prompt(session, hooks)
        layers = range(len(adapter.decoder_layers))
        seeing = head_outputs(adapter, layers, lambda: adapter.multimodal(**inputs, use_cache=False), session.gate)
        blind = prompts[-1].run(session, layers)
    found = []
    for layer in layers:
        scores = prompts[-1].only_where_image(vhd_scores(seeing[layer][:, -1], blind[layer]))
        found.append(without_outliers(scores, blind[layer]) if remove_outliers else scores)
    home = found[0].device
    return torch.stack([scores.to(home) for scores in found], 1)
