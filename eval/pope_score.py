"""Scoring POPE answers. The positive class is "yes"; all values are fractions in [0, 1], None for 0/0.

Source: "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv 2305.10355). The headline is the
unweighted mean over the splits of accuracy and of F1; values pooled over all questions differ and are given too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlattn.errors import InputError
from vlattn.eval.pope_build import SPLITS, PopeQuestion
from vlattn.eval.pope_parse import parse_strict, parser
from vlattn.eval.records import Record, check_same_ids
from vlattn.eval.stats import plain

POPE_METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
POPE_COUNTS = ("n", "correct", "tp", "fp", "tn", "fn", "labelled_yes")
_SHOWN = 20  # examples listed per kind of odd answer


@dataclass(frozen=True)
class PopeResult:
    """Metrics and counts per split, their unweighted means, and pooled over all questions.

    unparsed_rate: the share of answers that `pope-strict` cannot read; a model that answers badly shows up here even
    where the profile reads every odd answer as "yes". predictions: item id -> "yes", "no" or None.
    table: [items, splits * len(POPE_COUNTS)], what a bootstrap resamples, in the order of item_ids and image_ids.
    """

    profile: str
    splits: dict[str, dict[str, float | None]]
    counts: dict[str, dict[str, int]]
    mean: dict[str, float | None]
    pooled: dict[str, float | None]
    unparsed_rate: float
    unparsed: tuple[str, ...]
    warnings: tuple[str, ...]
    traps: tuple[dict[str, str], ...]
    predictions: dict[str, str | None]
    item_ids: tuple[str, ...]
    image_ids: tuple[int, ...]
    correct: NDArray[np.bool_]
    table: NDArray[np.int64]


def split_of(item_id: str) -> str:
    """`popular:12` -> `popular`; an id without a split belongs to `all`."""
    return item_id.split(":", 1)[0] if ":" in item_id else "all"


def pope_metrics(totals: NDArray[Any], profile: str = "pope-official") -> dict[str, NDArray[np.float64]]:
    """POPE_METRICS from summed counts [..., len(POPE_COUNTS)]; 0/0 is nan, or 0 in `pope-lmms`, as there."""
    n, correct, tp, fp, _, fn, labelled_yes = np.moveaxis(np.asarray(totals, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall, f1 = tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)
        # lmms-eval's yes ratio counts the right answers, not the given ones; its profile keeps that.
        yes_ratio = (labelled_yes if profile == "pope-lmms" else tp + fp) / n
        values = [correct / n, precision, recall, f1, yes_ratio]
    if profile == "pope-lmms":
        values = [np.nan_to_num(value, nan=0.0) for value in values]
    return dict(zip(POPE_METRICS, values, strict=True))


def split_means(totals: NDArray[Any], profile: str = "pope-official") -> dict[str, NDArray[np.float64]]:
    """Unweighted means over splits of POPE_METRICS, from summed counts [..., splits * len(POPE_COUNTS)]."""
    shape = np.shape(totals)
    per_split = pope_metrics(np.reshape(totals, (*shape[:-1], -1, len(POPE_COUNTS))), profile)
    return {name: value.mean(axis=-1) for name, value in per_split.items()}


def pooled_metrics(totals: NDArray[Any], profile: str = "pope-official") -> dict[str, NDArray[np.float64]]:
    """POPE_METRICS of all questions taken as one set, from summed counts [..., splits * len(POPE_COUNTS)]."""
    shape = np.shape(totals)
    return pope_metrics(np.reshape(totals, (*shape[:-1], -1, len(POPE_COUNTS))).sum(axis=-2), profile)


def score_pope(
    records: Sequence[Record], profile: str = "pope-official", questions: Sequence[PopeQuestion] | None = None
) -> PopeResult:
    """Read each record's `raw` by the profile's rule and score it against its label.

    questions: the full set the records must answer; their labels must agree. Pass records that have an answer.
    Raises InputError for missing, unexpected or repeated ids and for labels other than yes or no.
    """
    read = parser(profile)
    _check(records, questions)
    names = sorted(
        {split_of(r.id) for r in records}, key=lambda s: (SPLITS.index(s) if s in SPLITS else len(SPLITS), s)
    )
    width = len(POPE_COUNTS)
    table = np.zeros((len(records), len(names) * width), dtype=np.int64)
    predictions = {record.id: read(record.raw) for record in records}
    for row, record in enumerate(records):
        said_yes, is_yes = predictions[record.id] == "yes", record.label == "yes"
        right = predictions[record.id] == record.label
        cells = [said_yes and is_yes, said_yes and not is_yes, not said_yes and not is_yes, not said_yes and is_yes]
        if profile == "pope-lmms" and predictions[record.id] is None:
            cells = [False] * 4  # there, an answer that is not exactly yes or no enters accuracy alone
        at = names.index(split_of(record.id)) * width
        table[row, at : at + width] = [1, right, *cells, is_yes]

    totals = table.sum(axis=0)
    per_split = totals.reshape(len(names), width)
    unparsed = tuple(r.id for r in records if parse_strict(r.raw) is None)
    traps = tuple(
        {"id": r.id, "raw": r.raw, "read_as": str(predictions[r.id])}
        for r in records
        if predictions[r.id] is not None and parse_strict(r.raw) != predictions[r.id]
    )
    return PopeResult(
        profile=profile,
        splits={s: _plain(pope_metrics(per_split[i], profile)) for i, s in enumerate(names)},
        counts={s: dict(zip(POPE_COUNTS, map(int, per_split[i]), strict=True)) for i, s in enumerate(names)},
        mean=_plain(split_means(totals, profile)),
        pooled=_plain(pooled_metrics(totals, profile)),
        unparsed_rate=len(unparsed) / len(records),
        unparsed=unparsed,
        warnings=tuple(_warnings(profile, len(records), unparsed, traps)),
        traps=traps[:_SHOWN],
        predictions=predictions,
        item_ids=tuple(r.id for r in records),
        image_ids=tuple(r.image_id for r in records),
        correct=np.array([predictions[r.id] == r.label for r in records]),
        table=table,
    )


def _check(records: Sequence[Record], questions: Sequence[PopeQuestion] | None) -> None:
    if not records:
        raise InputError("records is empty; give at least one answered question")
    ids = [record.id for record in records]
    if len(set(ids)) < len(ids):
        raise InputError("records repeat an id; keep one record per question")
    bad = next((r for r in records if r.label not in ("yes", "no")), None)
    if bad is not None:
        raise InputError(f"label={bad.label!r} of record {bad.id!r} is neither yes nor no; give POPE records")
    if questions is not None:
        labels = {q.item_id: q.label for q in questions}
        check_same_ids(labels, ids, "records")
        wrong = [r.id for r in records if labels[r.id] != r.label]
        if wrong:
            raise InputError(
                f"records differ from the questions in {len(wrong)} labels (first {wrong[0]!r}); use one set"
            )


def _warnings(profile: str, n: int, unparsed: Sequence[str], traps: Sequence[dict[str, str]]) -> list[str]:
    found = []
    if unparsed:
        found.append(f"{len(unparsed)} of {n} answers hold no clear yes or no (pope-strict cannot read them)")
    if traps:
        found.append(
            f"{len(traps)} answers are read by {profile} otherwise than by pope-strict, e.g. {traps[0]['raw']!r}"
        )
    if profile == "pope-lmms":
        found.append("yes_ratio in pope-lmms counts the labels, as lmms-eval does, not the answers")
    return found


def _plain(values: dict[str, NDArray[np.float64]]) -> dict[str, float | None]:
    return {name: plain(value) for name, value in values.items()}
