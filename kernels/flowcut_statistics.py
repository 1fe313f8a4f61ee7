"""`flowcut_statistics` on Triton: FlowCut's score of each patch, keys and values read once.

The first kernel takes a tile of tokens through all heads: logits of CLS, products with its value, the size of the mean
value. The second takes an image: two softmaxes, the score, the running average, the entropy. Nothing is added
atomically: the same inputs give the same bits on one card under one configuration. A choice of tokens has no gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.language import tensor as T

from vlattn.kernels.compilation import Compilation
from vlattn.kernels.launch import Tuned
from vlattn.kernels.received_attention import LOG2_E
from vlattn.kernels.reference_flowcut_statistics import MAX_TOKENS, FlowCutStatistics


@triton.jit
def compare(
    q: T, k: T, v: T, alive: T, logits: T, likeness: T, size: T, scale: T, heads: T, kv_heads: T, tokens: T,
    q_b: T, q_h: T, q_d: T, k_b: T, k_h: T, k_n: T, k_d: T, v_b: T, v_h: T, v_n: T, v_d: T, alive_b: T, alive_n: T,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of tokens through all heads. Program (tile, image).

    q, k, logits: None where the attention is given. logits [B, H, N], likeness [B, Hkv, N]: in base 2, CLS first,
    -inf for filler. size: [B, N]. TOKENS: rounded size, which chooses the configuration.
    """
    b = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    wide, at = d < WIDTH, n < tokens
    inside, far = at[:, None] & wide[None, :], n.to(tl.int64)
    live = at
    if alive is not None:
        live = (n == 0) | (tl.load(alive + b * alive_b + (far - 1) * alive_n, mask=at & (n > 0), other=0) != 0)
    v += b * v_b
    if k is not None:
        k, q = k + b * k_b, q + b * q_b
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in tl.range(0, kv_heads, num_stages=STAGES):
        value = tl.load(v + far[:, None] * v_n + d[None, :] * v_d, mask=inside, other=0.0).to(tl.float32)
        cls = tl.load(v + d * v_d, mask=wide, other=0.0).to(tl.float32)
        v += v_h
        total += value
        s = tl.sum(value * cls[None, :], 1) * 1.4426950408889634
        tl.store(likeness + (b * kv_heads + g) * tokens + n, tl.where(live, s, float("-inf")), mask=at)
        if k is not None:
            key = tl.load(k + far[:, None] * k_n + d[None, :] * k_d, mask=inside, other=0.0).to(tl.float32)
            k += k_h
            for i in tl.static_range(SHARE):
                query = tl.load(q + d * q_d, mask=wide, other=0.0).to(tl.float32)
                q += q_h
                s = tl.sum(key * query[None, :], 1) * scale
                line = b * heads + g * SHARE + i
                tl.store(logits + line * tokens + n, tl.where(live, s, float("-inf")), mask=at)
    tl.store(size + b * tokens + n, tl.sum(tl.abs(total / kv_heads), 1), mask=at)


