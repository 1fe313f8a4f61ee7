"""Methods on the same images: every arm answers the same POPE questions and describes the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlattn.assets.paths import TinyCoco
from vlattn.eval.answer import chat_prompt, read_image
from vlattn.eval.coco import CocoSet, read_coco
from vlattn.eval.compare import compare_files
from vlattn.eval.items import CHAIR_PROMPT, Item, chair_items, pope_items
from vlattn.eval.report import score_file
from vlattn.eval.run import run_items
from vlattn.models.load import load
from vlattn.models.registry import adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Step = Callable[[str, int], None]
"""Called as (what is going on, how many steps have just been finished)."""

TASKS = ("pope", "chair")


class Arms:
    """One model and one draw of images, for any number of arms; an arm is a file name and a method string.

    Every answer is a line of `out/records/{task}_{file}.jsonl`, and what is there already is not asked again.

    Args:
        out: the folder of everything that is written.
        data: images and COCO annotation files; images without enough objects for POPE are not drawn.
        images: how many, drawn by `seed`.
        model: as `vlattn.load` takes it; `load_options` go there too (dtype, device).
        batch_size, max_new_tokens: of both tasks.
        n_boot: bootstrap samples behind each interval.
    """

    def __init__(
        self,
        out: Path,
        data: TinyCoco,
        *,
        images: int,
        seed: int,
        model: str,
        batch_size: int,
        max_new_tokens: int,
        n_boot: int = 10_000,
        **load_options: Any,
    ) -> None:
        self.out, self.data, self.model_name, self.n_boot = out, data, model, n_boot
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.coco: CocoSet = read_coco(data.instances, data.captions)
        self.pope: list[Item] = pope_items(data.instances, images, seed)
        chosen = {item.image_id for item in self.pope}
        self.chair: list[Item] = [item for item in chair_items(self.coco) if item.image_id in chosen]
        self.model: PreTrainedModel
        self.processor: ProcessorMixin
        self.model, self.processor = load(model, **load_options)
        self.adapter = adapter_for(self.model)

    @property
    def items_per_arm(self) -> int:
        """How many steps `answer` reports."""
        return len(self.pope) + len(self.chair)

    def answer(self, name: str, file: str, method: str, step: Step) -> None:
        """Run both tasks under a method string; `name` is what progress calls the arm."""
        for task, items in (("pope", self.pope), ("chair", self.chair)):
            step(f"{task.upper()} {name}", 0)
            run_items(
                self.model,
                self.processor,
                items,
                task=task,
                method=method,
                images=self.data.images,
                out=self.records_of(task, file),
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                settings={"model": self.model_name},
                advance=lambda n: step("", n),
            )

    def records_of(self, task: str, file: str) -> Path:
        return self.out / "records" / f"{task}_{file}.jsonl"

    def scores_of(self, file: str) -> dict[str, Any]:
        """POPE and CHAIR of one arm, each figure with its 95% interval."""
        pope = score_file(self.records_of("pope", file), "pope", n_boot=self.n_boot)
        chair = score_file(
            self.records_of("chair", file),
            "chair",
            annotations=self.data.instances,
            captions=self.data.captions,
            n_boot=self.n_boot,
        )
        return {
            "pope": {
                "mean_f1": pope["metrics"]["f1"],
                "mean_accuracy": pope["metrics"]["accuracy"],
                "pooled": {name: pope["pooled"][name] for name in ("f1", "accuracy")},
                "splits": {
                    name: {
                        "f1": split["metrics"]["f1"],
                        "accuracy": split["metrics"]["accuracy"],
                        "yes_ratio": split["metrics"]["yes_ratio"]["value"],
                    }
                    for name, split in pope["splits"].items()
                },
            },
            "chair": {name: chair["metrics"][name] for name in ("chair_s", "chair_i", "recall", "f1")}
            | {"length": chair["metrics"]["len"]["value"]},
        }

    def compare(self, task: str, a: str, b: str, metrics: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """{metric: B minus A, paired by image} of two arms' files; POPE metrics are means over the splits."""
        first, second = (self.records_of(task, file) for file in (a, b))
        instances, captions = (self.data.instances, self.data.captions) if task == "chair" else (None, None)
        return compare_files(first, second, instances, captions, metrics=metrics, n_boot=self.n_boot)["metrics"]

    def inputs(self, items: list[Item], prompt: str = CHAIR_PROMPT) -> Any:
        """Model inputs of one prompt, about captioning by default, over the items' images."""
        return self.processor(
            images=[read_image(self.data.images / item.image) for item in items],
            text=[chat_prompt(self.processor, prompt)] * len(items),
            return_tensors="pt",
            padding=True,
        ).to(self.model.device)
