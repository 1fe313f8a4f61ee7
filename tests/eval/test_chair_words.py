"""Captions become COCO objects by the rules of each profile."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlattn.errors import InputError
from vlattn.eval.chair_words import CHAIR_PROFILES, synonym_groups, tokenize, vocabulary


def nodes(text: str, profile: str = "chair-legacy") -> list[str]:
    return [found.node for found in vocabulary(profile).find(text)[0]]


def test_the_table_holds_the_80_groups_and_403_words_of_the_published_list() -> None:
    groups = synonym_groups()
    words = sorted((name, word) for name, found in groups.items() for word in found)
    assert len(groups) == 80
    assert len(words) == len({word for _, word in words}) == 403
    digest = hashlib.sha256("\n".join(f"{name}\t{word}" for name, word in words).encode()).hexdigest()
    assert digest == "df3b64c4b3518844539d1ba6bcd43769747a9b96b75069c3ce666f097a2022e1"


def test_in_chair_fixed_every_word_names_its_category() -> None:
    for name, words in synonym_groups().items():
        for word in words:
            assert nodes(word, "chair-fixed") == [name], word


def test_in_chair_legacy_every_category_but_bus_names_itself() -> None:
    assert [name for name in synonym_groups() if nodes(name) != [name]] == ["bus"]


def test_in_chair_legacy_three_singulars_and_four_dead_entries_are_never_found() -> None:
    missed = {w for name, words in synonym_groups().items() for w in words if nodes(w) != [name]}
    assert missed == {"bus", "airbus", "minibus", "motor bike", "cheesecake", "iphone", "stove top oven"}
    assert nodes("buses, airbuses and minibuses") == ["bus", "airplane", "bus"]


@pytest.mark.parametrize(
    ("text", "legacy", "fixed"),
    [
        ("motor bike", [], ["motorcycle"]),
        ("motor cycle", ["motorcycle"], ["motorcycle"]),
        ("cheesecake", [], ["cake"]),
        ("iPhone", [], ["cell phone"]),
        ("two wine glasses", ["wine glass"], ["wine glass"]),
        ("a wine glass", ["wine glass"], ["wine glass"]),
        ("a glass", [], []),
        ("tennis rackets", ["tennis racket"], ["tennis racket"]),
        ("stove top oven", ["oven", "oven"], ["oven"]),
        ("home plate", [], []),
        ("train track", [], []),
        ("ties", [], ["tie"]),
        ("canoes", [], ["boat"]),
        ("collies", [], ["dog"]),
        ("computer monitor", ["laptop", "tv"], ["laptop", "tv"]),
        ("passenger jet", ["airplane"], ["airplane"]),
        ("passenger", ["person"], ["person"]),
        ("baby elephant", ["elephant"], ["elephant"]),
        ("adult animal", [], []),
        ("baby goat", ["person", "sheep"], ["person", "sheep"]),
        ("bow ties", ["tie"], ["tie"]),
        ("dining tables", ["dining table"], ["dining table"]),
        ("hot dogs", ["hot dog"], ["hot dog"]),
        ("teddy-bear", [], []),
        ("a dog's ball", ["dog", "sports ball"], ["dog", "sports ball"]),
        ("a toilet and a seat", ["toilet"], ["toilet"]),
        ("a toilet seat", ["toilet"], ["toilet"]),
        ("a seat", ["chair"], ["chair"]),
        ("there is no dog", ["dog"], ["dog"]),
        ("", [], []),
    ],
)
def test_phrases_are_read_as_each_profile_reads_them(text: str, legacy: list[str], fixed: list[str]) -> None:
    assert nodes(text) == legacy
    assert nodes(text, "chair-fixed") == fixed


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A light. A dog.", "a|light|.|a|dog|."),
        ("dog's isn't don't cannot I'll", "dog|'s|is|n't|do|n't|can|not|i|'ll"),
        ("3.5 m, 1,000 men: two", "3.5|m|,|1,000|men|:|two"),
        ('(a "red" teddy-bear)!?', '(|a|"|red|"|teddy-bear|)|!|?'),
        ("wait... the dogs' bowl", "wait|...|the|dogs|'|bowl"),
        ("He said “stop.”", "he|said|“|stop|.|”"),
        ("one\n\ntwo.\tthree", "one|two|.|three"),
        ("dog’s", "dog|’|s"),
        ("", ""),
    ],
)
def test_tokens_are_those_of_the_treebank_sentence_by_sentence(text: str, tokens: str) -> None:
    assert "|".join(token.text for token in tokenize(text)) == tokens


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.,'\"-n t5 :()\nsD’!", max_size=40))
def test_tokens_cover_every_character_but_white_space_once(text: str) -> None:
    tokens = tokenize(text)
    assert all(text[t.start : t.end].lower() == t.text and t.text for t in tokens)
    assert all(a.end <= b.start for a, b in itertools.pairwise(tokens))
    assert "".join(t.text for t in tokens) == "".join(text.lower().split())


def test_spans_point_at_the_words_in_the_text() -> None:
    text = "Two Wine Glasses near a baby elephant."
    found, n_tokens = vocabulary("chair-legacy").find(text)
    assert [(text[f.start : f.end], f.word, f.node) for f in found] == [
        ("Wine Glasses", "wine glass", "wine glass"),
        ("baby elephant", "elephant", "elephant"),
    ]
    assert n_tokens == 6  # two, wine glass, near, a, baby elephant, .


@pytest.mark.parametrize("profile", CHAIR_PROFILES)
def test_a_category_without_synonyms_names_itself(profile: str) -> None:
    words = vocabulary(profile, ["dog", "Glass", "red panda", "sofa"])
    assert words.unknown == ("glass", "red panda")
    found, _ = words.find("Two glasses, a glass, red pandas and a sofa")
    assert [f.node for f in found] == ["glass", "glass", "red panda", "couch"]


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(InputError, match=r"profile='chair'.*chair-legacy, chair-fixed"):
        vocabulary("chair")
