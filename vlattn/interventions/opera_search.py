"""OPERA's decoding loop: beam search that tries candidates in the model before it chooses, and that goes back.

All prompts of a batch share one cache and advance together. Where one goes back, the cache is cut to what every beam
still has in common with it, and is fed again from there; the other prompts wait, with the tokens that they have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput

from vlattn.errors import InputError
from vlattn.interventions.opera_beams import BeamRules, Beams, Candidates, PromptSearch
from vlattn.interventions.opera_scores import extend_columns, most_common, over_trust
from vlattn.interventions.opera_stream import Stream

if TYPE_CHECKING:
    from vlattn.interventions.opera import OPERA


class Search:
    """One call of `generate`. prompts: each one's search, which waits while it has more than the cache holds."""

    def __init__(self, method: OPERA, stream: Stream, config: Any) -> None:
        self._method, self._stream, self._config = method, stream, config
        number = method.num_beams
        rules = BeamRules(
            keep=max(2, 1 + len(_end_tokens(config))) * number,
            longest=config.max_length - stream.given.shape[1],
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        fresh = Beams.fresh(number, stream.given.device)
        self.prompts = [PromptSearch(method, rules, fresh) for _ in range(len(stream.given) // number)]

    def run(self, processor: Any, criteria: Any) -> torch.Tensor | GenerateBeamDecoderOnlyOutput:
        """Decode, with `generate`'s logits processors and stopping criteria.

        Returns:
            int64 [B * num_return_sequences, T + n], or that as the field `sequences` beside `sequences_scores`.
        """
        logits = self._stream.prefill()
        if self._stream.followed and self._method.threshold < math.inf:
            raise InputError(
                "OPERA: a second stream runs beside this model, as VCD and others have it, and it cannot follow a "
                "rollback; leave one of the contexts, or give OPERA(threshold=math.inf)"
            )
        while True:
            self._advance(logits, processor, criteria)
            done = [prompt.done for prompt in self.prompts]
            if all(done):
                return self._output()
            logits = self._stream.feed([prompt.beams.ids for prompt in self.prompts], done)

    def _advance(self, logits: torch.Tensor, processor: Any, criteria: Any) -> None:
        """Go on, or back, with each prompt whose tokens the cache now holds; logits: [R, V] behind them."""
        held = self._stream.held.shape[1]
        active = [n for n, prompt in enumerate(self.prompts) if not prompt.done and prompt.beams.length == held]
        if not active:
            return
        scores, ids = self._best_tokens(logits, processor, active)
        pending = []
        for n, candidates in zip(active, self._weigh(scores, ids, active), strict=True):
            prompt = self.prompts[n]
            if not prompt.roll_back(candidates.winners):
                pending.append((n, candidates, prompt.continuations(candidates)))
        if not pending:
            return
        ends = criteria(torch.cat([self._whole(n, best.ids) for n, _, best in pending]), None)
        for (n, candidates, best), ended in zip(pending, ends.chunk(len(pending)), strict=True):
            self.prompts[n].step(candidates, best, ended)

    def _best_tokens(
        self, logits: torch.Tensor, processor: Any, active: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The C most probable tokens of each beam, their log-probabilities (-inf where banned) and ids [B, K, C]."""
        log_probs = processor(self._stream.ids, logits.log_softmax(-1))  # [R, V]
        # No image stands behind a placeholder that the model says.
        placeholders = torch.tensor(self._stream.placeholders, device=log_probs.device)
        log_probs = log_probs.index_fill(1, placeholders, -torch.inf)
        log_probs = log_probs.unflatten(0, (-1, self._method.num_beams))  # [B, K, V]
        for n in active:
            log_probs[n] = self.prompts[n].forbid(log_probs[n])
        found = log_probs.topk(min(self._method.num_attn_candidates, log_probs.shape[-1]))
        return found.values, found.indices

    def _weigh(self, scores: torch.Tensor, ids: torch.Tensor, active: list[int]) -> list[Candidates]:
        """Try tokens [B, K, C] in the model, and score those of the active prompts by what they look at."""
        method = self._method
        # What cannot be chosen need not be tried; it may be a token that the model cannot be given.
        tried = torch.where(scores.isfinite(), ids, ids[..., :1])
        rows, image = self._stream.attempt(tried.flatten(0, 1))
        rows = rows.unflatten(0, (-1, method.num_beams))[active]  # [A, K, C, t + 1]
        image = image.unflatten(0, (-1, method.num_beams))[active]  # [A, K, C]
        columns = torch.stack([self.prompts[n].beams.columns for n in active])[:, :, None]  # [A, K, 1, t]
        columns = extend_columns(columns.expand(-1, -1, rows.shape[2], -1), rows, method.scale_factor)
        trust, places = over_trust(columns, method.score_scale, method.window)  # [A, K, C]
        penalty = -image if rows.shape[-1] <= method.warmup else trust
        scores = scores[active] - method.penalty_weights * penalty.float()
        if method.renormalize:
            scores = scores.log_softmax(-1).nan_to_num(nan=-torch.inf)  # NaN: nothing can be chosen
        winners = most_common(places)  # [A, K]
        return [Candidates(ids[n], scores[at], columns[at], winners[at]) for at, n in enumerate(active)]

    def _whole(self, prompt: int, ids: torch.Tensor) -> torch.Tensor:
        """Generated tokens [M, n] behind their prompt [M, T + n]."""
        given = self._stream.given[prompt * self._method.num_beams]
        return torch.cat([given.expand(len(ids), -1), ids], 1)

    def _output(self) -> torch.Tensor | GenerateBeamDecoderOnlyOutput:
        each = self._config.num_return_sequences
        answers = [(n, answer) for n, prompt in enumerate(self.prompts) for answer in prompt.answers(each)]
        longest = max(len(answer.ids) for _, answer in answers)
        pad = self._config.pad_token_id
        if pad is None:
            pad = next(iter(_end_tokens(self._config)), 0)
        sequences: Any = self._stream.given.new_full((len(answers), self._stream.given.shape[1] + longest), pad)
        for row, (n, answer) in zip(sequences, answers, strict=True):
            whole = self._whole(n, answer.ids[None])[0]
            row[: len(whole)] = whole
        if not self._config.return_dict_in_generate:
            return sequences
        scores = torch.tensor([answer.score for _, answer in answers], device=sequences.device)
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)


def _end_tokens(config: Any) -> list[int]:
    """The EOS tokens of a generation config."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
