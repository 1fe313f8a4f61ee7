"""What a gaze data set is: scenes of boxed objects, trials of fixations, and the JSON file that holds both.

    {"version": 1,
     "scenes": [{"id", "width", "height", "image", "objects": [{"label", "box": [x, y, width, height]}]}],
     "trials": [{"id", "scene", "target", "subject", "fixations": [[x, y] or [x, y, duration], ...],
                 "objects": [index of the fixated object, -1 for none], "correct", "target_object"}]}

Pixels with the origin at the top left, milliseconds. Predictions are the same with the name of a model as `subject`;
several samples of one trial T are trials T/0, T/1, ... No torch here: scoring must not pay for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.trial_check import check_gaze, warn_of_units

VERSION = 1


@dataclass(frozen=True)
class SceneObject:
    """label: what it is. box: x, y of its top left corner, width, height, in pixels, as COCO has them."""

    label: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """width, height: of the screen, in pixels. image: a path relative to the file that the scene is in."""

    id: str
    width: int
    height: int
    objects: tuple[SceneObject, ...]
    image: str | None = None

    def boxes(self) -> np.ndarray:
        """float64 [P, 4]: x, y, width, height in pixels."""
        return np.array([one.box for one in self.objects], np.float64).reshape(-1, 4)

    def centers(self) -> np.ndarray:
        """float64 [P, 2]: x, y of the middle of each box, in pixels."""
        boxes = self.boxes()
        return boxes[:, :2] + boxes[:, 2:] / 2


@dataclass(frozen=True)
class Fixation:
    """x, y: pixels. duration: milliseconds, None where it was not measured."""

    x: float
    y: float
    duration: float | None = None


@dataclass(frozen=True)
class Trial:
    """One subject's search for one target in one scene.

    target: its label, or the name of its picture; it need not be in the scene (target-absent trials).
    objects: per fixation the index of the fixated object of the scene, -1 for none; None before fixations were
        assigned (`vlattn.gaze.assign`).
    correct: whether the subject answered rightly. target_object: index of the target in the scene.
    """

    id: str
    scene: str
    target: str
    subject: str
    fixations: tuple[Fixation, ...]
    objects: tuple[int, ...] | None
    correct: bool | None = None
    target_object: int | None = None

    def points(self) -> np.ndarray:
        """float64 [n, 2]: x, y of each fixation in pixels."""
        return np.array([(one.x, one.y) for one in self.fixations], np.float64).reshape(-1, 2)

    def durations(self) -> np.ndarray:
        """float64 [n] in milliseconds, NaN where none was measured."""
        return np.array([np.nan if one.duration is None else one.duration for one in self.fixations], np.float64)


@dataclass(frozen=True)
class GazeSet:
    """Scenes by their ids, and trials. root: the folder that the scenes' images are relative to, if they are files."""

    scenes: Mapping[str, Scene]
    trials: tuple[Trial, ...]
    root: Path | None = field(default=None, compare=False)

    def scene_of(self, trial: Trial) -> Scene:
        return self.scenes[trial.scene]

    def image_path(self, scene: Scene) -> Path:
        """The file of a scene's picture.

        Raises:
            InputError: the scene has none.
        """
        if scene.image is None:
            raise InputError(f"image: scene {scene.id!r} has no picture; give the file that shows it, as `image`")
        return (self.root or Path()) / scene.image


# Files ----------------------------------------------------------------------------------------------------------------
def read_gaze(path: str | Path) -> GazeSet:
    """Read a gaze file.

    Fixations may also be objects {"x", "y", "duration"}. An empty path is read as it is: a model can predict one, and
    every metric says what it makes of it.

    Raises:
        InputError: the file, the trial or scene, and the field that is wrong: no JSON, a version that this vlattn does
            not know, a field that is missing or of the wrong kind, coordinates that are not finite, a negative
            duration, an index of no object, ids that are not unique, a trial of an unknown scene.

    Warns:
        UserWarning: durations look like seconds or microseconds.
    """
    shown = str(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror}); give a gaze file") from None
    except ValueError:
        raise InputError(f"{shown}: is not JSON; give a gaze file, as write_gaze makes them") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in ("scenes", "trials")):
        raise InputError(f"{shown}: has no lists scenes and trials; give a gaze file, as write_gaze makes them")
    version = data.get("version")
    if version != VERSION:
        raise InputError(f"{shown}: version is {version!r}, but this vlattn reads {VERSION}; convert the file")
    scenes: dict[str, Scene] = {}
    for number, entry in enumerate(data["scenes"]):
        scene = _scene(entry, _named(shown, "scene", number, entry))
        if scene.id in scenes:
            raise InputError(f"{shown}: scene {scene.id!r}: id is given twice; give each scene its own")
        scenes[scene.id] = scene
    trials = tuple(_trial(t, _named(shown, "trial", number, t)) for number, t in enumerate(data["trials"]))
    found = GazeSet(scenes, trials, Path(path).parent)
    check_gaze(found, shown)
    warn_of_units(found, shown)
    return found


