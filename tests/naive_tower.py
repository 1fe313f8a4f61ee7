"""Vision towers looked into with full attention matrices, and prompts written out with the features put in by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Seen(NamedTuple):
    """One layer of a CLIP or SigLIP tower.

    q, k: [B, H, N, D], as the projections gave them, heads split.
    attention: [B, H, N, N], softmaxed.
    middle: [B, N, C], the residual stream between attention and MLP.
    output: [B, N, C], of the layer.
    """

    q: torch.Tensor
    k: torch.Tensor
    attention: torch.Tensor
    middle: torch.Tensor
    output: torch.Tensor


def layers_of(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower).encoder.layers


def look(tower: Any, pixels: torch.Tensor, layer: int) -> Seen:
    """Layer `layer` of the stock tower on pixels [B, 3, h, w]."""
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        return look_at(layers_of(tower)[layer], states[layer])


def look_at(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Seen:
    """A layer on x [B, N, C]; `bias` [B, N] is added to the logits of each key."""
    attention = layer.self_attn
    y = layer.layer_norm1(x)
    q, k, v = (getattr(attention, f"{n}_proj")(y).unflatten(-1, (attention.num_heads, -1)) for n in "qkv")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias[:, None, None]
    weights = logits.softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    x = x + attention.out_proj(mixed)
    return Seen(q, k, weights, x, x + layer.mlp(layer.layer_norm2(x)))


def features_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What enters the stock projector of a LLaVA, CLS included where there is one [B, lead + P, C]."""
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer]


def with_features(
    model: Any, inputs: dict[str, torch.Tensor], features: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The prompt with features[i] [K_i, D] in place of the i-th run of placeholders, left-padded again.

    Returns:
        {inputs_embeds, attention_mask}.
    """
    table, placeholder = model.get_input_embeddings().weight, model.config.image_token_id
    rows: list[torch.Tensor] = []
    image = 0
    for tokens, alive in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        pieces: list[torch.Tensor] = []
        at = 0
        while at < len(tokens):
            if alive[at] and tokens[at] == placeholder:
                pieces.append(features[image])
                image += 1
                while at < len(tokens) and tokens[at] == placeholder:
                    at += 1
            else:
                pieces += [table[tokens[at]][None]] * alive[at]
                at += 1
        rows.append(torch.cat(pieces))
    assert image == len(features)
    longest = max(map(len, rows))
    embeds = torch.zeros(len(rows), longest, table.shape[1], dtype=table.dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        embeds[b, longest - len(row) :] = row
        mask[b, longest - len(row) :] = 1
    return {"inputs_embeds": embeds, "attention_mask": mask}


def assert_decodes_as(
    model: Any, inputs: dict[str, torch.Tensor], method: Any, features: Sequence[torch.Tensor], **generate: Any
) -> Any:
    """Under `method` the model gives the logits and the tokens of the prompt that has `features` written out.

    Returns:
        The trace.
    """
    short = with_features(model, inputs, features)
    generate = {"max_new_tokens": 4, "do_sample": False, **generate}
    with torch.no_grad():
        expected, said = model(**short).logits, model.generate(**short, **generate)
        with method(model) as trace:
            found, told = model(**inputs).logits, model.generate(**inputs, **generate)
    assert found.shape == expected.shape
    alive = short["attention_mask"].bool()
    torch.testing.assert_close(found[alive], expected[alive], rtol=1e-9, atol=1e-9)
    assert torch.equal(told[:, inputs["input_ids"].shape[1] :], said)
    return trace
