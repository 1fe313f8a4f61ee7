"""Shapes and dtypes that the ops of `vlattn.ops` share, refused by the name of the argument."""

from __future__ import annotations

import torch

from vlattn.errors import InputError


def check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise InputError(
            f"q and k: expected [B, H, R, D] and [B, Hkv, N, D], got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"k: its {k.shape[1]} heads do not divide the {q.shape[1]} of q; give one per group of q's")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise InputError(f"q and k: {q.dtype} against {k.dtype}; give both in one floating-point dtype")


def check_mask(name: str, mask: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in shapes):
        expected = " or ".join(map(str, shapes))
        raise InputError(f"{name}: got {mask.dtype} {tuple(mask.shape)}; give bool {expected}, True where it counts")


def check_flowcut(
    v: torch.Tensor,
    cls_query: torch.Tensor | None,
    k: torch.Tensor | None,
    scale: float | None,
    cls_attention: torch.Tensor | None,
) -> None:
    """The attention of CLS, or what it is made from, beside values."""
    if v.ndim != 4 or not v.is_floating_point() or v.shape[1] == 0 or v.shape[2] == 0:
        raise InputError(f"v: got {v.dtype} {tuple(v.shape)}; give floating-point numbers [B, H, 1 + P, D]")
    batch, _, tokens, width = v.shape
    if cls_attention is not None:
        if cls_query is not None or k is not None:
            raise InputError("cls_attention: given beside cls_query or k, of which it would be made; leave one out")
        heads = cls_attention.shape[1] if cls_attention.ndim == 3 else 0
        check_size("cls_attention", cls_attention, batch, heads, tokens)
        return
    if cls_query is None or k is None or scale is None:
        raise InputError("cls_query, k and scale: give all three, or the attention of CLS as cls_attention")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise InputError(f"k: got {k.dtype} {tuple(k.shape)}; give one key for each value, {v.dtype} {tuple(v.shape)}")
    if cls_query.ndim != 3 or cls_query.shape[::2] != (batch, width):
        raise InputError(f"cls_query: got {tuple(cls_query.shape)}; give [B, H, D], the query of CLS alone")
    check_heads(cls_query[:, :, None], k)


def check_size(name: str, x: torch.Tensor | None, *shape: int) -> None:
    if x is not None and (tuple(x.shape) != shape or not x.is_floating_point()):
        raise InputError(f"{name}: got {x.dtype} {tuple(x.shape)}; give floating-point numbers {shape}")


def check_groups(groups: torch.Tensor, *shape: int) -> None:
    """Values too, but on a GPU, which that would wait for, and in a compiled graph, which it would break."""
    if tuple(groups.shape) != shape or groups.dtype not in (torch.int8, torch.uint8):
        raise InputError(f"groups: got {groups.dtype} {tuple(groups.shape)}; give int8 or uint8 {shape}")
    seen = groups.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and bool(((groups < 0) | (groups > 3)).any()):
        raise InputError("groups: some are not in 0 to 3 (rest, visual, visual sink, text sink); give these")


def check_kept(k: int | torch.Tensor, width: int | None, batch: int, tokens: int) -> int:
    """Columns of what `select_tokens` gives: k itself, or the most that any row keeps."""
    if not isinstance(k, torch.Tensor):
        if width is not None:
            raise InputError(f"width: got {width} for k={k}, the same of each row; leave it out")
        if not 1 <= k <= tokens:
            raise InputError(f"k: got {k} for scores of shape {(batch, tokens)}; give 1 <= k <= N")
        return k
    if k.shape != (batch,) or k.dtype not in (torch.int32, torch.int64):
        raise InputError(f"k: got {k.dtype} {tuple(k.shape)}; give a number, or int64 ({batch},), one for each row")
    if width is not None:
        if not 0 <= width <= tokens:
            raise InputError(f"width: got {width} for rows of {tokens} tokens; give 0 <= width <= N")
        return width
    least, most = (int(x) for x in torch.aminmax(k)) if batch else (0, 0)
    if least < 0 or most > tokens:
        raise InputError(f"k: got {least} to {most} for rows of {tokens} tokens; give 0 <= k <= N")
    return most


def check_cache(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, in_place: bool) -> None:
    if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise InputError(f"key and value: expected [B, Hkv, T, D], got {tuple(key.shape)} and {tuple(value.shape)}")
    batch, _, tokens, _ = key.shape
    if index.ndim != 2 or index.shape[0] != batch or index.dtype not in (torch.int32, torch.int64):
        raise InputError(f"index: got {index.dtype} {tuple(index.shape)}; give int64 ({batch}, K), positions to keep")
    if in_place and index.shape[1] > tokens:
        raise InputError(f"index: {index.shape[1]} positions do not fit into {tokens} places; give in_place=False")
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    if int(index.min()) < -1 or int(index.max()) >= tokens:
        raise InputError(
            f"index: got {int(index.min())} to {int(index.max())} for {tokens} positions; give 0 to {tokens - 1}, or "
            "-1 for a row of zeros"
        )
    if in_place:
        before, after = index[:, :-1], index[:, 1:]
        if not bool(((after == -1) | ((before < after) & (before >= 0))).all()):
            raise InputError("index: in place, each row has to be ascending, no position twice, -1 at the end alone")


def check_pool(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """query [B or 1, H, M, D], key and value [B, Hkv, N, D], from what `pooled_probe` takes."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if key.ndim not in (3, 4) or query.ndim not in (key.ndim - 1, key.ndim) or query.shape[-1] != key.shape[-1]:
        raise InputError(
            f"query and key: got {shapes}; give [M, D] or [B, M, D] and [B, N, D], or [H, M, D] or [B, H, M, D] and "
            "[B, Hkv, N, D]"
        )
    if value is not None and (value.shape != key.shape or value.dtype != key.dtype):
        raise InputError(f"value: got {value.dtype} {tuple(value.shape)}; give {key.dtype} {tuple(key.shape)}")
    if query.dtype != key.dtype or not key.is_floating_point():
        raise InputError(f"query and key: got {query.dtype} and {key.dtype}; give both in one floating-point dtype")
    if query.ndim == key.ndim and query.shape[0] != key.shape[0]:
        raise InputError(f"query: got {shapes}; give queries of each image, or leave out the first dimension")
    if key.shape[-2] == 0:
        raise InputError(f"key: got {tuple(key.shape)}; give at least one token")
    query = query if query.ndim == key.ndim else query[None]
    if key.ndim == 3:
        query, key, value = query[:, None], key[:, None], None if value is None else value[:, None]
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise InputError(f"key: its {key.shape[1]} heads do not divide the {query.shape[1]} of the query")
    check_mask("key_mask", key_mask, (key.shape[0], key.shape[2]))
    return query, key, value
