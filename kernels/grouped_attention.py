"""`grouped_attention` on Triton: attention over keys in four groups from one online softmax, and what is made of it.

Prefill and decode are one kernel: query heads that share a key head lie in one tile, and where there are few tiles the
keys are split over programs, which a second kernel merges. Nothing is added atomically: the same inputs give the same
bits on one card under one configuration. No gradients: `vlattn.ops` leaves those to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from vlattn.kernels.compilation import Compilation
from vlattn.kernels.grouped_finish import merge
from vlattn.kernels.grouped_kernels import attend
from vlattn.kernels.grouped_types import GroupedAttention, Redistribution, sink_slack
from vlattn.kernels.launch import Tuned

SPLIT = 128
"""Keys of a split are a multiple of this, which every tile of keys divides."""


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)


FEW = 16
"""Up to as many rows, query heads of a key head counted apart, tiles have 16: decode steps."""
CONFIGS: dict[tuple[str, int], list[triton.Config]] = {
    ("few", 384): [_config(16, 64, 8, 3), _config(16, 32, 8, 3), _config(16, 32, 4, 3)],
    ("few", 1024): [_config(16, 64, 8, 3), _config(16, 32, 8, 3)],
    ("many", 64): [_config(128, 64, 8, 3), _config(128, 64, 8, 2), _config(64, 64, 4, 3), _config(64, 64, 8, 2)],
    ("many", 128): [_config(64, 64, 8, 2), _config(128, 32, 8, 2), _config(64, 32, 4, 2), _config(32, 64, 8, 2)],
    ("many", 256): [_config(64, 64, 8, 2), _config(64, 32, 8, 2), _config(32, 64, 8, 2), _config(32, 32, 4, 2)],
    ("many", 384): [_config(64, 32, 8, 2), _config(32, 64, 8, 2)],
    ("many", 512): [_config(32, 64, 8, 2)],
    ("by row", 192): [_config(64, 64, 8, 2), _config(32, 64, 8, 2)],
    ("by row", 512): [_config(32, 32, 8, 2), _config(16, 64, 8, 2)],
    ("wide", 256): [_config(64, 32, 8, 2), _config(32, 64, 8, 2)],
    ("wide", 1024): [_config(16, 64, 8, 2)],
    ("fp32, 1 set", 256): [_config(16, 32, 8, 2)],
    ("fp32, 2 sets", 256): [_config(16, 32, 8, 2)],
    ("fp32, 2 sets", 512): [_config(16, 32, 8, 1)],
    ("fp32, 3 sets", 192): [_config(16, 32, 8, 2)],
    ("fp32, 3 sets", 384): [_config(16, 16, 4, 2)],
    ("fp32, 3 sets", 768): [_config(16, 32, 8, 1)],
    ("fp32, 4 sets", 1024): [_config(16, 16, 8, 2)],
}
"""{(kind, the most numbers that the sums of a row are): configurations}; others spill registers on sm_80 or sm_90.

by row: wider sums under a mask of their own for each row, whose tiles take registers.
"""
_KEY = ["KEYS", "ROWS", "WIDTH", "SETS", "CAUSAL", "MASK"]
_ATTEND = {kind: Tuned(attend, configs, _KEY) for kind, configs in CONFIGS.items()}
_MERGE = Tuned(merge, [triton.Config({"BLOCK_M": 4}, num_warps=4)], ["WIDTH"])


def _kind(lines: int, sets: int, width: int, fp32: bool, by_row: bool) -> tuple[str, int]:
    """Which of CONFIGS. lines: rows times query heads of a key head. by_row: whether each row has a mask."""
    padded = triton.next_power_of_2(width)
    if fp32:
        name = f"fp32, {sets} set{'s' * (sets > 1)}"
    else:
        many = "wide" if padded > 128 else "by row" if by_row and sets * padded > 64 else "many"
        name = "few" if lines <= FEW else many
    return name, min(most for kind, most in CONFIGS if kind == name and sets * padded <= most)


def _sets(redistributed: bool, partial: bool, knockout: bool) -> int:
    """Into how many disjoint sets keys fall; see `grouped_kernels`."""
    if partial or (redistributed and knockout):
        return 4
    return 3 if redistributed else 2 if knockout else 1


def _chunk(tiles: int, keys: int, device: torch.device) -> int:
    """Keys of a split: all, where tiles alone keep the card busy."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    splits = max(1, min(2 * cores // max(tiles, 1), triton.cdiv(keys, 2 * SPLIT)))
    return triton.cdiv(triton.cdiv(keys, splits), SPLIT) * SPLIT


