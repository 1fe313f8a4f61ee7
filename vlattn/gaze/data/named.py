"""Gaze data by a short text: what a command or a configuration names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlattn.assets.paths import tiny_gaze
from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.assign import OUTSIDE, Outside, assign_objects
from vlattn.gaze.data.amazon import read_amazon
from vlattn.gaze.data.coco_search import read_coco_search
from vlattn.gaze.data.shelf import read_shelf
from vlattn.gaze.trial import GazeSet, read_gaze

TINY = ("", "shelf", "coco")
FORMS = (
    '"tiny-gaze", "tiny-gaze:shelf", "tiny-gaze:coco", a gaze file (.json), "amazon:FILE.json[::IMAGES]", '
    '"shelf:TABLE.xlsx[::IMAGES]" or "coco-search:FIXATIONS.json::INSTANCES.json[::IMAGES]"'
)


def named_gaze(text: str, outside: Outside = "drop") -> GazeSet:
    """The data set that a short text names, every trial with `objects`.

    Args:
        text: "tiny-gaze" (embedded: simulated searches over shelves and tiny COCO scenes), or with ":shelf" or ":coco"
            one kind of them; a gaze file; or published data, "amazon:FILE[::IMAGES]", "shelf:TABLE[::IMAGES]" or
            "coco-search:FIXATIONS::INSTANCES[::IMAGES]", with a folder of pictures where models are to see them.
        outside: what becomes of fixations in no box where they have to be assigned, as in `assign_objects`: in
            COCO-Search18, and in gaze files whose trials have no `objects`.

    Raises:
        InputError: an unknown form, or what the reader of that form refuses.
    """
    require_choice("outside", outside, OUTSIDE)
    kind, _, rest = text.partition(":")
    if kind == "tiny-gaze":
        return _tiny(text, rest)
    if kind in ("amazon", "shelf", "coco-search"):
        parts = rest.split("::")
        least = 2 if kind == "coco-search" else 1
        if not least <= len(parts) <= least + 1 or not all(parts):
            raise InputError(f"data: got {text!r}; give {FORMS}")
        images = parts[least] if len(parts) > least else None
        if kind == "amazon":
            return read_amazon(parts[0], images)
        if kind == "shelf":
            return read_shelf(parts[0], images=images)
        return read_coco_search(parts[0], parts[1], images, outside=outside)
    if not Path(text).is_file():
        raise InputError(f"data: {text!r} is none that is known or on this machine; give {FORMS}")
    found = read_gaze(text)
    return assign_objects(found, outside) if any(trial.objects is None for trial in found.trials) else found


def gaze_name(text: str) -> str:
    """What results call a data set: its text without the folders of the machine."""
    kind, colon, rest = text.partition(":")
    if kind in ("tiny-gaze", "amazon", "shelf", "coco-search"):
        return kind + colon + "::".join(Path(part).name for part in rest.split("::"))
    return Path(text).name


def _tiny(text: str, kind: str) -> GazeSet:
    if kind not in TINY:
        raise InputError(f"data: got {text!r}; give tiny-gaze, tiny-gaze:shelf or tiny-gaze:coco")
    found = read_gaze(tiny_gaze())
    scenes = {name: scene for name, scene in found.scenes.items() if name.startswith(kind)}
    return replace(found, scenes=scenes, trials=tuple(trial for trial in found.trials if trial.scene in scenes))
