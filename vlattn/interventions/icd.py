"""ICD: contrast the logits with those under an instruction that invites hallucination.

"Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding", arXiv 2403.18715.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vlattn.checks import require_choice, require_number
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.contrast import contrast
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.second_prompt import text_positions, with_image
from vlattn.runtime.second_stream import SecondStream
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

At = Literal["start", "after_image"]


@dataclass(frozen=True)
class Edit:
    """One change of a prompt: from index `place` on, `removed` tokens make room for others."""

    place: int
    removed: int = 0


def disturb(inputs: dict[str, Any], edits: Sequence[Edit], words: Sequence[int], mrope: bool) -> dict[str, Any]:
    """A batch of prompts with `words` put in at the edit of each row: left-padded anew, positions and types following.

    Args:
        inputs: input_ids and attention_mask [B, T]; token_type_ids, mm_token_type_ids [B, T] and position_ids
            ([B, T], or [3 or 4, B, T] with M-RoPE) where there are some. The rest is handed on.
        edits: one for each row, its place an index into the padded row.
        words: ids of the disturbance.
        mrope: whether positions are three-dimensional. Given ones follow the edit; others are left for the model to
            make, as one-dimensional ones are counted anew.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    batch, length = ids.shape
    # The source of each new token: an index of the old row, or length + its index among the words.
    rows = []
    for edit, alive in zip(edits, mask.tolist(), strict=True):
        old = [i for i in range(length) if alive[i] and not edit.place <= i < edit.place + edit.removed]
        before = sum(i < edit.place for i in old)
        rows.append([*old[:before], *range(length, length + len(words)), *old[before:]])
    longest = max(map(len, rows))
    alive = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=ids.device)
    source = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=ids.device)  # [B, N]
    put_in = ids.new_tensor(list(words)).expand(batch, -1)  # [B, W]
    found = dict(inputs)
    found["attention_mask"] = alive.long()
    found["input_ids"] = torch.where(alive, torch.cat([ids, put_in], 1).gather(1, source), 0)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            text = torch.zeros_like(put_in, dtype=inputs[name].dtype)
            found[name] = torch.cat([inputs[name], text], 1).gather(1, source).masked_fill(~alive, 0)
    places = inputs.get("position_ids")
    if not mrope:
        found["position_ids"] = text_positions(alive)
    elif places is not None:
        found["position_ids"] = _moved(places, edits, len(words), source, alive)
    return found


def _moved(
    places: torch.Tensor, edits: Sequence[Edit], words: int, source: torch.Tensor, alive: torch.Tensor
) -> torch.Tensor:
    """M-RoPE's positions after the edits [3 or 4, B, N]; what is taken out and put in is text, of one position each."""
    dims, batch, length = places.shape
    at = torch.tensor([edit.place for edit in edits], device=places.device)
    by = torch.tensor([words - edit.removed for edit in edits], device=places.device)
    behind = torch.arange(length, device=places.device) >= at[:, None]  # [B, T]
    first = torch.cat([places, places.amax(2, keepdim=True) + 1], 2)  # at the end a word follows the largest
    first = first.gather(2, at.view(1, -1, 1).expand(dims, batch, 1))  # [dims, B, 1]
    of_words = first + torch.arange(words, device=places.device)
    both = torch.cat([places + behind * by[:, None], of_words], 2)
    return both.gather(2, source.expand(dims, -1, -1)).masked_fill(~alive, 0)


def edits_of(
    ids: torch.Tensor,
    mask: torch.Tensor,
    visual: torch.Tensor,
    at: At,
    system: Sequence[int] | None,
    first: Sequence[int],
    wrappers: Sequence[int],
) -> list[Edit]:
    """Where the disturbance goes in each row of ids [B, T] (mask, visual: bool [B, T]).

    first: ids that stay in front of it at the start (BOS). wrappers: ids that stay with the image before them.

    Raises:
        InputError: `system` is given and a row does not have it exactly once.
    """
    found = []
    for number, (row, alive, images) in enumerate(zip(ids.tolist(), mask.tolist(), visual.tolist(), strict=True)):
        start = alive.index(True)
        if system is not None:
            wanted = list(system)
            places = [i for i in range(start, len(row)) if row[i : i + len(wanted)] == wanted]
            if len(places) != 1:
                raise InputError(
                    f"system: prompt {number} has it {len(places)} times, as token ids {wanted}; give the text as the "
                    "prompt has it (or its ids), once in each prompt"
                )
            found.append(Edit(places[0], len(wanted)))
            continue
        place = start + (row[start] in first)
        if at == "after_image":
            place = len(row) - images[::-1].index(True)
            while place < len(row) and row[place] in wrappers:
                place += 1
        found.append(Edit(place))
    return found


