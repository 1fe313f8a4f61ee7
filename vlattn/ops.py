"""The functional face of the kernels: shapes, errors, dispatch."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from vlattn.errors import InputError
from vlattn.kernels import pooled_sizes, reference
from vlattn.kernels.dispatch import Backend, uses_triton
from vlattn.kernels.grouped_types import MAX_WIDTH, GroupedAttention, Redistribution
from vlattn.kernels.reference_flowcut_statistics import MAX_TOKENS, FlowCutStatistics
from vlattn.op_checks import (
    check_cache,
    check_flowcut,
    check_groups,
    check_heads,
    check_kept,
    check_mask,
    check_pool,
    check_size,
)


def query_row_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Attention weights of a few query rows over all keys, without the other rows of the [N, N] matrix.

    The row of CLS, or of the last token, by which FastV (arXiv 2403.06764) and many after it rank visual tokens.

    Args:
        q: query rows [B, H, R, D]. Any strides, as for all tensors here.
        k: keys [B, Hkv, N, D] of the same floating-point dtype; Hkv divides H, and query head h reads key head
            h // (H / Hkv).
        scale: factor on q k^T, usually D ** -0.5.
        key_mask: bool, True where a key may be attended: [B, N] for all rows, or [B, R, N]. A row that may attend to
            nothing gives 0 everywhere.
        backend: None for Triton on a GPU and the reference elsewhere. The kernel has no fp64, and D up to 256: what
            it does not cover goes to the reference, or is refused where "triton" was asked for.

    Returns:
        Weights [B, H, R, N], fp32 for half-precision inputs, the input's dtype otherwise; with gradients for q and k.
        2 B H R N D floating-point operations. Triton reads each key once for each tile of 16 to 64 rows, the heads
        of a key head counted as rows, writes 4 B H R N bytes of logits, and makes weights of them in place: near
        2 B Hkv N D + 12 B H R N bytes in half precision, of which a cache takes the last two thirds. Deterministic,
        no atomics: the same inputs give the same bits on one card, as long as tuning chose the same tiles.

    Raises:
        InputError: shapes or dtypes that do not fit, or what `backend="triton"` does not cover.
    """
    check_heads(q, k)
    check_mask("key_mask", key_mask, (q.shape[0], k.shape[2]), (q.shape[0], q.shape[2], k.shape[2]))
    if _kernel_takes(q, backend):
        from vlattn.kernels import query_row_attention as kernel

        return kernel.query_row_attention(q, k, scale, key_mask)
    return reference.query_row_attention(q, k, scale, key_mask)


