"""Two runs on the same items: how far apart are they, and could that be chance?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlattn.errors import InputError
from vlattn.eval.chair import CHAIR_METRICS, Caption, chair_metrics
from vlattn.eval.coco import CocoSet, read_coco
from vlattn.eval.load import Items, choose_profile, choose_task, load_items, score_items_chair, score_items_pope
from vlattn.eval.pope_files import PopeFile, read_pope
from vlattn.eval.pope_score import POPE_METRICS, split_means
from vlattn.eval.records import Record, check_same_ids
from vlattn.eval.report import Report, versions
from vlattn.eval.stats import holm, mcnemar, paired_difference, resample_totals

Metrics = Callable[[NDArray[Any]], Mapping[str, NDArray[np.float64]]]
DEFAULT_METRICS = {"pope": ("accuracy", "f1"), "chair": ("chair_s", "chair_i", "recall", "len")}
KNOWN_METRICS = {"pope": POPE_METRICS, "chair": CHAIR_METRICS}


def compare_files(
    a: str | Path,
    b: str | Path,
    annotations: str | Path | None = None,
    captions: str | Path | None = None,
    task: str | None = None,
    profile: str | None = None,
    metrics: Sequence[str] = (),
    truncate: str = "none",
    n_boot: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Report:
    """Compare run B with run A on the same items.

    Each metric gets the difference B - A with a paired bootstrap interval by image and a p-value, Holm-adjusted over
    the metrics asked for. McNemar's exact test on right and wrong items (for chair: captions without and with a
    hallucination) is given beside it; it takes items as independent. Items that failed in either run are left out
    of both and counted. Raises InputError when the runs do not hold the same items with the same images and labels.
    """
    task_a, task_b = choose_task(a, task), choose_task(b, task)
    if task_a != task_b:
        raise InputError(f"{str(a)!r} holds answers for {task_a!r} and {str(b)!r} for {task_b!r}; compare one task")
    task = task_a
    profile = choose_profile(task, profile)
    names = tuple(dict.fromkeys(metrics)) or DEFAULT_METRICS[task]
    unknown = [name for name in names if name not in KNOWN_METRICS[task]]
    if unknown:
        raise InputError(f"metric={unknown[0]!r} is no {task} metric; choose from {', '.join(KNOWN_METRICS[task])}")
    files: list[PopeFile] = []
    coco: CocoSet | None = None
    if annotations is not None:
        if task == "pope":
            files = read_pope(annotations)
        else:
            coco = read_coco(annotations, captions)
    items_a, items_b = load_items(a, task, files), load_items(b, task, files)
    left_out = sorted({*items_a.error_ids, *items_b.error_ids})
    items_a, items_b = _align(items_a, items_b)

    measure: Metrics
    if task == "pope":
        pope = [score_items_pope(items, profile, files) for items in (items_a, items_b)]
        tables, right = [r.table for r in pope], [r.correct for r in pope]
        images: Sequence[int] = pope[0].image_ids

        def measure(totals: NDArray[Any]) -> Mapping[str, NDArray[np.float64]]:
            return split_means(totals, profile)
    else:
        chair = [score_items_chair(items, profile, coco, truncate) for items in (items_a, items_b)]
        tables = [r.table() for r in chair]
        right = [np.array([not c.counts["hallucinated_captions"] for c in r.captions]) for r in chair]
        images = [c.image_id for c in chair[0].captions]
        measure = chair_metrics

    totals = resample_totals(np.concatenate(tables, axis=1), images, n_boot, seed)
    width = tables[0].shape[1]
    values = [measure(table.sum(axis=0)) for table in tables]
    samples = [measure(totals[:, :width]), measure(totals[:, width:])]
    n_images = len(set(images))
    results = {
        name: asdict(
            paired_difference(values[0][name], values[1][name], samples[1][name] - samples[0][name], n_images, level)
        )
        for name in names
    }
    tested = [name for name in names if results[name]["p_value"] is not None]
    adjusted = holm([results[name]["p_value"] for name in tested])
    for name in names:
        results[name]["p_holm"] = adjusted[tested.index(name)] if name in tested else None
    only_a, only_b = int(np.sum(right[0] & ~right[1])), int(np.sum(~right[0] & right[1]))
    return {
        "task": task,
        "profile": profile,
        "truncate": truncate if task == "chair" else None,
        "a": {**items_a.to_json(), "run": items_a.sidecar.get("settings")},
        "b": {**items_b.to_json(), "run": items_b.sidecar.get("settings")},
        "settings_that_differ": _differing(items_a, items_b),
        "n_items": len(images),
        "left_out_ids": left_out,
        "metrics": results,
        "mcnemar": {"only_a_right": only_a, "only_b_right": only_b, "p_value": mcnemar(only_a, only_b)},
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": level, "unit": "image", "n_images": n_images},
        "versions": versions(),
        "warnings": [f"{len(left_out)} items failed in a run and are left out of both"] if left_out else [],
    }


def _align(a: Items, b: Items) -> tuple[Items, Items]:
    """Both runs on the items both answered, in A's order."""
    check_same_ids([*a.ids, *a.error_ids], [*b.ids, *b.error_ids], f"records={b.path!r}")
    failed = {*a.error_ids, *b.error_ids}
    records, captions = {r.id: r for r in b.records}, {c.id: c for c in b.captions}
    kept_a = [r for r in a.records if r.id not in failed]
    kept_captions = [c for c in a.captions if c.id not in failed]
    if not kept_a and not kept_captions:
        raise InputError("no item was answered in both runs; nothing can be compared")
    pairs: list[tuple[Record | Caption, Record | Caption]] = [(r, records[r.id]) for r in kept_a]
    pairs += [(c, captions[c.id]) for c in kept_captions]
    for ours, theirs in pairs:
        if ours.image_id != theirs.image_id or getattr(ours, "label", None) != getattr(theirs, "label", None):
            raise InputError(
                f"item {ours.id!r} has another image or label in {b.path!r}; compare runs on the same items"
            )
    gone = tuple(sorted(failed))
    return (
        Items(a.path, tuple(kept_a), tuple(kept_captions), gone, a.sidecar),
        Items(
            b.path, tuple(records[r.id] for r in kept_a), tuple(captions[c.id] for c in kept_captions), gone, b.sidecar
        ),
    )


def _differing(a: Items, b: Items) -> list[str]:
    left, right = a.sidecar.get("settings") or {}, b.sidecar.get("settings") or {}
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
