"""What is said about scenes is true of them, and the tokenizer loses none of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from vlattn.assets.language import (
    CHAT_TEMPLATE,
    DETAIL_PROMPTS,
    NUMBERS,
    POSITIONS,
    SHORT_PROMPTS,
    article,
    build_tokenizer,
    detailed_caption,
    listing,
    other_turns,
    phrase,
    plural,
    position,
    short_caption,
    yes_no_question,
    yes_no_turns,
)
from vlattn.assets.scenes import NAMES, SIZE, Placed, Scene
from vlattn.eval.chair_words import vocabulary
from vlattn.eval.pope_build import question_text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def placed(category: int, x: int = 0) -> Placed:
    return Placed(category, x, 0, 24, np.ones((24, 24), np.float32))


def scene_of(*objects: Placed) -> Scene:
    return Scene(np.zeros((SIZE, SIZE, 3), np.float32), objects, np.full((SIZE, SIZE), -1), "blue")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dog", "dogs"),
        ("bus", "buses"),
        ("couch", "couches"),
        ("toothbrush", "toothbrushes"),
        ("wine glass", "wine glasses"),
        ("person", "people"),
        ("mouse", "mice"),
        ("knife", "knives"),
        ("sheep", "sheep"),
        ("skis", "skis"),
        ("scissors", "scissors"),
        ("broccoli", "broccoli"),
    ],
)
def test_plurals(name: str, expected: str) -> None:
    assert plural(name) == expected


def test_articles_follow_the_sound_of_every_category() -> None:
    vowels = {name for name in NAMES if article(name) == "an"}
    assert vowels == {"airplane", "apple", "elephant", "orange", "umbrella"}


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [("dog", 1, "a dog"), ("orange", 1, "an orange"), ("person", 3, "three people"), ("skis", 1, "skis")],
)
def test_phrases(name: str, count: int, expected: str) -> None:
    assert phrase(name, count) == expected


def test_listings() -> None:
    assert [listing(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_positions_are_thirds() -> None:
    assert [position(placed(0, x)) for x in (0, 36, 72)] == list(POSITIONS)


def test_questions_are_those_of_pope() -> None:
    assert all(yes_no_question(name) == question_text(name) for name in NAMES)


def test_captions_count_and_place_objects() -> None:
    dog, cat = NAMES.index("dog"), NAMES.index("cat")
    scene = scene_of(placed(dog, 72), placed(cat, 0), placed(cat, 36))
    assert short_caption(scene) == "two cats and a dog."
    assert detailed_caption(scene) == "The image shows two cats and a dog on the right."


@pytest.mark.parametrize("say", [short_caption, detailed_caption])
def test_captions_name_exactly_the_objects_of_the_scene(say: Any, scenes: list[Scene]) -> None:
    words = vocabulary("chair-fixed")
    for scene in scenes:
        there = Counter(NAMES[o.category] for o in scene.objects)
        found, _ = words.find(say(scene))
        assert Counter(mention.node for mention in found) == Counter(there.keys())
        assert all(phrase(name, count) in say(scene) for name, count in there.items())


def test_yes_and_no_are_true_and_balanced(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    answers: Counter[str] = Counter()
    for scene in scenes:
        for question, answer, category in yes_no_turns(rng, scene, 4):
            assert (answer == "yes") == (category in {o.category for o in scene.objects})
            assert question.startswith(yes_no_question(NAMES[category]))
            answers[answer] += 1
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.05


def test_counts_and_places_are_true(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    plurals = {f"How many {plural(name)} are in the image?": i for i, name in enumerate(NAMES)}
    singles = {f"Where is the {name}?": i for i, name in enumerate(NAMES)}
    for scene in scenes:
        (count_question, count), *where, short, detailed = other_turns(rng, scene)
        members = [o for o in scene.objects if o.category == plurals[count_question]]
        assert count == NUMBERS[len(members)]
        for question, answer in where:
            (one,) = (o for o in scene.objects if o.category == singles[question])
            assert answer == position(one)
        assert short[0] in SHORT_PROMPTS
        assert short[1] == short_caption(scene)
        assert detailed[0] in DETAIL_PROMPTS
        assert detailed[1] == detailed_caption(scene)


def everything_said(scenes: list[Scene]) -> list[str]:
    """Every answer there is besides captions, every phrase a caption is made of, and many whole captions."""
    phrases = [phrase(name, count) for name in NAMES for count in range(1, 7)]
    placed_phrases = [f"{phrase(name, 1)} {where}" for name in NAMES for where in POSITIONS]
    sentences = [f"The image shows {text}." for text in phrases]
    captions = [say(scene) for scene in scenes for say in (short_caption, detailed_caption)]
    return ["yes", "no", *NUMBERS, *POSITIONS, *phrases, *placed_phrases, *sentences, *captions]


def test_answers_come_back_from_the_tokenizer(tokenizer: Any, scenes: list[Scene]) -> None:
    for text in everything_said(scenes):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.lower()


def test_questions_have_no_unknown_words(tokenizer: Any, scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    asked = {question for scene in scenes for question, *_ in yes_no_turns(rng, scene, 6)}
    asked |= {question for scene in scenes for question, _ in other_turns(rng, scene)}
    asked |= {yes_no_question(name) for name in NAMES}
    assert all(tokenizer.unk_token_id not in tokenizer(f"USER: <image>\n{q} ASSISTANT:")["input_ids"] for q in asked)


def test_case_and_spacing_do_not_matter(tokenizer: Any) -> None:
    expected = tokenizer("Is there a dog in the image?")["input_ids"]
    for text in ("is there a dog in the image?", "  IS  THERE\ta Dog\nin the image?  "):
        assert tokenizer(text)["input_ids"] == expected


def test_a_word_no_template_says_is_unknown(tokenizer: Any) -> None:
    assert tokenizer.unk_token_id in tokenizer("a zeppelin")["input_ids"]


def test_the_chat_template_reads_text_and_images(tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog in the image?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Is there a cat in the image?"},
    ]
    text = tokenizer.apply_chat_template(talk, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True)
    assert text == (
        "USER: <image>\nIs there a dog in the image? ASSISTANT: yes</s>USER: Is there a cat in the image? ASSISTANT:"
    )
    assert tokenizer(text)["input_ids"].count(tokenizer.convert_tokens_to_ids("<image>")) == 1
