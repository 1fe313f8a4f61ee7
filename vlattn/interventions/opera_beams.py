"""The beams of one prompt in OPERA's search: a step of beam search, and the way back to an earlier state."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlattn.interventions.opera_scores import repeated_column, rollback_place

if TYPE_CHECKING:
    from vlattn.interventions.opera import OPERA


@dataclass(frozen=True)
class BeamRules:
    """What a generation config says about beams.

    keep: best continuations looked at in each step, enough for K to be left when some end.
    longest: tokens that may be generated.
    """

    keep: int
    longest: int
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True)
class Hypothesis:
    """A finished answer: its tokens, int64 [n], and its score with the length penalty."""

    ids: torch.Tensor
    score: float


@dataclass(frozen=True)
class Beams:
    """K beams with n generated tokens each.

    ids: int64 [K, n].
    scores: [K], sums of log-probabilities; -inf for a beam that is none.
    columns: [K, n], logarithms of column products over the rows of these tokens.
    history: int64 [K, n], which column won in the step that chose each token.
    finished: at most K, best first.
    improvable: whether a running beam may still beat a finished one.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    columns: torch.Tensor
    history: torch.Tensor
    finished: tuple[Hypothesis, ...] = ()
    improvable: bool = True

    @classmethod
    def fresh(cls, number: int, device: torch.device) -> Beams:
        """No token yet: the first beam alone counts, or all would choose the same."""
        scores = torch.full((number,), -torch.inf, device=device)
        scores[0] = 0
        ids = torch.empty(number, 0, dtype=torch.int64, device=device)
        return cls(ids, scores, torch.empty(number, 0, device=device), ids)

    @property
    def length(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True)
