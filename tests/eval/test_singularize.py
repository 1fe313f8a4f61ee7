"""The singulariser makes the slips that published CHAIR numbers rest on."""

from __future__ import annotations

import pytest

from vlattn.eval.singularize import singularize

KNOWN = {
    **{"cars": "car", "dogs": "dog", "puppies": "puppy", "benches": "bench", "dishes": "dish", "boxes": "box"},
    **{"people": "person", "children": "child", "men": "man", "women": "woman", "policemen": "policeman"},
    **{"geese": "goose", "oxen": "ox", "mice": "mouse", "knives": "knife", "calves": "calf", "wolves": "wolf"},
    **{"buses": "bus", "shoes": "shoe", "leaves": "leaf", "loaves": "loaf", "feet": "foot", "teeth": "tooth"},
    **{"scissors": "scissors", "luggage": "luggage", "bison": "bison", "news": "news", "movies": "movie"},
}
SLIPS = {
    **{"bus": "bu", "glass": "glas", "tennis": "tenni", "sports": "sport", "has": "ha", "this": "thi"},
    **{"ties": "ty", "canoes": "cano", "police": "polouse", "pita": "pitum", "data": "datum", "four": "fmy"},
    **{"shelves": "shelve", "collies": "collies", "doggies": "doggies", "cookies": "cookies", "hour": "hmy"},
    **{"is": "is", "ice": "ice", "glasses": "glass", "skis": "ski", "dogs'": "dog's"},
}


@pytest.mark.parametrize(("word", "singular"), [*KNOWN.items(), *SLIPS.items()])
def test_words_come_out_as_the_published_scorer_has_them(word: str, singular: str) -> None:
    assert singularize(word) == singular


@pytest.mark.parametrize("word", ["", "a", "dog", "sheep", "3.5", "-", "café"])
def test_what_is_no_plural_stays(word: str) -> None:
    assert singularize(word) == word
