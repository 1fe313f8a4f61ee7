"""Each parser reads answers as its script does, traps included."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlattn.errors import InputError
from vlattn.eval.pope_parse import PARSERS, parser

# answer: official, opera, lmms, vlmeval, strict; y yes, n no, - neither
ANSWERS = {
    "Yes": "yyyyy",
    "No": "nnnnn",
    "yes\n": "yyyyy",
    "Yes, there is a dog.": "yy-yy",
    "No, there is no cat.": "nn-nn",
    "There is not a person in the image.": "nn---",
    "Yes. No other animals are visible.": "yn---",
    "NO": "ynnnn",
    "None": "yy---",
    "": "yy---",
    "I don't see a dog": "yn---",
    "no\nBecause": "yy-nn",
    "There is a dog, not a cat": "nn---",
    "Not visible": "yy---",
    "y": "yy--y",
    "n": "yy--n",
    "True.": "yy--y",
    "False": "yy--n",
    "Yes/No": "yy---",
    "(no)": "yy-nn",
    "yesterday": "yy---",
    "The answer is yes!": "yy-yy",
}


@pytest.mark.parametrize(("raw", "read"), ANSWERS.items())
def test_answers_are_read_as_each_script_reads_them(raw: str, read: str) -> None:
    names = {"yes": "y", "no": "n", None: "-"}
    assert "".join(names[parse(raw)] for parse in PARSERS.values()) == read


@given(st.text(max_size=40))
def test_any_text_is_read_as_yes_no_or_neither(raw: str) -> None:
    for parse in PARSERS.values():
        assert parse(raw) in ("yes", "no", None)
    assert parser("pope-official")(raw) is not None


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(InputError, match=r"profile='pope'.*pope-official"):
        parser("pope")
