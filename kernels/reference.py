"""The definitions: every op of `vlattn.ops` in plain PyTorch, accumulated in fp32 (fp64 stays), written to be read."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vlattn.kernels.reference_flowcut_statistics import FlowCutStatistics, from_row
from vlattn.kernels.reference_grouped_attention import grouped_attention as grouped_attention
from vlattn.kernels.reference_grouped_attention import head_scale as head_scale

ROW_BLOCK = 128
"""Query rows whose weights exist at one time where a method goes through a matrix in blocks of rows."""

CPU_BLOCK, DEVICE_BLOCK = 2**19, 2**25
"""Weights that exist at one time in `received_attention`: on a CPU what its cache holds, elsewhere more."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def softmax_over(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """softmax over the keys in `seen` (bool, broadcast to the logits); 0, not NaN, in a row that may attend to none."""
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale * q k^T) for a few query rows; see `vlattn.ops.query_row_attention`."""
    dtype = accumulation_dtype(q.dtype)
    batch, heads, rows, width = q.shape
    # Query heads that share a key head become rows of one product; keys are never repeated.
    grouped = q.to(dtype).reshape(batch, k.shape[1], heads // k.shape[1] * rows, width)  # [B, Hkv, H / Hkv * R, D]
    # Contiguous at once: keys come as views of [B, N, H, D], which a batched product would copy again.
    keys = k.to(dtype, memory_format=torch.contiguous_format)
    logits = (grouped @ keys.transpose(-1, -2)) * scale  # [B, Hkv, H / Hkv * R, N]
    logits = logits.view(batch, heads, rows, k.shape[2])  # [B, H, R, N]
    if key_mask is None:
        return logits.softmax(-1)
    return softmax_over(logits, key_mask[:, None] if key_mask.ndim == 3 else key_mask[:, None, None])


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    maxima: bool = False,
    rows_too: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Column sums of the attention matrix, column maxima, and the log-sum-exp of each row, a block of rows at a time.

    See `vlattn.ops.received_attention`. What is not asked for is None.
    """
    batch, heads, rows, width = q.shape
    groups, keys, dtype = k.shape[1], k.shape[2], accumulation_dtype(q.dtype)
    share = heads // groups
    # One leading dimension for prompts and key heads, so that a block is a few of them by a few rows.
    query = (q.to(dtype) * scale).reshape(batch * groups, share, rows, width)
    key = k.to(dtype).reshape(batch * groups, keys, width).transpose(1, 2)  # [B Hkv, D, N]
    total = query.new_zeros(batch * groups, share, keys)
    best = torch.zeros_like(total) if maxima else None
    levels = None if lse is None else lse.to(dtype).reshape(batch * groups, share, rows)
    found = query.new_empty(batch * groups, share, rows) if rows_too else None
    prompt = torch.arange(batch, device=q.device).repeat_interleave(groups)
    position = torch.arange(keys, device=q.device)
    limit = CPU_BLOCK if q.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, min(rows, limit // max(share * keys, 1)))
    some = max(1, limit // max(share * step * keys, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        # Under a causal mask no row of this block sees beyond its last.
        end = stop + keys - rows if causal else keys
        past = position[:end] <= torch.arange(start, stop, device=q.device)[:, None] + keys - rows  # [r, n]
        for first in range(0, batch * groups, some):
            here = slice(first, first + some)
            block = query[here, :, start:stop].flatten(1, 2) @ key[here, :, :end]
            weights = block.view(block.shape[0], share, stop - start, end)  # [p, H / Hkv, r, n]
            seen = None if key_mask is None else key_mask[prompt[here], None, None, :end]
            if causal:
                seen = past if seen is None else seen & past
            if found is not None:
                logits = weights if seen is None else weights.masked_fill(~seen, -torch.inf)
                found[here, :, start:stop] = logits.logsumexp(-1)
            if levels is not None:
                level = levels[here, :, start:stop, None]
                unseen = level.isneginf() if seen is None else level.isneginf() | ~seen
                weights = (weights - level).masked_fill(unseen, -torch.inf).exp()
            else:
                weights = weights.softmax(-1) if seen is None else softmax_over(weights, seen)
            if query_mask is not None:
                weights = weights.masked_fill(~query_mask[prompt[here], None, start:stop, None], 0)
            total[here, :, :end] += weights.sum(2)
            if best is not None:
                best[here, :, :end] = torch.maximum(best[here, :, :end].clone(), weights.amax(2))
    found = None if found is None else found.view(batch, heads, rows)
    return total.view(batch, heads, keys), None if best is None else best.view(batch, heads, keys), found


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
    """FlowCut's numbers of one layer; see `vlattn.ops.flowcut_statistics`."""
    dtype = accumulation_dtype(v.dtype)
    if cls_attention is None:
        assert cls_query is not None
        assert k is not None
        assert scale is not None
        keys = None if alive is None else F.pad(alive, (1, 0), value=True)
        cls_attention = query_row_attention(cls_query[:, :, None], k, scale, keys)[:, :, 0]
    values = v.to(dtype, memory_format=torch.contiguous_format)
    return from_row(values, cls_attention.to(dtype), alive, average, momentum)


def select_tokens(
    score: torch.Tensor, k: int | torch.Tensor, width: int, *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Top-k per row in ascending order of position, and the rows gathered; see `vlattn.ops.select_tokens`."""
    # A stable sort, so that ties go to the lower position on every device.
    best = score.sort(dim=-1, descending=True, stable=True).indices[:, :width]  # [B, width]
    if not isinstance(k, torch.Tensor):
        index = best.sort(dim=-1).values
        return (index, *(_rows_at(t, index, 1) for t in tensors))
    tokens = score.shape[1]
    rank = torch.arange(width, device=score.device)
    index = best.masked_fill(rank >= k[:, None], tokens).sort(dim=-1).values  # what is too much comes last
    index = index.masked_fill(index == tokens, -1)
    return (index, *(_rows_or_zeros(t, index, 1) for t in tensors))


def gather_kv(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a cache layer at `index`; see `vlattn.ops.gather_kv`."""
    if not in_place:
        return _rows_or_zeros(key, index, 2), _rows_or_zeros(value, index, 2)
    kept = index.shape[1]
    for x in (key, value):  # one after the other: no more than one of them is held twice
        x[:, :, :kept].copy_(_rows_or_zeros(x, index, 2))
    return key[:, :, :kept], value[:, :, :kept]


def pooled_probe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T) value, all in four dimensions; see `vlattn.ops.pooled_probe`."""
    dtype = accumulation_dtype(key.dtype)
    share = query.shape[1] // key.shape[1]
    # Query heads that share a key head become rows of one product.
    rows = query.to(dtype).unflatten(1, (key.shape[1], share)).flatten(2, 3)  # [B or 1, Hkv, H / Hkv * M, D]
    logits = rows @ key.to(dtype).mT * scale  # [B, Hkv, H / Hkv * M, N]
    weights = logits.softmax(-1) if key_mask is None else softmax_over(logits, key_mask[:, None, None])
    out = weights @ (key if value is None else value).to(dtype)
    return out.unflatten(2, (share, query.shape[2])).flatten(1, 2).to(key.dtype)


def _rows_at(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of x [B, ..., N, ...], N at `dim`, at index [B, K]."""
    before, (n, *after) = x.shape[:dim], x.shape[dim:]
    places = index.reshape(len(index), *[1] * (dim - 1), -1).expand(*before, -1)  # [B, ..., K]
    if x.is_contiguous():  # rows are copied whole, which is faster than a gather of single numbers
        start = torch.arange(before.numel(), device=x.device).view(*before, 1) * n
        return x.reshape(-1, *after).index_select(0, (start + places).flatten()).view(*places.shape, *after)
    return x.gather(dim, places.reshape(*places.shape, *[1] * len(after)).expand(*places.shape, *after))


def _rows_or_zeros(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """`_rows_at`, with zeros where the index is -1."""
    missing = (index < 0).reshape(len(index), *[1] * (dim - 1), -1, *[1] * (x.ndim - dim - 1))
    return _rows_at(x, index.long().clamp(min=0), dim).masked_fill_(missing, 0)