@overload
def received_attention(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, causal: bool = ..., key_mask: torch.Tensor | None = ...,
    query_mask: torch.Tensor | None = ..., lse: torch.Tensor | None = ..., return_max: Literal[False] = ...,
    return_lse: Literal[False] = ..., backend: Backend | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def received_attention(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, causal: bool = ..., key_mask: torch.Tensor | None = ...,
    query_mask: torch.Tensor | None = ..., lse: torch.Tensor | None = ..., return_max: bool = ...,
    return_lse: bool = ..., backend: Backend | None = ...,
) -> Any: ...  # fmt: skip
def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_max: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Attention that each key receives: the sum over queries of softmax(scale * q k^T), without the [R, N] matrix.

    The log-sum-exp of a row is the natural logarithm of the sum of exp(scale * q k^T) over the keys that it sees, -inf
    where it sees none: what flash attention leaves for its way back, and what spares a sweep over keys here.

    Args:
        q: queries [B, H, R, D]. Any strides, as for all tensors here.
        k: keys [B, Hkv, N, D] of the same floating-point dtype; Hkv divides H, and query head h reads key head
            h // (H / Hkv).
        scale: factor on q k^T, usually D ** -0.5.
        causal: let each query see keys up to its own place; the last query stands at the last key, so R <= N.
        key_mask: bool [B, N], True where a key may be attended. A query that sees no key adds nothing.
        query_mask: bool [B, R], True where a query counts; padded ones should not.
        lse: [B, H, R], the log-sum-exp of each row under the same masks, where it is known; fp32 for half precision.
            Gradients take it for an input of its own.
        return_max: also give the largest weight in each column, over the queries that count.
        return_lse: also give the log-sum-exp of each row, whether it counts or not.
        backend: None for Triton on a GPU and the reference elsewhere. The kernel has no fp64, no gradients of maxima,
            and D up to 256: what it does not cover goes to the reference, or is refused where "triton" was asked for.

    Returns:
        Sums [B, H, N], not divided by the number of queries; fp32 for half-precision inputs, the input's dtype
        otherwise; or a tuple of these, the maxima [B, H, N] if asked for, and the log-sum-exp [B, H, R] if asked for.
        With gradients for q, k and `lse`, which go through the weights again, a block of rows at a time: 6 B H R N D
        floating-point operations. Without them 4 B H R N D, 2 B H R N D with `lse`. The reference holds a fixed number
        of weights. Triton reads queries and keys, writes 4 B H (R + N) bytes, and reads each again for each tile of 16
        to 128 of the others, from a cache where that is large enough. Deterministic, no atomics: the same inputs give
        the same bits on one card, as long as tuning chose the same tiles.

    Raises:
        InputError: shapes or dtypes that do not fit, or what `backend="triton"` does not cover.
    """
    check_heads(q, k)
    check_mask("key_mask", key_mask, (q.shape[0], k.shape[2]))
    check_mask("query_mask", query_mask, (q.shape[0], q.shape[2]))
    check_size("lse", lse, *q.shape[:3])
    if causal and q.shape[2] > k.shape[2]:
        raise InputError(
            f"causal: {q.shape[2]} queries but only {k.shape[2]} keys; give the keys of every query, or causal=False"
        )
    arguments = (scale, causal, key_mask, query_mask, lse, return_max)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, lse))
    sums: torch.Tensor
    best: torch.Tensor | None
    found: torch.Tensor | None
    if _kernel_takes(q, backend, return_max and gradients):
        from vlattn.kernels import received_attention as kernel

        sums, best, found = kernel.received_attention(q, k, *arguments)
    else:
        sums, best, found = reference.received_attention(q, k, *arguments, return_lse and lse is None)
        found = found if lse is None else lse
    if not (return_max or return_lse):
        return sums
    return tuple(x for x, asked in ((sums, True), (best, return_max), (found, return_lse)) if asked and x is not None)


def flowcut_statistics(
    v: torch.Tensor,
    *,
    cls_query: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    scale: float | None = None,
    cls_attention: torch.Tensor | None = None,
    alive: torch.Tensor | None = None,
    average: torch.Tensor | None = None,
    momentum: float = 0.5,
    backend: Backend | None = None,
) -> FlowCutStatistics:
    """What FlowCut makes of an encoder layer: importance of each patch, its running average, entropy of the attention.

    "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
    With a the head-mean attention of CLS, s the head-mean of softmax(v_cls . v_j), not scaled and CLS included, and
    both scaled to sum to 1 over patches, the score is (a + s) times the L1 norm of the head-mean value.

    Args:
        v: values, bias included [B, Hkv, 1 + P, D], floating-point, CLS at slot 0. Any strides, as for all tensors
            here.
        cls_query, k, scale: the query of CLS [B, H, D], keys [B, Hkv, 1 + P, D] and the factor on their products:
            what the attention of CLS is made from in the same pass over the tokens. Hkv divides H.
        cls_attention: that attention [B, H, 1 + P] instead, softmaxed over all keys, 0 for filler.
        alive: bool [B, P], False for patches that only fill a ragged row; None for none.
        average: running average [B, P] of the layers before; None in the first.
        momentum: what of the average stays; the rest comes from this score. The first layer's score is taken whole.
        backend: None for Triton on a GPU and the reference elsewhere. The kernel has no fp64, D up to 256 and up to
            4096 tokens: what it does not cover goes to the reference, or is refused where "triton" was asked for.

    Returns:
        See `FlowCutStatistics`: fp32 for half-precision inputs, the input's dtype otherwise. No gradients: a choice of
        tokens has none. 2 B (H + Hkv) N D floating-point operations, half of that with `cls_attention`. Triton reads
        each key and value once, with a scratch of 4 B (H + Hkv) N bytes. Deterministic, no atomics: the same inputs
        give the same bits on one card, as long as tuning chose the same tiles.

    Raises:
        InputError: shapes or dtypes that do not fit, both or neither of `cls_query` and `cls_attention`, or what
            `backend="triton"` does not cover.
    """
    check_flowcut(v, cls_query, k, scale, cls_attention)
    patches = (v.shape[0], v.shape[2] - 1)
    check_mask("alive", alive, patches)
    check_size("average", average, *patches)
    arguments = (cls_query, k, scale, cls_attention, alive, average, momentum)
    with torch.no_grad():
        if uses_triton(v, backend):
            reason = _why_not_grouped(v, False)
            if v.shape[2] > MAX_TOKENS:
                reason = f"takes at most {MAX_TOKENS} tokens, not {v.shape[2]}"
            if reason is None:
                from vlattn.kernels import flowcut_statistics as kernel

                return kernel.flowcut_statistics(v, *arguments)
            _refuse_backend(backend, reason)
        return reference.flowcut_statistics(v, *arguments)


def select_tokens(
    score: torch.Tensor,
    k: int | torch.Tensor,
    *tensors: torch.Tensor,
    width: int | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, ...]:
    """Keep the `k` highest-scored tokens of each row in their original order, and gather what belongs to them.

    Args:
        score: [B, N] of any real dtype and strides. Ties go to the lower position, -0.0 ties with 0.0, and NaN counts
            as the highest score, on every backend.
        k: how many to keep, 1 <= k <= N; or int [B], how many of each row, from 0 to N.
        tensors: hidden states, positions, rotary tables, masks: any dtypes [B, N, ...], or [1, N, ...] for all rows.
            Triton reads them by their strides, and copies one first only where the dimensions behind N do not lie in
            steps of one size.
        width: columns of the result where `k` is a tensor. None is its largest number, which waits for the device; with
            a width, rows that ask for more get so many.
        backend: None for Triton on a GPU and the reference elsewhere. The kernel takes half-precision and fp32 scores
            and N up to 8192: what it does not cover goes to the reference, or is refused where "triton" was asked for.

    Returns:
        (index, *gathered): int64 [B, K], ascending, and each tensor as [B, K, ...], differentiable in the tensors. K is
        k, or the width: rows that keep fewer are padded at the end, the index with -1 and tensors with 0 or False, so
        that `index >= 0` is a mask of what is there. Selecting reads B N scores once and compares each 32 times; what
        is gathered is read and written once. No floating-point operations, no atomics: the same bits on every card.

    Raises:
        InputError: shapes, dtypes or numbers that do not fit, or what `backend="triton"` does not cover.
    """
    if score.ndim != 2:
        raise InputError(f"score: got shape {tuple(score.shape)}; give [B, N]")
    batch, tokens = score.shape
    kept = check_kept(k, width, batch, tokens)
    for number, tensor in enumerate(tensors):
        if tensor.ndim < 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != tokens:
            raise InputError(
                f"tensors: number {number} has shape {tuple(tensor.shape)}; give [{batch}, {tokens}, ...], one row for "
                "each score"
            )
    tensors = tuple(tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors)
    if uses_triton(score, backend):
        from vlattn.kernels import select_tokens as kernel

        reason = kernel.unsupported(score, tensors)
        if reason is None:
            return kernel.select_tokens(score, kept, k if isinstance(k, torch.Tensor) else None, tensors)
        _refuse_backend(backend, reason)
    return reference.select_tokens(score, k, kept, *tensors)


def gather_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    *,
    in_place: bool = False,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shorten a layer of a KV cache to the positions in `index`, the same for all heads of a row.

    Args:
        key, value: [B, Hkv, T, D] of any dtype; the value may be of another width. Any strides.
        index: int64 or int32 [B, K], positions from 0 to T - 1 in ascending order; -1 stands for a row of zeros.
        in_place: write to the first K places of `key` and `value`, and return views of these: no memory is asked for,
            and what lies behind them is left as it was. Each row of the index is then ascending, no position twice,
            with -1 at the end alone; K <= T. A CPU checks that; a GPU would have to wait, so there it is not checked.
        backend: None for Triton on a GPU and the reference elsewhere.

    Returns:
        (key, value), [B, Hkv, K, D] each. What is kept is read and written once, 4 B Hkv K D numbers in all. No
        floating-point operations, no atomics: every bit is that of the input. Gradients come from the reference.

    Raises:
        InputError: shapes or dtypes that do not fit, or on a CPU positions that do not.
    """
    check_cache(key, value, index, in_place)
    gradients = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if uses_triton(key, backend):
        from vlattn.kernels import gather_kv as kernel

        reason = "has no gradients" if gradients else kernel.unsupported(key, value)
        if reason is None:
            return kernel.gather_kv(key, value, index, in_place)
        _refuse_backend(backend, reason)
    return reference.gather_kv(key, value, index, in_place)


def pooled_probe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None = None,
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """A few queries pool many tokens: softmax(scale * query key^T) value, the tokens read once.

    Without values it is what efficient probing sums in its re-associated form ("Attention, Please! Revisiting Attentive
    Probing Through the Lens of Efficiency", arXiv 2506.10178): y_j = W_j (a_j X), with the raw tokens X as keys and
    values. With values, in heads, it is what other attentive poolers do.

    Args:
        query: [M, D] for all images or [B, M, D]; in heads [H, M, D] or [B, H, M, D].
        key: tokens [B, N, D]; in heads [B, Hkv, N, D], Hkv divides H, and query head h reads h // (H / Hkv).
        value: as the key; None for the tokens themselves.
        scale: factor on query key^T, D ** -0.5 for efficient probing.
        key_mask: bool [B, N], True where a token counts. An image in which none does gives 0.
        backend: None for Triton on a GPU and the reference elsewhere. The kernel takes half precisions and fp32, D up
            to 1024 without values and up to 256 with them: what it does not cover goes to the reference, or is refused
            where "triton" was asked for.

    Returns:
        [B, M, D], in heads [B, H, M, D], in the dtype of the key; accumulated in fp32. Any strides. Differentiable once
        in query, key and value, and under `torch.func.vmap`, which makes several sets of queries one larger set.
        4 B H M N D floating-point operations. Triton reads the tokens once for each tile of 16 or 32 queries, and
        writes B H M D numbers; the gradient of the queries reads them once more, that of the tokens once more and
        writes as many. Weights are rounded to the dtype of the tokens, as flash attention does; the reference does not.
        Deterministic, no atomics: the same inputs give the same bits on one card, as long as tuning chose the same
        tiles.

    Raises:
        InputError: shapes or dtypes that do not fit, or what `backend="triton"` does not cover.
    """
    heads = key.ndim == 4
    query, key, value = check_pool(query, key, value, key_mask)
    if uses_triton(key, backend):
        reason = pooled_sizes.unsupported(key, value)
        if reason is None:
            from vlattn.kernels import pooled_probe as kernel

            out = kernel.pooled_probe(query, key, value, scale, key_mask)
            return out if heads else out[:, 0]
        _refuse_backend(backend, reason)
    out = reference.pooled_probe(query, key, value, scale, key_mask)
    return out if heads else out[:, 0]


def _kernel_takes(q: torch.Tensor, backend: Backend | None, gradients: bool = False) -> bool:
    """Whether a call goes to Triton. gradients: whether some are wanted that the kernel does not have."""
    if not uses_triton(q, backend):
        return False
    reason = _why_not_grouped(q, gradients)
    if reason is not None:
        _refuse_backend(backend, reason)
    return reason is None


def _refuse_backend(backend: Backend | None, reason: str) -> None:
    """Refuse a backend that was asked for and does not cover the call."""
    if backend is not None:
        raise InputError(f"backend: the Triton kernel {reason}; give backend='reference'")


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    edited_rows: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    head_weights: torch.Tensor | None = None,
    redistribution: Redistribution | None = None,
    head_scale: torch.Tensor | None = None,
    lse: bool = False,
    mass: bool = False,
    partial: bool = False,
    knockout: bool = False,
    backend: Backend | None = None,
) -> GroupedAttention:
    """Attention over keys in four groups, with what each group holds and what methods make of that, in one pass.

    In this order: logits s = scale q k^T become s + gamma |s| (PAI, PAINT); one softmax over all keys gives the masses
    and partial outputs of the groups; `redistribution` moves mass between them in the rows it chooses (VAR); the output
    is multiplied by `head_scale` (VHR). All that is returned beside `output` is from before the last two.

    Sources: PAI, arXiv 2407.21771; PAINT, arXiv 2501.12206; VAR, arXiv 2503.03321; VHR, arXiv 2412.13949.

    Args:
        q: queries [B, H, R, D]. Any strides, as for all tensors here.
        k, v: keys and values [B, Hkv, N, D] of the same floating-point dtype; Hkv divides H, and query head h reads
            h // (H / Hkv).
        groups: int8 or uint8 [B, N]: 0 rest, 1 visual, 2 visual sink, 3 text sink. Other values are refused on a CPU;
            on a GPU and in compiled code only their last two bits count.
        scale: factor on q k^T, usually D ** -0.5.
        causal: let each query see keys up to its own place; the last query stands at the last key, so R <= N.
        key_mask: bool, True where a key may be attended: [B, N] for all rows, or [B, R, N].
        edited_rows: bool [B, R], the rows that `gamma` and `redistribution` act on; None for all.
        gamma: [B, N], strength by key; 0 leaves a logit as it is.
        head_weights: [B, H], what a head's strengths are multiplied by; None for 1.
        redistribution: VAR's numbers; None for none. Masked keys count among those `eps` is added for.
        head_scale: [B, H].
        lse, mass, partial, knockout: what else is wanted; `knockout` is `without` and `shift`.
        backend: None for Triton on a GPU and the reference elsewhere. The kernel has no gradients, and D up to 256:
            what it does not cover goes to the reference, or is refused where "triton" was asked for.

    Returns:
        See `GroupedAttention`. Rows that may attend to nothing give 0 (-inf as `lse`). 4 B H R N D floating-point
        operations. Triton reads each key and value once for each tile of 16 to 128 rows, the heads of a key head
        counted as rows, and a mask [B, R, N] once for each key head. It writes the results and, where tiles alone would
        leave a card idle, the sums of a few splits of the keys; nothing of size R N. In half precision it rounds
        weights to the dtype of v, as flash attention does; the reference does not, and holds a fixed number of weights.
        Deterministic, no atomics: the same inputs give the same bits on one card, as long as tuning chose the same
        tiles.

    Raises:
        InputError: shapes, dtypes or values that do not fit, or what `backend="triton"` does not cover.
    """
    (batch, heads, rows), keys = q.shape[:3] if q.ndim == 4 else (0, 0, 0), k.shape[2] if k.ndim == 4 else 0
    check_heads(q, k)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise InputError(f"v: got {v.dtype} {tuple(v.shape)}; give one value for each key, {k.dtype} {tuple(k.shape)}")
    check_groups(groups, batch, keys)
    check_mask("key_mask", key_mask, (batch, keys), (batch, rows, keys))
    check_mask("edited_rows", edited_rows, (batch, rows))
    check_size("gamma", gamma, batch, keys)
    check_size("head_weights", head_weights, batch, heads)
    check_size("head_scale", head_scale, batch, heads)
    if causal and rows > keys:
        raise InputError(f"causal: {rows} queries but only {keys} keys; give the keys of every query, or causal=False")
    arguments = (scale, causal, key_mask, edited_rows, gamma, head_weights, redistribution, head_scale, lse, mass)
    if uses_triton(q, backend):
        inputs = (q, k, v, gamma, head_weights, head_scale)
        gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        reason = _why_not_grouped(q, gradients)
        if reason is None:
            from vlattn.kernels import grouped_attention as kernel

            return kernel.grouped_attention(q, k, v, groups, *arguments, partial, knockout)
        _refuse_backend(backend, reason)
    return reference.grouped_attention(q, k, v, groups, *arguments, partial, knockout)


