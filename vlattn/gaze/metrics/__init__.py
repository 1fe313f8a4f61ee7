"""Scanpath metrics, in numpy: each one function over batches of paths, (predicted, human, *, on_degenerate, ...).

from vlattn.gaze.metrics import METRICS, make_paths
predicted = make_paths([[(100, 100), (300, 150)]], (1280, 720), symbols=[[3, 5]])
human = make_paths([[(110, 90), (320, 180), (480, 420)]], (1280, 720), symbols=[[3, 5, 7]])
METRICS["ss"](predicted, human)  # array([0.66666667])

Row b of the one is compared with row b of the other: `Paths.take` repeats rows. Pixels and milliseconds throughout.
What too short paths score is a table, in `policy`; what means are taken over, in `average`; whole files, in `score`.
"""

from vlattn.gaze.metrics.behaviour import behaviour, behaviour_delta
from vlattn.gaze.metrics.edit import edit_distance, string_edit
from vlattn.gaze.metrics.geometric import dtw, euclidean, eyenalysis, frechet, hausdorff
from vlattn.gaze.metrics.multimatch import multimatch
from vlattn.gaze.metrics.multimatch_package import Grouping
from vlattn.gaze.metrics.paths import Paths, make_paths
from vlattn.gaze.metrics.recurrence import recurrence
from vlattn.gaze.metrics.registry import METRICS, Metric, get_metric
from vlattn.gaze.metrics.scanmatch import scanmatch
from vlattn.gaze.metrics.search import (
    mean_step,
    probability_mismatch,
    scanpath_ratio,
    search_curve,
    search_steps,
    target_found,
    tfp_auc,
)
from vlattn.gaze.metrics.sequence import semantic_score, sequence_score
from vlattn.gaze.metrics.steps import step_auc, step_cc, step_gain, step_nll, step_nss, step_overlap
from vlattn.gaze.metrics.symbols import Clusters, fixation_clusters, grid_symbols, label_symbols
from vlattn.gaze.metrics.time_delay import stde, tde

__all__ = [
    "METRICS",
    "Clusters",
    "Grouping",
    "Metric",
    "Paths",
    "behaviour",
    "behaviour_delta",
    "dtw",
    "edit_distance",
    "euclidean",
    "eyenalysis",
    "fixation_clusters",
    "frechet",
    "get_metric",
    "grid_symbols",
    "hausdorff",
    "label_symbols",
    "make_paths",
    "mean_step",
    "multimatch",
    "probability_mismatch",
    "recurrence",
    "scanmatch",
    "scanpath_ratio",
    "search_curve",
    "search_steps",
    "semantic_score",
    "sequence_score",
    "stde",
    "step_auc",
    "step_cc",
    "step_gain",
    "step_nll",
    "step_nss",
    "step_overlap",
    "string_edit",
    "target_found",
    "tde",
    "tfp_auc",
]