@triton.jit
def _mean_of_softmaxes(x: T, heads: T, tokens: T, h: T, n: T, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr) -> T:
    """The mean over heads of softmaxes over tokens [N] of logits x [H, N] in base 2."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, heads, BLOCK_H):
        inside = (first + h < heads)[:, None] & (n < tokens)[None, :]
        s = tl.load(x + (first + h)[:, None] * tokens + n[None, :], mask=inside, other=float("-inf"))
        top = tl.max(s, 1)
        e = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
        z = tl.sum(e, 1)
        total += tl.sum(e * (1.0 / tl.where(z > 0, z, 1.0))[:, None], 0)
    return total / heads


@triton.jit
def rate(
    logits: T, given: T, likeness: T, size: T, average: T, score_out: T, attention_out: T, average_out: T, entropy: T,
    momentum: T, heads: T, kv_heads: T, tokens: T, given_b: T, given_h: T, given_n: T, average_b: T, average_n: T,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """An image: from what `compare` left to results [B, P]. Program: image.

    given: attention [B, H, N] where that is not to be made from logits. BLOCK_N: all tokens.
    """
    b = tl.program_id(0).to(tl.int64)
    n, h = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    patch = (n > 0) & (n < tokens)
    if given is None:
        attention = _mean_of_softmaxes(logits + b * heads * tokens, heads, tokens, h, n, BLOCK_H, BLOCK_N)
    else:
        attention = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, heads, BLOCK_H):
            at = (first + h).to(tl.int64)[:, None] * given_h + n.to(tl.int64)[None, :] * given_n
            inside = (first + h < heads)[:, None] & (n < tokens)[None, :]
            attention += tl.sum(tl.load(given + b * given_b + at, mask=inside, other=0.0).to(tl.float32), 0)
        attention = attention / heads
    likeness += b * kv_heads * tokens
    similarity = _mean_of_softmaxes(likeness, kv_heads, tokens, h, n, BLOCK_H, BLOCK_N)
    attention, similarity = tl.where(patch, attention, 0.0), tl.where(patch, similarity, 0.0)
    # CLS may relate to itself alone: what vanishes stays 0.
    share = attention / tl.maximum(tl.sum(attention, 0), 1.1754943508222875e-38)
    score = share + similarity / tl.maximum(tl.sum(similarity, 0), 1.1754943508222875e-38)
    score = score * tl.load(size + b * tokens + n, mask=patch, other=0.0)
    out = b * (tokens - 1) + n - 1
    tl.store(attention_out + out, attention, mask=patch)
    tl.store(score_out + out, score, mask=patch)
    tl.store(entropy + b, -tl.sum(share * tl.log(tl.where(share > 0, share, 1.0)), 0))
    if average is not None:
        place = average + b * average_b + (n.to(tl.int64) - 1) * average_n
        past = tl.load(place, mask=patch, other=0.0).to(tl.float32)
        tl.store(average_out + out, momentum * past + (1.0 - momentum) * score, mask=patch)


def _config(tokens: int, stages: int, warps: int) -> triton.Config:
    return triton.Config({"BLOCK_N": tokens, "STAGES": stages}, num_warps=warps, num_stages=stages)


CONFIGS: dict[bool, list[triton.Config]] = {
    False: [_config(16, 4, 4), _config(32, 4, 4), _config(64, 3, 8)],
    True: [_config(8, 3, 4), _config(16, 3, 4)],
}
"""{whether heads are wider than 128: configurations}; others spill registers."""
_COMPARE = {wide: Tuned(compare, configs, ["TOKENS", "WIDTH"]) for wide, configs in CONFIGS.items()}
HELD = 8192
"""Numbers of a tile of heads and tokens in `rate`, which holds all tokens at once."""
_RATE = {warps: Tuned(rate, [triton.Config({}, num_warps=warps)], []) for warps in (8, 16)}


def _warps(tokens: int) -> int:
    return 8 if tokens <= 2048 else 16


@torch.library.custom_op("vlattn::flowcut_statistics", mutates_args=())
def _flowcut_statistics(
    v: torch.Tensor,
    cls_query: torch.Tensor | None,
    k: torch.Tensor | None,
    scale: float,
    cls_attention: torch.Tensor | None,
    alive: torch.Tensor | None,
    average: torch.Tensor | None,
    momentum: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, attention and running average [B, P] (no numbers where none was given), and entropy [B]."""
    batch, kv_heads, tokens, width = v.shape
    score, attention, moved, entropy = results = _results(v, average)
    row = cls_query if cls_query is not None else cls_attention
    assert row is not None
    heads = row.shape[1]
    if not score.numel():
        entropy.zero_()
        return results

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, tokens, dtype=torch.float32, device=v.device)

    logits = None if cls_query is None else scratch(heads)
    likeness, size = scratch(kv_heads), scratch()
    mask = None if alive is None else alive.view(torch.uint8)
    queries, keys, marks, given, past = (
        (0,) * dims if x is None else x.stride()
        for x, dims in ((cls_query, 3), (k, 4), (mask, 2), (cls_attention, 3), (average, 2))
    )
    _COMPARE[width > 128](
        lambda c: (triton.cdiv(tokens, c["BLOCK_N"]), batch),
        cls_query, k, v, mask, logits, likeness, size, scale * LOG2_E, heads, kv_heads, tokens,
        *queries, *keys, *v.stride(), *marks, SHARE=heads // kv_heads, WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)), TOKENS=triton.next_power_of_2(max(tokens, 16)),
    )  # fmt: skip
    every = triton.next_power_of_2(max(tokens, 16))
    _RATE[_warps(every)](
        lambda c: (batch,),
        logits, cls_attention, likeness, size, average, score, attention, moved if average is not None else None,
        entropy, momentum, heads, kv_heads, tokens, *given, *past,
        BLOCK_H=max(1, min(triton.next_power_of_2(heads), HELD // every)), BLOCK_N=every,
    )  # fmt: skip
    return results


def _results(v: Any, average: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=v.device)

    patches = (v.shape[0], v.shape[2] - 1)
    return make(*patches), make(*patches), make(0) if average is None else make(*patches), make(v.shape[0])


@_flowcut_statistics.register_fake
def _(
    v: Any, cls_query: Any, k: Any, scale: float, cls_attention: Any, alive: Any, average: Any, momentum: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(v, average)


@register_flop_formula(torch.ops.vlattn.flowcut_statistics)
def _flops(v: Any, cls_query: Any, *args: Any, **kwargs: Any) -> int:
    """A product with the value of CLS for each value, and one with a query for each key."""
    batch, kv_heads, tokens, width = v
    return 2 * batch * (kv_heads + (0 if cls_query is None else cls_query[1])) * tokens * width


def flowcut_statistics(
    v: torch.Tensor,
    cls_query: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    scale: float | None = None,
    cls_attention: torch.Tensor | None = None,
    alive: torch.Tensor | None = None,
    average: torch.Tensor | None = None,
    momentum: float = 0.5,
) -> FlowCutStatistics:
    """FlowCut's numbers of one layer, fp32; see `vlattn.ops.flowcut_statistics`."""
    score, attention, moved, entropy = torch.ops.vlattn.flowcut_statistics(
        v, cls_query, k, 1.0 if scale is None else float(scale), cls_attention, alive, average, float(momentum)
    )
    return FlowCutStatistics(score, attention, score if average is None else moved, entropy)


# Compilation for cards that are not there -----------------------------------------------------------------------------
def compilations() -> list[Compilation]:
    """Every configuration of the first kernel with all it can be given, and the second at its largest and usual."""
    found = []
    for fp32 in (False, True):
        for wide, configs in CONFIGS.items():
            for width in (256,) if wide else (64, 128):
                found += [_compare_compilation(fp32, width, config) for config in configs]
    sizes = (1024, 2048, MAX_TOKENS)
    return [*found, *(_rate_compilation(tokens, given) for tokens in sizes for given in (False, True))]


def _compare_compilation(fp32: bool, width: int, config: triton.Config) -> Compilation:
    names, half = compare.arg_names, "fp32" if fp32 else "bf16"
    types = dict.fromkeys(names[names.index("heads") : names.index("SHARE")], "i32")
    types |= dict.fromkeys(("q", "k", "v"), f"*{half}") | dict.fromkeys(("logits", "likeness", "size"), "*fp32")
    types |= {"scale": "fp32", "alive": "*u8"}
    constants: dict[str, Any] = {"q_d": 1, "k_d": 1, "v_d": 1, "alive_n": 1, "SHARE": 1, "WIDTH": width}
    constants |= {"BLOCK_D": width, "TOKENS": 1024, **config.kwargs}
    kept = {name: types[name] for name in names if name in types and name not in constants}
    aligned = [name for name, type_ in kept.items() if type_[0] == "*" or name in names[names.index("q_b") :]]
    title = f"flowcut compare {half} D{width} {config.kwargs['BLOCK_N']}"
    return Compilation(title, compare, kept, constants, config.num_warps, config.num_stages, aligned)


def _rate_compilation(tokens: int, given: bool) -> Compilation:
    names = rate.arg_names
    types = dict.fromkeys(names[: names.index("momentum")], "*fp32") | {"momentum": "fp32"}
    types |= dict.fromkeys(names[names.index("heads") : names.index("BLOCK_H")], "i32")
    constants: dict[str, Any] = {"given_n": 1, "average_n": 1, "BLOCK_H": min(16, HELD // tokens), "BLOCK_N": tokens}
    constants["logits" if given else "given"] = None
    kept = {name: types[name] for name in names if name in types and name not in constants}
    aligned = [name for name, type_ in kept.items() if type_[0] == "*"]
    title = f"flowcut rate {tokens} {'given' if given else 'made'}"
    return Compilation(title, rate, kept, constants, _warps(tokens), 2, aligned)
