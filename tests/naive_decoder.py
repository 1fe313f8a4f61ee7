"""Cuts inside the decoder in plain loops: one prompt at a time, every layer on hand-made masks, no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# (layer, hidden [n, D], positions in the full prompt [n]) -> positions that stay, or None.
Choose = Callable[[int, torch.Tensor, list[int]], "list[int] | None"]


@torch.no_grad()
def run(
    model: Any,
    embeds: torch.Tensor,
    choose: Choose,
    *,
    compact: bool = False,
    prompt: int | None = None,
    hide: bool = False,
) -> tuple[torch.Tensor, list[list[int]]]:
    """One prompt through a Llama decoder, layer by layer.

    Args:
        model: a LLaVA with its head; sdpa or eager attention.
        embeds: [T, D] of the full sequence, generated tokens included.
        choose: called after each layer with the full-prompt positions that are left.
        compact: whether a cut renumbers what follows.
        prompt: length of the prompt within `embeds`; what follows was generated, and is never offered for choice.
        hide: mask the keys of what leaves, instead of removing them.

    Returns:
        (logits [n, V] of what is left, the positions that entered each layer, and last those that are left).
    """
    decoder = model.model.language_model
    prompt = embeds.shape[0] if prompt is None else prompt
    hidden, places, ids = embeds[None], list(range(embeds.shape[0])), torch.arange(embeds.shape[0])
    hidden_keys: set[int] = set()
    entered = []
    for number, layer in enumerate(decoder.layers):
        entered.append(list(places))
        n = len(places)
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        for column, place in enumerate(places):
            if place in hidden_keys:
                allowed[:, column] = False
                allowed[column, column] = True
        mask = torch.zeros(1, 1, n, n, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        tables = decoder.rotary_emb(hidden, ids[None])
        output = layer(hidden, attention_mask=mask, position_embeddings=tables, position_ids=ids[None])
        hidden = output[0] if isinstance(output, tuple) else output
        stay = choose(number, hidden[0, : len([p for p in places if p < prompt])], [p for p in places if p < prompt])
        if stay is None:
            continue
        if hide:
            hidden_keys |= set(places) - set(stay) - set(range(prompt, embeds.shape[0]))
            continue
        keep = [i for i, place in enumerate(places) if place in stay or place >= prompt]
        if compact:
            gone = [0] * n
            for i in range(n):
                gone[i] = (gone[i - 1] if i else 0) + (i not in keep)
            ids = ids - torch.tensor(gone)
        hidden, ids, places = hidden[:, keep], ids[keep], [places[i] for i in keep]
    return model.lm_head(decoder.norm(hidden))[0], [*entered, places]
