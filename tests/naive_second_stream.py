"""Two-stream decoding from its definition: each step runs each row's second prompt anew, alone, whole, without a cache.

The other way round than the code under test: a logits processor on an untouched model, and a copy of the model for the
second prompts.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

Inputs = dict[str, Any]
# A single prompt -> its second prompt.
Second = Callable[[Inputs], Inputs]
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


# Prompts --------------------------------------------------------------------------------------------------------------
def grown(single: Inputs, tokens: Sequence[int]) -> Inputs:
    """A prompt of one row with text behind it."""
    new = dict(single)
    for name in BY_TOKEN:
        if name in single:
            fill = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
            new[name] = torch.cat([single[name], torch.tensor([fill], dtype=single[name].dtype)], 1)
    return new


def put_in(single: Inputs, place: int, tokens: Sequence[int], removed: int = 0) -> Inputs:
    """A prompt of one row with text put in at `place`, instead of `removed` tokens."""
    new = dict(single)
    for name in BY_TOKEN:
        if name in single:
            fill = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
            row = single[name]
            middle = torch.tensor([fill], dtype=row.dtype)
            new[name] = torch.cat([row[:, :place], middle, row[:, place + removed :]], 1)
    return new


def text_only(single: Inputs, gone: Sequence[int]) -> Inputs:
    """A prompt of one row without the ids `gone`, and without anything about images."""
    ids = [token for token in single["input_ids"][0].tolist() if token not in gone]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def joined(singles: Sequence[Inputs]) -> Inputs:
    """A left-padded batch of prompts of one row each."""
    longest = max(single["input_ids"].shape[1] for single in singles)
    batch: Inputs = {}
    for name in {name: None for single in singles for name in single}:
        if name in BY_TOKEN:
            rows = [torch.nn.functional.pad(single[name], (longest - single[name].shape[1], 0)) for single in singles]
        elif name == "batch_num_images":
            rows = [single.get(name, torch.tensor([1])) for single in singles]
        else:
            rows = [single[name] for single in singles]
        batch[name] = torch.cat(rows)
    return batch


# Decoding -------------------------------------------------------------------------------------------------------------
class Contrasting(LogitsProcessor):
    """a l + b l', masked by what is plausible in l; (a, b) = weights(t) at the t-th generated token."""

    def __init__(
        self,
        model: Any,
        singles: Sequence[Inputs],
        second: Second,
        weights: Callable[[int], tuple[float, float]],
        beta: float,
        banned: Sequence[int] | None,
    ) -> None:
        self.other, self.banned = copy.deepcopy(model), list(banned or [])
        self.seconds = [second(single) for single in singles]
        self.weights, self.beta = weights, beta
        self.prompt = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prompt = self.prompt or input_ids.shape[1]
        new = input_ids[:, self.prompt :]
        rows = input_ids.shape[0] // len(self.seconds)
        found = []
        for row in range(input_ids.shape[0]):
            with torch.no_grad():
                prompt = grown(self.seconds[row // rows], new[row].tolist())
                found.append(self.other(**prompt).logits[0, -1].double())
        main = scores.double()
        a, b = self.weights(new.shape[1] + 1)
        out = a * main + b * torch.stack(found)
        if self.beta:
            for row, own in zip(out, main, strict=True):
                implausible = own < own.max() + math.log(self.beta)
                # Behind everything plausible, for when all of that is banned.
                row[implausible] = row[~implausible].min() - 1e3 + own[implausible] - own.max()
        out = out.log_softmax(-1)
        out[:, self.banned] = -torch.inf
        return out.float()


def generate(model: Any, inputs: Inputs, processor: Contrasting, **how: Any) -> Any:
    """As `model.generate`, with the processor in front of what the model bans by itself."""
    with torch.no_grad():
        return model.generate(
            **inputs, logits_processor=LogitsProcessorList([processor]), suppress_tokens=None, **DETAILS, **how
        )


DETAILS = {"return_dict_in_generate": True, "output_scores": True}


# VCD's noise ----------------------------------------------------------------------------------------------------------
def noised(single: Inputs, step: int, seed: int) -> Inputs:
    """The prompt with noise on its pixels: image by image, as the paper's schedule says, in a plain loop."""
    kept = 1.0
    for i in range(step + 1):
        kept *= 1 - (1 / (1 + math.exp(-(-6 + 12 * i / 999))) * (5e-3 - 1e-5) + 1e-5)
    new = dict(single)
    for name, grid in (
        ("pixel_values", "image_grid_thw"),
        ("pixel_values_images", ""),
        ("pixel_values_videos", "video_grid_thw"),
    ):
        if name not in single:
            continue
        pixels = single[name].clone()
        images = list(pixels.split(single[grid].prod(1).tolist())) if grid in single else list(pixels.flatten(0, -4))
        for image in images:
            if image.any():
                draw = torch.Generator().manual_seed(zlib.crc32(image.float().contiguous().numpy().tobytes(), seed))
                noise = torch.randn(image.shape, generator=draw)
                image.copy_(math.sqrt(kept) * image.double() + math.sqrt(1 - kept) * noise.double())
        new[name] = pixels
    return new
