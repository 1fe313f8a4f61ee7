"""From a caption to the COCO objects it mentions: tokens, joined word pairs, synonyms.

Source: "Object Hallucination in Image Captioning" (arXiv 1809.02156) and the scoring scripts that later papers copied.
`chair-legacy` reproduces those scripts word for word, so that numbers compare with published tables; `chair-fixed`
repairs what they miss (bus, ties, canoes, cheesecake, ...) and compares only with itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from vlattn.errors import InputError
from vlattn.eval.singularize import singularize

ChairProfile = Literal["chair-legacy", "chair-fixed"]
CHAIR_PROFILES: tuple[str, ...] = get_args(ChairProfile)

_SINGLE = r"[;@#$%&?!()\[\]{}<>\"“”‘’«»„]|`+"  # always a token of its own
_AFTER = r"(?=\s|\Z|[.,:;@#$%&?!()\[\]{}<>\"“”‘’«»„`])"  # what may follow a clitic
_CLITIC = rf"(?:'(?:s|m|d|ll|re|ve)?|n't){_AFTER}"
_STOP = r"\.(?=[\])}>\"'”’»]*(?:\s|\Z))"  # a sentence's last period, in every sentence; 3.5 keeps its own
_BREAKS = rf"\.{{2,}}|--|{_SINGLE}|[,:](?!\d)|{_STOP}"
_TOKEN = re.compile(rf"{_BREAKS}|{_CLITIC}|\S(?:(?!{_BREAKS}|{_CLITIC})\S)*", re.IGNORECASE)
_SPLIT_WORDS = {"cannot": 3, "gonna": 3, "wanna": 3, "gotta": 3, "gimme": 3, "lemme": 3}


@dataclass(frozen=True)
class Token:
    """A lower-case token and its span [start, end) in the text it came from, in characters."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Found:
    """A mention: the text's characters [start, end) read as `word`, which names the object `node`."""

    start: int
    end: int
    word: str
    node: str


def tokenize(text: str) -> list[Token]:
    """Tokens as the Penn Treebank rules give them sentence by sentence.

    Punctuation and clitics ("dog's" is `dog`, `'s`) stand alone, decimals and hyphenated words stay whole.
    Abbreviations are not known, so "St. Bernard" has three tokens.
    """
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        word, start, end = match.group().lower(), match.start(), match.end()
        cut = _SPLIT_WORDS.get(word)
        if cut is None:
            tokens.append(Token(word, start, end))
        else:
            tokens += [Token(word[:cut], start, start + cut), Token(word[cut:], start + cut, end)]
    return tokens


@lru_cache(maxsize=1)
def _table() -> Any:
    return yaml.safe_load(files("vlattn.eval").joinpath("coco_synonyms.yaml").read_text(encoding="utf-8"))


def synonym_groups() -> dict[str, tuple[str, ...]]:
    """The 80 COCO categories, each with every word that names it, the category's own name first."""
    return {name: (name, *words) for name, words in _table()["words"].items()}


@dataclass(frozen=True)
class Vocabulary:
    """The words of one profile. Make it with `vocabulary`.

    nodes: word -> object it names, for captions; phrases: two- or three-token phrase -> the word it is read as;
    names: word -> object, for category names of an annotation file (it also holds what captions can never match).
    """

    profile: str
    nodes: Mapping[str, str]
    phrases: Mapping[str, str]
    names: Mapping[str, str]
    unknown: tuple[str, ...] = ()
    _parts: frozenset[str] = field(default=frozenset(), repr=False)

    def find(self, text: str) -> tuple[list[Found], int]:
        """The mentions in `text`, in order and with repeats, and its length in tokens (a joined phrase counts once)."""
        tokens = tokenize(text)
        forms = [self._form(token.text) for token in tokens]
        units: list[Found] = []  # node "" where the unit names nothing
        longest = 2 if self.profile == "chair-legacy" else 3
        at = 0
        while at < len(tokens):
            size, word = 1, forms[at]
            for n in range(min(longest, len(tokens) - at), 1, -1):
                joined = self.phrases.get(" ".join(forms[at : at + n]))
                if joined is not None:
                    size, word = n, joined
                    break
            units.append(Found(tokens[at].start, tokens[at + size - 1].end, word, self.nodes.get(word, "")))
            at += size
        words = {unit.word for unit in units}
        no_seat = {"toilet", "seat"} <= words  # the seat of a toilet is no chair
        return [unit for unit in units if unit.node and not (no_seat and unit.word == "seat")], len(units)

    def _form(self, token: str) -> str:
        if self.profile == "chair-legacy":
            return singularize(token)
        if token in self.nodes or token in self._parts:
            return token
        if token.endswith("s") and token[:-1] in self.nodes:  # ties, canoes, collies
            return token[:-1]
        return singularize(token)


def vocabulary(profile: str = "chair-legacy", categories: Iterable[str] = ()) -> Vocabulary:
    """The words of a profile. `categories` the table does not know become objects named by themselves (`unknown`)."""
    return _vocabulary(profile, tuple(categories))


@lru_cache(maxsize=16)
def _vocabulary(profile: str, categories: tuple[str, ...]) -> Vocabulary:
    if profile not in CHAIR_PROFILES:
        raise InputError(f"profile={profile!r} is no CHAIR profile; choose one of {', '.join(CHAIR_PROFILES)}")
    legacy = profile == "chair-legacy"
    table = _table()
    names = {word: node for node, words in synonym_groups().items() for word in words}
    unmatched = set(table["unmatched_in_legacy"]) if legacy else set()
    nodes = {word: node for word, node in names.items() if word not in unmatched}

    pairs = table["pairs"]
    phrases = {word: word for word in [*names, *pairs["same"]] if " " in word}
    for rule in pairs["second_word"]:
        phrases |= {f"{first} {second}": second for first in rule["first"] for second in rule["second"]}
    phrases |= pairs["becomes"]
    if legacy:
        phrases = {phrase: word for phrase, word in phrases.items() if phrase not in pairs["not_in_legacy"]}

    unknown = tuple(dict.fromkeys(name for name in map(str.lower, categories) if name not in names))
    for name in unknown:
        names[name] = nodes[name] = name
        # Whatever the singulariser makes of the name must lead back to it.
        form = " ".join(singularize(part) for part in name.split())
        if " " in name:
            phrases[name] = phrases[form] = name
        else:
            nodes.setdefault(form, name)
    parts = frozenset(part for phrase in phrases for part in phrase.split())
    return Vocabulary(profile, nodes, phrases, names, unknown, parts)
