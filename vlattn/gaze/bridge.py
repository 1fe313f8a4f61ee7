"""Where a language model that sees looks, object by object, while it answers a question about the target of a search.

Gaze and language models meet here: what is found is a predictor of scanpaths (`attention_paths`) to hold against people
and OAT on the same trials, and a test of grounding (`grounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.gaze.box_cover import WHOLE, box_cover, seen_window
from vlattn.gaze.trial import GazeSet, Scene, Trial
from vlattn.image_file import read_rgb
from vlattn.models.llava_next import LlavaNextAdapter
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.routing import AttentionCall, Plain
from vlattn.runtime.session import Session, close_if_empty, session_of
from vlattn.runtime.tokens import VisualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Rows = Literal["prompt", "answer", "target"]
LONGEST_NAME = 12
Search = tuple[str, str]
"""Scene and target."""


@dataclass(frozen=True)
class ObjectAttention:
    """One search as every layer and head of a decoder sees it; averages over the rows asked for.

    objects: float32 [L, H, P], attention on the visual tokens in each box, a token that is partly inside counting for
        that part. Overlapping boxes share tokens, so it need not sum to the attention on the image.
    area: float64 [P], of each box in tokens, as far as the model sees it.
    tokens: float32 [L, H, rows, columns], attention on each visual token.
    cover: float64 [P, rows, columns], the share of each token in each box.
    """

    objects: np.ndarray
    area: np.ndarray
    tokens: np.ndarray
    cover: np.ndarray


def presence_question(trial: Trial) -> str:
    """Is there a dog in the image?"""
    return f"Is there {'an' if trial.target[0].lower() in 'aeiou' else 'a'} {trial.target} in the image?"


@torch.no_grad()
def object_attention(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    gaze: GazeSet,
    *,
    prompt: str | Callable[[Trial], str] = presence_question,
    rows: Rows = "prompt",
    max_new_tokens: int = 16,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[Search, ObjectAttention]:
    """Ask about the target of every search and read the attention on the objects.

    Full attention weights are never made: the rows that are asked for are computed again, on sdpa and flash attention
    as on eager. Inside a context the model is asked as the context leaves it; tokens that a method drops get nothing.

    Args:
        model: with an adapter; of families that cut images into tiles, LLaVA-NeXT and OneVision (their small view).
        processor: of the same model.
        gaze: trials, of scenes with pictures. Searches of several subjects for one target are asked once.
        prompt: what makes the question of a trial, or a text with {target} in the place of its label.
        rows: "prompt": the last row of the prompt, from which the answer begins. "answer": greedy decoding, the mean
            over the rows that the answer's tokens come from (that one, and each further one). "target": the mean over
            the rows of the target's name in the question, where it stands last.
        max_new_tokens: longest answer, with "answer".
        batch_size: searches at once.
        advance: called with the number of searches that are finished, as they are.

    Returns:
        By (scene, target).

    Raises:
        InputError: a scene without a picture or objects, no visual tokens, tiles whose places are not known, or with
            "target" a question without the target's name.
    """
    require_choice("rows", rows, ("prompt", "answer", "target"))
    require_count("max_new_tokens", max_new_tokens)
    require_count("batch_size", batch_size)
    searches: dict[Search, Trial] = {}
    for trial in gaze.trials:
        if not gaze.scene_of(trial).objects:
            raise InputError(f"trial {trial.id!r}: scene {trial.scene!r} has no objects to attend to; leave it out")
        searches.setdefault((trial.scene, trial.target), trial)
    listed, found = list(searches.items()), {}
    session = session_of(model, adapter_for)
    hooks = HookSet(session.gate)
    watch = _Watch(session, rows)
    try:
        session.attention.add(list(range(len(session.adapter.decoder_layers))), watch, hooks)
        for start in range(0, len(listed), batch_size):
            batch = listed[start : start + batch_size]
            scenes = [gaze.scene_of(trial) for _, trial in batch]
            pictures = [read_rgb(gaze.image_path(scene)) for scene in scenes]
            texts = [_chat(processor, _question(prompt, trial)) for _, trial in batch]
            inputs: Any = processor(images=pictures, text=texts, return_tensors="pt", padding=True)  # type: ignore[operator]
            asked = inputs["input_ids"]
            named = named_rows(processor, asked, [trial for _, trial in batch]) if rows == "target" else None
            lengths = watch.run(model, inputs.to(model.device), max_new_tokens, named)
            for place, (search, _) in enumerate(batch):
                size = pictures[place].size
                found[search] = watch.take(place, lengths[place], scenes[place], processor.image_processor, size)
            advance(len(batch))
    finally:
        hooks.remove()
        close_if_empty(session)
    return found


def _question(prompt: str | Callable[[Trial], str], trial: Trial) -> str:
    return prompt.format(target=trial.target) if isinstance(prompt, str) else prompt(trial)


def named_rows(processor: Any, input_ids: torch.Tensor, trials: Sequence[Trial]) -> torch.Tensor:
    """Where each prompt names its target last: bool [B, R] over the last R positions.

    The shortest run of tokens whose text has the name in it, so that any tokenizer will do.
    """
    places = []
    for ids, trial in zip(input_ids.tolist(), trials, strict=True):
        place = _last_mention(processor.tokenizer, ids, trial.target.lower())
        if place is None:
            raise InputError(
                f"prompt: does not name the target {trial.target!r} of trial {trial.id!r}; put {{target}} into the "
                "question, or give rows='prompt'"
            )
        places.append(place)
    length = input_ids.shape[1]
    first = min(start for start, _ in places)
    mask = torch.zeros(len(places), length - first, dtype=torch.bool)
    for row, (start, end) in zip(mask, places, strict=True):
        row[start - first : end - first] = True
    return mask


def _last_mention(tokenizer: Any, ids: list[int], name: str) -> tuple[int, int] | None:
    for start in range(len(ids) - 1, -1, -1):
        if name in tokenizer.decode(ids[start : start + LONGEST_NAME]).lower():
            ends = range(start + 1, start + LONGEST_NAME + 1)
            return start, next(end for end in ends if name in tokenizer.decode(ids[start:end]).lower())
    return None


def _chat(processor: Any, text: str) -> str:
    """One user turn with an image, in the model's own form."""
    if not getattr(processor, "chat_template", None):
        raise InputError("processor: has no chat template; set processor.chat_template to the model's own")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


