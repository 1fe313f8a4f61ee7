"""T-VHD: how much the image had to say in each generated token, word and sentence.

"Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, equation 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.interventions.teacher_forcing import Blind, Seeing
from vlattn.interventions.vhd import joined, require_image, vhd_scores, watch_prompt
from vlattn.interventions.vhd_knockout import KnockOut

By = Literal["removal", "knockout"]
Scored = list[tuple[str, float]]
WORD = re.compile(r"\w+(?:['’-]\w+)*")
SENTENCE = re.compile(r"[^\s.!?][^.!?\n]*[.!?]*")


def token_scores(vhd: torch.Tensor, k: int) -> torch.Tensor:
    """Equation 5: the k largest VHD of each layer, summed over layers.

    Args:
        vhd: [B, L, H, N], outliers and all.
        k: from 1 to H.

    Returns:
        [B, N].
    """
    heads = vhd.shape[2]
    if k > heads:
        raise InputError(f"k: got {k}, but a layer has {heads} heads; give 1 <= k <= {heads}")
    return vhd.topk(k, dim=2).values.sum((1, 2))


@dataclass(frozen=True)
class TVHD:
    """T-VHD of generated tokens.

    ids: int64 [B, N].
    scores: [B, N], at least 0; what stands behind the end of a text scores the padding there, and means nothing.
    """

    ids: torch.Tensor
    scores: torch.Tensor

    def words(self, tokenizer: Any) -> list[Scored]:
        """For each text its words in order, each with the mean score of the tokens it is spelled with.

        The paper does not say how tokens make words; a token that spells the end of one and the start of another counts
        in both. Special tokens count nowhere.
        """
        return self._parts(tokenizer, WORD)

    def sentences(self, tokenizer: Any) -> list[Scored]:
        """For each text its sentences, each with the mean score of its tokens; `.`, `!`, `?` and new lines end one."""
        return self._parts(tokenizer, SENTENCE)

    def _parts(self, tokenizer: Any, pattern: re.Pattern[str]) -> list[Scored]:
        found: list[Scored] = []
        for ids, scores in zip(self.ids.tolist(), self.scores.tolist(), strict=True):
            text, spans = spell(tokenizer, ids)
            parts: Scored = []
            for match in pattern.finditer(text):
                own = [
                    score
                    for (start, end), score in zip(spans, scores, strict=True)
                    if start < match.end() and end > match.start() and text[start:end].strip()
                ]
                parts.append((match.group().strip(), sum(own) / len(own)))
            found.append(parts)
        return found


def spell(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """A text, and which characters each of its tokens adds to it; special tokens add none."""
    text, spans = "", []
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        start = min(len(text), len(longer))
        # A letter of several byte tokens is a replacement character until it is whole: the last token completes it.
        while start and longer[:start] != text[:start]:
            start -= 1
        spans.append((start, len(longer)))
        text = longer
    return text, spans


@torch.no_grad()
def tvhd(
    model: nn.Module, inputs: Mapping[str, Any], generated: torch.Tensor, *, k: int = 4, by: By = "removal"
) -> TVHD:
    """T-VHD of every generated token: what the image moved, in the heads that it moves most.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949. Lower for
    hallucinated words and sentences, the paper finds. The same tokens are fed behind the prompt and behind the prompt
    without its images; heads are compared where each token was predicted. Inside a context the prompt with images goes
    through the model as the context leaves it, one token at a time.

    Args:
        model: a model with an adapter.
        inputs: keyword arguments of its forward that the text was generated from, left-padded, with images; no labels.
        generated: int64 [B, N], new tokens, the prompt left out, as in `model.generate(**inputs)[:, T:]`.
        k: heads of each layer that count; the paper does not give its number.
        by: `removal` of the image from the prompt, as published, or the `knockout` of image keys in one stream; see
            `vhd_knockout`.

    Returns:
        scores [B, N], fp32 for half-precision models, with `.words(tokenizer)` and `.sentences(tokenizer)`.

    Raises:
        InputError: no image in the whole batch, padding on the right, a prompt without text, or k above the heads.
    """
    require_count("k", k)
    require_choice("by", by, ("removal", "knockout"))
    batch = len(inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"])
    if generated.ndim != 2 or len(generated) != batch or not generated.shape[1]:
        raise InputError(
            f"generated: got {list(generated.shape)}; give the new tokens of {batch} prompts as [{batch}, N], N >= 1"
        )
    with joined(model) as (session, hooks):
        require_image(session, inputs)
        layers = list(range(len(session.adapter.decoder_layers)))
        size = 1 if session.members else max(1, generated.shape[1] - 1)
        if by == "knockout":
            edit = KnockOut()
            session.attention.add(layers, edit, hooks)
            for _, forward in Seeing(session, inputs).forwards(generated, size):
                forward()
            found = [torch.cat(edit.found[layer], -1) for layer in layers]  # each [B, H, N]
        else:
            prompts = watch_prompt(session, hooks)
            seeing = Seeing(session, inputs).heads(generated, size)
            blind = Blind(session, prompts[-1]).heads(generated, size)
            moved = [vhd_scores(seeing[layer], blind[layer]) for layer in layers]
            found = [prompts[-1].only_where_image(scores).transpose(1, 2) for scores in moved]
    home = found[0].device
    return TVHD(generated, token_scores(torch.stack([scores.to(home) for scores in found], 1), k))
