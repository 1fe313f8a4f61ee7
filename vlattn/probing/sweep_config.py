"""What a probing sweep runs, read from YAML and checked before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vlattn import config_file
from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.registry import parse_pooler
from vlattn.probing.settings import ProbeSettings, fast_settings


@dataclass(frozen=True)
class ProbeSubject:
    """A backbone on a data set.

    backbone: as `vlattn.probing.named_backbone` takes it. layer: a block counted from 0; None is the model's own end.
    data, val: as `vlattn.probing.data.named` takes them.
    """

    backbone: str
    data: str
    val: str | None = None
    layer: int | None = None

    @property
    def file(self) -> str:
        """A name for files."""
        parts = [self.backbone, self.data.partition("::")[0]] + ([] if self.layer is None else [f"layer{self.layer}"])
        return "_".join(file_name(part) for part in parts)


@dataclass(frozen=True)
class ProbeSweepConfig:
    """A sweep of poolers. `read` takes it from a file with these keys.

    subjects: [{backbone, data, val, layer}], of which only backbone and data are due.
    poolers: as `vlattn.probing.poolers` has them; those of `linear` are run in any case.
    linear: linear probes; the better of them, by its mean, is what each pooler is compared with.
    seeds: of weights and order of images; a run for each.
    recipe: `fast` (`fast_settings`: AdamW, no augmentation) or `published` (`ProbeSettings`: LARS, 90 epochs).
    rates: learning rates trained at once, of which the best counts: lr for fast, blr for published; None is the
        recipe's own.
    epochs: None is the recipe's own.
    batch_size: images of an update.
    augment: whether each epoch sees new crops and flips; None follows the recipe.
    step_rounds: steps behind each measured time.
    shots: train on so many images of each class alone, drawn by the seed, with as many updates as all images get; None
        is all.
    """

    subjects: Sequence[Mapping[str, Any]]
    poolers: Sequence[str]
    linear: Sequence[str] = ("cls", "gap")
    seeds: Sequence[int] = (0, 1, 2)
    recipe: Literal["fast", "published"] = "fast"
    rates: Sequence[float] | None = None
    epochs: int | None = None
    batch_size: int = 256
    augment: bool | None = None
    step_rounds: int = 7
    shots: int | None = None

    def __post_init__(self) -> None:
        for name in ("subjects", "poolers", "linear", "seeds"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise InputError(f"{name}: got {given!r}; write a list")
        known = {field.name for field in fields(ProbeSubject)}
        for subject in self.subjects:
            if not isinstance(subject, Mapping) or not {"backbone", "data"} <= set(subject) <= known:
                raise InputError(f"subjects: got {subject!r}; write backbone and data, and where due val and layer")
        for what, names in (
            ("subjects", [one.file for one in self.all_subjects]),
            ("poolers", [file_name(name) for name in self.poolers]),
            ("seeds", list(self.seeds)),
        ):
            twice = [name for name, times in Counter(names).items() if times > 1]
            if twice:
                raise InputError(f"{what}: {twice[0]!r} is listed twice; leave one out")
        for name in self.all_poolers:
            parse_pooler(name)
        for seed in self.seeds:
            require_count("seeds", seed, 0)
        require_choice("recipe", self.recipe, ("fast", "published"))
        require_count("batch_size", self.batch_size, 2)
        require_count("step_rounds", self.step_rounds)
        if self.shots is not None:
            require_count("shots", self.shots)
        self.settings(self.seeds[0])

    @classmethod
    def read(cls, path: str | Path) -> ProbeSweepConfig:
        """A configuration file, or one that comes with vlattn by its name (`probe_digits`, `probe_tiny_coco`).

        Raises:
            InputError: no such file, no YAML, keys that are unknown or missing, or values that cannot be.
        """
        return cls(**config_file.read_config(cls, path, "probe_digits"))

    @property
    def all_subjects(self) -> list[ProbeSubject]:
        return [ProbeSubject(**subject) for subject in self.subjects]

    @property
    def all_poolers(self) -> list[str]:
        """Linear probes first, then the others, each once."""
        return list(dict.fromkeys([*self.linear, *self.poolers]))

    @property
    def augmented(self) -> bool:
        return self.recipe == "published" if self.augment is None else self.augment

    def settings(self, seed: int) -> ProbeSettings:
        """How a run is trained."""
        changes: dict[str, Any] = {"seed": seed}
        if self.rates is not None:
            changes["lr" if self.recipe == "fast" else "blr"] = tuple(self.rates)
        if self.recipe == "fast":
            return fast_settings(**changes) if self.epochs is None else fast_settings(self.epochs, **changes)
        if self.epochs is not None:
            changes |= {"epochs": self.epochs, "warmup_epochs": min(10, self.epochs / 9)}
        return ProbeSettings(**changes)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def file_name(text: str) -> str:
    """A name for files and folders: `ep:queries=32,d=2` is `ep_queries-32_d-2`."""
    return config_file.file_name(text).strip("_.")
