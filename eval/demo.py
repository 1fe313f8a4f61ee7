"""What `vlattn demo` measures: FlowCut and random pruning against the vanilla model, on POPE, CHAIR and cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from vlattn.assets.paths import tiny_coco
from vlattn.eval.answer import environment
from vlattn.eval.arms import Arms, Step
from vlattn.eval.chair import ground_truth, mark_mentions
from vlattn.eval.chair_words import vocabulary
from vlattn.eval.model_cost import cache_bytes, model_cost
from vlattn.eval.pope_parse import parser
from vlattn.eval.records import read_records
from vlattn.interventions.base import attach
from vlattn.interventions.registry import parse_method
from vlattn.runtime.hooks import cache_of
from vlattn.runtime.timing import interleave


@dataclass(frozen=True)
class Arm:
    """One row of the demo: a name to print and the method string that commands take."""

    name: str
    method: str
    family: str
    visual_tokens: int

    @property
    def file(self) -> str:
        return self.name.lower().replace(" ", "_")


def settings() -> dict[str, Any]:
    """The demo's configuration, `configs/demo.yaml`."""
    return yaml.safe_load((files("vlattn.configs") / "demo.yaml").read_text(encoding="utf-8"))


def arms(budgets: list[int], visual_tokens: int) -> list[Arm]:
    """Vanilla, then FlowCut and random pruning at each budget."""
    found = [Arm("vanilla", "vanilla", "vanilla", visual_tokens)]
    # Counted per image, so that a scene keeps the same patches whatever it is batched with.
    found += [Arm(f"FlowCut {k}", f"flowcut:keep={k},count=per_image", "flowcut", k) for k in budgets]
    found += [Arm(f"Random {k}", f"random:keep={k}", "random", k) for k in budgets]
    return found


