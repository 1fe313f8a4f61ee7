"""Building POPE questions: is there an object in the image, asked of objects that are there and of ones that are not.

Source: "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv 2305.10355) and its released builder.
Ours has a seed, stops where the released one would loop for ever, and writes "in the image" whatever the article.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlattn.errors import InputError
from vlattn.eval.coco import ImageObjects

SPLITS = ("random", "popular", "adversarial")
UNIVERSES = ("observed", "all")
FREQ_SCOPES = ("sample", "all")


@dataclass(frozen=True)
class PopeQuestion:
    """One question. question_id counts from 1 within a split; label is "yes" or "no"; category is the split."""

    question_id: int
    image: str
    image_id: int
    text: str
    label: str
    category: str

    @property
    def item_id(self) -> str:
        """`split:question_id`, what answers are joined by."""
        return f"{self.category}:{self.question_id}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def question_text(name: str) -> str:
    """`Is there a dog in the image?`, with "an" before a vowel letter and plurals as they are ("a skis")."""
    article = "an" if name[:1].lower() in set("aeiou") else "a"
    return f"Is there {article} {name} in the image?"


def build_pope(
    coco_objects: Iterable[ImageObjects],
    n_images: int = 500,
    per_image: int = 3,
    seed: int = 0,
    universe: str = "observed",
    freq_scope: str = "sample",
    categories: Sequence[str] = (),
) -> dict[str, list[PopeQuestion]]:
    """The questions of the three splits, `2 * per_image` per image and half of them "yes".

    Images with at least `per_image` objects are candidates, `n_images` of them are drawn. An image is asked about its
    first `per_image` objects and, after each, about one that is not there: any (random), the most frequent (popular),
    or the one that most often comes with the object just asked (adversarial); where none of those is left, any.

    universe: what may be asked without being there, the objects observed in the counted images or all of `categories`.
    freq_scope: count frequencies over the sampled images, as the released files do, or over all images.
    Raises InputError when there are too few images, or too few objects outside one of them.
    """
    for argument, given, known in (("universe", universe, UNIVERSES), ("freq_scope", freq_scope, FREQ_SCOPES)):
        if given not in known:
            raise InputError(f"{argument}={given!r} is unknown; choose one of {', '.join(known)}")
    if n_images < 1 or per_image < 1:
        raise InputError(f"n_images={n_images}, per_image={per_image}: give two positive numbers")
    everything = sorted(coco_objects, key=lambda image: image.image_id)
    candidates = [image for image in everything if len(image.objects) >= per_image]
    if len(candidates) < n_images:
        raise InputError(
            f"n_images={n_images} is more than the {len(candidates)} images with {per_image} or more objects; lower it"
        )
    chosen = random.Random(seed).sample(candidates, n_images)
    images = sorted(chosen, key=lambda image: image.image_id)
    stats = _Statistics.count(images if freq_scope == "sample" else everything)
    pool = list(stats.frequency) if universe == "observed" else list(dict.fromkeys([*categories, *stats.frequency]))
    return {
        split: [
            question
            # The splits draw apart: the negatives of one do not depend on the fallbacks of another.
            for draw in [random.Random(f"{seed}/{split}")]
            for place, image in enumerate(images)
            for question in _ask(image, split, per_image, stats, pool, draw, 2 * per_image * place + 1)
        ]
        for split in SPLITS
    }


@dataclass(frozen=True)
class _Statistics:
    frequency: list[str]  # objects by falling number of images; ties stand in first-seen order
    company: Mapping[str, list[str]]  # object -> objects it shares images with, by falling number of them

    @staticmethod
    def count(images: Sequence[ImageObjects]) -> _Statistics:
        frequency: Counter[str] = Counter()
        company: dict[str, Counter[str]] = {}
        for image in images:
            frequency.update(image.objects)
            for name in image.objects:
                company.setdefault(name, Counter()).update(image.objects)  # itself too: it is there, so never asked
        return _Statistics(_ranked(frequency), {name: _ranked(others) for name, others in company.items()})


def _ranked(counter: Counter[str]) -> list[str]:
    return [name for name, _ in counter.most_common()]  # most_common() without n sorts stably


def _ask(
    image: ImageObjects,
    split: str,
    per_image: int,
    stats: _Statistics,
    pool: list[str],
    draw: random.Random,
    first_id: int,
) -> Iterable[PopeQuestion]:
    barred = set(image.objects)  # what is there, and what has been asked
    absent = [name for name in pool if name not in barred]
    if len(absent) < per_image:
        raise InputError(
            f"image {image.image_id} leaves {len(absent)} objects to ask about that are not in it and {per_image} are "
            "needed; use universe='all' or more images"
        )
    for slot, present in enumerate(image.objects[:per_image]):
        order = {"random": [], "popular": stats.frequency, "adversarial": stats.company[present]}[split]
        missing = next((name for name in order if name not in barred), None)
        if missing is None:
            missing = draw.choice([name for name in absent if name not in barred])
        barred.add(missing)
        for step, (name, label) in enumerate(((present, "yes"), (missing, "no"))):
            number = first_id + 2 * slot + step
            yield PopeQuestion(number, image.file_name, image.image_id, question_text(name), label, split)
