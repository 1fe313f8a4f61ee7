"""A sweep: methods at several budgets on the same images, hallucination against visual tokens."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.eval.answer import environment
from vlattn.eval.arms import TASKS, Arms, Step
from vlattn.eval.sweep_budget import BUDGETS, one_per_image, read_budgets, record_budgets
from vlattn.eval.sweep_compare import METRICS, SAME, add_differences
from vlattn.eval.sweep_config import SweepArm, SweepConfig
from vlattn.interventions.describe import describe
from vlattn.interventions.registry import parse_method


class Sweep(Arms):
    """The arms of a configuration; records in `out` make it resume where it was cut off."""

    def __init__(self, config: SweepConfig, out: Path) -> None:
        self.config, self.start = config, time.perf_counter()
        super().__init__(
            out,
            config.files,
            images=config.images,
            seed=config.seed,
            model=config.model,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            n_boot=config.bootstrap,
            dtype=config.dtype,
            device=config.device,
        )
        self.prompts = {"pope": one_per_image(self.pope), "chair": self.chair}
        for arm in config.arms:  # what the model refuses is refused now and not after hours
            intervention = parse_method(arm.setting)
            if intervention is not None:
                with intervention(self.model):
                    pass

    @property
    def steps(self) -> int:
        """How many steps `run` reports."""
        return len(self.config.arms) * (self.items_per_arm + sum(map(len, self.prompts.values())))

    def run(self, step: Step, budget: str = "average") -> dict[str, Any]:
        """Run what is not recorded yet; returns what `sweep.json` holds.

        budget: the sense in which visual tokens are counted where arms are compared and drawn: final, average, counted.
        """
        if budget not in BUDGETS:
            raise InputError(f"budget: got {budget!r}; give {', '.join(BUDGETS)}")
        for arm in self.config.arms:
            step(f"tokens {arm.setting}", 0)
            self.count_tokens(arm, step)
            self.answer(arm.setting, arm.file, arm.setting, step)
        arms = [self.report(arm) for arm in self.config.arms]
        add_differences(arms, budget, self.compare)
        return {
            "title": "vlattn sweep",
            "config": asdict(self.config),
            "model": {"name": self.model_name, "parameters": sum(p.numel() for p in self.model.parameters())},
            "data": {"name": self.config.data_name, "images": len(self.chair), "questions": len(self.pope)},
            "environment": environment(self.model),
            "budget": budget,
            "budgets": BUDGETS,
            "bootstrap": {"n_boot": self.n_boot, "level": 0.95, "unit": "image", "interval": "percentile"},
            "comparisons": {
                "metrics": METRICS,
                "pope": "means over the three splits",
                "same_budget_within": SAME,
                "p_holm": "Holm over all arms compared with one reference on one metric",
            },
            "arms": arms,
            "seconds": round(time.perf_counter() - self.start, 1),
        }

    def count_tokens(self, arm: SweepArm, step: Step) -> None:
        """One prefill per image and task; the prompt decides for some methods how many tokens stay."""
        for task, items in self.prompts.items():
            record_budgets(
                self.model,
                self.processor,
                items,
                method=arm.setting,
                images=self.data.images,
                out=self.records_of(f"budget_{task}", arm.file),
                settings={"model": self.model_name},
                advance=lambda n: step("", n),
            )

    def report(self, arm: SweepArm) -> dict[str, Any]:
        """What an arm is, how many visual tokens it works with, and its scores."""
        sources = [] if arm.method == "vanilla" else [describe(name) for name in method_names(arm.setting)]
        return {
            "method": arm.method,
            "setting": arm.setting,
            "file": arm.file,
            "papers": [asdict(source.paper) for source in sources if source.paper is not None],
            "budget": {task: read_budgets(self.records_of(f"budget_{task}", arm.file)) for task in TASKS},
        } | self.scores_of(arm.file)


def method_names(setting: str) -> list[str]:
    """The registry's names in a method string: `a:keep=3+b` is a and b."""
    return [part.partition(":")[0].strip() for part in setting.split("+")]
