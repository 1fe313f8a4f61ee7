"""POPE metrics: the worked table, all-yes and all-no models, a published row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlattn.errors import InputError
from vlattn.eval.pope import PARSERS, PopeQuestion, score_pope
from vlattn.eval.records import Record

ANSWERS = [
    "Yes, there is a dog.",
    "No, there is no cat.",
    "There is not a person in the image.",
    "Yes",
    "Yes. No other animals are visible.",
    "NO",
]


def record(item: str, label: str, raw: str, image_id: int = 1) -> Record:
    return Record(item, image_id, raw=raw, label=label)


def run(answers: list[str], labels: str = "ynynyn", split: str = "random") -> list[Record]:
    long = {"y": "yes", "n": "no"}
    return [record(f"{split}:{i}", long[lab], raw) for i, (raw, lab) in enumerate(zip(answers, labels, strict=True), 1)]


@pytest.mark.parametrize(
    ("profile", "counts", "values"),
    [
        ("pope-official", (2, 2, 1, 1), (0.5, 0.5, 2 / 3, 4 / 7, 4 / 6)),
        ("pope-opera", (1, 1, 2, 2), (0.5, 0.5, 1 / 3, 0.4, 2 / 6)),
        ("pope-vlmeval", (1, 1, 2, 2), (3 / 6, 0.5, 1 / 3, 0.4, 2 / 6)),
        ("pope-lmms", (0, 1, 1, 0), (1 / 6, 0, 0, 0, 0.5)),
    ],
)
def test_the_worked_answers_under_each_profile(profile: str, counts: Any, values: Any) -> None:
    found = score_pope(run(ANSWERS), profile)
    assert tuple(found.counts["random"][name] for name in ("tp", "fp", "tn", "fn")) == counts
    assert tuple(found.splits["random"].values()) == pytest.approx(values)


def test_the_strict_profile_counts_and_lists_what_it_cannot_read() -> None:
    found = score_pope(run(ANSWERS), "pope-strict")
    assert found.unparsed == ("random:3", "random:5")
    assert found.unparsed_rate == 2 / 6
    assert found.splits["random"]["accuracy"] == 3 / 6


def test_official_traps_are_reported_beside_the_official_numbers() -> None:
    found = score_pope(run(["NO", "Yes", "", "No", "Not visible", "no"]))
    assert [trap["id"] for trap in found.traps] == ["random:1", "random:3", "random:5"]
    assert found.traps[0] == {"id": "random:1", "raw": "NO", "read_as": "yes"}
    assert len(found.warnings) == 2
    assert score_pope(run(["Yes", "No"], "yn")).warnings == ()


def test_a_broken_run_is_all_yes_officially_and_all_unparsed() -> None:
    found = score_pope(run([""] * 6))
    assert found.splits["random"]["yes_ratio"] == 1
    assert found.unparsed_rate == 1


def test_a_model_that_always_says_yes() -> None:
    values = score_pope(run(["Yes"] * 6)).splits["random"]
    assert values == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1})


def test_a_model_that_always_says_no_has_no_precision_and_does_not_crash() -> None:
    values = score_pope(run(["No"] * 6)).splits["random"]
    assert values == {"accuracy": 0.5, "precision": None, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_a_published_row_follows_from_its_counts() -> None:
    """LLaVA-1.5 on the early random split: 1183/31/1379/317."""
    answers = ["Yes"] * (1183 + 31) + ["No"] * (1379 + 317)
    labels = "y" * 1183 + "n" * 31 + "n" * 1379 + "y" * 317
    values = score_pope(run(answers, labels)).splits["random"]
    assert values["accuracy"] == pytest.approx(0.880412, abs=5e-7)
    assert values["f1"] == pytest.approx(0.871776, abs=5e-7)
    assert values["yes_ratio"] == pytest.approx(0.417182, abs=5e-7)
    assert values["precision"] == pytest.approx(0.9745, abs=5e-5)
    assert values["recall"] == pytest.approx(0.7887, abs=5e-5)


def test_means_over_splits_are_unweighted_and_differ_from_pooled_values() -> None:
    first = run(["Yes", "No", "Yes", "No"], "ynyn", "random")
    second = run(["Yes"] * 8, "yn" * 4, "adversarial")
    found = score_pope(first + second)
    assert list(found.splits) == ["random", "adversarial"]
    assert found.mean["accuracy"] == (1 + 0.5) / 2
    assert found.pooled["accuracy"] == 8 / 12
    assert found.mean["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found.pooled["f1"] == pytest.approx(2 * 6 / (2 * 6 + 4))


answered = st.lists(
    st.tuples(st.sampled_from([*ANSWERS, "No", "n", ""]), st.sampled_from("yn")), min_size=1, max_size=20
)


@settings(max_examples=100, deadline=None)
@given(answered, st.sampled_from(sorted(set(PARSERS) - {"pope-lmms"})))
def test_counts_add_up_and_metrics_follow_from_them(items: Any, profile: str) -> None:
    found = score_pope(run([raw for raw, _ in items], "".join(label for _, label in items)), profile)
    c, values = found.counts["random"], found.splits["random"]
    assert c["tp"] + c["fp"] + c["tn"] + c["fn"] == c["n"] == len(items)
    assert values["yes_ratio"] == (c["tp"] + c["fp"]) / c["n"]
    right = sum(PARSERS[profile](raw) == {"y": "yes", "n": "no"}[label] for raw, label in items)
    assert values["accuracy"] == right / len(items)
    p, r = values["precision"], values["recall"]
    if p and r:
        assert values["f1"] == pytest.approx(2 * p * r / (p + r))


@settings(max_examples=30, deadline=None)
@given(answered, st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_nothing(items: Any, rng: Any) -> None:
    records = run([raw for raw, _ in items], "".join(label for _, label in items))
    shuffled = list(records)
    rng.shuffle(shuffled)
    a, b = score_pope(records), score_pope(shuffled)
    assert (a.splits, a.counts, a.pooled) == (b.splits, b.counts, b.pooled)


def question(number: int, label: str) -> PopeQuestion:
    return PopeQuestion(number, "a.jpg", 1, "Is there a dog in the image?", label, "random")


def test_missing_repeated_and_mislabelled_items_are_refused() -> None:
    full = [question(1, "yes"), question(2, "no")]
    assert score_pope(run(["Yes", "No"], "yn"), questions=full).mean["accuracy"] == 1
    with pytest.raises(InputError, match=r"lacks 1 item ids \(random:2\)"):
        score_pope(run(["Yes"], "y"), questions=full)
    with pytest.raises(InputError, match="unexpected 1 item ids"):
        score_pope(run(["Yes", "No", "No"], "ynn"), questions=full)
    with pytest.raises(InputError, match="1 labels"):
        score_pope(run(["Yes", "No"], "yy"), questions=full)
    with pytest.raises(InputError, match="repeat an id"):
        score_pope(run(["Yes"], "y") * 2)
    with pytest.raises(InputError, match="label=None"):
        score_pope([Record("random:1", 1, raw="Yes")])
    with pytest.raises(InputError, match="records is empty"):
        score_pope([])
