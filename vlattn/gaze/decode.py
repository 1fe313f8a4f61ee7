"""Scanpaths from a model: the likeliest step each time, samples, or beams, for many trials at once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlattn.checks import require_bool, require_choice, require_count, require_number, require_positive
from vlattn.errors import InputError
from vlattn.gaze.decode_beam import search_beams
from vlattn.gaze.decode_draw import draw_paths
from vlattn.gaze.decode_steps import CachedSteps, PrefixSteps
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_batch import OATData, Search

MODES = ("greedy", "sample", "beam")


@dataclass(frozen=True)
class Decoding:
    """How paths are made.

    mode: `greedy`, `sample` or `beam`.
    samples: paths a search; for `beam` the best of its `beams`, for `greedy` 1.
    temperature: of `sample`. beams, length_penalty: of `beam`.
    longest: fixations at most; None is the longest path of the model's training.
    seed: a search's samples depend on it and on the search's key, on nothing that is decoded beside it.
    cached: keep keys and values. Without, each step runs over the whole path: the same, slower.
    rows: paths that grow at once.
    """

    mode: str = "greedy"
    samples: int = 1
    temperature: float = 1.0
    beams: int = 5
    length_penalty: float = 0.0
    longest: int | None = None
    seed: int = 0
    cached: bool = True
    rows: int = 2048

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, MODES)
        for name in ("samples", "beams", "rows"):
            require_count(name, getattr(self, name))
        require_count("seed", self.seed, 0)
        require_positive("temperature", self.temperature)
        require_number("length_penalty", self.length_penalty, 0)
        require_bool("cached", self.cached)
        if self.longest is not None:
            require_count("longest", self.longest)
        most = {"greedy": 1, "beam": self.beams}.get(self.mode)
        if most is not None and self.samples > most:
            raise InputError(f"samples: got {self.samples}; {self.mode} gives {most}: ask for less, or mode='sample'")

    @property
    def drawn(self) -> bool:
        return self.mode == "sample"


@dataclass(frozen=True)
class Path:
    """A predicted scanpath. objects: indices, in order. log_prob: natural logarithm of its probability, the end
    included where it came; of samples, at their temperature."""

    objects: tuple[int, ...]
    log_prob: float


def generate(
    model: OAT,
    data: OATData,
    searches: Sequence[Search],
    decoding: Decoding | None = None,
    *,
    keys: Sequence[str] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[Path]]:
    """Predict paths of searches; their own paths are not looked at. The model is left in the mode that it was in.

    Args:
        data: the scenes.
        decoding: None is greedy.
        keys: what the samples of each search depend on, such as the trials' ids; None takes scene, target and how
            often these came before.
        progress: hears how many searches are done.

    Returns:
        for each search its paths; beams may be fewer than asked for in the smallest scenes.

    Raises:
        InputError: as `OATData.batch` does, or no `longest` is known.
    """
    decoding = decoding or Decoding()
    longest = decoding.longest or model.config.longest
    if longest is None:
        raise InputError("longest: got None, and the model has not been trained; give the most fixations of a path")
    asked = [Search(one.scene, one.target) for one in searches]
    names = _count_keys(asked) if keys is None else list(keys)
    if len(names) != len(asked):
        raise InputError(f"keys: got {len(names)} for {len(asked)} searches; give one for each")
    # What is not drawn is the same for the same question.
    tasks = list(enumerate(asked)) if decoding.drawn else [(asked.index(one), one) for one in dict.fromkeys(asked)]
    tasks.sort(
        key=lambda task: len(data.gaze.scenes[task[1].scene].objects) if task[1].scene in data.gaze.scenes else 0
    )
    share = max(1, decoding.rows // (decoding.beams if decoding.mode == "beam" else decoding.samples))
    found: dict[Search | int, list[Path]] = {}
    done, training = 0, model.training
    model.eval()
    try:
        for first in range(0, len(tasks), share):
            part = tasks[first : first + share]
            paths = _decode(model, data, [one for _, one in part], decoding, longest, [names[n] for n, _ in part])
            found |= {n if decoding.drawn else one: some for (n, one), some in zip(part, paths, strict=True)}
            done += len(part)
            progress(len(asked) * done // len(tasks))
    finally:
        model.train(training)
    return [found[n] if decoding.drawn else found[one] for n, one in enumerate(asked)]


@torch.inference_mode()
def _decode(
    model: OAT, data: OATData, searches: list[Search], decoding: Decoding, longest: int, keys: list[str]
) -> list[list[Path]]:
    device = next(model.parameters()).device
    batch = data.batch(searches).to(device)
    steps = (CachedSteps if decoding.cached else PrefixSteps)(model, model.encode(batch), longest)
    if decoding.mode == "beam":
        ids, totals = search_beams(
            steps, batch.size, batch.objects, longest, decoding.beams, decoding.length_penalty, device
        )
    else:
        draws = None
        if decoding.drawn:
            made = [uniform_draws(decoding.seed, key, decoding.samples, longest) for key in keys]
            draws = torch.from_numpy(np.stack(made)).to(device, torch.float32 if device.type == "mps" else None)
        temperature = decoding.temperature if decoding.drawn else 1.0
        ids, totals = draw_paths(steps, batch.size, batch.objects, longest, temperature, draws, device)
    lengths = (ids == batch.end).int().argmax(-1).tolist()
    listed, chances = ids.tolist(), totals.tolist()
    return [
        [
            Path(tuple(path[:length]), chance)
            for path, length, chance in list(zip(listed[row], lengths[row], chances[row], strict=True))
            if chance > -np.inf
        ][: decoding.samples]
        for row in range(batch.size)
    ]


def uniform_draws(seed: int, key: str, samples: int, longest: int) -> np.ndarray:
    """float64 [samples, longest] in [0, 1), decided by seed and key; sample n has the same ones however many follow."""
    return np.random.default_rng([seed, zlib.crc32(key.encode())]).random((samples, longest))


def _count_keys(searches: Sequence[Search]) -> list[str]:
    times: dict[Search, int] = {}
    names = []
    for one in searches:
        times[one] = times.get(one, -1) + 1
        names.append(f"{one.scene}/{one.target}/{times[one]}")
    return names
