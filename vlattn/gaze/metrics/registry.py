"""All metrics by name. Each is one function (predicted, human, *, on_degenerate="nan", **its settings)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlattn.errors import InputError
from vlattn.gaze.metrics import search, steps
from vlattn.gaze.metrics.behaviour import behaviour_delta, behaviour_rule
from vlattn.gaze.metrics.edit import edit_distance, string_edit
from vlattn.gaze.metrics.geometric import dtw, euclidean, eyenalysis, frechet, hausdorff
from vlattn.gaze.metrics.multimatch import DIMENSIONS, multimatch
from vlattn.gaze.metrics.policy import Family
from vlattn.gaze.metrics.recurrence import MEASURES, recurrence
from vlattn.gaze.metrics.scanmatch import scanmatch
from vlattn.gaze.metrics.sequence import semantic_score, sequence_score
from vlattn.gaze.metrics.set_rule import SetRule
from vlattn.gaze.metrics.time_delay import stde, tde

Kind = Literal["pair", "set", "step"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    compute: for pairs gives [B] or [B, columns], for sets a number, for steps [S].
    settings: those that make this metric of a function that serves several.
    needs: what paths must have: "objects", "labels", "clusters", "durations", "boxes".
    rule: of set metrics, made from settings.
    """

    name: str
    compute: Callable[..., Any]
    kind: Kind
    family: Family | None
    better: Better
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rule: Callable[..., SetRule] | None = None

    def __call__(self, predicted: Any, human: Any, **settings: Any) -> Any:
        """`compute`, with this metric's settings unless others are given."""
        return self.compute(predicted, human, **{**self.settings, **settings})


def _string(name: str, function: Callable[..., Any], better: Better, about: str, symbols: str, **more: Any) -> Metric:
    family: Family = "string similarity" if better == "higher" else "string distance"
    needs = (symbols, "durations") if "time_bin" in more else (symbols,)
    return Metric(name, function, "pair", family, better, about, {"symbols": symbols, **more}, needs)


def _geometric(function: Callable[..., Any], about: str, better: Better = "lower", **more: Any) -> Metric:
    return Metric(function.__name__, function, "pair", "geometric", better, about, **more)


def _set(function: Callable[..., Any], rule: Callable[..., SetRule], better: Better, about: str, needs: str) -> Metric:
    return Metric(function.__name__, function, "set", "behaviour", better, about, needs=(needs,), rule=rule)


def _step(function: Callable[..., Any], better: Better, about: str) -> Metric:
    return Metric(function.__name__, function, "step", None, better, about)


_ALL = (
    _string("ss", sequence_score, "higher", "Sequence Score of objects", "objects"),
    _string("ss_time", sequence_score, "higher", "the same, 50 ms a symbol", "objects", time_bin=50.0),
    _string("ss_clusters", sequence_score, "higher", "Sequence Score of clusters", "clusters"),
    _string("semss", semantic_score, "higher", "Semantic Sequence Score", "labels"),
    _string("semss_time", semantic_score, "higher", "the same, 50 ms a symbol", "labels", time_bin=50.0),
    _string("ed", edit_distance, "lower", "edit distance of objects", "objects"),
    _string("ed_norm", edit_distance, "lower", "the same over the longer length", "objects", normalised=True),
    _string("fed", edit_distance, "lower", "fixation edit distance, of clusters", "clusters"),
    _string("fed_time", edit_distance, "lower", "the same, 50 ms a symbol", "clusters", time_bin=50.0),
    _string("semfed", edit_distance, "lower", "semantic edit distance", "labels"),
    _string("semfed_time", edit_distance, "lower", "the same, 50 ms a symbol", "labels", time_bin=50.0),
    Metric("sed", string_edit, "pair", "string distance", "lower", "string edit distance on a 5 x 5 grid"),
    Metric("scanmatch", scanmatch, "pair", "string similarity", "higher", "ScanMatch without time"),
    Metric(
        "scanmatch_time",
        scanmatch,
        "pair",
        "string similarity",
        "higher",
        "ScanMatch, 50 ms a symbol",
        {"time_bin": 50.0},
        ("durations",),
    ),
    Metric("multimatch", multimatch, "pair", "MultiMatch", "higher", "MultiMatch, five values", columns=DIMENSIONS),
    _geometric(tde, "time-delay embedding, k = 3, px"),
    _geometric(stde, "scaled time-delay embedding", "higher"),
    _geometric(dtw, "dynamic time warping, px"),
    _geometric(frechet, "discrete Frechet distance, px"),
    _geometric(hausdorff, "Hausdorff distance, px"),
    _geometric(eyenalysis, "Eyenalysis, px squared"),
    _geometric(euclidean, "point by point, equal lengths only, px"),
    _geometric(recurrence, "recurrence and determinism, percent", "higher", columns=MEASURES),
    _set(search.tfp_auc, search.tfp_auc_rule, "higher", "sum of the search curve", "boxes"),
    _set(search.probability_mismatch, search.mismatch_rule, "lower", "distance of the search curves", "boxes"),
    _set(search.target_found, search.found_rule, "higher", "share of paths that find the target", "boxes"),
    _set(search.mean_step, search.step_rule, "lower", "fixation that finds the target", "boxes"),
    _set(search.scanpath_ratio, search.ratio_rule, "higher", "straight way over way gone", "boxes"),
    _set(behaviour_delta, behaviour_rule, "lower", "relative difference of behaviour", "objects"),
    _step(steps.step_overlap, "higher", "probability of the next fixation (SIM)"),
    _step(steps.step_nll, "lower", "negative log-likelihood, nats"),
    _step(steps.step_gain, "higher", "information gain, bits"),
    _step(steps.step_nss, "higher", "normalised scanpath saliency"),
    _step(steps.step_auc, "higher", "conditional AUC"),
    _step(steps.step_cc, "higher", "correlation of maps"),
)
METRICS: dict[str, Metric] = {one.name: one for one in _ALL}


def get_metric(name: str) -> Metric:
    """Raises InputError for an unknown name."""
    if name not in METRICS:
        raise InputError(f"metric: got {name!r}; give one of {', '.join(METRICS)}")
    return METRICS[name]


def metric_table() -> str:
    """All metrics in Markdown."""
    lines = ["| name | function | compares | better | what |", "|---|---|---|---|---|"]
    for one in METRICS.values():
        settings = ", ".join(f"{name}={value!r}" for name, value in one.settings.items())
        lines.append(
            f"| `{one.name}` | `{one.compute.__name__}({settings})` | {one.kind}s | {one.better} | {one.about} |"
        )
    return "\n".join(lines)