class Demo(Arms):
    """The steps of the demo, each of which leaves its files in `out`."""

    def __init__(self, out: Path, config: dict[str, Any] | None = None) -> None:
        self.config, self.start = config or settings(), time.perf_counter()
        shared = ("images", "seed", "model", "batch_size", "max_new_tokens")
        super().__init__(out, tiny_coco(self.config["data"]), **{key: self.config[key] for key in shared})
        self.arms = arms(self.config["budgets"], self.adapter.patches)

    @property
    def steps(self) -> int:
        """How many steps `run` reports."""
        return len(self.arms) * self.items_per_arm + self.config["timing"]["repeats"]

    def run(self, step: Step) -> dict[str, Any]:
        """Run everything; returns the results that `results.json` holds and the page shows."""
        for arm in self.arms:
            self.answer(arm.name, arm.file, arm.method, step)
        step("timing, arms interleaved", 0)
        costs = self.costs(step)
        return {
            "title": "vlattn demo",
            "model": {
                "name": self.model_name,
                "visual_tokens": self.adapter.patches,
                "parameters": sum(p.numel() for p in self.model.parameters()),
            },
            "data": {
                "name": f"tiny COCO {self.config['data']}",
                "images": len(self.chair),
                "questions": len(self.pope),
            },
            "environment": environment(self.model),
            "arms": [self.scores(arm) | {"cost": costs[arm.name]} for arm in self.arms],
            "comparisons": self.comparisons(),
            "commands": self.commands(),
            "seconds": round(time.perf_counter() - self.start, 1),
        }

    def records(self, task: str, arm: Arm) -> Path:
        return self.records_of(task, arm.file)

    def scores(self, arm: Arm) -> dict[str, Any]:
        """What the arm is, and its POPE and CHAIR."""
        return {
            "name": arm.name,
            "method": arm.method,
            "family": arm.family,
            "visual_tokens": arm.visual_tokens,
        } | self.scores_of(arm.file)

    def comparisons(self) -> list[dict[str, Any]]:
        """FlowCut minus random pruning at each budget, paired by image."""
        by_name = {arm.name: arm for arm in self.arms}
        found = []
        for budget in self.config["budgets"]:
            a, b = by_name[f"Random {budget}"], by_name[f"FlowCut {budget}"]
            f1 = self.compare("pope", a.file, b.file, ("f1",))["f1"]
            found.append(
                {"a": a.name, "b": b.name, "metric": "POPE mean F1", "p": f1["p_value"]}
                | {key: f1[key] for key in ("difference", "low", "high")}
            )
        return found

    def commands(self) -> list[str]:
        budget, n = self.config["budgets"][1], self.config["images"]
        shared = f'--method "flowcut:keep={budget}" --data {self.config["data"]} --n-images {n}'
        return [
            "vlattn demo",
            f"vlattn eval pope {shared} --out pope.jsonl",
            f"vlattn eval chair {shared} --out chair.jsonl",
        ]

    # Cost -------------------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def costs(self, step: Step) -> dict[str, dict[str, Any]]:
        """Time ratios to vanilla (arms interleaved), measured KV bytes and theoretical FLOPs of each arm."""
        timing = self.config["timing"]
        inputs = self.inputs(self.chair[: timing["batch"]])
        # A copy of the model per arm, so that attaching is not part of what is timed.
        handles = {}
        models = {}
        for arm in self.arms:
            method = parse_method(arm.method)
            models[arm.name] = self.model if method is None else copy.deepcopy(self.model)
            if method is not None:
                handles[arm.name] = attach(models[arm.name], method)

        def call(model: Any, new_tokens: int) -> Callable[[], Any]:
            return lambda: model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )

        timed = [
            interleave({name: call(model, n) for name, model in models.items()}, timing["repeats"], timing["warmup"])
            for n in (1, timing["new_tokens"])
        ]
        step("", timing["repeats"])
        found: dict[str, dict[str, Any]] = {}
        for arm in self.arms:
            used = cache_bytes(cache_of(models[arm.name](**inputs, use_cache=True)))["used"]
            prefill, total = (
                {"median": over.median, "q1": over.lower, "q3": over.upper}
                for over in (times[arm.name].over(times["vanilla"]) for times in timed)
            )
            ratio = 1.0
            if arm.name in handles:
                ratio = model_cost(models[arm.name], handles[arm.name].trace)["ratio"]
            found[arm.name] = {
                "prefill_ratio": prefill,
                "total_ratio": total,
                "kv_bytes": used,
                "kv_ratio": used / found["vanilla"]["kv_bytes"] if found else 1.0,
                "flops_ratio": ratio,
            }
        for handle in handles.values():
            handle.detach()
        return found

    # Pictures ---------------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def examples(self) -> list[dict[str, Any]]:
        """Scenes with what each arm kept, answered and said, for the page."""
        shown, read = self.chair[: self.config["examples"]], parser("pope-official")
        words = vocabulary("chair-legacy", self.coco.categories)
        truth = ground_truth(self.coco, [item.image_id for item in shown], words)
        found: list[dict[str, Any]] = [
            {
                "image": item.image,
                "grid": list(self.adapter.grid),
                "objects": list(self.coco.objects[item.image_id]),
                "arms": {},
            }
            for item in shown
        ]
        for arm in self.arms:
            method, kept = parse_method(arm.method), None
            if method is not None:
                with method(self.model) as trace:
                    self.model(**self.inputs(shown))
                kept = trace.kept
            captions = {r.image_id: r.raw for r in read_records(self.records("chair", arm))}
            answers = read_records(self.records("pope", arm))
            for i, item in enumerate(shown):
                text = captions[item.image_id]
                mentions = mark_mentions(text, truth[item.image_id], "chair-legacy", words)
                found[i]["arms"][arm.name] = {
                    "kept": None if kept is None else kept[i].tolist(),
                    "caption": text,
                    "mentions": [vars(m) for m in mentions],
                    "answers": [
                        {"question": r.prompt, "label": r.label, "raw": r.raw, "pred": read(r.raw)}
                        for r in answers
                        if r.image_id == item.image_id and r.meta["split"] == "adversarial"
                    ],
                }
        return found