def _strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of a tensor; a mask [B, N] has none along its rows."""
    if x is None:
        return (0,) * dims
    own = x.stride()
    return own if len(own) == dims else (own[0], 0, own[1])


def _shapes(
    q: torch.Tensor, redistributed: bool, lse: bool, mass: bool, partial: bool, knockout: bool
) -> tuple[torch.Tensor, ...]:
    """The results, with no numbers in what is not asked for."""
    b, h, r, d = q.shape

    def make(wanted: bool, *more: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((b, h, r, *more) if wanted else 0, dtype=dtype, device=q.device)

    return (
        make(True, d, dtype=q.dtype), make(lse), make(mass, 4), make(partial, 4, d), make(knockout, d), make(knockout),
        make(redistributed, dtype=torch.bool),
    )  # fmt: skip


@torch.library.custom_op("vlattn::grouped_attention", mutates_args=())
def _grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
    scale: float,
    causal: bool,
    key_mask: torch.Tensor | None,
    edited_rows: torch.Tensor | None,
    gamma: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    slack: torch.Tensor | None,
    sink_share: float,
    min_visual_mass: float,
    move: float,
    head_scale: torch.Tensor | None,
    lse: bool,
    mass: bool,
    partial: bool,
    knockout: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """slack: of `sink_slack`, None for no redistribution. chunk: keys of a split, 0 for what fits the card."""
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1:3]
    made = _shapes(q, slack is not None, lse, mass, partial, knockout)
    share, lines = heads // kv_heads, batch * heads * rows
    if not lines:
        return made  # type: ignore[return-value]
    sets = _sets(slack is not None, partial, knockout)
    if key_mask is not None and key_mask.ndim == 3 and rows == 1:
        key_mask = key_mask[:, 0]  # of a decode step
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    by_row = mask is not None and mask.ndim == 3
    kind = _kind(rows * share, sets, width, q.dtype == torch.float32, by_row)
    height = int(CONFIGS[kind][0].kwargs["BLOCK_M"])
    chunk = chunk or _chunk(triton.cdiv(rows * share, height) * batch * kv_heads, keys, q.device)
    splits = max(1, triton.cdiv(keys, chunk))
    stats = split_sums = None
    if splits > 1:
        stats = q.new_empty(splits, lines, 8, dtype=torch.float32)
        split_sums = q.new_empty(splits, lines, sets, width, dtype=torch.float32)
    edited_rows, head_weights, head_scale = (
        None if x is None else x.to(dtype).contiguous()
        for x, dtype in ((edited_rows, torch.uint8), (head_weights, torch.float32), (head_scale, torch.float32))
    )
    results = [x if x.numel() else None for x in (*made[:-1], made[-1].view(torch.uint8))]
    sizes = {"WIDTH": width, "BLOCK_D": max(16, triton.next_power_of_2(width)), "SETS": sets}
    ends = (sink_share, min_visual_mass, move, heads)

    def tiles(c: dict[str, Any]) -> tuple[int, ...]:
        return triton.cdiv(rows * share, c["BLOCK_M"]) * batch * kv_heads, splits

    _ATTEND[kind](
        tiles, q, k, v, groups, mask, edited_rows, gamma, head_weights, slack, head_scale, *results, stats, split_sums,
        scale * 1.4426950408889634, *ends, kv_heads, rows, keys, chunk, lines,
        *q.stride(), *k.stride(), *v.stride(), *groups.stride(), *_strides(mask, 3), *_strides(gamma, 2),
        SHARE=share, CAUSAL=causal, MASK=0 if mask is None else mask.ndim - 1, MASSES=sets > 1 or mass,
        KEYS=triton.next_power_of_2(max(keys, 16)), ROWS=triton.next_power_of_2(max(rows, 16)), **sizes,
    )  # fmt: skip
    if splits > 1:
        _MERGE(
            lambda c: (triton.cdiv(lines, c["BLOCK_M"]),),
            stats, split_sums, edited_rows, slack, head_scale, *results, *ends, rows, lines, splits, **sizes,
        )  # fmt: skip
    return made  # type: ignore[return-value]


@_grouped_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: torch.Tensor, scale: float, causal: bool,
    key_mask: Any, edited_rows: Any, gamma: Any, head_weights: Any, slack: Any, sink_share: float,
    min_visual_mass: float, move: float, head_scale: Any, lse: bool, mass: bool, partial: bool, knockout: bool,
    chunk: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return _shapes(q, slack is not None, lse, mass, partial, knockout)


@register_flop_formula(torch.ops.vlattn.grouped_attention)
def _flops(q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products, as in attention: what lies behind the causal edge counts too."""
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: torch.Tensor,
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
    chunk: int = 0,
) -> GroupedAttention:
    """Attention over keys in groups; see `vlattn.ops.grouped_attention`. chunk: keys of a split, 0 for what fits."""
    rule = redistribution or Redistribution()
    slack = None if redistribution is None else sink_slack(groups & 3, rule, torch.float32)
    made = torch.ops.vlattn.grouped_attention(
        q, k, v, groups, float(scale), causal, key_mask, edited_rows, gamma, head_weights, slack,
        1.0 - rule.rho_nonsink, float(rule.min_visual_mass), float(rule.move), head_scale,
        lse, mass, partial, knockout, chunk,
    )  # fmt: skip
    asked = (True, lse, mass, partial, knockout, knockout, redistribution is not None)
    given: list[Any] = [x if wanted else None for x, wanted in zip(made, asked, strict=True)]
    return GroupedAttention(*given)


