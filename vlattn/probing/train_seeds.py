"""The same probe under several seeds: how far a figure depends on weights and order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.intervals import LEVEL, mean_interval
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.sweep import best_value
from vlattn.probing.train import train_probe
from vlattn.probing.train_result import ProbeResult
from vlattn.probing.train_source import Source
from vlattn.probing.train_state import begun


def train_seeds(
    seeds: Sequence[int],
    sources: Callable[[int], tuple[Source, Source]],
    pooler: str,
    classes: int,
    settings: ProbeSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> dict[int, ProbeResult]:
    """Train one probe under each seed.

    Args:
        seeds: of weights, order and augmentation; each takes the place of the one in `settings`.
        sources: train and val source of a seed, made when its turn comes.
        pooler, classes, settings: as `train_probe` takes them.
        out: folder in which seed 3 has the folder `seed_3`; None keeps nothing.
        resume: read the seeds that `out` holds, go on with one that was cut off, and train the others.
        options: further arguments of `train_probe`.

    Returns:
        {seed: result}, in the order given.

    Raises:
        InputError: no seeds, one twice, or one below 0; without `resume`, a seed's folder that holds a run.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds: got {list(seeds)}; give at least one, each once")
    for seed in seeds:
        require_count("seeds", seed, 0)
    settings = ProbeSettings() if settings is None else settings
    found = {}
    for seed in seeds:
        train, val = sources(seed)
        place = None if out is None else Path(out) / f"seed_{seed}"
        here = dataclasses.replace(settings, seed=seed)
        again = resume and (place is None or begun(place))
        found[seed] = train_probe(train, val, pooler, classes, here, out=place, resume=again, **options)
    return found


def summarise_seeds(results: Mapping[int, ProbeResult]) -> dict[str, Any]:
    """Mean and 95% t interval over seeds, as plain data.

    Returns:
        {"pooler", "metric", "level", "seeds", "value": as `mean_interval` gives it, in percent, "rates": each seed's
        best, "trainable", "departures", "about"}.

    Raises:
        InputError: every learning rate diverged under one of the seeds.
    """
    one = next(iter(results.values()))
    return {
        "pooler": one.pooler,
        "metric": one.metric,
        "level": LEVEL,
        "seeds": list(results),
        "value": mean_interval([best_value(one.pooler, seed, result) for seed, result in results.items()]),
        "rates": [result.best.rate for result in results.values()],
        "trainable": one.trainable,
        "departures": list(one.departures),
        "about": dict(one.about),
    }
