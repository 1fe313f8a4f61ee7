"""The work of an arm, apart from time: tokens, MACs, FLOPs, KV cache bytes, and the least time they can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.eval.bench_arms import Arm, Inputs
from vlattn.eval.bench_flops import count_flops, is_counted
from vlattn.eval.bench_saving import Saving, cache_lengths, judge_saving
from vlattn.eval.cost import flops, kv_bytes_formula
from vlattn.eval.layer_lengths import LayerLengths
from vlattn.eval.model_cost import (
    Parts,
    cache_bytes,
    decoder_widths,
    decoding_macs,
    image_only_ratio,
    kv_bytes,
    measured_parts,
)
from vlattn.eval.roofline import Roofline
from vlattn.models.adapter import Adapter
from vlattn.runtime.hooks import cache_of
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class Prefill:
    """What one prefill of one arm left behind. visual: visual tokens of each prompt before any pruning."""

    seen: LayerLengths
    cached: list[int]
    kv: dict[str, int]
    visual: list[int]
    logits: torch.Tensor  # [B, V], of the first new token


def look_at_prefill(arm: Arm, inputs: Inputs) -> Prefill:
    """Run one prefill and write down its lengths, its cache and its logits."""
    with LayerLengths(arm.model) as seen:
        output = arm.prefill(inputs)
    cache = cache_of(output)
    visual = arm.adapter.visual_mask(inputs).sum(1).tolist()
    return Prefill(seen, cache_lengths(cache), cache_bytes(cache), visual, output.logits[:, -1].clone())


class Work:
    """The work of one arm, summed over inputs; `Work.row` puts it beside vanilla's."""

    def __init__(self, arm: Arm, steps: int) -> None:
        self.arm, self.steps = arm, steps
        self.parts: list[Parts] = []
        self.prefills: list[Prefill] = []
        self.savings: list[Saving] = []
        self.budgets: list[dict[str, float]] = []
        self.image_only: list[float | None] = []

    def add(self, inputs: Inputs, vanilla: Prefill | None = None) -> Prefill:
        """Look at one more input; vanilla: the same input without the method."""
        found, trace = look_at_prefill(self.arm, inputs), self.arm.trace
        adapter = self.arm.adapter
        self.parts.append(measured_parts(adapter, found.seen))
        self.prefills.append(found)
        self.budgets.append(_budget(trace, found.visual))
        if trace is not None and vanilla is not None:
            patches = adapter.patches if adapter.patchwise and not adapter.many_tiles else None
            self.savings.append(judge_saving(trace, found.visual, found.cached, vanilla.cached, patches))
            self.image_only.append(image_only_ratio(adapter, trace) if trace.visual_by_layer else None)
        return found

    @property
    def saving(self) -> Saving | None:
        """The verdict over all inputs: masked if any is, else removed if any is; None for vanilla."""
        for kind in ("masked", "removed", "none"):
            for saving in self.savings:
                if saving.kind == kind:
                    return saving
        return None

    def row(self, vanilla: Work, roofline: Roofline, counted: dict[str, Any]) -> dict[str, Any]:
        """Plain numbers, means over inputs; counts are of the whole batch.

        counted: what `count_arm` said.
        """
        adapter, saving, first = self.arm.adapter, self.saving, self.prefills[0]
        macs = {
            "tower": _mean([p.tower for p in self.parts]),
            "projector": _mean([p.projector for p in self.parts]),
            "decoder": _mean([p.decoder for p in self.parts]),
            "prefill": _mean([p.total for p in self.parts]),
            "decode": _mean([decoding_macs(adapter, p, self.steps) for p in self.parts]),
        }
        image_only = [ratio for ratio in self.image_only if ratio is not None]
        return {
            "saving": None if saving is None else {"kind": saving.kind, "text": saving.text},
            "visual_tokens": {key: _mean([b[key] for b in self.budgets]) for key in self.budgets[0]},
            "decoder_lengths": first.seen.decoder,
            "tower_lengths": [sum(lengths) for lengths in first.seen.tower],
            "cache_lengths": first.cached,
            "macs": macs,
            "prefill_flops": flops(round(macs["prefill"])),
            "prefill_flops_counted": counted,
            "image_only_decoder_ratio": _mean(image_only) if image_only else None,
            "kv_bytes": {
                "used": _mean([p.kv["used"] for p in self.prefills]),
                "allocated": _mean([p.kv["allocated"] for p in self.prefills]),
                "formula": _mean([kv_bytes(adapter, p) for p in self.parts]),
            },
            "bound": {
                "prefill": _bound(roofline, [prefill_load(adapter, p) for p in self.parts]),
                "decode": _bound(roofline, [decode_load(adapter, p, self.steps) for p in self.parts]),
            },
            **({} if vanilla is self else {"ratios": self._ratios(vanilla, macs)}),
        }

    def _ratios(self, vanilla: Work, macs: Mapping[str, float]) -> dict[str, float]:
        adapter = self.arm.adapter
        full = {name: _mean([getattr(p, name) for p in vanilla.parts]) for name in ("tower", "projector", "decoder")}
        found = {name: macs[name] / full[name] for name in full if full[name]}
        found["prefill"] = macs["prefill"] / sum(full.values())
        if self.steps:
            found["decode"] = macs["decode"] / _mean([decoding_macs(adapter, p, self.steps) for p in vanilla.parts])
        found["kv_bytes"] = _mean([p.kv["used"] for p in self.prefills]) / _mean(
            [p.kv["used"] for p in vanilla.prefills]
        )
        return found


