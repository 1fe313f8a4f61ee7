"""From a records file to a report: plain data that says what was scored, how, and how sure one can be."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vlattn
from vlattn.errors import InputError
from vlattn.eval.chair import chair_metrics
from vlattn.eval.coco import read_coco
from vlattn.eval.load import (
    Items,
    choose_profile,
    choose_task,
    load_items,
    score_items_chair,
    score_items_pope,
)
from vlattn.eval.pope_files import read_pope
from vlattn.eval.pope_score import POPE_COUNTS, pooled_metrics, pope_metrics, split_means
from vlattn.eval.stats import interval, resample_totals, wilson

Report = dict[str, Any]


def score_file(
    records: str | Path,
    task: str | None = None,
    profile: str | None = None,
    annotations: str | Path | None = None,
    captions: str | Path | None = None,
    truncate: str = "none",
    n_boot: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    details: bool = False,
) -> Report:
    """Score a records file.

    task and profile default to the sidecar's task and to the profile of published tables. annotations: for chair the
    COCO instances file (and `captions` the captions file); for pope the question file or folder, which is then checked
    to be answered in full. details adds the scored items. Values are fractions in [0, 1], Len in tokens, None 0/0.
    """
    task = choose_task(records, task)
    profile = choose_profile(task, profile)
    boot = {"n_boot": n_boot, "seed": seed, "level": level}
    if task == "pope":
        if captions is not None or truncate != "none":
            raise InputError("captions and truncate are for task 'chair'; leave them out for 'pope'")
        return _pope_report(records, profile, annotations, boot, details)
    return _chair_report(records, profile, annotations, captions, truncate, boot, details)


def _pope_report(
    path: str | Path, profile: str, annotations: str | Path | None, boot: Mapping[str, Any], details: bool
) -> Report:
    files = read_pope(annotations) if annotations is not None else []
    items = load_items(path, "pope", files)
    result = score_items_pope(items, profile, files)
    totals = resample_totals(result.table, result.image_ids, boot["n_boot"], boot["seed"])
    n = len(set(result.image_ids))
    width = len(POPE_COUNTS)

    def intervals(values: Mapping[str, float | None], samples: Mapping[str, NDArray[np.float64]]) -> Report:
        return _intervals(values, samples, n, boot["level"])

    splits = {
        split: {
            "metrics": intervals(values, pope_metrics(totals[:, i * width : (i + 1) * width], profile)),
            "counts": result.counts[split],
        }
        for i, (split, values) in enumerate(result.splits.items())
    }
    report = _head("pope", profile, items, boot, n)
    report |= {
        "metrics": intervals(result.mean, split_means(totals, profile)),
        "metrics_are": "unweighted means over the splits",
        "pooled": intervals(result.pooled, pooled_metrics(totals, profile)),
        "splits": splits,
        "unparsed_rate": result.unparsed_rate,
        "unparsed_ids": list(result.unparsed),
        "traps": list(result.traps),
        "annotations": {Path(f.path).name: {"sha256": f.sha256, "questions": len(f.questions)} for f in files},
    }
    report["warnings"] += [warning for file in files for warning in file.warnings] + list(result.warnings)
    if details:
        report["items"] = [
            {"id": r.id, "image_id": r.image_id, "label": r.label, "pred": result.predictions[r.id], "raw": r.raw}
            for r in items.records
        ]
    return report


def _chair_report(
    path: str | Path,
    profile: str,
    annotations: str | Path | None,
    captions: str | Path | None,
    truncate: str,
    boot: Mapping[str, Any],
    details: bool,
) -> Report:
    items = load_items(path, "chair")
    coco = read_coco(annotations, captions) if annotations is not None else None
    result = score_items_chair(items, profile, coco, truncate)
    images = [caption.image_id for caption in result.captions]
    totals = resample_totals(result.table(), images, boot["n_boot"], boot["seed"])
    n = len(set(images))
    report = _head("chair", profile, items, boot, n)
    report |= {
        "truncate": truncate,
        "ground_truth": "instances" if captions is None else "instances and reference captions",
        "metrics": _intervals(result.metrics, chair_metrics(totals), n, boot["level"]),
        "counts": result.counts,
        "annotations": dict(coco.sha256) if coco else {},
    }
    if n == len(images):  # a proportion of independent items only then
        bounds = wilson(result.counts["hallucinated_captions"], n, boot["level"])
        report["metrics"]["chair_s"]["wilson"] = list(bounds) if bounds else None
    report["warnings"] += list(result.warnings)
    if details:
        report["items"] = [caption.to_json() for caption in result.captions]
    return report


def _intervals(
    values: Mapping[str, float | None], samples: Mapping[str, NDArray[np.float64]], n_clusters: int, level: float
) -> Report:
    found = {}
    for name, value in values.items():
        bounds = interval(np.nan if value is None else value, samples[name], n_clusters, level)
        found[name] = {"value": value, "low": bounds.low, "high": bounds.high, "n_undefined": bounds.n_undefined}
    return found


def _head(task: str, profile: str, items: Items, boot: Mapping[str, Any], n_images: int) -> Report:
    warnings = []
    if items.error_ids:
        warnings.append(f"{len(items.error_ids)} items failed and are not scored (first {items.error_ids[0]!r})")
    return {
        "task": task,
        "profile": profile,
        "records": items.to_json(),
        "run": items.sidecar.get("settings"),
        "environment": items.sidecar.get("environment"),
        "bootstrap": {**boot, "unit": "image", "n_images": n_images, "interval": "percentile"},
        "versions": versions(),
        "warnings": warnings,
    }


def versions() -> dict[str, str]:
    """The versions of what computed the report."""
    return {
        "vlattn": vlattn.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pycocotools": metadata.version("pycocotools"),
    }


def write_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a report as JSON with plain numbers and null."""
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"out={str(path)!r} cannot be written ({error.strerror}); give another path") from None
