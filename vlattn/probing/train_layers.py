"""The same probe on several layers of a backbone: where in the network is the answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train import train_probe
from vlattn.probing.train_result import ProbeResult
from vlattn.probing.train_source import Source
from vlattn.probing.train_state import begun


def train_layers(
    layers: Sequence[int],
    sources: Callable[[int], tuple[Source, Source]],
    pooler: str,
    classes: int,
    settings: ProbeSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> dict[int, ProbeResult]:
    """Train one probe on each layer, from the same seed.

    Args:
        layers: blocks counted from 0; 0 is the first block.
        sources: train and val source of a layer, made when its turn comes.
        pooler, classes, settings: as `train_probe` takes them.
        out: folder in which layer 3 has the folder `layer_3`; None keeps nothing.
        resume: read the layers that `out` holds, go on with one that was cut off, and train the others.
        options: further arguments of `train_probe`.

    Returns:
        {layer: result}, in the order given.

    Raises:
        InputError: no layers, or one twice.
    """
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"layers: got {list(layers)}; give block numbers counted from 0, each once")
    found = {}
    for layer in layers:
        train, val = sources(layer)
        folder = None if out is None else Path(out) / f"layer_{layer}"
        again = resume and (folder is None or begun(folder))
        found[layer] = train_probe(train, val, pooler, classes, settings, out=folder, resume=again, **options)
    return found