class _Watch(Plain):
    """Reads the attention on the visual tokens of a batch, each prompt having one image, and changes none."""

    def __init__(self, session: Session, rows: Rows) -> None:
        self._session, self._answers = session, rows == "answer"
        self._picked = torch.ones(1, 1, dtype=torch.bool)
        self._steps: dict[int, list[torch.Tensor]] = {}  # per layer, per step: [B, H, V]
        self._visual: VisualTokens | None = None

    def run(self, model: Any, inputs: Mapping[str, Any], max_new_tokens: int, picked: torch.Tensor | None) -> list[int]:
        """Ask a batch; how many steps each prompt's answer took.

        picked: bool [B, R], which of the last R rows of the prompts to look at; None for the last.
        """
        self._steps.clear()
        batch = len(inputs["input_ids"])
        self._picked = torch.ones(batch, 1, dtype=torch.bool) if picked is None else picked
        if not self._answers:
            self._session.adapter.multimodal(**inputs, use_cache=False)
            lengths = [1] * batch
        else:
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            new = output[:, inputs["input_ids"].shape[1] :]
            stop = model.generation_config.eos_token_id
            stops = torch.tensor(stop if isinstance(stop, list) else [-1 if stop is None else stop], device=new.device)
            ended = torch.isin(new, stops).cumsum(1) > 0
            lengths = (~ended).sum(1).clamp(min=1).tolist()
        self._visual = self._session.visual
        if self._visual is None or not self._steps:
            raise InputError("processor: its prompts have no visual tokens; give the model's own processor")
        return lengths

    def rows(self, call: AttentionCall) -> int:
        if call.prefill:
            return self._picked.shape[1]
        return call.query.shape[2] if self._answers else 0

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        now, visual = self._session.cuts.at(call.layer), self._session.visual
        assert now is not None
        assert visual is not None
        slot = now.tokens.slot.to(weights.device)  # [B, n], which visual token of the whole prompt each key is
        most = int(visual.mask.sum(1).max())
        if call.prefill:
            share = self._picked.to(weights) / self._picked.sum(1, keepdim=True).to(weights)
            row = torch.einsum("bhrk,br->bhk", weights, share)
        else:
            row = weights[:, :, -1]
        read = weights.new_zeros(*weights.shape[:2], most + 1)  # the last one takes what is text
        places = torch.where(slot >= 0, slot, most)[:, None].expand(-1, weights.shape[1], -1)
        read.scatter_add_(2, places, row[..., : slot.shape[1]])
        self._steps.setdefault(call.layer, []).append(read[..., :-1].float().cpu())
        return weights, None

    def take(
        self, prompt: int, steps: int, scene: Scene, image_processor: Any, size: tuple[int, int]
    ) -> ObjectAttention:
        """One prompt of the batch, averaged over its first `steps`."""
        assert self._visual is not None
        visual, tiled = self._visual, isinstance(self._session.adapter, LlavaNextAdapter)
        mine = visual.mask[prompt]
        image, tile, row, column = (
            x[prompt][mine].cpu() for x in (visual.image, visual.tile, visual.row, visual.column)
        )
        shown = row >= 0
        tiles = tile[shown].unique()
        if len(image.unique()) > 1 or (len(tiles) > 1 and not tiled):
            raise InputError(
                "processor: it cuts images into tiles whose places are not known; prepare images whole, with "
                "crop_to_patches or do_image_splitting off"
            )
        shown &= tile == tiles.min()  # of LLaVA-NeXT the small view
        grid = int(row[shown].max()) + 1, int(column[shown].max()) + 1
        layers = [torch.stack(read[:steps]).mean(0)[prompt][:, : len(shown)] for _, read in sorted(self._steps.items())]
        read = torch.stack(layers)[..., shown].numpy()  # [L, H, n]
        tokens = np.zeros((*read.shape[:2], *grid), np.float32)
        tokens[:, :, row[shown].numpy(), column[shown].numpy()] = read
        window = WHOLE if tiled else seen_window(image_processor, *size)
        cover = box_cover(scene.boxes(), (scene.width, scene.height), grid, window)
        objects = np.einsum("lhrc,prc->lhp", tokens, cover).astype(np.float32)
        return ObjectAttention(objects, cover.sum((1, 2)), tokens, cover)


def chosen(attention: np.ndarray, layers: Sequence[int] | None, heads: Sequence[tuple[int, int]] | None) -> np.ndarray:
    """Mean over layers and heads of [L, H, ...]: over all, over `layers`, or over `heads` given as (layer, head)."""
    if layers is not None and heads is not None:
        raise InputError("layers, heads: got both; give one of them, or neither")
    depth, width = attention.shape[:2]
    pairs = [(layer, 0) for layer in layers] if layers is not None else list(heads or ())
    if (layers is not None or heads is not None) and not pairs:
        raise InputError("layers, heads: got none to average over; give at least one")
    for layer, head in pairs:
        if not (0 <= layer < depth and 0 <= head < width):
            raise InputError(f"layers, heads: got ({layer}, {head}); the decoder has {depth} layers of {width} heads")
    if layers is not None:
        return attention[list(layers)].mean((0, 1))
    return attention.mean((0, 1)) if heads is None else np.mean([attention[layer, head] for layer, head in heads], 0)