def begin_ids(session: Session) -> tuple[int, ...]:
    """What a prompt may begin with that is no text: the model's BOS."""
    found: list[int] = []
    for config in (session.adapter.text_config, getattr(session.model, "generation_config", None)):
        bos = getattr(config, "bos_token_id", None)
        found += bos if isinstance(bos, list) else [] if bos is None else [bos]
    return tuple(found)


@dataclass(frozen=True)
class ICD(Intervention):
    """Baseline: subtract the logits that the model has under a disturbed instruction, among plausible tokens.

    "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding", arXiv 2403.18715.
    l is the model's logits, l' those of the same image under a prompt with the disturbance in it, generating the same
    tokens with a cache of its own: (1 + alpha) l - alpha l', where l >= max l + log beta. The authors put a role prefix
    in place of the system message, and try some that ask for care and some that ask for vagueness or confusion: say
    which one a result was made with. SID's authors put "You are a confused object detector." right after the image.

    Methods that prune or edit act on the model's own stream. Prompts must be given as input_ids.

    disturbance: what is put into the prompt: a text, or a sequence of token ids.
    system: the system message that it replaces, as text or ids; None: it replaces nothing and goes to `at`.
    at: `start` puts it in front of the prompt, behind BOS; `after_image` right behind the (last) image.
    alpha: weight of the contrast; 0 leaves the model as it is, the mask included.
    beta: a token needs at least this share of the largest probability, 0 to 1; 0 keeps all tokens.
    processor: the model's processor or tokenizer, which texts need; ids do without.
    """

    place = "decoder"

    disturbance: str | tuple[int, ...]
    system: str | tuple[int, ...] | None = None
    at: At = "start"
    alpha: float = 1.0
    beta: float = 0.1
    processor: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("disturbance", "system"):
            value = getattr(self, name)
            if value is None and name == "system":
                continue
            if isinstance(value, str) and value and self.processor is None:
                raise InputError(f"{name}: a text needs processor=... to become token ids; give it, or give ids")
            ids = not isinstance(value, str) and isinstance(value, Sequence)
            if not value or not (isinstance(value, str) or (ids and all(type(i) is int and i >= 0 for i in value))):
                raise InputError(f"{name}: got {value!r}; give a text, or a sequence of token ids")
            if ids:
                object.__setattr__(self, name, tuple(value))  # lists are welcome; the method stays hashable
        require_choice("at", self.at, ("start", "after_image"))
        require_number("alpha", self.alpha, 0)
        require_number("beta", self.beta, 0, 1)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        if self.alpha == 0:
            return
        words = self._ids(self.disturbance)
        system = None if self.system is None else self._ids(self.system)
        first = begin_ids(session)

        def make(call: dict[str, Any], session: Session) -> dict[str, Any]:
            if call.get("input_ids") is None:
                raise InputError("input_ids: ICD rewrites the prompt's text; give input_ids instead of inputs_embeds")
            inputs, adapter = with_image(call, session), session.adapter
            edits = edits_of(
                inputs["input_ids"],
                inputs["attention_mask"].bool(),
                adapter.visual_mask(inputs),
                self.at,
                system,
                first,
                adapter.wrapper_ids,
            )
            return disturb(inputs, edits, words, adapter.mrope)

        def combine(main: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
            return contrast(main, second, 1 + self.alpha, -self.alpha, self.beta)

        SecondStream(session, make, combine).attach(hooks)

    def _ids(self, given: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(given, str):
            return tuple(given)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return tuple(tokenizer(given, add_special_tokens=False)["input_ids"])
