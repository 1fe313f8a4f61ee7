"""What a sweep runs, read from YAML and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlattn.assets.paths import TinyCoco, tiny_coco
from vlattn.config_file import file_name, read_config
from vlattn.errors import InputError
from vlattn.interventions.registry import parse_method

COUNTS = ("images", "batch_size", "max_new_tokens", "bootstrap")
DATA_FILES = ("images", "instances", "captions")


@dataclass(frozen=True)
class SweepArm:
    """One point of the figure: the line it belongs to, and the method string that commands take."""

    method: str
    setting: str

    @property
    def file(self) -> str:
        """Its name for files."""
        return file_name(self.setting)


VANILLA = SweepArm("vanilla", "vanilla")


@dataclass(frozen=True)
class SweepConfig:
    """A sweep. `read` takes it from a file with these keys.

    methods: {line of the figure: method strings, one for each budget}. Vanilla is always run and not listed; the others
        are compared with it, and with the line called `random` where there is one.
    images: how many, drawn by `seed` among those that POPE can ask about.
    model, dtype, device: as `vlattn.load` takes them.
    data: `val` or `shift` of tiny COCO, or {images: folder, instances: file, captions: file} in COCO format.
    batch_size, max_new_tokens: of both tasks.
    bootstrap: samples behind each interval.
    """

    methods: Mapping[str, tuple[str, ...]]
    images: int
    model: str = "tiny"
    data: str | Mapping[str, str] = "val"
    seed: int = 0
    batch_size: int = 1
    max_new_tokens: int = 64
    bootstrap: int = 10_000
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in COUNTS:
            _check_integer(name, getattr(self, name), least=1)
        _check_integer("seed", self.seed, least=0)
        if not isinstance(self.methods, Mapping) or not self.methods:
            raise InputError(f"methods: got {self.methods!r}; write a list of method strings under each name")
        seen: dict[str, str] = {}
        for name, settings in self.methods.items():
            if name == VANILLA.method:
                raise InputError("methods: vanilla is always run; leave it out")
            if isinstance(settings, str) or not isinstance(settings, list | tuple) or not settings:
                raise InputError(f"methods: {name} has {settings!r}; write a list of method strings under it")
            for setting in settings:
                if parse_method(str(setting)) is None:
                    raise InputError(f"methods: {name} lists vanilla, which is always run; leave it out")
                file = SweepArm(str(name), str(setting)).file
                if file in seen:
                    raise InputError(f"methods: {setting!r} is listed twice (as {seen[file]!r}); leave one out")
                seen[file] = str(setting)

    @classmethod
    def read(cls, path: str | Path) -> SweepConfig:
        """A configuration file, or one that comes with vlattn by its name (`sweep_tiny`).

        Raises:
            InputError: no such file, no YAML, keys that are unknown or missing, or values that cannot be.
        """
        return cls(**read_config(cls, path, "sweep_tiny"))

    @property
    def arms(self) -> list[SweepArm]:
        """Vanilla, then every setting in the order of the file."""
        return [VANILLA, *(SweepArm(str(name), str(s)) for name, listed in self.methods.items() for s in listed)]

    @property
    def data_name(self) -> str:
        return f"tiny COCO {self.data}" if isinstance(self.data, str) else self.files.instances.name

    @property
    def files(self) -> TinyCoco:
        """Where images and annotations lie."""
        if isinstance(self.data, str):
            return tiny_coco(self.data)
        if not isinstance(self.data, Mapping) or set(self.data) != set(DATA_FILES):
            raise InputError(f"data: got {self.data!r}; give val, shift, or the paths {', '.join(DATA_FILES)}")
        found = TinyCoco(**{name: Path(self.data[name]) for name in DATA_FILES})
        if not found.images.is_dir():
            raise InputError(f"data: {found.images} is not a folder; give the folder that holds the image files")
        return found


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: got {value!r}; give an integer from {least} on")
