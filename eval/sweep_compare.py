"""The differences of a sweep: every arm against vanilla, and against random pruning with as many visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlattn.eval.stats import holm

METRICS = {"pope": ("f1", "accuracy"), "chair": ("chair_i", "chair_s", "recall")}
"""What is compared; POPE metrics are means over the three splits."""

REFERENCES = ("vanilla", "random")

SAME = 0.05
"""Budgets this close, as a share of the arm's own, count as the same."""

Report = dict[str, Any]
Compare = Callable[[str, str, str, tuple[str, ...]], Mapping[str, Mapping[str, Any]]]
"""(task, file of A, file of B, metrics) -> {metric: B minus A}; `Arms.compare`."""


def add_differences(arms: Sequence[Report], budget: str, compare: Compare) -> None:
    """Give each arm `against`: {reference: {task: what it differs by, or None where there is nothing to compare}}.

    arms: with `method`, `setting`, `file` and `budget`; the argument `budget` names the sense in which visual tokens
    are counted. p-values are adjusted (Holm) over all arms compared with one reference on one metric.
    """
    for arm in arms:
        arm["against"] = {reference: dict.fromkeys(METRICS) for reference in REFERENCES}
    for reference in REFERENCES:
        for task, metrics in METRICS.items():
            compared = []
            for arm in arms:
                other = reference_of(arm, arms, reference, task, budget)
                if other is not None:
                    found = compare(task, other["file"], arm["file"], metrics)
                    compared.append({name: _difference(found[name]) for name in metrics})
                    arm["against"][reference][task] = {
                        "setting": other["setting"],
                        "visual_tokens": other["budget"][task][budget],
                        "metrics": compared[-1],
                    }
            for name in metrics:
                _adjust([differences[name] for differences in compared])


def reference_of(arm: Report, arms: Sequence[Report], reference: str, task: str, budget: str) -> Report | None:
    """The vanilla arm, or the random arm nearest in budget where that is the same; None for the references themselves.

    An arm of `random` is compared with vanilla alone.
    """
    if arm["method"] in ("vanilla", reference):
        return None
    found = [other for other in arms if other["method"] == reference]
    if reference == "vanilla" or not found:
        return found[0] if found else None
    tokens = arm["budget"][task][budget]
    nearest = min(found, key=lambda other: abs(other["budget"][task][budget] - tokens))
    return nearest if abs(nearest["budget"][task][budget] - tokens) <= SAME * tokens else None


def _difference(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("difference", "low", "high", "p_value")}


def _adjust(differences: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm` to each; None where there is no p-value."""
    tested = [found for found in differences if found["p_value"] is not None]
    adjusted = iter(holm([found["p_value"] for found in tested]))
    for found in differences:
        found["p_holm"] = None if found["p_value"] is None else next(adjusted)
