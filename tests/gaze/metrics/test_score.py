"""Whole gaze sets against loops over their trials."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import METRICS, make_paths
from vlattn.gaze.metrics.gaze_paths import gaze_paths, random_gaze
from vlattn.gaze.metrics.score import score_gaze
from vlattn.gaze.metrics.score_settings import ScoreSettings
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial

PLAIN = ScoreSettings(n_boot=0)
W, H = 400, 300


def scenes() -> dict[str, Scene]:
    objects = tuple(
        SceneObject(label, (100.0 * column, 100.0 * row, 100.0, 100.0))
        for (column, row), label in zip(
            [(c, r) for r in range(3) for c in range(4)], ["cup", "cat", "car", "cow"] * 2 + list("abcd"), strict=True
        )
    )
    return {name: Scene(name, W, H, objects) for name in ("one", "two", "three")}


def trials(subjects: list[str], seed: int, samples: int = 1, low: int = 1, timed: bool = True) -> list[Trial]:
    """Targets differ in how many scenes they have: a in three, b in one, so that tasks and trials weigh differently."""
    rng, found = np.random.default_rng(seed), []
    for scene, target in (("one", "a"), ("two", "a"), ("three", "a"), ("one", "b")):
        for subject in subjects:
            for sample in range(samples):
                fixations = tuple(
                    Fixation(
                        float(rng.uniform(0, W)),
                        float(rng.uniform(0, H)),
                        float(rng.uniform(80, 500)) if timed else None,
                    )
                    for _ in range(rng.integers(low, 9))
                )
                name = f"{scene}/{target}/{subject}" if samples == 1 else f"{scene}/{target}/{subject}/{sample}"
                found.append(Trial(name, scene, target, subject, fixations, None))
    return found


@pytest.fixture
def human() -> GazeSet:
    return GazeSet(scenes(), tuple(trials(["p1", "p2", "p3"], 0)))


@pytest.fixture
def model() -> GazeSet:
    made = []
    for trial in trials(["p1", "p2", "p3"], 1, samples=4):
        made.append(replace(trial, subject="net"))
    return GazeSet(scenes(), tuple(made))


def value(name: str, a: Trial, b: Trial) -> float:
    """Of one pair, from the trials."""
    sides = []
    for trial in (a, b):
        cells = [int(f.x // 100) + 4 * int(f.y // 100) for f in trial.fixations]
        labels = ["cup", "cat", "car", "cow"] * 2 + list("abcd")
        points = [(f.x, f.y) if f.duration is None else (f.x, f.y, f.duration) for f in trial.fixations]
        kinds: Any = {"objects": [cells], "labels": [[labels[c] for c in cells]]}
        sides.append(make_paths([points], (W, H), symbols=kinds))
    return float(np.ravel(METRICS[name](*sides))[0])


def expected(
    name: str, predicted: GazeSet, people: GazeSet, over: str, average: str, compare: str
) -> tuple[float, int]:
    tasks: dict[str, list[float]] = defaultdict(list)
    valid = 0
    for scene, target in (("one", "a"), ("two", "a"), ("three", "a"), ("one", "b")):
        per_person = []
        for person in [t for t in people.trials if (t.scene, t.target) == (scene, target)]:
            mine = [t for t in predicted.trials if (t.scene, t.target) == (scene, target)]
            if compare == "trial":
                mine = [t for t in mine if t.id.rsplit("/", 1)[0] == person.id]
            values = [value(name, one, person) for one in mine]
            values = [v for v in values if not np.isnan(v)]
            valid += len(values)
            if values:
                per_person.append(np.mean(values))
        if per_person:
            best = max if METRICS[name].better == "higher" else min
            tasks[target].append(np.mean(per_person) if over == "mean" else best(per_person))
    if average == "tasks":
        return float(np.mean([np.mean(one) for one in tasks.values()])), valid
    return float(np.mean([v for one in tasks.values() for v in one])), valid


@pytest.mark.parametrize("name", ["ss", "semss_time", "ed", "scanmatch", "tde", "dtw"])
@pytest.mark.parametrize(
    ("over", "average", "compare"),
    [("mean", "tasks", "stimulus"), ("best", "trials", "stimulus"), ("mean", "trials", "trial")],
)
def test_means_are_over_samples_people_and_stimuli(
    name: str, over: Any, average: Any, compare: Any, model: GazeSet, human: GazeSet
) -> None:
    how = replace(PLAIN, over=over, average=average, compare=compare)
    cell = score_gaze(model, human, [name], how)["models"]["net"]["metrics"][name]
    want, valid = expected(name, model, human, over, average, compare)
    assert cell["value"] == pytest.approx(want)
    assert cell["n_valid"] == valid
    assert cell["n_total"] == (48 if compare == "trial" else 144)
    if name == "tde":
        assert 0 < valid < cell["n_total"]


@pytest.mark.parametrize("over", ["mean", "best"])
def test_people_are_each_scored_against_the_others(over: Any, human: GazeSet) -> None:
    found = score_gaze(human, human, ["ss", "ed"], replace(PLAIN, over=over))["human"]
    for name, best in (("ss", max), ("ed", min)):
        tasks: dict[str, list[float]] = defaultdict(list)
        for scene, target in (("one", "a"), ("two", "a"), ("three", "a"), ("one", "b")):
            here = [t for t in human.trials if (t.scene, t.target) == (scene, target)]
            each = []
            for one in here:
                values = [value(name, one, other) for other in here if other.subject != one.subject]
                each.append(np.mean(values) if over == "mean" else best(values))
            tasks[target].append(float(np.mean(each)))
        assert found[name]["value"] == pytest.approx(np.mean([np.mean(v) for v in tasks.values()]))
        assert found[name]["n_total"] == 24


def test_one_person_has_no_ceiling_of_pairs(human: GazeSet) -> None:
    alone = replace(human, trials=tuple(t for t in human.trials if t.subject == "p1"))
    found = score_gaze(human, alone, ["ss", "tfp_auc"], PLAIN)
    assert list(found["human"]) == ["tfp_auc"]


def test_metrics_of_sets_are_those_of_the_functions(model: GazeSet, human: GazeSet) -> None:
    found = score_gaze(model, human, ["tfp_auc", "probability_mismatch", "behaviour_delta", "mean_step"], PLAIN)
    trials = tuple(trial.id.rsplit("/", 1)[0] for trial in model.trials)
    mine, theirs = replace(gaze_paths(model), trials=trials), gaze_paths(human)
    for name, cell in found["models"]["net"]["metrics"].items():
        assert cell["value"] == pytest.approx(METRICS[name](mine, theirs))
        assert cell["n_total"] == 48
    for name, cell in found["human"].items():
        assert cell["value"] == pytest.approx(METRICS[name](theirs, theirs))
    assert found["human"]["behaviour_delta"]["value"] == 0
    shorter = score_gaze(model, human, ["tfp_auc"], replace(PLAIN, max_step=2))
    assert shorter["models"]["net"]["metrics"]["tfp_auc"]["value"] == pytest.approx(
        METRICS["tfp_auc"](mine, theirs, max_step=2)
    )


def test_truncation_cuts_human_paths_only_if_asked(model: GazeSet, human: GazeSet) -> None:
    def cut(gaze: GazeSet) -> GazeSet:
        return replace(gaze, trials=tuple(replace(t, fixations=t.fixations[:3]) for t in gaze.trials))

    for both, people in ((True, cut(human)), (False, human)):
        how = replace(PLAIN, truncate=3, truncate_human=both)
        found = score_gaze(model, human, ["ss", "dtw"], how)["models"]["net"]["metrics"]
        want = score_gaze(cut(model), people, ["ss", "dtw"], PLAIN)["models"]["net"]["metrics"]
        assert found == want


def test_all_that_files_allow_is_scored_and_the_rest_is_explained(model: GazeSet, human: GazeSet) -> None:
    found = score_gaze(model, human, settings=PLAIN)
    scored = {column.split(".")[0] for column in found["models"]["net"]["metrics"]}
    assert scored == {
        name
        for name, one in METRICS.items()
        if one.kind != "step" and "clusters" not in one.needs and name != "euclidean"
    }
    assert found["skipped"] == {}
    assert found["about"]["ed"]["better"] == "lower"
    json.dumps(found, allow_nan=False)
    assert found == score_gaze(model, human, settings=PLAIN)

    untimed = replace(model, trials=tuple(trials(["net"], 1, timed=False)))
    found = score_gaze(untimed, human, settings=PLAIN)
    assert set(found["skipped"]) == {"ss_time", "semss_time", "semfed_time", "scanmatch_time"}
    assert "no durations" in found["skipped"]["ss_time"]
    assert found["models"]["net"]["metrics"]["multimatch.duration"]["value"] is None

    bare = {name: Scene(name, W, H, ()) for name in human.scenes}
    found = score_gaze(replace(model, scenes=bare), replace(human, scenes=bare), settings=PLAIN)
    assert {"ss", "semss", "ed", "tfp_auc", "behaviour_delta"} <= set(found["skipped"])
    assert "dtw" in found["models"]["net"]["metrics"]


def test_intervals_hold_the_value_and_are_repeatable(model: GazeSet, human: GazeSet) -> None:
    how = ScoreSettings(n_boot=200)
    found = score_gaze(model, human, ["ss", "dtw", "tfp_auc"], how)
    for cell in (*found["models"]["net"]["metrics"].values(), *found["human"].values()):
        assert cell["low"] <= cell["value"] <= cell["high"]
        assert cell["low"] < cell["high"]
    assert found == score_gaze(model, human, ["ss", "dtw", "tfp_auc"], how)
    assert found != score_gaze(model, human, ["ss", "dtw", "tfp_auc"], replace(how, seed=1))


def test_chance_has_as_many_fixations_anywhere_on_the_screen(model: GazeSet, human: GazeSet) -> None:
    chance = random_gaze(model, 0)
    for mine, drawn in zip(model.trials, chance.trials, strict=True):
        assert len(mine.fixations) == len(drawn.fixations)
        assert sorted(f.duration or 0 for f in mine.fixations) == sorted(f.duration or 0 for f in drawn.fixations)
        assert all(0 <= f.x < W and 0 <= f.y < H for f in drawn.fixations)
    assert chance == random_gaze(model, 0)
    found = score_gaze(human, human, ["multimatch", "ss"], PLAIN)["models"]["p1"]
    assert set(found["random"]) == set(found["metrics"])


def test_each_subject_of_predictions_is_a_model(human: GazeSet) -> None:
    found = score_gaze(human, human, ["ss"], PLAIN)["models"]
    assert list(found) == ["p1", "p2", "p3"]
    assert all(one["paths"] == 4 for one in found.values())


def test_predictions_without_people_are_counted_and_left_out(model: GazeSet, human: GazeSet) -> None:
    fewer = replace(human, trials=tuple(t for t in human.trials if t.scene != "two"))
    found = score_gaze(model, fewer, ["ss", "tfp_auc"], PLAIN)["models"]["net"]
    kept = replace(model, trials=tuple(t for t in model.trials if t.scene != "two"))
    assert found["unmatched"] == 12
    assert found["metrics"] == score_gaze(kept, fewer, ["ss", "tfp_auc"], PLAIN)["models"]["net"]["metrics"]
    with pytest.raises(InputError, match=r"^predictions of 'net': no scene and target"):
        score_gaze(model, replace(human, trials=tuple(replace(t, target="zebra") for t in human.trials)), ["ss"], PLAIN)


def test_clusters_are_of_peoples_fixations_and_reported(model: GazeSet, human: GazeSet) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    found = score_gaze(model, human, ["fed"], PLAIN)
    total: dict[str, list[float]] = defaultdict(list)
    for scene, target, bandwidth in found["bandwidths"]:
        people = [t for t in human.trials if (t.scene, t.target) == (scene, target)]
        shift = cluster.MeanShift(bandwidth=bandwidth).fit(np.concatenate([t.points() for t in people]))
        values = []
        for one in [t for t in model.trials if (t.scene, t.target) == (scene, target)]:
            for person in people:
                pair = [
                    make_paths([t.points()], (W, H), symbols={"clusters": [shift.predict(t.points()).tolist()]})
                    for t in (one, person)
                ]
                values.append(float(METRICS["fed"](*pair)[0]))
        total[target].append(float(np.mean(values)))
    want = np.mean([np.mean(v) for v in total.values()])
    assert found["models"]["net"]["metrics"]["fed"]["value"] == pytest.approx(want)


def test_empty_predictions_are_scored_by_the_table(model: GazeSet, human: GazeSet) -> None:
    empty = replace(model, trials=tuple(replace(t, fixations=()) for t in model.trials))
    found = score_gaze(empty, human, ["ss", "ed", "dtw", "multimatch", "tfp_auc"], PLAIN)["models"]["net"]["metrics"]
    assert found["ss"]["value"] == 0
    assert found["ss"]["n_valid"] == 144
    assert found["ed"]["value"] > 0
    for name in ("dtw", "multimatch.mean4", "tfp_auc"):
        assert found[name]["value"] is None
        assert found[name]["n_valid"] == 0


def test_target_is_the_named_object_or_the_only_one_with_its_label(human: GazeSet) -> None:
    trial = human.trials[0]
    paths = gaze_paths(
        replace(
            human,
            trials=(
                replace(trial, id="only", target="a"),
                replace(trial, id="two of them", target="cup"),
                replace(trial, id="absent", target="zebra"),
                replace(trial, id="named", target="cup", target_object=4),
            ),
        )
    )
    assert paths.targets == (8, None, None, 4)
    assert paths.boxes[0].tolist() == [0, 200, 100, 100]
    assert np.isnan(paths.boxes[1:3]).all()
    assert paths.boxes[3].tolist() == [0, 100, 100, 100]


def test_objects_that_trials_have_are_kept(human: GazeSet) -> None:
    trial = human.trials[0]
    own = replace(trial, objects=(-1,) * len(trial.fixations))
    paths = gaze_paths(replace(human, trials=(own, human.trials[1])))
    assert set(paths.symbols["objects"][0]) == {-1}
    assert set(paths.symbols["labels"][0]) == {""}
    assert -1 not in paths.symbols["objects"][1]


def test_errors_say_what_to_do(model: GazeSet, human: GazeSet) -> None:
    wide = replace(model, scenes={**model.scenes, "one": replace(model.scenes["one"], width=800)})
    fewer = replace(model, scenes={**model.scenes, "one": replace(model.scenes["one"], objects=())})
    untimed = replace(model, trials=tuple(trials(["net"], 1, timed=False)))
    nothing = replace(model, trials=())
    for message, call in (
        (r"predicted: has no trials", lambda: score_gaze(nothing, human)),
        (r"human: has no trials", lambda: score_gaze(model, nothing)),
        (r"scene 'one': is 800 x 300 in the predictions and 400 x 300", lambda: score_gaze(wide, human)),
        (r"scene 'one': has other objects", lambda: score_gaze(fewer, human)),
        (r"metric: got 'bleu'; give one of ss, ", lambda: score_gaze(model, human, ["bleu"])),
        (r"metrics: step_nll cannot be scored: it takes", lambda: score_gaze(model, human, ["step_nll"])),
        (r"metrics: ss_time cannot be scored: fixations have no", lambda: score_gaze(untimed, human, ["ss_time"])),
        (r"over: got 'median'", lambda: ScoreSettings(over="median")),  # type: ignore[arg-type]
        (r"truncate: got 0", lambda: ScoreSettings(truncate=0)),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            call()
