"""CHAIR: which objects does a caption mention that are not in the image?

Source: "Object Hallucination in Image Captioning" (arXiv 1809.02156), with the recall, precision, F1 and length columns
that later papers added. All values are corpus-level fractions in [0, 1], None for 0/0; Len is in tokens.

    CHAIR_i = hallucinated mentions / mentions               repeats count every time
    CHAIR_s = captions with a hallucinated mention / captions
    recall, precision = correct unique objects / true objects, / unique objects mentioned
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlattn.errors import InputError
from vlattn.eval.chair_words import Vocabulary, vocabulary
from vlattn.eval.coco import CocoSet

TRUNCATIONS = ("none", "drop_partial_sentence")
CHAIR_METRICS = ("chair_s", "chair_i", "recall", "precision", "f1", "len")
CHAIR_COUNTS = (
    *("captions", "hallucinated_captions", "mentions", "hallucinated_mentions"),
    *("unique_objects", "correct_objects", "true_objects", "tokens"),
)

GroundTruth = Mapping[int, frozenset[str]]


@dataclass(frozen=True)
class Caption:
    """A generated caption. finish is "eos", "length", "stop", or None where the file does not say."""

    id: str
    image_id: int
    text: str
    finish: str | None = None


@dataclass(frozen=True)
class Mention:
    """The characters [start, end) of a caption, the word they are read as, its object, and whether it is not there."""

    start: int
    end: int
    word: str
    node: str
    hallucinated: bool


@dataclass(frozen=True)
class CaptionScore:
    """One caption's mentions and its row of CHAIR_COUNTS. text is the scored text, after any truncation."""

    id: str
    image_id: int
    text: str
    mentions: tuple[Mention, ...]
    truth: tuple[str, ...]
    n_tokens: int

    @property
    def counts(self) -> dict[str, int]:
        unique = {m.node for m in self.mentions}
        wrong = sum(m.hallucinated for m in self.mentions)
        values = (1, int(wrong > 0), len(self.mentions), wrong)
        return dict(
            zip(
                CHAIR_COUNTS,
                (*values, len(unique), len(unique & set(self.truth)), len(self.truth), self.n_tokens),
                strict=True,
            )
        )

    def to_json(self) -> dict[str, Any]:
        mentions = [asdict(m) for m in self.mentions]
        return {**asdict(self), "mentions": mentions, "truth": list(self.truth), "counts": self.counts}


@dataclass(frozen=True)
class ChairResult:
    """Corpus metrics, summed counts, and the details per caption. profile names what was computed."""

    profile: str
    truncate: str
    metrics: dict[str, float | None]
    counts: dict[str, int]
    captions: tuple[CaptionScore, ...]
    warnings: tuple[str, ...] = field(default=())

    def table(self) -> NDArray[np.int64]:
        """[captions, len(CHAIR_COUNTS)]: what a bootstrap resamples."""
        rows = [list(caption.counts.values()) for caption in self.captions]
        return np.array(rows, dtype=np.int64).reshape(-1, len(CHAIR_COUNTS))