def count_arm(arm: Arm, inputs: Inputs) -> dict[str, Any]:
    """FLOPs of one prefill by PyTorch's counter: total and by operator, or why they cannot be had."""
    unseen = [name for name in arm.attention.values() if not is_counted(name)]
    if unseen:
        return {"total": None, "why": f"PyTorch does not count the kernels of {unseen[0]}"}
    found = count_flops(lambda: arm.prefill(inputs))
    return {"total": found.total, "by_op": found.by_op}


# Loads: (operations, bytes moved) -------------------------------------------------------------------------------------
def prefill_load(adapter: Adapter, parts: Parts) -> tuple[int, int]:
    """A prefill at the least: every weight read once, the KV cache written once, logits of the last position."""
    head = _head(adapter)
    skipped = {id(_embedding(adapter))} - {id(head)}
    weights = sum(p.nbytes for p in adapter.model.parameters() if id(p) not in skipped)
    return flops(parts.total + parts.batch * _size(head)), weights + kv_bytes(adapter, parts)


def decode_load(adapter: Adapter, parts: Parts, steps: int) -> tuple[int, int]:
    """`steps` decode steps at the least: each reads the decoder and its head once, and all that is cached so far."""
    head = _head(adapter)
    skipped = {id(_embedding(adapter)), id(head)}
    weights = sum(p.nbytes for p in adapter.language_model.parameters() if id(p) not in skipped)
    weights += 0 if head is None else head.nbytes
    width, itemsize = decoder_widths(adapter)["kv_width"], torch.empty((), dtype=adapter.model.dtype).element_size()
    # Step i reads n + i positions of a layer that prefill left n in.
    read = [steps * n + steps * (steps + 1) // 2 for n in parts.decoder_lengths]
    cache = kv_bytes_formula(parts.batch, read, 1, width, itemsize)
    macs = decoding_macs(adapter, parts, steps) + steps * parts.batch * _size(head)
    return flops(macs), steps * weights + cache


def _head(adapter: Adapter) -> torch.Tensor | None:
    found = adapter.model.get_output_embeddings()
    return None if found is None else found.weight


def _embedding(adapter: Adapter) -> torch.Tensor:
    return adapter.language_model.get_input_embeddings().weight


def _size(weight: torch.Tensor | None) -> int:
    return 0 if weight is None else weight.numel()


def _bound(roofline: Roofline, loads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    operations, moved = (_mean(list(column)) for column in zip(*loads, strict=True))
    bound = roofline.bound(operations, moved)
    return {"seconds": bound.seconds, "by": bound.by, "flops": operations, "bytes": moved}


def _budget(trace: Trace | None, visual: Sequence[int]) -> dict[str, float]:
    """Visual tokens per prompt without pruning (full), and in the three senses of `Trace.budget`."""
    full = _mean(visual)
    if trace is None:
        return {"full": full, "final": full, "average": full, "counted": full}
    if not trace.visual_by_layer:
        raise InputError("trace: it does not say how many visual tokens enter each decoder layer")
    return {"full": full, **trace.budget()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
