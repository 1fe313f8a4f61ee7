"""One evaluation run: a model, a method and a list of items become a records file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlattn.eval.answer import OnError, answer_items, environment, fingerprint
from vlattn.eval.items import Item
from vlattn.eval.records import RecordWriter
from vlattn.interventions.registry import parse_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlattn.interventions.base import Intervention


def run_items(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    *,
    task: str,
    method: str,
    images: Path,
    out: Path,
    batch_size: int = 1,
    max_new_tokens: int = 512,
    on_error: OnError = "raise",
    settings: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Answer `items` under `method` ("vanilla", "flowcut:keep=64", ...) into the records file `out`.

    A file that an earlier, interrupted run left is completed if the run was the same, and refused otherwise. `settings`
    are recorded and compared too; `model` among them is the name by which the model was asked for.
    """
    intervention = parse_method(method)
    generation = {
        "batch_size": batch_size,
        "generation": {"do_sample": False, "max_new_tokens": max_new_tokens},
        **(settings or {}),
    }
    with open_run(model, items, task=task, intervention=intervention, out=out, settings=generation) as writer:
        answer_items(
            model, processor, items, images, writer, intervention, batch_size, max_new_tokens, on_error, advance
        )


def open_run(
    model: PreTrainedModel,
    items: Sequence[Item],
    *,
    task: str,
    intervention: Intervention | None,
    out: Path,
    settings: dict[str, Any],
) -> RecordWriter:
    """The writer of a run's records, which knows model, weights, method and items; `settings` are recorded beside."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(i) for i in items], sort_keys=True).encode()).hexdigest()
    run_info = {
        "task": task,
        "model": str(model.config._name_or_path),
        "weights": fingerprint(model),
        "method": repr(intervention) if intervention is not None else "vanilla",
        "items": len(items),
        "items_sha256": digest,
        **settings,
    }
    return RecordWriter(out, run_info, environment(model))
