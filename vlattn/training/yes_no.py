"""Yes/no questions as batches whose margins can be measured: the model's own prompt, and the two tokens in question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlattn.errors import InputError
from vlattn.eval.answer import chat_prompt
from vlattn.interventions.act_margins import MarginBatch
from vlattn.training.examples import Example, open_image

if TYPE_CHECKING:
    from transformers import ProcessorMixin

OTHER = {"yes": "no", "no": "yes"}


def yes_no_batches(
    processor: ProcessorMixin,
    examples: Sequence[Example],
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    answers: tuple[str, str] = ("yes", "no"),
) -> list[MarginBatch]:
    """The examples that are answered with yes or no, in batches of equally many questions, in their order.

    Args:
        processor: the model's own; its tokenizer must pad on the left.
        examples: others than yes/no questions are passed over.
        batch_size: questions in a batch.
        device: where tensors go.
        answers: how the model writes the two.

    Raises:
        InputError: no example is such a question, or both answers begin with the same token.
    """
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if getattr(tokenizer, "padding_side", None) != "left":
        raise InputError("processor: its tokenizer pads on the right; set processor.tokenizer.padding_side = 'left'")
    chosen = [example for example in examples if _word(example.answer) in OTHER]
    if not chosen:
        raise InputError("examples: none is answered with yes or no; give questions that are")
    written = dict(zip(("yes", "no"), answers, strict=True))
    batches = []
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        asked = [chat_prompt(processor, example.question) for example in part]
        process: Any = processor
        inputs = process(
            images=[open_image(example.image) for example in part], text=asked, return_tensors="pt", padding=True
        )
        tokens = {
            word: torch.tensor([_first_token(tokenizer, prompt, text) for prompt in asked], device=device)
            for word, text in written.items()
        }
        is_yes = torch.tensor([_word(example.answer) == "yes" for example in part], device=device)
        if bool((tokens["yes"] == tokens["no"]).any()):
            raise InputError(f"answers: {answers} begin with the same token; give two that differ in their first")
        batches.append(
            MarginBatch(
                tuple(f"{example.image.name}/{example.question}" for example in part),
                dict(inputs.to(device)),
                torch.where(is_yes, tokens["yes"], tokens["no"]),
                torch.where(is_yes, tokens["no"], tokens["yes"]),
            )
        )
    return batches


def _word(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def _first_token(tokenizer: Any, asked: str, answer: str) -> int:
    """The token with which `answer` goes on behind a prompt."""
    ids = list(tokenizer(asked).input_ids)
    whole = list(tokenizer(f"{asked}{'' if asked[-1].isspace() else ' '}{answer}").input_ids)
    same = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    return int(whole[same])
