"""EP's re-associated form for tokens that need no gradient: four products with the tokens a step, and no copy of them.

Tokens are by far the largest tensor, and every product with them is skinny, so that a step costs what reading them
costs. Autograd would read and write more: here the softmax's backward takes its row sums from the feature, since
sum_n a_jn <dP_j, x_n> = <dP_j, P_j> = <dy_j, y_j>, and every gradient is born in the layout that the next product
takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_PART = 3 * 2**19  # bytes


def frozen_ep(tokens: torch.Tensor, query: torch.Tensor, slices: torch.Tensor, scale: float) -> torch.Tensor:
    """y_j = slices_j P_j with P = softmax(scale * query tokens^T) tokens, all in one dtype, the softmax in fp32.

    Args:
        tokens: [B, N, D], taken as constant.
        query: [M, D].
        slices: [M, C, D], the value projection's rows of each query.
        scale: factor on the scores.

    Returns:
        [B, M C]. Differentiable once in query and slices; under vmap, sets of queries become one larger set.
    """
    return _FrozenEP.apply(tokens.contiguous(), query, slices, scale)[0]


class _FrozenEP(torch.autograd.Function):
    """The feature, and for backward the weights [B, M, N] and the sums P [B, M, D]."""

    @staticmethod
    def forward(
        tokens: torch.Tensor, query: torch.Tensor, slices: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (images, count, dim), queries, scaled = tokens.shape, len(query), query * scale
        weights = tokens.new_empty(images, queries, count, dtype=torch.promote_types(tokens.dtype, torch.float32))
        sums = tokens.new_empty(images, queries, dim)
        for part in _parts(sums):
            here = tokens[part]
            scores = F.linear(here.flatten(0, 1), scaled).unflatten(0, here.shape[:2])  # [b, N, M]
            weights[part] = scores.mT.contiguous().softmax(2, dtype=weights.dtype)
            torch.bmm(weights[part].to(tokens.dtype), here, out=sums[part])
        feature = torch.bmm(sums.transpose(0, 1), slices.mT).transpose(0, 1).flatten(1)
        return feature, weights, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        tokens, _, slices, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward is handed zeros as large as weights and sums
        ctx.save_for_backward(tokens, slices, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:  # the feature was not used
            return None, None, None, None
        tokens, slices, feature, weights, sums = ctx.saved_tensors
        queries = len(slices)
        rows = (grad * feature).unflatten(1, (queries, -1)).sum(-1)  # [B, M]
        grad = grad.unflatten(1, (queries, -1)).transpose(0, 1).contiguous()  # [M, B, C]
        slices_grad = torch.bmm(grad.mT, sums.transpose(0, 1))
        query_grad = tokens.new_zeros(queries, tokens.shape[2], dtype=weights.dtype)
        for part in _parts(sums):
            sums_grad = torch.bmm(grad[:, part], slices).permute(1, 2, 0)  # [b, D, M]
            scores_grad = torch.bmm(tokens[part], sums_grad).sub_(rows[part, None])  # [b, N, M]
            scores_grad = scores_grad.mT.contiguous().mul_(weights[part])
            query_grad = query_grad + torch.bmm(scores_grad, tokens[part]).sum(0, dtype=weights.dtype)
        return None, (query_grad * ctx.scale).to(tokens.dtype), slices_grad, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        tokens: torch.Tensor,
        query: torch.Tensor,
        slices: torch.Tensor,
        scale: float,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        several = [
            x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            for x, at in zip((tokens, query, slices), in_dims, strict=False)
        ]
        if in_dims[0] is None:
            sets = (info.batch_size, -1)
            flat = [x.flatten(0, 1) for x in several[1:]]
            feature, weights, sums = _FrozenEP.apply(tokens, *flat, scale)
            return (feature.unflatten(1, sets), weights.unflatten(1, sets), sums.unflatten(1, sets)), (1, 1, 1)
        done = [_FrozenEP.apply(*one, scale) for one in zip(*several, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*done, strict=True)), (0, 0, 0)


def _parts(sums: torch.Tensor) -> list[slice]:
    """Slices of the batch whose sums are small enough that memory for their gradient is reused, not asked for anew."""
    step = max(1, len(sums))
    if sums.device.type == "cpu":
        step = max(1, _PART // (sums.shape[1] * sums.shape[2] * sums.element_size()))
    return [slice(start, start + step) for start in range(0, len(sums), step)]
