"""OPERA in plain loops: one prompt, no cache, a whole forward with all attention weights for every candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class State:
    """Tokens, score and winning columns of each beam."""

    tokens: list[list[int]]
    scores: list[float]
    history: list[list[int]]


@dataclass
class Found:
    tokens: list[int]
    rollbacks: list[tuple[int, int]] = field(default_factory=list)


def forward(model: Any, inputs: dict[str, torch.Tensor], tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [V] behind the prompt and `tokens`, and the last layer's attention [H, S, S]; an eager model."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.int64)], 1)
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=inputs["pixel_values"],
        output_attentions=True,
    )
    return output.logits[0, -1].float(), output.attentions[-1][0]


def normalised_rows(attention: torch.Tensor) -> torch.Tensor:
    """[S, S]: the strongest head, each row divided by its sum."""
    rows = attention.max(0).values.double()
    return rows / rows.sum(1, keepdim=True)


def mode(values: list[int]) -> int:
    return min(values, key=lambda value: (-values.count(value), value))


def answer(
    model: Any,
    inputs: dict[str, torch.Tensor],
    new: int,
    method: Any,
    banned: list[int],
) -> Found:
    """`new` tokens as OPERA with `method`'s settings says them, `banned` ones never."""
    prompt, beams, count = inputs["input_ids"].shape[1], method.num_beams, method.num_attn_candidates
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    state = State([[] for _ in range(beams)], [0.0] + [-math.inf] * (beams - 1), [[] for _ in range(beams)])
    states: dict[int, State] = {}
    chosen: dict[int, list[tuple[int, int]]] = {}
    forbidden: dict[int, set[tuple[int, int]]] = {}
    used: dict[int, int] = {}
    found = Found([])
    while len(state.tokens[0]) < new:
        length = len(state.tokens[0])
        options: list[tuple[float, int, int, int]] = []  # score, beam, token, winner
        winners = []
        for beam in range(beams):
            logits, _ = forward(model, inputs, state.tokens[beam])
            everything = logits.double().logsumexp(0)  # bans come after the softmax, as in stock beam search
            for token in banned:
                logits[token] = -math.inf
            for other, token in forbidden.get(length, set()):
                if other == beam:
                    logits[token] = -math.inf
            tokens = logits.topk(count).indices.tolist()
            raw, places = [], []
            for token in tokens:
                _, attention = forward(model, inputs, [*state.tokens[beam], token])
                rows = normalised_rows(attention)
                products = [
                    math.prod(method.scale_factor * float(rows[prompt + i, prompt + j]) for i in range(j, length + 1))
                    for j in range(length + 1)
                ]
                window = range(max(0, length + 1 - method.window), length + 1)
                place = max(window, key=lambda j: products[j])
                looks = sum(float(rows[-1, j]) for j in image)
                penalty = -looks if length + 1 <= method.warmup else method.score_scale * products[place]
                raw.append(float(logits[token]) - method.penalty_weights * penalty)
                places.append(place)
            whole = torch.tensor(raw, dtype=torch.float64).logsumexp(0) if method.renormalize else everything
            winners.append(mode(places))
            for token, score in zip(tokens, raw, strict=True):
                options.append((state.scores[beam] + score - float(whole), beam, token, winners[-1]))
        live = [beam for beam in range(beams) if state.scores[beam] > -math.inf]
        now = mode([winners[beam] for beam in live])
        histories = [[*state.history[beam], winners[beam]][-method.window :] for beam in live]
        if now >= method.warmup and all(history.count(now) > method.threshold for history in histories):
            latest = max((to for _, to in found.rollbacks), default=0) if method.monotone else 0
            places = [
                place
                for place in (now + 1, now)
                if now + 1 < length and place > 0 and place in states and place >= latest
                if used.get(place, 0) < count
            ]
            if places:
                place = places[0]
                used[place] = used.get(place, 0) + 1
                found.rollbacks.append((length, place))
                state = states[place]
                forbidden.setdefault(place, set()).update(chosen[place])
                forbidden = {known: pairs for known, pairs in forbidden.items() if known <= place}
                states = {known: before for known, before in states.items() if known < place}
                continue
        options.sort(key=lambda option: -option[0])
        states[length] = state
        states = {known: before for known, before in states.items() if known > length - method.window}
        best = options[:beams]
        chosen[length] = [(beam, token) for score, beam, token, _ in best if score > -math.inf]
        state = State(
            [[*state.tokens[beam], token] for _, beam, token, _ in best],
            [score for score, _, _, _ in best],
            [[*state.history[beam], winner] for _, beam, _, winner in best],
        )
    found.tokens = state.tokens[0]
    return found