def chair_metrics(totals: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """CHAIR_METRICS from summed counts [..., len(CHAIR_COUNTS)]; 0/0 is nan."""
    n, bad, mentions, wrong, unique, correct, true, tokens = np.moveaxis(np.asarray(totals, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, precision = correct / true, correct / unique
        # 2PR/(P+R) with the fractions cleared, so that it is 0 when nothing is correct and either side is there
        f1 = np.where((true > 0) & (unique > 0), 2 * correct / (true + unique), np.nan)
        values = (bad / n, wrong / mentions, recall, precision, f1, tokens / n)
    return dict(zip(CHAIR_METRICS, values, strict=True))


def ground_truth(coco: CocoSet, image_ids: Iterable[int], words: Vocabulary) -> dict[int, frozenset[str]]:
    """Per image: the objects annotated in it, and those its reference captions mention, read as generated ones are.

    Raises InputError for an id that is no integer or not among the annotations: it would score as all hallucinated.
    """
    truth: dict[int, frozenset[str]] = {}
    for image_id in image_ids:
        if type(image_id) is not int:
            raise InputError(f"image_id={image_id!r} is not an integer; COCO image ids are integers")
        if image_id not in coco.objects:
            raise InputError(
                f"image_id={image_id} is not in the annotations; give the annotation files of these images"
            )
        if image_id not in truth:
            nodes = {words.names[name.lower()] for name in coco.objects[image_id]}
            for caption in (coco.captions or {}).get(image_id, ()):
                nodes.update(found.node for found in words.find(caption)[0])
            truth[image_id] = frozenset(nodes)
    return truth


def mark_mentions(
    caption: str,
    truth: Iterable[str],
    profile: str = "chair-legacy",
    words: Vocabulary | None = None,
) -> list[Mention]:
    """The object mentions of `caption` in order, each with its character span, for highlighting.

    truth: the objects (node names) in the image. words: a vocabulary with other categories than COCO's.
    """
    there = set(truth)
    found, _ = (words or vocabulary(profile)).find(caption)
    return [Mention(f.start, f.end, f.word, f.node, f.node not in there) for f in found]


def drop_partial_sentence(text: str) -> str:
    """Cut after the last `.`, `!` or `?` that ends a sentence; a text without one is kept whole."""
    ends = [match.end() for match in re.finditer(r"[.!?][\])}\"'”’]*(?=\s|\Z)", text)]
    return text[: ends[-1]] if ends else text


def score_captions(
    captions: Sequence[Caption],
    truth: GroundTruth,
    words: Vocabulary,
    truncate: str = "none",
    warnings: Iterable[str] = (),
) -> ChairResult:
    """CHAIR of captions against a ground truth made with the same `words`.

    truncate="drop_partial_sentence" drops the unfinished last sentence of captions that ended by length, as OPERA's
    numbers at 64 tokens do (arXiv 2311.17911).
    """
    if truncate not in TRUNCATIONS:
        raise InputError(f"truncate={truncate!r} is unknown; choose one of {', '.join(TRUNCATIONS)}")
    if not captions:
        raise InputError("captions is empty; give at least one caption")
    scores = []
    for caption in captions:
        if caption.image_id not in truth:
            raise InputError(f"image_id={caption.image_id!r} has no ground truth; give the annotations of these images")
        text = caption.text
        if truncate == "drop_partial_sentence":
            if caption.finish is None:
                raise InputError(
                    f"truncate={truncate!r} needs to know how caption {caption.id!r} ended; give records with `finish`"
                )
            text = drop_partial_sentence(text) if caption.finish == "length" else text
        there = truth[caption.image_id]
        found, n_tokens = words.find(text)
        mentions = tuple(Mention(f.start, f.end, f.word, f.node, f.node not in there) for f in found)
        scores.append(CaptionScore(caption.id, caption.image_id, text, mentions, tuple(sorted(there)), n_tokens))
    result = ChairResult(words.profile, truncate, {}, {}, tuple(scores), tuple(warnings))
    totals = result.table().sum(axis=0)
    metrics = {name: None if np.isnan(v) else float(v) for name, v in chair_metrics(totals).items()}
    counts = dict(zip(CHAIR_COUNTS, map(int, totals), strict=True))
    return ChairResult(words.profile, truncate, metrics, counts, tuple(scores), tuple(warnings))


def score_chair(
    captions: Sequence[Caption], coco: CocoSet, profile: str = "chair-legacy", truncate: str = "none"
) -> ChairResult:
    """CHAIR of captions against COCO-format annotations (instances, and reference captions where `coco` has them)."""
    words = vocabulary(profile, coco.categories)
    truth = ground_truth(coco, [caption.image_id for caption in captions], words)
    warnings = []
    if words.unknown:
        warnings.append(f"categories without synonyms stand for themselves: {', '.join(words.unknown)}")
    if coco.captions is None:
        warnings.append("ground truth from instances only, without reference captions: CHAIR is higher than published")
    else:
        bare = sum(not coco.captions.get(image_id) for image_id in truth)
        if bare:
            warnings.append(f"{bare} of {len(truth)} images have no reference caption: CHAIR is higher than published")
    return score_captions(captions, truth, words, truncate, warnings)
