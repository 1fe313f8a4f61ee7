"""CHAIR: the worked corpus, and what must hold for any captions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlattn.errors import InputError
from vlattn.eval.chair import (
    Caption,
    ChairResult,
    drop_partial_sentence,
    ground_truth,
    mark_mentions,
    score_captions,
    score_chair,
)
from vlattn.eval.chair_words import CHAIR_PROFILES, synonym_groups, vocabulary
from vlattn.eval.coco import read_coco

CORPUS = [
    ("A man throws a frisbee to his dog while a cat watches.", ["person", "dog", "frisbee"]),
    (
        "Two cars wait at a traffic light. A hot dog stand is near the traffic lights, and cars pass by.",
        ["traffic light", "car"],
    ),
    ("A baby elephant stands next to a toilet with the seat up and a sink.", ["toilet", "sink", "elephant"]),
    ("A beautiful view of the blue sky.", ["person", "kite"]),
    ("A bus and a car.", ["car"]),
]


def score(corpus: list[tuple[str, list[str]]], profile: str = "chair-legacy", **options: Any) -> ChairResult:
    captions = [Caption(str(i), i, text) for i, (text, _) in enumerate(corpus)]
    truth = {i: frozenset(objects) for i, (_, objects) in enumerate(corpus)}
    return score_captions(captions, truth, vocabulary(profile), **options)


def test_each_caption_of_the_worked_corpus_has_its_mentions_and_length() -> None:
    found = score(CORPUS).captions
    assert [[m.node for m in c.mentions] for c in found] == [
        ["person", "frisbee", "dog", "cat"],
        ["car", "traffic light", "hot dog", "traffic light", "car"],
        ["elephant", "toilet", "sink"],
        [],
        ["car"],
    ]
    assert [[m.node for m in c.mentions if m.hallucinated] for c in found] == [["cat"], ["hot dog"], [], [], []]
    assert [c.n_tokens for c in found] == [13, 20, 15, 8, 6]
    assert [c.counts["correct_objects"] for c in found] == [3, 2, 3, 0, 1]


def test_the_worked_corpus_in_chair_legacy() -> None:
    found = score(CORPUS)
    assert (found.counts["mentions"], found.counts["hallucinated_mentions"]) == (13, 2)
    assert found.metrics == pytest.approx(
        {"chair_s": 0.4, "chair_i": 2 / 13, "recall": 9 / 11, "precision": 9 / 11, "f1": 9 / 11, "len": 12.4}
    )


def test_the_worked_corpus_in_chair_fixed_sees_the_bus() -> None:
    found = score(CORPUS, "chair-fixed")
    assert [m.node for m in found.captions[4].mentions if m.hallucinated] == ["bus"]
    assert found.profile == "chair-fixed"
    assert found.metrics == pytest.approx(
        {"chair_s": 0.6, "chair_i": 3 / 14, "recall": 9 / 11, "precision": 0.75, "f1": 18 / 23, "len": 12.4}
    )


def test_no_mentions_at_all_is_none_and_not_zero() -> None:
    found = score([("A blue sky.", ["kite"])])
    assert found.metrics == {"chair_s": 0, "chair_i": None, "recall": 0, "precision": None, "f1": None, "len": 4}


WORDS = ["dog", "cats", "a", "the", "men", "wine", "glass", "traffic", "light", "toilet", "seat", "bus", "is", ","]
NODES = ["dog", "cat", "person", "wine glass", "traffic light", "toilet", "chair", "bus"]
corpora = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
        st.lists(st.sampled_from(NODES), max_size=5, unique=True),
    ),
    min_size=1,
    max_size=6,
)
profiles = st.sampled_from(CHAIR_PROFILES)
RATES = ("chair_s", "chair_i", "recall", "precision", "f1")


@settings(max_examples=100, deadline=None)
@given(corpora, profiles)
def test_rates_are_fractions_and_agree_about_whether_anything_was_hallucinated(corpus: Any, profile: str) -> None:
    found = score(corpus, profile)
    values = {name: found.metrics[name] for name in RATES}
    assert all(v is None or 0 <= v <= 1 for v in values.values())
    wrong = found.counts["hallucinated_mentions"]
    assert (values["chair_s"] == 0) == (wrong == 0)
    if found.counts["mentions"]:
        assert (values["precision"] == 1) == (values["chair_i"] == 0)
    else:
        assert values["chair_i"] is None


@settings(max_examples=100, deadline=None)
@given(corpora, profiles)
def test_corpus_values_are_ratios_of_sums_over_captions(corpus: Any, profile: str) -> None:
    """Recomputed with plain sets and sums from single-caption mentions."""
    spoken = [[m.node for m in mark_mentions(text, [], profile)] for text, _ in corpus]
    wrong = [[m for m in said if m not in there] for said, (_, there) in zip(spoken, corpus, strict=True)]
    hits = sum(len(set(said) & set(there)) for said, (_, there) in zip(spoken, corpus, strict=True))

    def over(a: float, b: float) -> float | None:
        return a / b if b else None

    recall, precision = over(hits, sum(len(t) for _, t in corpus)), over(hits, sum(len(set(s)) for s in spoken))
    found = score(corpus, profile).metrics
    assert found["chair_i"] == over(sum(map(len, wrong)), sum(map(len, spoken)))
    assert found["chair_s"] == sum(map(bool, wrong)) / len(corpus)
    assert (found["recall"], found["precision"]) == (recall, precision)
    if recall and precision:
        assert found["f1"] == pytest.approx(2 * recall * precision / (recall + precision))


@settings(max_examples=50, deadline=None)
@given(corpora, st.randoms(use_true_random=False), profiles)
def test_the_order_of_captions_changes_nothing(corpus: Any, rng: Any, profile: str) -> None:
    shuffled = list(corpus)
    rng.shuffle(shuffled)
    assert score(shuffled, profile).metrics == score(corpus, profile).metrics


@settings(max_examples=50, deadline=None)
@given(corpora, profiles, st.sampled_from(NODES))
def test_a_further_true_object_never_raises_chair_nor_lowers_the_true_objects(
    corpus: Any, profile: str, node: str
) -> None:
    before, after = score(corpus, profile), score([(text, [*there, node]) for text, there in corpus], profile)
    for name in ("chair_s", "chair_i"):
        assert (after.metrics[name] or 0) <= (before.metrics[name] or 0)
    assert after.counts["true_objects"] >= before.counts["true_objects"]


@settings(max_examples=50, deadline=None)
@given(corpora, profiles)
def test_saying_everything_twice_doubles_the_counts_and_keeps_the_rates(corpus: Any, profile: str) -> None:
    once, twice = score(corpus, profile), score([(f"{text}. {text}", there) for text, there in corpus], profile)
    assert {n: twice.metrics[n] for n in RATES} == {n: once.metrics[n] for n in RATES}
    for name in ("mentions", "hallucinated_mentions"):
        assert twice.counts[name] == 2 * once.counts[name]


@settings(max_examples=50, deadline=None)
@given(corpora, profiles)
def test_capitals_change_nothing(corpus: Any, profile: str) -> None:
    assert score([(text.upper(), there) for text, there in corpus], profile).metrics == score(corpus, profile).metrics


@pytest.mark.parametrize("profile", CHAIR_PROFILES)
def test_a_reference_caption_scored_against_its_own_image_hallucinates_nothing(write_coco: Any, profile: str) -> None:
    texts = {i: [text, "A giraffe on buses."] for i, (text, _) in enumerate(CORPUS)}
    coco = read_coco(*write_coco({i: ["dog"] for i in texts}, texts))
    found = score_chair([Caption(str(i), i, spoken[0]) for i, spoken in texts.items()], coco, profile)
    assert (found.metrics["chair_s"], found.metrics["precision"]) == (0, 1)


def test_the_truth_is_annotations_and_reference_captions_together(write_coco: Any) -> None:
    coco = read_coco(*write_coco({1: ["dog", "hair drier"], 2: ["bus"]}, {1: ["Two puppies and a man.", "A kite"]}))
    truth = ground_truth(coco, [1, 2], vocabulary("chair-legacy", coco.categories))
    assert truth == {1: {"dog", "hair drier", "person", "kite"}, 2: {"bus"}}
    result = score_chair([Caption("a", 1, "A dog."), Caption("b", 2, "A bus.")], coco)
    assert result.warnings == ("1 of 2 images have no reference caption: CHAIR is higher than published",)


def test_without_reference_captions_the_report_warns(write_coco: Any) -> None:
    instances, _ = write_coco({1: ["dog"]})
    result = score_chair([Caption("a", 1, "A dog.")], read_coco(instances))
    assert "instances only" in result.warnings[0]


def test_an_unknown_category_is_its_own_object_with_a_warning(write_coco: Any) -> None:
    coco = read_coco(*write_coco({1: ["Penguin", "dog"]}, {1: ["A penguin"]}))
    result = score_chair([Caption("a", 1, "Penguins and a cat")], coco)
    assert result.metrics["chair_i"] == 0.5
    assert "penguin" in result.warnings[0]


@pytest.mark.parametrize("image_id", ["1", 99, True, 1.0])
def test_a_string_or_unknown_image_id_raises(write_coco: Any, image_id: Any) -> None:
    coco = read_coco(*write_coco({1: ["dog"]}, {1: ["A dog"]}))
    with pytest.raises(InputError, match="image_id="):
        score_chair([Caption("a", image_id, "A cat.")], coco)


def test_mentions_are_marked_where_they_stand() -> None:
    text = "A Hot Dog beside two dogs."
    assert [(text[m.start : m.end], m.node, m.hallucinated) for m in mark_mentions(text, ["dog"])] == [
        ("Hot Dog", "hot dog", True),
        ("dogs", "dog", False),
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog runs. A cat si", "A dog runs."),
        ("A dog runs! Is it? A", "A dog runs! Is it?"),
        ("It weighs 3.5 kg and", "It weighs 3.5 kg and"),
        ("A dog. It weighs 3.5 kg and", "A dog."),
        ('He says "stop." Then', 'He says "stop."'),
        ("A dog.\nA cat", "A dog."),
        ("A whole sentence.", "A whole sentence."),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_a_partial_sentence_is_cut_after_the_last_full_one(text: str, kept: str) -> None:
    assert drop_partial_sentence(text) == kept


def test_truncation_touches_only_captions_cut_by_length() -> None:
    truth = {1: frozenset({"dog"})}
    words = vocabulary("chair-legacy")
    text = "A dog runs. A cat and a"

    def chair_i(finish: str, truncate: str) -> float | None:
        return score_captions([Caption("a", 1, text, finish)], truth, words, truncate).metrics["chair_i"]

    assert chair_i("length", "drop_partial_sentence") == 0
    assert chair_i("eos", "drop_partial_sentence") == chair_i("length", "none") == 0.5
    with pytest.raises(InputError, match="needs to know how caption 'a' ended"):
        score_captions([Caption("a", 1, text)], truth, words, "drop_partial_sentence")
    with pytest.raises(InputError, match="truncate='half'"):
        score_captions([Caption("a", 1, text)], truth, words, "half")


def test_nothing_to_score_raises() -> None:
    with pytest.raises(InputError, match="captions is empty"):
        score_captions([], {}, vocabulary())


def test_every_category_is_reachable_as_truth_and_mention(write_coco: Any) -> None:
    names = list(synonym_groups())
    coco = read_coco(*write_coco({1: names}, {1: []}))
    found = score_chair([Caption("a", 1, ", ".join(names))], coco, "chair-fixed")
    assert (found.counts["mentions"], found.metrics["recall"], found.metrics["chair_i"]) == (80, 1, 0)
