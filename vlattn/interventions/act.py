"""ACT: in chosen heads, tokens that draw attention without reason keep a share of it, and the others get the rest.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", arXiv 2406.15765.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vlattn.checks import require_bool, require_choice, require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.act_edit import Tokens
from vlattn.interventions.act_head_file import chosen_heads
from vlattn.interventions.act_run import ActRun
from vlattn.interventions.act_sinks import Spare
from vlattn.interventions.base import Intervention
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Heads = Mapping[int, Sequence[int]] | str | Path
Rows = Literal["all", "text"]
Threshold = Literal["absolute", "relative"]
Decode = Literal["frozen", "running", "off"]


@dataclass(frozen=True)
class ACT(Intervention):
    """In chosen heads, later attention sinks keep a share of their attention and hand the rest to the other tokens.

    "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
    Calibration", arXiv 2406.15765. A sink is a token whose mean attention, over the queries that see it, is above a
    threshold; the first token is spared. The heads are found once on held-out questions: `vlattn.calibrate_heads`.

    The paper edits text models. Ours for models with images: `donors`, `recipients`, `stat_rows`, `edit_rows`,
    `min_rows`, and `decode`, since the released code finds sinks anew in each decode step from the one row there is.
    `literal=True` with `min_rows=1` and `spare="first_detected"` is that code at prefill. A sink that may not give
    never receives. Text behind the image means behind the first visual token of a prompt; a prompt without an image has
    none. In the trace's notes, `sinks` is {layer: LayerSinks}.

    heads: {layer: heads} to edit, query heads of 0-based layers; or a file that `vlattn.calibrate_heads` wrote; "auto"
        is the one embedded for the tiny model, "all" every head of layers 2 to L - 2, which is known to hurt.
    beta: share of its attention that a sink keeps, 0.4 in the paper; 1 changes nothing.
    theta: mean attention above which a token is a sink where `threshold` is absolute.
    threshold: `absolute` compares with theta, as the released code does; `relative` with alpha / N for N tokens.
    alpha: how many times its even share 1 / N a token must get where `threshold` is relative; 5 in the paper.
    donors: which sinks give: `all`, `text` or `visual` ones.
    recipients: who receives in proportion to what it has: `all` tokens that are no sinks, as in the paper, or among
        them the `text` or `visual` ones alone.
    stat_rows: queries whose attention is averaged: `text` behind the image, or `all`, as in the paper.
    edit_rows: prompt rows that are edited: `text` behind the image, or `all`, as in the paper.
    decode: `frozen` edits rows of generated tokens with the prompt's sinks, `running` goes on averaging, so that
        generated tokens may join, `off` leaves these rows alone.
    spare: the token that is no sink: the `first_token`, or the `first_detected` one, as in the released code.
    min_rows: a token that fewer of the averaged queries see is no sink, since the last ones mostly see themselves.
    literal: sets stat_rows and edit_rows to `all`, as the released code has them.
    """

    heads: Heads | None = None
    beta: float = 0.4
    theta: float = 0.1
    threshold: Threshold = "absolute"
    alpha: float = 5.0
    donors: Tokens = "all"
    recipients: Tokens = "all"
    stat_rows: Rows = "text"
    edit_rows: Rows = "text"
    decode: Decode = "frozen"
    spare: Spare = "first_token"
    min_rows: int = 8
    literal: bool = False

    place = "decoder"

    def __post_init__(self) -> None:
        if self.heads is None:
            raise InputError(
                "heads: not given, and editing all heads is known to hurt; find those that gain from it with "
                "vlattn.calibrate_heads(model, items, out='heads.json') or `vlattn calibrate act`, and give the file, "
                "or give {layer: heads}"
            )
        require_number("beta", self.beta, 0, 1)
        require_number("theta", self.theta, 0)
        require_number("alpha", self.alpha, 0)
        require_count("min_rows", self.min_rows)
        require_bool("literal", self.literal)
        for name, choices in _CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        if self.literal:
            object.__setattr__(self, "stat_rows", "all")
            object.__setattr__(self, "edit_rows", "all")

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        assert self.heads is not None
        heads = chosen_heads(self.heads, session.adapter)
        if self.beta < 1 and heads:
            ActRun(self, session, trace, heads).attach(hooks)


_CHOICES = {
    "threshold": get_args(Threshold),
    "donors": get_args(Tokens),
    "recipients": get_args(Tokens),
    "stat_rows": get_args(Rows),
    "edit_rows": get_args(Rows),
    "decode": get_args(Decode),
    "spare": get_args(Spare),
}