def write_gaze(gaze: GazeSet, path: str | Path) -> Path:
    """Write a gaze file; the same set gives the same bytes. Pictures are named relative to where the file lies.

    Raises:
        InputError: as by `read_gaze`; nothing is written then.
    """
    out = Path(path)
    check_gaze(gaze, str(path))
    scenes = list(gaze.scenes.values())
    if gaze.root is not None and gaze.root.resolve() != out.parent.resolve():
        moved = os.path.relpath(gaze.root.resolve(), out.parent.resolve())
        scenes = [s if s.image is None else replace(s, image=Path(moved, s.image).as_posix()) for s in scenes]
    rows = [_rows("scenes", map(_scene_entry, scenes)), _rows("trials", map(_trial_entry, gaze.trials))]
    text = f'{{"version":{VERSION},\n' + ",\n".join(rows) + "}\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(out.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(out)
    return out


def _rows(name: str, entries: Any) -> str:
    """One entry a line, so that a change shows as a changed line."""
    lines = ",\n".join(json.dumps(entry, separators=(",", ":"), ensure_ascii=False) for entry in entries)
    return f'"{name}":[\n{lines}]'


def _scene_entry(scene: Scene) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": scene.id, "width": int(scene.width), "height": int(scene.height)}
    if scene.image is not None:
        entry["image"] = scene.image
    return {**entry, "objects": [{"label": one.label, "box": list(map(_short, one.box))} for one in scene.objects]}


def _trial_entry(trial: Trial) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": trial.id, "scene": trial.scene, "target": trial.target, "subject": trial.subject}
    fixations = [(f.x, f.y) if f.duration is None else (f.x, f.y, f.duration) for f in trial.fixations]
    entry["fixations"] = [list(map(_short, numbers)) for numbers in fixations]
    optional = {
        "objects": None if trial.objects is None else list(map(int, trial.objects)),
        "correct": trial.correct,
        "target_object": None if trial.target_object is None else int(trial.target_object),
    }
    return {**entry, **{name: value for name, value in optional.items() if value is not None}}


def _short(number: float) -> float | int:
    """12 for 12.0: shorter, and the same number when read."""
    return int(number) if float(number).is_integer() else float(number)


# Reading entries ------------------------------------------------------------------------------------------------------
def _named(shown: str, kind: str, number: int, entry: Any) -> str:
    """How errors call an entry: by its id, or by its place where it has none."""
    known = isinstance(entry, dict) and isinstance(entry.get("id"), str)
    return f"{shown}: {kind} {entry['id']!r}" if known else f"{shown}: {kind} number {number}"


def _get(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: got {entry!r:.60}; give an object with the fields that write_gaze writes")
    if name not in entry:
        raise InputError(f"{where}: {name} is missing; add it")
    return entry[name]


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} is {value!r:.60}; give a list")
    return value


def _scene(entry: Any, where: str) -> Scene:
    scene_id, width, height, listed = (_get(entry, name, where) for name in ("id", "width", "height", "objects"))
    objects = []
    for place, one in enumerate(_list(listed, "objects", where)):
        inside = f"{where}: objects[{place}]"
        box = _list(_get(one, "box", inside), "box", inside)
        objects.append(SceneObject(_get(one, "label", inside), tuple(box)))  # type: ignore[arg-type]
    return Scene(scene_id, width, height, tuple(objects), entry.get("image"))


def _trial(entry: Any, where: str) -> Trial:
    names = ("id", "scene", "target", "subject")
    trial_id, scene, target, subject = (_get(entry, name, where) for name in names)
    listed = _list(_get(entry, "fixations", where), "fixations", where)
    fixations = tuple(_fixation(one, f"{where}: fixations[{place}]") for place, one in enumerate(listed))
    objects = entry.get("objects")
    seen = None if objects is None else tuple(_list(objects, "objects", where))
    return Trial(trial_id, scene, target, subject, fixations, seen, entry.get("correct"), entry.get("target_object"))


def _fixation(entry: Any, where: str) -> Fixation:
    if isinstance(entry, dict):
        return Fixation(_get(entry, "x", where), _get(entry, "y", where), entry.get("duration"))
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        raise InputError(f"{where}: got {entry!r:.60}; give [x, y] or [x, y, duration]")
    return Fixation(*entry)
