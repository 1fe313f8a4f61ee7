"""Five captions of a scene, in varied words: what people might write under it, and nothing that is not there."""

from __future__ import annotations

from string import Formatter

import numpy as np

from vlattn.assets.language import NUMBERS, listing, phrase
from vlattn.assets.scenes import NAMES, SIZE, Placed, Scene

SYNONYMS = {
    "airplane": ("plane",),
    "bicycle": ("bike",),
    "boat": ("sailboat",),
    "car": ("automobile",),
    "cell phone": ("phone", "mobile phone"),
    "couch": ("sofa",),
    "donut": ("doughnut",),
    "handbag": ("purse",),
    "laptop": ("laptop computer", "computer"),
    "motorcycle": ("motorbike",),
    "potted plant": ("houseplant",),
    "sports ball": ("ball",),
    "tennis racket": ("racket",),
    "traffic light": ("traffic signal", "stoplight"),
    "tv": ("television",),
}
"""Other words for a category, each of which CHAIR's synonym table reads as that category."""

UNITS = {"scissors": "pair", "broccoli": "head"}

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)

COMPLETE = (
    "{everything} on a {background} background.",
    "{everything} against a {background} backdrop.",
    "a picture of {everything}.",
    "there {are} {everything} in this picture.",
    "this image has {everything} in it.",
    "{everything} can be seen here.",
    "{total} things on {background}: {everything}.",
    "a drawing with {everything}, all on {background}.",
)
"""Templates that name every object. A template is used for a scene that has all of its fields."""

PARTIAL = (
    "{placed}.",
    "{placed}, on a {background} background.",
    "{main} and a few other things.",
    "{main} in a {background} scene with more in it.",
    "{most} stand out on {background}.",
    "a view of {most}, among other things.",
    "{single} {place} of a {background} picture.",
    "{single} is {place} of the image.",
    "{related}.",
    "{related}, with a {background} background.",
    "{hidden}.",
    "{repeated} in a picture of {total} things.",
    "{repeated} drawn on {background}.",
    "{total} objects, {main} the largest of them.",
)


def noun(rng: np.random.Generator, name: str, count: int) -> str:
    """`a dog`, `two sofas`, `a pair of scissors`: the category's own name half of the time."""
    if name in UNITS:
        return f"{phrase(UNITS[name], count)} of {name}"
    others = SYNONYMS.get(name, ())
    word = others[rng.integers(len(others))] if others and rng.random() < 0.5 else name
    return phrase(word, count)


def place(placed: Placed) -> str:
    """Where the object's centre is, in thirds of both axes."""
    column, row = (0 if v < 0.38 * SIZE else 2 if v > 0.62 * SIZE else 1 for v in placed.center)
    return PLACES[row][column]


def visible_pixels(scene: Scene) -> np.ndarray:
    """Pixels of each object that no later object covers, int [objects]."""
    return np.bincount(scene.owner.ravel() + 1, minlength=len(scene.objects) + 1)[1:]


def _hidden(scene: Scene, single: dict[int, str]) -> tuple[int, int] | None:
    """Two single objects, the second of which covers at least a tenth of the first."""
    for i in single:
        o = scene.objects[i]
        over = scene.owner[o.y : o.y + o.size, o.x : o.x + o.size][o.alpha > 0.5]
        for j in single:
            if j > i and (over == j).mean() >= 0.1:
                return i, j
    return None


def _fields(rng: np.random.Generator, scene: Scene) -> dict[str, str]:
    area = visible_pixels(scene)
    groups: dict[str, list[int]] = {}
    for i in np.argsort(-area, kind="stable"):
        groups.setdefault(NAMES[scene.objects[i].category], []).append(int(i))
    names = sorted(groups, key=lambda name: -area[groups[name]].sum())
    single = {members[0]: name for name, members in groups.items() if len(members) == 1}
    repeated = [name for name in names if len(groups[name]) > 1]

    def say(name: str) -> str:
        return noun(rng, name, len(groups[name]))

    order = [names[i] for i in rng.permutation(len(names))]
    # What has a place comes first: in "two cups and a dog on the left" the cups would seem to be there as well.
    placed = [f"{noun(rng, name, 1)} {place(scene.objects[i])}" for i, name in single.items()]
    fields = {
        "background": scene.background,
        "everything": listing([say(name) for name in order]),
        "are": "are" if len(groups[order[0]]) > 1 else "is",
        "placed": listing(placed + [say(name) for name in repeated]),
    }
    if len(scene.objects) > 1:
        fields["total"] = NUMBERS[len(scene.objects)]
    if len(names) > 2:
        fields["main"] = say(names[0])
        fields["most"] = listing([say(name) for name in names[:2]])
    if repeated:
        fields["repeated"] = say(repeated[0])
    if single:
        first = next(iter(single))
        fields["single"], fields["place"] = say(single[first]), place(scene.objects[first])
    if len(single) > 1:
        a, b = (int(i) for i in rng.choice(list(single), 2, replace=False))
        dx, dy = np.subtract(scene.objects[b].center, scene.objects[a].center)
        if abs(dx) >= abs(dy):
            relation = "to the left of" if dx > 0 else "to the right of"
        else:
            relation = "above" if dy > 0 else "below"
        if max(abs(dx), abs(dy)) >= SIZE / 6:
            fields["related"] = f"{say(single[a])} {relation} {say(single[b])}"
        pair = _hidden(scene, single)
        if pair:
            fields["hidden"] = f"{say(single[pair[0]])} partly hidden behind {say(single[pair[1]])}"
    return fields


def reference_captions(rng: np.random.Generator, scene: Scene, n: int = 5) -> list[str]:
    """`n` different captions, the first of which names every object."""
    captions: list[str] = []
    templates = [COMPLETE[i] for i in rng.permutation(len(COMPLETE))]
    others = [*templates[1:3], *PARTIAL]
    templates = [templates[0], *(others[i] for i in rng.permutation(len(others))), *templates[3:]]
    for template in templates:
        fields = _fields(rng, scene)
        if any(field not in fields for _, field, _, _ in Formatter().parse(template) if field):
            continue
        caption = template.format_map(fields)
        caption = caption[0].upper() + caption[1:]
        if caption not in captions:
            captions.append(caption)
        if len(captions) == n:
            break
    return captions