# Compilation for cards that are not there -----------------------------------------------------------------------------
_OPTIONAL = {"lse": "fp32", "mass": "fp32", "partial": "fp32", "without": "fp32", "shift": "fp32", "chosen": "u8"}
_UNASKED: dict[int, tuple[str, ...]] = {
    1: ("mass", "partial", "without", "shift", "chosen", "slack"),
    2: ("partial", "chosen", "slack"),
    3: ("partial", "without", "shift"),
    4: (),
}
"""By SETS: the arguments that are None."""


def compilations() -> list[Compilation]:
    """Every configuration with all that it can be asked for at once, and the merge.

    Half precision also with what interventions give, who need no four sets: masks of their own for each row, lengths
    that 16 does not divide, and a number of query heads per key head that is no power of 2.
    """
    found = []
    for fp32 in (False, True):
        for width in (64, 128, 256):
            for sets in (1, 2, 3, 4):
                for lines in (FEW, 4096):
                    for by_row in (False, True) if not fp32 and sets < 4 else (False,):
                        configs = CONFIGS[_kind(lines, sets, width, fp32, by_row)]
                        found += [_compilation(fp32, width, sets, lines, config, by_row) for config in configs]
                found.append(_merge_compilation(fp32, width, sets))
    return found


def _compilation(fp32: bool, width: int, sets: int, lines: int, config: triton.Config, by_row: bool) -> Compilation:
    half = "fp32" if fp32 else "bf16"
    names = attend.arg_names
    types = dict.fromkeys(names[names.index("heads") : names.index("SHARE")], "i32")
    types |= {"scale": "fp32", "sink_share": "fp32", "min_mass": "fp32", "move": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "out"), f"*{half}")
    types |= dict.fromkeys(("gamma", "weights", "slack", "head_scale", "stats", "split_sums"), "*fp32")
    types |= {name: f"*{kind}" for name, kind in {**_OPTIONAL, "mask": "u8", "edited": "u8", "groups": "i8"}.items()}
    constants: dict[str, Any] = dict.fromkeys(_UNASKED[sets])
    constants |= {"q_d": 1, "k_d": 1, "v_d": 1, "groups_n": 1, "mask_n": 1, "gamma_n": 1}
    if lines > FEW:
        constants |= {"stats": None, "split_sums": None}
    constants |= {"WIDTH": width, "BLOCK_D": width, "CAUSAL": True, "SETS": sets}
    constants |= {"SHARE": 7, "MASK": 2} if by_row else {"SHARE": 4, "MASK": 1, "mask_r": 0}
    constants |= {"MASSES": sets > 1, "KEYS": 4096, "ROWS": lines, **config.kwargs}
    title = "x".join(str(config.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N"))
    kept = {name: kind for name, kind in types.items() if name not in constants}
    wide = names[names.index("q_b") : names.index("groups_b" if by_row else "SHARE")]
    aligned = [name for name, kind in kept.items() if kind[0] == "*" or name in wide]
    if by_row:
        aligned.remove("mask")
    return Compilation(
        f"attend {half} D{width} sets{sets} {'few' if lines <= FEW else 'many'} {title}{' by row' if by_row else ''}",
        attend, kept, constants, config.num_warps, config.num_stages, aligned,
    )  # fmt: skip


def _merge_compilation(fp32: bool, width: int, sets: int) -> Compilation:
    half = "fp32" if fp32 else "bf16"
    types = {"heads": "i32", "rows": "i32", "lines": "i32", "splits": "i32"}
    types |= dict.fromkeys(("sink_share", "min_mass", "move"), "fp32")
    types |= dict.fromkeys(("stats", "split_sums", "slack", "head_scale"), "*fp32")
    types |= {name: f"*{kind}" for name, kind in {**_OPTIONAL, "out": half, "edited": "u8"}.items()}
    constants: dict[str, Any] = dict.fromkeys(_UNASKED[sets])
    constants |= {"WIDTH": width, "BLOCK_D": width, "SETS": sets, "BLOCK_M": 4}
    kept = {name: kind for name, kind in types.items() if name not in constants}
    aligned = [name for name, kind in kept.items() if kind[0] == "*"]
    return Compilation(f"merge {half} D{width} sets{sets}", merge, kept, constants, 4, 2, aligned)
