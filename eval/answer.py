"""Ask a model and record its answers, in batches, resumable at any moment."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.eval.items import Item
from vlattn.eval.records import Record, RecordWriter
from vlattn.eval.report import versions
from vlattn.image_file import read_rgb
from vlattn.runtime.machine import describe_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlattn.interventions.base import Intervention

OnError = Literal["raise", "skip"]


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """Where a run was made: versions, machine, dtype, attention implementation."""
    return {**versions(), **describe_run(model)}


def fingerprint(model: PreTrainedModel) -> str:
    """A checksum of the start of every parameter: records of other weights under the same name are not mixed."""
    checksum = 0
    for parameter in model.parameters():
        start = parameter.detach().flatten()[:256].float().cpu()
        checksum = zlib.crc32(start.numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def read_image(path: Path) -> Image.Image:
    """An RGB image, or an InputError that names the file and what is wrong with it."""
    return read_rgb(path, "images:", "go on without it with --on-error skip")


def chat_prompt(processor: ProcessorMixin, text: str) -> str:
    """One user turn with an image, as the model's own chat template writes it."""
    if not getattr(processor, "chat_template", None):
        raise InputError("model: its processor has no chat template; set processor.chat_template to the model's own")
    turn: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


def answer_items(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    images: Path,
    writer: RecordWriter,
    intervention: Intervention | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 512,
    on_error: OnError = "raise",
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Answer greedily every item that `writer` has not recorded yet, one record each, flushed as they come.

    Items that ask the same of the same image are asked once. A missing or corrupt image raises, or is recorded as a
    failed item with `on_error="skip"`. `advance(n)` is called as items are finished.
    """
    asked: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if item.id in writer.done_ids:
            advance(1)
        else:
            asked.setdefault((item.image, item.prompt), []).append(item)
    with intervention(model) if intervention is not None else contextlib.nullcontext():
        for batch in _batches(list(asked.values()), images, batch_size, on_error, writer, advance):
            for same, fields in zip(
                [b[0] for b in batch], _generate(model, processor, batch, max_new_tokens), strict=True
            ):
                for item in same:
                    writer.write(
                        Record(
                            item.id, item.image_id, item.image, item.prompt, label=item.label, meta=item.meta, **fields
                        )
                    )
                advance(len(same))


Loaded = tuple[list[Item], Image.Image]


def _batches(
    groups: list[list[Item]],
    images: Path,
    batch_size: int,
    on_error: OnError,
    writer: RecordWriter,
    advance: Callable[[int], None],
) -> Iterator[list[Loaded]]:
    batch: list[Loaded] = []
    for group in groups:
        try:
            picture = read_image(images / group[0].image)
        except InputError as error:
            if on_error == "raise":
                raise
            for item in group:
                writer.write(
                    Record(item.id, item.image_id, item.image, item.prompt, label=item.label, error=str(error))
                )
            advance(len(group))
            continue
        batch.append((group, picture))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _generate(model: Any, processor: ProcessorMixin, batch: list[Loaded], max_new_tokens: int) -> list[dict[str, Any]]:
    """The record fields that come from the model: raw text, length, and how it ended."""
    inputs = processor(
        images=[picture for _, picture in batch],
        text=[chat_prompt(processor, group[0].prompt) for group, _ in batch],
        return_tensors="pt",
        padding=True,
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=new.device)
    found = []
    for row in new:
        stops = torch.isin(row, ends).nonzero()
        length = int(stops[0]) + 1 if len(stops) else len(row)
        raw = processor.tokenizer.decode(row[:length], skip_special_tokens=True).strip()
        found.append({"raw": raw, "n_new_tokens": length, "finish": "eos" if len(stops) else "length"})
    return found
