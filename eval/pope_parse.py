"""Yes or no? Each published POPE script reads an answer by its own rule, and each rule is a profile here.

The official reading calls everything "yes" that holds none of three tokens, an empty answer and "NO" included. It stays
as it is, because published numbers rest on it; `pope-strict` is run beside it to show what it hides.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vlattn.errors import InputError


def parse_official(raw: str) -> str:
    """The released script: the text before the first full stop; "no" if it holds the token No, no or not."""
    words = raw.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_opera(raw: str) -> str:
    """OPERA's script: the whole text; "no" if it holds the token No, not, no or NO, or one that ends in n't."""
    words = raw.replace(".", "").replace(",", "").split(" ")
    return "no" if {"No", "not", "no", "NO"} & set(words) or any(w.endswith("n't") for w in words) else "yes"


def parse_lmms(raw: str) -> str | None:
    """lmms-eval: the whole answer must be yes or no, in any case; None for anything else."""
    answer = raw.lower().strip()
    return answer if answer in ("yes", "no") else None


def parse_vlmeval(raw: str) -> str | None:
    """VLMEvalKit without a judge: the word yes or the word no, and not both; None otherwise."""
    return _one_of(set(_vqa_punctuation(raw.lower()).split()), {"yes"}, {"no"})


def parse_strict(raw: str) -> str | None:
    """Ours: yes, y or true against no, n or false as whole words, and not both; None otherwise (unparsed)."""
    return _one_of(set(re.findall(r"[^\W_]+(?:'[^\W_]+)?", raw.lower())), {"yes", "y", "true"}, {"no", "n", "false"})


def _one_of(words: set[str], yes: set[str], no: set[str]) -> str | None:
    if bool(words & yes) == bool(words & no):
        return None
    return "yes" if words & yes else "no"


def _vqa_punctuation(text: str) -> str:
    """As the VQA evaluation does: marks beside a space vanish, others become one; full stops vanish outside numbers."""
    out = text
    squeeze = re.search(r"\d,\d", text) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or squeeze else " ")
    return re.sub(r"\.(?!\d)", "", out)


PARSERS: dict[str, Callable[[str], str | None]] = {
    "pope-official": parse_official,
    "pope-opera": parse_opera,
    "pope-lmms": parse_lmms,
    "pope-vlmeval": parse_vlmeval,
    "pope-strict": parse_strict,
}


def parser(profile: str) -> Callable[[str], str | None]:
    """The reading of a profile: raw answer -> "yes", "no", or None for neither."""
    if profile not in PARSERS:
        raise InputError(f"profile={profile!r} is no POPE profile; choose one of {', '.join(PARSERS)}")
    return PARSERS[profile]
