"""Poolers on the blocks of a backbone, one after the other, under several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.probing.intervals import LEVEL, mean_interval
from vlattn.probing.poolers.registry import parse_pooler
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.sources import TokenSources
from vlattn.probing.sweep import best_value
from vlattn.probing.sweep_config import file_name
from vlattn.probing.train import train_probe
from vlattn.probing.train_state import begun


def probe_layers(
    sources: Callable[[int], TokenSources],
    poolers: Sequence[str],
    runs: Sequence[ProbeSettings],
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    device: str | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Train each pooler on each block under each seed; finished runs in `out` are read.

    Args:
        sources: those of a block, counted from 0.
        poolers: as `vlattn.probing.poolers` has them.
        runs: settings, one for each seed.
        out: folder for the runs.
        layers: blocks; None is all.
        device: of training.
        report: hears of each block and pooler that is done.

    Returns:
        Plain data: {"metric", "level", "seeds", "depth", "lines": {pooler: [{"layer", "mean", "low", "high",
        "values"}]}}, and backbone and data of the first block.

    Raises:
        InputError: no poolers, a block that is not there or listed twice, or tokens that the backbone does not have.
    """
    if not poolers or len(set(poolers)) != len(poolers):
        raise InputError(f"poolers: got {list(poolers)}; give at least one, each once")
    kinds = {name: parse_pooler(name)[2] for name in poolers}
    first = sources(0)
    depth = first.backbone.depth
    chosen = list(range(depth)) if layers is None else list(layers)
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise InputError(f"layers: got {chosen}; this backbone has blocks 0 to {depth - 1}, give each once")
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in poolers}
    metric = ""
    for layer in chosen:
        here = first if layer == 0 else sources(layer)
        for name, kind in kinds.items():
            values = []
            for settings in runs:
                place = out / "runs" / f"layer_{layer}" / file_name(name) / f"seed_{settings.seed}"
                result = train_probe(
                    here.train(kind, settings.seed),
                    here.val(kind),
                    name,
                    len(here.data.classes),
                    settings,
                    dim=here.sample(kind).shape[-1],
                    grid=here.backbone.grid,
                    out=place,
                    resume=begun(place),
                    device=device or "cpu",
                    about=here.describe(),
                )
                metric = result.metric
                values.append(best_value(name, settings.seed, result))
            lines[name].append({"layer": layer, **mean_interval(values)})
            report(f"layer {layer}, {name}: {metric} {lines[name][-1]['mean']:.2f}")
    return {
        "metric": metric,
        "level": LEVEL,
        "seeds": [settings.seed for settings in runs],
        "depth": depth,
        **first.describe(),
        "lines": lines,
    }
