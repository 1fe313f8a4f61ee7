"""A searcher that is known in full: it makes the embedded gaze data, so no model can predict them better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlattn.checks import require_count, require_number
from vlattn.gaze.search_view import SearchView


@dataclass(frozen=True)
class Searcher:
    """Looks where the target could be, rather near than far, and not where it just was.

    Ours, of what is known about visual search. After fixations f_1..f_t it fixates object i next with

        p(i) = (1 - p_end) softmax_i(likeness s_i - distance d_i - inhibition m_i)

    where s_i is the similarity of i to the target (0 to 1), d_i the distance from f_t (at first from the middle of the
    screen) to i in diagonals of the screen, and m_i = memory^a what is left of the inhibition of return a fixations
    after i was last fixated (0 for objects that were not; 1 for f_t itself, so that refixations are rare, not
    impossible). It ends with p_end = found on the target, mistaken s_i on another object i; never before the first
    fixation and always after `limit`.

    likeness: weight of the similarity.
    distance: cost of a saccade across the screen.
    inhibition: cost of going back at once.
    memory: how much of the inhibition each fixation leaves, 0 to 1.
    found: chance to end on the target.
    mistaken: chance to end on an object that looks just like it.
    limit: longest path.
    """

    likeness: float = 3.0
    distance: float = 8.0
    inhibition: float = 4.0
    memory: float = 0.8
    found: float = 0.9
    mistaken: float = 0.05
    limit: int = 30

    name = "searcher"

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.name == "limit":
                require_count("limit", self.limit)
            else:
                chance = one.name in ("memory", "found", "mistaken")
                require_number(one.name, getattr(self, one.name), 0, 1 if chance else None)

    def probabilities(self, view: SearchView, path: Sequence[int]) -> np.ndarray:
        """Of each next step after `path` (indices of objects): float64 [P + 1], objects and then the end; sums to 1."""
        state = _State(view, 1)
        for index in path:
            state.fixate(np.array([index]), self.memory)
        return self._next(view, state)[0]

    def sample(self, view: SearchView, rng: np.random.Generator, count: int = 1) -> list[list[int]]:
        """`count` independent paths of object indices, of 1 to `limit` fixations."""
        state, paths = _State(view, count), [[] for _ in range(count)]  # type: tuple[_State, list[list[int]]]
        alive = np.arange(count)
        while len(alive):
            chances = self._next(view, state)
            drawn = (chances.cumsum(1) < rng.random((len(alive), 1))).sum(1).clip(max=chances.shape[1] - 1)
            goes_on = drawn < chances.shape[1] - 1
            alive, drawn = alive[goes_on], drawn[goes_on]
            state.keep(goes_on)
            for one, index in zip(alive, drawn, strict=True):
                paths[one].append(int(index))
            if len(alive):
                state.fixate(drawn, self.memory)
        return paths

    def _next(self, view: SearchView, state: _State) -> np.ndarray:
        """[n, P + 1] for n searches at the same step."""
        diagonal = np.hypot(*view.size)
        away = np.hypot(*np.moveaxis(view.centers[None] - state.place[:, None], -1, 0)) / diagonal  # [n, P]
        pull = self.likeness * view.similarity - self.distance * away - self.inhibition * state.visited
        chances = np.exp(pull - pull.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        end = self._end(view, state)[:, None]
        return np.concatenate([(1 - end) * chances, end], 1)

    def _end(self, view: SearchView, state: _State) -> np.ndarray:
        if state.current is None:
            return np.zeros(len(state.place))
        if state.step >= self.limit:
            return np.ones(len(state.place))
        target = -1 if view.target is None else view.target
        return np.where(state.current == target, self.found, self.mistaken * view.similarity[state.current])


class _State:
    """Where n searches of one view are, all after the same number of fixations.

    place: [n, 2], pixels. visited: [n, P], inhibition that is left. current: int64 [n], None before the first fixation.
    """

    def __init__(self, view: SearchView, count: int) -> None:
        self._centers = view.centers
        self.place = np.tile(np.array(view.size, np.float64) / 2, (count, 1))
        self.visited = np.zeros((count, len(view.centers)))
        self.current: np.ndarray | None = None
        self.step = 0

    def fixate(self, index: np.ndarray, memory: float) -> None:
        self.visited *= memory
        self.visited[np.arange(len(index)), index] = 1
        self.place, self.current, self.step = self._centers[index], index, self.step + 1

    def keep(self, which: np.ndarray) -> None:
        self.place, self.visited = self.place[which], self.visited[which]
        self.current = None if self.current is None else self.current[which]
