"""Configurations of the kernels of `pooled_probe`, by the width of tokens."""

from __future__ import annotations

from typing import Any

import triton

from vlattn.kernels.compilation import Compilation
from vlattn.kernels.pooled_kernels import backward_query, backward_tokens, forward
from vlattn.kernels.pooled_sizes import MAX_OWN_VALUES

KERNELS = {"forward": forward, "backward_query": backward_query, "backward_tokens": backward_tokens}
WIDTHS = (64, 128, 256, 512, 1024)


def _configs(width: int, several: list[tuple[int, int, int, int, int]]) -> list[triton.Config]:
    """From queries and tokens of a tile, channels of a piece, warps and stages."""
    return [
        triton.Config(
            {"BLOCK_M": rows, "BLOCK_N": tokens, "CHUNKS": width // piece, "CHUNK": piece},
            num_warps=warps, num_stages=stages,
        )
        for rows, tokens, piece, warps, stages in several
    ]  # fmt: skip


# Two or three each. Others spill registers or take more shared memory than an A100 has.
_HALF = {
    "forward": {
        64: [(32, 32, 32, 4, 3), (16, 32, 32, 4, 3)],
        128: [(32, 16, 32, 4, 3), (16, 32, 32, 4, 3)],
        256: [(32, 32, 32, 8, 3), (16, 32, 32, 8, 3)],
        512: [(32, 32, 64, 8, 3), (16, 32, 64, 8, 3)],
        1024: [(32, 16, 128, 8, 3), (16, 16, 128, 8, 3), (16, 16, 64, 16, 3)],
    },
    "backward_query": {
        64: [(32, 32, 32, 4, 3), (16, 16, 64, 4, 3)],
        128: [(32, 32, 32, 4, 3), (16, 32, 128, 4, 3)],
        256: [(32, 32, 32, 8, 3), (16, 32, 32, 8, 3)],
        512: [(16, 32, 64, 8, 3), (16, 16, 64, 8, 3)],
        1024: [(16, 16, 128, 8, 3), (16, 16, 128, 8, 2)],
    },
    "backward_tokens": {
        64: [(32, 32, 32, 4, 2), (16, 16, 32, 4, 2)],
        128: [(32, 32, 32, 4, 2), (16, 16, 32, 4, 2)],
        256: [(32, 32, 32, 8, 2), (16, 32, 32, 8, 2)],
        512: [(16, 32, 64, 8, 2), (16, 16, 64, 8, 2)],
        1024: [(16, 16, 128, 8, 2), (16, 16, 128, 8, 1)],
    },
}
_FP32 = {
    "forward": {
        **{width: [(16, 16, 32, warps, 1)] for width, warps in ((64, 4), (128, 4), (256, 8), (512, 16))},
        1024: [(16, 16, 64, 16, 1), (16, 16, 32, 8, 1)],
    },
    "backward_query": {
        **{width: [(8, 16, 32, warps, 1)] for width, warps in ((64, 4), (128, 4), (256, 8))},
        512: [(4, 16, 32, 16, 1)],
        1024: [(4, 16, 32, 16, 1)],
    },
    "backward_tokens": {
        **{width: [(16, 16, 32, warps, 1)] for width, warps in ((64, 4), (128, 4), (256, 8))},
        512: [(16, 8, 32, 16, 1)],
        1024: [(16, 4, 32, 16, 1)],
    },
}
CONFIGS: dict[tuple[str, int, bool], list[triton.Config]] = {
    (kernel, width, fp32): _configs(width, table[kernel][width])
    for fp32, table in ((False, _HALF), (True, _FP32))
    for kernel in KERNELS
    for width in WIDTHS
}
"""{(kernel, width rounded up, fp32): configurations}."""


def rounded_width(width: int) -> int:
    return next(most for most in WIDTHS if width <= most)


def compilations() -> list[Compilation]:
    """Every configuration, for tokens that are their own values and, where they may be given, for others."""
    return [
        _compilation(kernel, width, fp32, own, config)
        for (kernel, width, fp32), configs in CONFIGS.items()
        for own in ((False, True) if width <= MAX_OWN_VALUES else (False,))
        for config in configs
    ]


def _compilation(kernel: str, width: int, fp32: bool, own: bool, config: triton.Config) -> Compilation:
    half = "*fp32" if fp32 else "*bf16"
    types = dict.fromkeys(("q", "k", "v", "grad", "k_grad", "v_grad"), half) | {"mask": "*u8"}
    types |= {"out": half if kernel == "forward" else "*fp32", "lse": "*fp32", "delta": "*fp32"}
    types |= {"scale": "fp32", "factor": "fp32"}
    strides = [f"{name}_{letter}" for name, letters in (("q", "bhm"), ("k", "bhn"), ("v", "bhn")) for letter in letters]
    constants: dict[str, Any] = {"q_d": 1, "k_d": 1, "v_d": 1, "mask_n": 1}
    if not own:
        constants |= dict.fromkeys(("v", "v_grad", "v_b", "v_h", "v_n", "v_d"))
    # A wide token is as wide as a model; one that fills its pieces takes no less.
    constants |= {"SHARE": 1, "WIDTH": 768 if width == 1024 else width, **config.kwargs}
    names = KERNELS[kernel].arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: types.get(name, "i32") for name in names if name not in constants}
    tiles = "x".join(str(config.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N", "CHUNKS", "CHUNK"))
    return Compilation(
        f"{kernel} {half[1:]} D{width}{' values' if own else ''} {tiles} warps{config.num_warps}x{config.num_stages}",
        KERNELS[kernel], signature, constants, config.num_warps, config.num_stages,
        [name for name, kind in signature.items() if kind.startswith("*") or name in (*strides, "mask_b")],
    )  # fmt: skip
