"""How many visual tokens an arm works with, measured on the prompts it is asked: the x axis of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlattn.eval.answer import chat_prompt, read_image
from vlattn.eval.items import Item
from vlattn.eval.records import Record, read_records
from vlattn.eval.run import open_run
from vlattn.interventions.registry import parse_method
from vlattn.models.registry import adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlattn.interventions.base import Intervention

BUDGETS = {
    "final": "left after the last decoder layer",
    "average": "mean of what enters each decoder layer",
    "counted": "mean of what each decoder layer hands on",
}


def one_per_image(items: Sequence[Item]) -> list[Item]:
    """The first item about each image."""
    return list({item.image_id: item for item in reversed(items)}.values())[::-1]


def record_budgets(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    *,
    method: str,
    images: Path,
    out: Path,
    settings: dict[str, Any],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """One prefill per item, alone in its batch; what `Trace.budget` says of it goes into its record's meta."""
    intervention = parse_method(method)
    with open_run(model, items, task="budget", intervention=intervention, out=out, settings=settings) as writer:
        for item in items:
            if item.id not in writer.done_ids:
                inputs = processor(
                    images=[read_image(images / item.image)],
                    text=[chat_prompt(processor, item.prompt)],
                    return_tensors="pt",
                ).to(model.device)
                found = prefill_budget(model, inputs, intervention)
                writer.write(Record(item.id, item.image_id, item.image, item.prompt, meta=found))
            advance(1)


@torch.inference_mode()
def prefill_budget(model: Any, inputs: Any, intervention: Intervention | None) -> dict[str, float | bool]:
    """Visual tokens of one prompt: `full` without pruning, and in each sense of BUDGETS under the intervention.

    masked: whether they are hidden from attention only, and still take part in the work.
    """
    full = float(adapter_for(model).visual_mask(inputs).sum())
    if intervention is None:
        return {"full": full, **dict.fromkeys(BUDGETS, full), "masked": False}
    with intervention(model) as trace:
        model(**inputs)
    return {"full": full, **trace.budget(), "masked": trace.masked}


def read_budgets(path: Path) -> dict[str, float | bool]:
    """The means over the prompts of a file, and whether any was masked."""
    metas = [record.meta for record in read_records(path)]
    means = {name: sum(meta[name] for meta in metas) / len(metas) for name in ("full", *BUDGETS)}
    return {**means, "masked": any(meta["masked"] for meta in metas)}
