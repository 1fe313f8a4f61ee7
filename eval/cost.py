"""What token pruning saves on paper: multiply-accumulates and KV cache bytes from plain numbers. Needs no torch.

One transformer layer on n tokens, hidden width d, FFN width m, key/value width d_kv (= d without grouped queries):

    C(n) = 2 n d^2 + 2 n d d_kv    query and output, key and value projections
         + 2 n^2 d                 q k^T and the weighted sum of values, without the saving that causality allows
         + ffn_mats n d m          FFN: two matrices, or three where it is gated (SwiGLU)

Any pruning scheme is a schedule: how many tokens enter each layer. Its cost is the sum of C over that schedule. With
d_kv = d this is 4 n d^2 + 2 n^2 d + ffn_mats n d m: FastV (arXiv 2403.06764) counts ffn_mats=2, PyramidDrop
(arXiv 2410.17247) and later LLaMA papers 3. Everybody leaves out norms, rotary embeddings, softmax, biases, the patch
embedding, the LM head and the selector's own work, and so does this.

The unit is one multiply-accumulate, MAC. The papers call that number "FLOPs": here `paper_flops`; `flops` is 2 per MAC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from vlattn.errors import InputError


def decoder_macs(
    lengths: Iterable[int],
    hidden: int,
    ffn: int,
    kv_width: int | None = None,
    ffn_mats: int = 3,
    *,
    query_width: int | None = None,
) -> int:
    """Prefill cost of a decoder in MACs, for one sequence.

    Args:
        lengths: tokens that enter each layer, one number per layer.
        hidden: width of the hidden states, d.
        ffn: inner width of the FFN, m; for mixtures of experts the active width.
        kv_width: key/value heads times head dim; None: as wide as the queries (no grouped queries).
        ffn_mats: matrices of the FFN: 3 for SwiGLU (as PyramidDrop counts, arXiv 2410.17247), 2 for a plain one (as
            FastV counts, arXiv 2403.06764).
        query_width: query heads times head dim, in models where that is not `hidden`.
    """
    width = hidden if query_width is None else query_width
    kv = width if kv_width is None else kv_width
    return layer_macs(lengths, 2 * hidden * width + 2 * hidden * kv + _ffn(ffn_mats, hidden, ffn), width)


def layer_macs(lengths: Iterable[int], weights: int, width: int) -> int:
    """Cost in MACs of transformer layers of one make, or of one layer on several sequences.

    For layers whose matrices were counted rather than looked up in a config.

    Args:
        lengths: tokens of each sequence, or that enter each layer; attention stays within one number.
        weights: numbers in a layer's matrices, which is what they cost per token.
        width: query heads times head dim.
    """
    return sum(n * weights + 2 * n * n * width for n in _checked(lengths))


def encoder_macs(lengths: Iterable[int], hidden: int, ffn: int) -> int:
    """Cost of a vision transformer's layers in MACs, for one image: two FFN matrices, no grouped queries.

    lengths: tokens that enter each layer, CLS included. A method that prunes inside the tower saves here too; CLIP-L/14
    at 336 pixels (24 layers, 1024, 4096, 577 tokens) costs 0.19e12.
    """
    return decoder_macs(lengths, hidden, ffn, ffn_mats=2)


def projector_macs(tokens: int, widths: Sequence[int]) -> int:
    """Cost of a multi-layer perceptron on `tokens` features in MACs; widths: (1024, 4096, 4096) for LLaVA-1.5."""
    (n,) = _checked([tokens])
    return n * sum(a * b for a, b in pairwise(widths))


def decode_macs(
    lengths: Iterable[int],
    new_tokens: int,
    hidden: int,
    ffn: int,
    kv_width: int | None = None,
    ffn_mats: int = 3,
    *,
    query_width: int | None = None,
) -> int:
    """Cost in MACs of generating `new_tokens` tokens one by one with a KV cache that starts with `lengths` per layer.

    The i-th new token attends to the n tokens that prefill left in that layer, and to i new ones, itself included.
    HoliTom (arXiv 2505.21334) reports it for 100 tokens. Other arguments: see `decoder_macs`.
    """
    (new,) = _checked([new_tokens])
    width = hidden if query_width is None else query_width
    kv = width if kv_width is None else kv_width
    per_token = 2 * hidden * width + 2 * hidden * kv + _ffn(ffn_mats, hidden, ffn)
    return sum(new * per_token + 2 * width * (n * new + new * (new + 1) // 2) for n in _checked(lengths))


def token_schedule(layers: int, text: int, image: int, drops: Mapping[int, int] | None = None) -> list[int]:
    """Tokens that enter each decoder layer when image tokens are dropped at some layers.

    Args:
        layers: decoder layers.
        text: text tokens of the prompt; 0 gives the papers' "image tokens only", whose ratios differ.
        image: image tokens of the prompt.
        drops: {layer index: image tokens that enter it and the following layers}. FastV with K=2, R=0.5 on 576 tokens
            is {2: 288}; PyramidDrop on 32 layers is {8: 288, 16: 144, 24: 72}; pruning before the decoder is {0: 64}.
    """
    drops = drops or {}
    now, schedule = image, []
    for layer in drops:
        if not 0 <= layer < layers:
            raise InputError(f"drops: layer {layer} is not among the {layers} layers; give 0 <= layer < {layers}")
    for layer in range(layers):
        left = drops.get(layer, now)
        if left > now:
            raise InputError(f"drops: {left} image tokens at layer {layer}, but only {now} are left there")
        now = left
        schedule.append(text + now)
    return list(_checked(schedule))


def average_tokens(lengths: Sequence[int]) -> float:
    """Mean over layers: the "average retained tokens" of VisionZip- and SparseVLM-style tables, given image tokens."""
    if not lengths:
        raise InputError("lengths: got no layer; give one number of tokens per layer")
    return sum(lengths) / len(lengths)


def paper_flops(macs: int) -> int:
    """What pruning papers print as FLOPs: one per multiply-accumulate."""
    return macs


def flops(macs: int) -> int:
    """Floating-point operations: a multiplication and an addition per MAC."""
    return 2 * macs


def cost_ratio(pruned: float, full: float) -> float:
    """`pruned / full`, for MACs or bytes; 1 is no saving, and the papers' "reduction" is 1 minus this."""
    if full <= 0:
        raise InputError(f"full: got {full}; give the unpruned cost, more than 0")
    return pruned / full


def kv_bytes_formula(batch: int, lengths: Iterable[int], kv_heads: int, head_dim: int, itemsize: int) -> int:
    """KV cache in bytes by formula: keys and values of every cached position of every layer.

    Args:
        batch: sequences.
        lengths: cached positions of each layer, padding included.
        kv_heads, head_dim: of the decoder; 32 and 128 for LLaVA-1.5-7B.
        itemsize: bytes of one number: 2 for fp16 and bf16, 4 for fp32.

    LLaVA-1.5-7B in fp16 takes 524 288 bytes per position. `vlattn.eval.model_cost.cache_bytes` measures a live cache.
    """
    return 2 * batch * sum(_checked(lengths)) * kv_heads * head_dim * itemsize


def _ffn(ffn_mats: int, hidden: int, ffn: int) -> int:
    if ffn_mats not in (2, 3):
        raise InputError(f"ffn_mats: got {ffn_mats!r}; give 3 for a gated FFN (SwiGLU), 2 for a plain one")
    return ffn_mats * hidden * ffn


def _checked(lengths: Iterable[int]) -> Iterable[int]:
    for n in lengths:
        if n < 0:
            raise InputError(f"lengths: got {n}; numbers of tokens cannot be negative")
        yield n