class Candidates:
    """C tokens for each of K beams.

    ids: int64 [K, C].
    scores: [K, C], log-probabilities after the penalty; -inf for what cannot be chosen.
    columns: [K, C, n + 1], logarithms of column products with the candidate's row.
    winners: int64 [K], the column that wins for most candidates of a beam.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    columns: torch.Tensor
    winners: torch.Tensor


@dataclass(frozen=True)
class Continuations:
    """The M best continuations over all beams, best first.

    scores: [M].
    beam, candidate: int64 [M], which candidate of which beam each one is.
    ids: int64 [M, n + 1], its tokens.
    """

    scores: torch.Tensor
    beam: torch.Tensor
    candidate: torch.Tensor
    ids: torch.Tensor


class PromptSearch:
    """The search for one prompt's answer. rollbacks: (from, to), in generated tokens, of each time it went back."""

    def __init__(self, method: OPERA, rules: BeamRules, beams: Beams) -> None:
        self._method, self._rules = method, rules
        self.beams = beams
        self.done = False
        self.rollbacks: list[tuple[int, int]] = []
        # By the number of tokens generated: the beams as they were, the (beam, token) pairs that they went on with, and
        # the pairs that a rollback has ruled out.
        self._before: dict[int, Beams] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._forbidden: dict[int, list[torch.Tensor]] = {}
        self._used: Counter[int] = Counter()

    def forbid(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [K, V] of the next token with -inf for what a rollback has ruled out here."""
        for pairs in self._forbidden.get(self.beams.length, []):
            log_probs = log_probs.index_put((pairs[:, 0], pairs[:, 1]), log_probs.new_tensor(-torch.inf))
        return log_probs

    # The way back -----------------------------------------------------------------------------------------------------
    def roll_back(self, winners: torch.Tensor) -> bool:
        """Go back to the state that ends with the summary token, if the same column has won too often.

        winners: int64 [K], the column that wins now on each beam.
        """
        history = torch.cat([self.beams.history, winners[:, None]], 1)[:, -self._method.window :]
        live = self.beams.scores.isfinite()
        column = repeated_column(history[live], self._method.threshold, self._method.warmup)
        if column is None:
            return False
        length = self.beams.length
        place = rollback_place(column, length, self._free)
        if place is None:
            return False
        self._used[place] += 1
        self.rollbacks.append((length, place))
        self.beams = self._before[place]
        self._forbidden.setdefault(place, []).append(self._chosen[place])
        for behind in [known for known in self._before if known >= place]:
            del self._before[behind], self._chosen[behind]
        for behind in [known for known in self._forbidden if known > place]:
            del self._forbidden[behind]
        return True

    def _free(self, place: int) -> bool:
        """Whether the search may go back to `place` tokens (once more)."""
        late = not self._method.monotone or all(place >= before for _, before in self.rollbacks)
        return place in self._before and late and self._used[place] < self._method.num_attn_candidates

    # The way on -------------------------------------------------------------------------------------------------------
    def continuations(self, candidates: Candidates) -> Continuations:
        """The best tokens to go on with, over all beams."""
        totals = (self.beams.scores[:, None] + candidates.scores).flatten()  # [K * C]
        scores, flat = totals.topk(min(self._rules.keep, len(totals)))
        beam, candidate = flat // candidates.ids.shape[1], flat % candidates.ids.shape[1]
        ids = torch.cat([self.beams.ids[beam], candidates.ids[beam, candidate][:, None]], 1)
        return Continuations(scores, beam, candidate, ids)

    def step(self, candidates: Candidates, best: Continuations, ends: torch.Tensor) -> None:
        """Go on with the K best continuations that do not end; those of the first K that end are answers.

        ends: bool [M], continuations that are complete.
        """
        before, number = self.beams, len(self.beams.scores)
        finished = self._with_answers(best, ends)
        running = best.scores.masked_fill(ends, -torch.inf)
        scores, order = running.topk(number)
        beam, candidate, ids = best.beam[order], best.candidate[order], best.ids[order]
        length = ids.shape[1]
        improvable = before.improvable and self._improvable(float(scores[0]), length, finished)
        self._remember(torch.stack([beam, ids[:, -1]], 1)[scores.isfinite()])
        self.beams = Beams(
            ids,
            scores,
            candidates.columns[beam, candidate],
            torch.cat([before.history[beam], candidates.winners[beam][:, None]], 1),
            finished,
            improvable,
        )
        full = self._rules.early_stopping is True and len(finished) == number
        self.done = full or not improvable or not bool(scores.isfinite().any())

    def _with_answers(self, best: Continuations, ends: torch.Tensor) -> tuple[Hypothesis, ...]:
        before, number = self.beams, len(self.beams.scores)
        full = self._rules.early_stopping is True and len(before.finished) == number
        if full or not before.improvable:
            return before.finished
        complete = (ends & best.scores.isfinite())[:number].nonzero().flatten().tolist()
        shrink = best.ids.shape[1] ** self._rules.length_penalty
        new = [Hypothesis(best.ids[m], float(best.scores[m]) / shrink) for m in complete]
        return tuple(sorted([*before.finished, *new], key=lambda answer: -answer.score)[:number])

    def _improvable(self, best: float, length: int, finished: tuple[Hypothesis, ...]) -> bool:
        """Whether a beam whose score is `best` may still beat the worst answer; a guess, as in stock beam search."""
        if len(finished) < len(self.beams.scores):
            return True
        rules = self._rules
        hoped = rules.longest if rules.early_stopping == "never" and rules.length_penalty > 0 else length
        return best / hoped**rules.length_penalty > finished[-1].score

    def _remember(self, chosen: torch.Tensor) -> None:
        length = self.beams.length
        self._before[length], self._chosen[length] = self.beams, chosen
        for old in [known for known in self._before if known <= length - self._method.window]:
            del self._before[old], self._chosen[old]

    def answers(self, number: int) -> list[Hypothesis]:
        """The `number` best answers; running beams where fewer have ended."""
        shrink = max(1, self.beams.length) ** self._rules.length_penalty
        running = [
            Hypothesis(ids, score / shrink)
            for ids, score in zip(self.beams.ids, self.beams.scores.tolist(), strict=True)
        ]
        return [*self.beams.finished, *running][:number]
