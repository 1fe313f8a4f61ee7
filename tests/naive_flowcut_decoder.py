"""FlowCut's cut inside a decoder, in plain loops: one prompt at a time, full attention matrices, no cache, no hooks.

For Llama and Qwen decoders, with one-dimensional or M-RoPE positions. Nothing here comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Decoded(NamedTuple):
    """logits [n, V] of what is left; kept: indices into the sequence that are left; lengths: what each layer ran on;
    positions: [n] or [3, n], of what is left; gap: by how much the worst score that stays beats the best that leaves.
    """

    logits: torch.Tensor
    kept: list[int]
    lengths: list[int]
    positions: torch.Tensor
    gap: float


@torch.no_grad()
def decode(
    model: Any,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    images: Sequence[Sequence[int]],
    keep: int,
    *,
    compact: bool,
    layer: int = 1,
    prompt: int | None = None,
) -> Decoded:
    """Run embeds [T, D] at `positions` ([T], or [3, T] with M-RoPE); images: where the tokens of each image stand.

    After `layer`, `keep` tokens of each image that has more are left. compact: whether what follows is renumbered.
    prompt: how many of the T belong to the prompt; the others were generated.
    """
    language = model.model.language_model
    x, kept, gap, lengths = embeds, list(range(len(embeds))), math.inf, []
    prompt = len(embeds) if prompt is None else prompt
    for number, block in enumerate(language.layers):
        lengths.append(len(x))
        y = block.input_layernorm(x)
        attention, d = block.self_attn, block.self_attn.head_dim
        q, k, v = (heads(getattr(attention, f"{name}_proj")(y), d) for name in "qkv")
        q, k = turn(model, q, positions), turn(model, k, positions)
        group = q.shape[0] // k.shape[0]
        closed = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        mixed = []
        for head in range(q.shape[0]):
            logits = (q[head] @ k[head // group].T / math.sqrt(d)).masked_fill(closed, -math.inf)
            mixed.append(logits.softmax(-1) @ v[head // group])
        x = x + attention.o_proj(torch.cat(mixed, -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
        everything = [i for image in images for i in image]
        if number != layer or all(len(image) <= keep for image in images):
            continue
        score = flow_score(q[:, prompt - 1], k[:, everything], v[:, prompt - 1], v[:, everything])
        by_place = dict(zip(everything, score, strict=True))
        gone: set[int] = set()
        for image in images:
            ranked = sorted(image, key=lambda i: -by_place[i])
            gone |= set(ranked[keep:])
            if len(image) > keep:
                gap = min(gap, by_place[ranked[keep - 1]] - by_place[ranked[keep]])
        kept = [i for i in kept if i not in gone]
        if compact:
            positions = positions - torch.tensor([sum(j in gone for j in range(i)) for i in range(len(x))])
        x, positions = x[kept], positions[..., kept]
    return Decoded(model.lm_head(language.norm(x)), kept, lengths, positions, gap)


def flow_score(q: torch.Tensor, k: torch.Tensor, last: torch.Tensor, v: torch.Tensor) -> list[float]:
    """The score of each visual token: q [H, d] and last [Hkv, d] of the last prompt token, k and v [Hkv, n, d] of the
    visual ones.

    Both softmaxes run over visual tokens alone and both are scaled; heads are averaged before the norm.
    """
    heads_, kv, n, d = q.shape[0], k.shape[0], k.shape[1], k.shape[2]
    relevance, semantic, size = [0.0] * n, [0.0] * n, [0.0] * n
    for head in range(heads_):
        of = head // (heads_ // kv)
        seen = softmax([float(q[head] @ k[of, j]) / math.sqrt(d) for j in range(n)])
        alike = softmax([float(last[of] @ v[of, j]) / math.sqrt(d) for j in range(n)])
        relevance = [old + new / heads_ for old, new in zip(relevance, seen, strict=True)]
        semantic = [old + new / heads_ for old, new in zip(semantic, alike, strict=True)]
    for j in range(n):
        size[j] = sum(abs(sum(float(v[of, j, e]) for of in range(kv)) / kv) for e in range(d))
    seen_sum, alike_sum = sum(relevance), sum(semantic)
    return [(relevance[j] / seen_sum + semantic[j] / alike_sum) * size[j] for j in range(n)]


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def heads(x: torch.Tensor, d: int) -> torch.Tensor:
    """[n, H * d] -> [H, n, d]."""
    return torch.stack(x.split(d, -1))


def turn(model: Any, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [H, n, d] with rotary positions [n] or [3, n] turned in; M-RoPE's sections say which of the three each
    frequency follows."""
    rope, half = model.config.get_text_config().rope_parameters, x.shape[-1] // 2
    inverse = 1.0 / (rope["rope_theta"] ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    if positions.ndim == 1:
        followed = [positions] * half
    else:
        followed = [positions[axis] for axis, n in enumerate(rope["mrope_section"]) for _ in range(n)]
    # Stock code makes its tables in fp32.
    angle = torch.stack([place.float() * inverse[i] for i, place in enumerate(followed)], -1)  # [n, d / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Entered(NamedTuple):
    """What the language model was given: embeds [B, n, D], positions as they were given, alive [B, n]."""

    embeds: torch.Tensor
    positions: torch.Tensor | None
    alive: torch.Tensor


@contextmanager
def watching(model: Any) -> Iterator[list[Entered]]:
    """Note every call of the language model; entered behind a method, so that its hooks come first."""
    found: list[Entered] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        alive = torch.ones(embeds.shape[:2], dtype=torch.bool)
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        if mask is not None:
            row = mask if mask.ndim == 2 else mask[:, 0, -1]
            alive = row.bool() if row.dtype == torch.bool or mask.ndim == 2 else row == 0
        positions = kwargs.get("position_ids")
        found.append(Entered(embeds.detach(), positions, alive[:, -embeds.shape[1] :].expand(len(embeds), -1)))

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
