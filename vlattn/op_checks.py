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
    if q.dtype != k.dtype:
        raise InputError(f"q and k: {q.dtype} against {k.dtype}; give both in one dtype")


def check_mask(name: str, mask: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in shapes):
        expected = " or ".join(map(str, shapes))
        raise InputError(f"{name}: got {mask.dtype} {tuple(mask.shape)}; give bool {expected}, True where it counts")