def _why_not_grouped(q: torch.Tensor, gradients: bool) -> str | None:
    """What of a call of `grouped_attention` its Triton kernel does not cover."""
    if gradients:
        return "has no gradients"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"has no {q.dtype}"
    if q.shape[-1] > MAX_WIDTH:
        return f"takes heads of at most {MAX_WIDTH} channels, not {q.shape[-1]}"
    return None


def head_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply the output of each head by its factor, as VHR does in front of the output projection.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949. PyTorch on every
    device, with gradients: one product under broadcasting. Where attention is computed too,
    `grouped_attention(..., head_scale=...)` costs no extra pass.

    Args:
        x: [B, T, H * D] of any floating-point dtype and strides, head h in channels h D to (h + 1) D.
        scale: [B, H], taken in the dtype of x.

    Returns:
        [B, T, H * D], in the dtype of x. B T H D multiplications, each number read and written once. Deterministic.

    Raises:
        InputError: shapes that do not belong together.
    """
    fits = x.ndim == 3 and scale.ndim == 2 and x.shape[0] == scale.shape[0] and scale.shape[1] > 0
    if not fits or x.shape[2] % scale.shape[1]:
        raise InputError(
            f"x and scale: expected [B, T, H * D] and [B, H], got {tuple(x.shape)} and {tuple(scale.shape)}"
        )
    return reference.head_scale(x, scale)
