"""Calibrate VAR's sink channels on the embedded model and store them beside its weights, as `tiny_llava/var.json`.

python -m vlattn.assets.calibrate_var

Its first token is no sink, so the channels are those of visual tokens. Only the third of `val` that is set aside for
training is looked at.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO

import vlattn
from vlattn.assets.paths import tiny_coco, tiny_llava
from vlattn.eval.answer import chat_prompt
from vlattn.eval.items import CHAIR_PROMPT
from vlattn.interventions.var_calibrate import SinkCalibration
from vlattn.interventions.var_sinks import DecoderPrint, sink_strength
from vlattn.training.tiny_examples import is_training_image

TAU = 4.0
"""Between the two heaps that visual tokens form in the strongest channels."""
BATCH = 32
EMPTY = 0.05
"""A patch with a smaller share of object pixels is background."""


def prompts(processor: Any, limit: int | None = None) -> Iterator[tuple[Any, torch.Tensor]]:
    """Batches of prompts about the training images, and the share of objects in each patch [B, 144]."""
    files = tiny_coco("val")
    coco = COCO(str(files.instances))
    ids = [i for i in sorted(coco.getImgIds()) if is_training_image(i)][:limit]
    for start in range(0, len(ids), BATCH):
        images, covered = [], []
        for info in coco.loadImgs(ids[start : start + BATCH]):
            images.append(Image.open(files.images / info["file_name"]).convert("RGB"))
            masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(imgIds=[info["id"]]))]
            covered.append(np.any(masks, axis=0).reshape(12, 8, 12, 8).mean((1, 3)).reshape(-1))
        texts = [chat_prompt(processor, CHAIR_PROMPT)] * len(images)
        yield processor(images=images, text=texts, return_tensors="pt"), torch.tensor(np.stack(covered))


@torch.no_grad()
def background(model: Any, batches: list[tuple[Any, torch.Tensor]], found: SinkCalibration) -> dict[str, float]:
    """How many visual tokens of the calibrated layers are sinks, and how much of either is background."""
    sinks = tokens = empty_sinks = empty = text_sinks = text = 0
    for inputs, covered in batches:
        visual = inputs["input_ids"] == model.config.image_token_id
        states = model.model(**inputs, output_hidden_states=True).hidden_states
        bare = covered < EMPTY
        for layer in range(found.layers[0], found.layers[1] + 1):
            strong = sink_strength(states[layer], found.dims) > found.tau
            sink = strong[visual].view_as(bare)
            sinks, tokens = sinks + int(sink.sum()), tokens + sink.numel()
            empty_sinks, empty = empty_sinks + int((sink & bare).sum()), empty + int(bare.sum())
            text_sinks, text = text_sinks + int(strong[~visual].sum()), text + int((~visual).sum())
    return {
        "visual_tokens_that_are_sinks": round(sinks / tokens, 4),
        "text_tokens_that_are_sinks": round(text_sinks / text, 4),
        "background_among_sinks": round(empty_sinks / sinks, 4),
        "background_among_visual_tokens": round(empty / tokens, 4),
    }


@torch.no_grad()
def attention(batches: list[tuple[Any, torch.Tensor]], found: SinkCalibration) -> dict[str, Any]:
    """What text behind the image attends to, in the mean over rows and heads.

    first_token_attention: in each layer. sink_attention: of a visual sink over that of any visual token, in the
    calibrated layers.
    """
    model, _ = vlattn.load("tiny", attn_implementation="eager")
    first: list[torch.Tensor] = []
    ratio: list[torch.Tensor] = []
    for inputs, _ in batches:
        visual = inputs["input_ids"] == model.config.image_token_id
        behind = int(visual[0].nonzero().max()) + 1
        out = model.model(**inputs, output_hidden_states=True, output_attentions=True)
        rows = [weights[:, :, behind:].mean((1, 2)) for weights in out.attentions]  # [B, T] each
        first.append(torch.stack([row[:, 0].mean() for row in rows]))
        middle = range(found.layers[0], found.layers[1] + 1)
        sinks = [visual & (sink_strength(out.hidden_states[layer], found.dims) > found.tau) for layer in middle]
        pairs = zip(middle, sinks, strict=True)
        ratio.append(torch.stack([rows[layer][sink].mean() / rows[layer][visual].mean() for layer, sink in pairs]))
    return {
        "first_token_attention": torch.stack(first).mean(0).tolist(),
        "sink_attention": torch.stack(ratio).mean(0).tolist(),
    }


def main() -> None:
    model, processor = vlattn.load("tiny")
    batches = list(prompts(processor))
    inputs = [inputs for inputs, _ in batches]
    first = vlattn.calibrate_sinks(model, inputs, tau=TAU)
    found = vlattn.calibrate_sinks(model, inputs, tau=TAU, tokens="visual")
    stored = {
        "decoder": dataclasses.asdict(DecoderPrint.of(model.config)),
        "vocabulary": model.config.get_text_config().vocab_size,
        "sink_dims": found.dims,
        "tau": found.tau,
        "source": "calibrated on visual tokens: this model's first token is no sink (assets/README.md)",
        "visual_tokens": dataclasses.asdict(found),
        "first_token": dataclasses.asdict(first),
        **background(model, batches, found),
        **attention(batches, found),
    }
    path = tiny_llava() / "var.json"
    path.write_text(json.dumps(_rounded(stored), indent=1) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


def _rounded(x: Any) -> Any:
    """Figures to four digits behind the point: what lies below differs between machines."""
    if isinstance(x, float):
        return round(x, 4)
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, list | tuple) else x


if __name__ == "__main__":
    main()
