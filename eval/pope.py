"""POPE in one place: build questions, read and write them, parse answers, score.

Source: "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv 2305.10355).
"""

from vlattn.eval.pope_build import SPLITS, PopeQuestion, build_pope, question_text
from vlattn.eval.pope_files import (
    PopeFile,
    read_official_answers,
    read_pope,
    write_official_answers,
    write_pope,
)
from vlattn.eval.pope_parse import PARSERS, parser
from vlattn.eval.pope_score import POPE_METRICS, PopeResult, score_pope

__all__ = [
    "PARSERS",
    "POPE_METRICS",
    "SPLITS",
    "PopeFile",
    "PopeQuestion",
    "PopeResult",
    "build_pope",
    "parser",
    "question_text",
    "read_official_answers",
    "read_pope",
    "score_pope",
    "write_official_answers",
    "write_pope",
]
