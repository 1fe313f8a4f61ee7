"""`gather_kv` on Triton: keys and values of a cache layer by index, into new memory or into their own.

Copies: no arithmetic, nothing added atomically, so every bit is that of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from vlattn.kernels.compilation import Compilation
from vlattn.kernels.gather_kernels import compact, gather
from vlattn.kernels.launch import Tuned

SLOTS = 4
"""Tensors that one launch copies."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CONFIGS = [
    triton.Config({"BLOCK_K": rows, "BLOCK_W": columns}, num_warps=warps)
    for rows, columns, warps in ((4, 1024, 4), (8, 512, 4), (16, 128, 4), (4, 2048, 8))
]
# One, which is never timed: a kernel that works in its own memory must run once.
IN_PLACE = triton.Config({"BLOCK_K": 64, "BLOCK_W": 64}, num_warps=4)
_GATHER = Tuned(gather, CONFIGS, ["WIDEST"])
_COMPACT = Tuned(compact, [IN_PLACE], [])


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that kernels know few types and move each bit as it is."""
    return x if x.dtype == BITS[x.element_size()] else x.view(BITS[x.element_size()])


def gather_rows(index: torch.Tensor, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rows of each source [B, H, N, W] at index [B, K], [B, H, K, W]; zeros where the index is -1."""
    targets = [x.new_empty(*x.shape[:2], index.shape[1], x.shape[3]) for x in sources]
    pairs = [(x, y) for x, y in zip(sources, targets, strict=True) if y.numel()]
    for first in range(0, len(pairs), SLOTS):
        some = pairs[first : first + SLOTS]
        slots: list[Any] = []
        rounds: dict[str, int | None] = {f"ROUND{i}": None for i in range(SLOTS)}
        for i, (x, y) in enumerate(some):
            slots += [as_bits(x), as_bits(y), x.shape[3], *x.stride()]
            rounds[f"ROUND{i}"] = triton.next_power_of_2(x.shape[3])
        slots += [None] * (7 * (SLOTS - len(some)))
        widest = max(size for size in rounds.values() if size is not None)
        batch, heads, tokens, _ = some[0][0].shape

        def grid(c: dict[str, Any], pairs: int = batch * heads) -> tuple[int, ...]:
            return (triton.cdiv(index.shape[1], c["BLOCK_K"]) * pairs,)

        _GATHER(grid, index, index.shape[1], tokens, heads, *index.stride(), *slots, WIDEST=widest, **rounds)
    return targets


@torch.library.custom_op("vlattn::gather_kv", mutates_args=())
def _gather_kv(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new_key, new_value = gather_rows(index, [key, value])
    return new_key, new_value


@_gather_kv.register_fake
def _(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads = key.shape[:2]
    shape = (batch, heads, index.shape[1])
    return key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])


@torch.library.custom_op("vlattn::gather_kv_", mutates_args=("key", "value"))
def _gather_kv_in_place(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> None:
    batch, heads, tokens, _ = key.shape
    if not (batch * heads * index.shape[1]):
        return
    widest = max(key.shape[3], value.shape[3])
    _COMPACT(
        lambda c: (batch * heads, triton.cdiv(widest, c["BLOCK_W"])),
        index, index.shape[1], tokens, heads, *index.stride(),
        as_bits(key), key.shape[3], *key.stride(), as_bits(value), value.shape[3], *value.stride(),
    )  # fmt: skip


@_gather_kv_in_place.register_fake
def _(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> None:
    return None


@register_flop_formula([torch.ops.vlattn.gather_kv, torch.ops.vlattn.gather_kv_])
def _flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 0


def unsupported(*tensors: torch.Tensor) -> str | None:
    """What of a call the kernels do not cover."""
    return None if all(x.element_size() in BITS for x in tensors) else "copies numbers of at most 8 bytes"


def gather_kv(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A shorter layer of a KV cache; see `vlattn.ops.gather_kv`."""
    if not in_place:
        made: tuple[torch.Tensor, torch.Tensor] = torch.ops.vlattn.gather_kv(key, value, index)
        return made
    torch.ops.vlattn.gather_kv_(key, value, index)
    return key[:, :, : index.shape[1]], value[:, :, : index.shape[1]]


def compilations() -> list[Compilation]:
    """Every configuration for hidden states, rotary tables and masks at once, for a cache layer, and in place."""
    found = []
    numbers = ("kept", "tokens", "heads")
    for title, slots in (
        ("tokens", (("*i16", 4096), ("*i64", 1), ("*i32", 128), ("*u8", 1))),
        ("kv", (("*i16", 128),) * 2),
    ):
        types = dict.fromkeys(numbers, "i32") | {"index": "*i64", "index_b": "i32"}
        constants: dict[str, Any] = {"index_k": 1, "WIDEST": max(width for _, width in slots)}
        for i in range(SLOTS):
            own = [f"{name}{i}" for name in ("source", "target", "width", "b", "h", "n")]
            if i < len(slots):
                kind, width = slots[i]
                types |= dict.fromkeys(own[:2], kind) | dict.fromkeys(own[2:], "i32")
                constants |= {f"w{i}": 1, f"ROUND{i}": width}
            else:
                constants |= dict.fromkeys([*own, f"w{i}", f"ROUND{i}"])
        aligned = [name for name, kind in types.items() if name not in numbers]
        for config in CONFIGS:
            name = f"gather {title} {config.kwargs['BLOCK_K']}x{config.kwargs['BLOCK_W']}"
            found.append(
                Compilation(
                    name, gather, types, constants | config.kwargs, config.num_warps, config.num_stages, aligned
                )
            )
    for kind in ("*i16", "*i32"):
        types = dict.fromkeys((*numbers, "key_width", "value_width"), "i32") | {"index": "*i64", "index_b": "i32"}
        for name in ("key", "value"):
            types |= {name: kind} | dict.fromkeys([f"{name}_{letter}" for letter in "bhn"], "i32")
        constants = {"index_k": 1, "key_d": 1, "value_d": 1, **IN_PLACE.kwargs}
        aligned = [name for name in types if name not in numbers]
        found.append(Compilation(f"compact {kind[1:]}", compact, types, constants, IN_PLACE.num_warps, 2, aligned))
    return found
