"""What methods against hallucination do on the embedded model: to hallucination, to what it otherwise knows, to length.

    python benchmarks/hallucination_tiny.py --work hallucination_work --out benchmarks/results/hallucination_tiny.json

For every method of configs/hallucination_tiny.yaml, each setting of its main knob answers POPE (three splits), captions
(CHAIR) and ordinary questions (counts and places) about the tuning images, a part of tiny COCO `val` told apart by a
hash of the image id. The setting with the fewest hallucinated mentions among those that lose at most `slack` of POPE F1
and of ordinary accuracy there is the tuned one. Then vanilla, the default and the tuned setting answer about other
images, beside the controls of some methods, and only those answers are reported: with 95% bootstrap intervals by image,
and differences from vanilla paired by image. `--work` keeps every answer, so a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from vlattn.assets.paths import tiny_coco
from vlattn.config_file import file_name
from vlattn.eval.arms import Arms
from vlattn.eval.items import chair_items, choose_images, pope_items
from vlattn.eval.ordinary import compare_ordinary, ordinary_items, score_ordinary
from vlattn.eval.pope_build import build_pope
from vlattn.eval.run import run_items
from vlattn.runtime.machine import describe_machine
from vlattn.training.tiny_examples import is_training_image

PER_IMAGE = 3  # objects that an image must have for POPE to ask about it


class Part(Arms):
    """One part of the images, answered about by any number of settings."""

    def __init__(self, out: Path, config: dict[str, Any], images: list[int]) -> None:
        data = tiny_coco(config["data"])
        super().__init__(
            out,
            data,
            images=len(images),
            seed=config["seed"],
            model=config["model"],
            batch_size=config["batch_size"],
            max_new_tokens=config["max_new_tokens"],
            n_boot=config["bootstrap"],
        )
        wanted = set(images)
        built = build_pope([i for i in self.coco.image_objects() if i.image_id in wanted], n_images=len(images))
        questions = self.out / "questions"
        questions.mkdir(parents=True, exist_ok=True)
        for split, asked in built.items():
            lines = [
                json.dumps({"question_id": n, "image": q.image, "text": q.text, "label": q.label})
                for n, q in enumerate(asked, 1)
            ]
            (questions / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")
        by_name = {name: image for image, name in self.coco.file_names.items()}
        self.pope = [
            type(item)(item.id, by_name[item.image], item.image, item.prompt, item.label, item.meta)
            for item in pope_items(questions)
        ]
        self.chair = [item for item in chair_items(self.coco) if item.image_id in wanted]
        self.ordinary = ordinary_items(data.instances, images)

    def run(self, setting: str, console: Console) -> dict[str, Any]:
        """Every answer under a setting, and its scores."""
        file = file_name(setting)
        console.print(f"{self.out.name}: {setting}")
        self.answer(setting, file, setting, lambda what, n: None)
        run_items(
            self.model,
            self.processor,
            self.ordinary,
            task="ordinary",
            method=setting,
            images=self.data.images,
            out=self.records_of("ordinary", file),
            batch_size=self.batch_size,
            max_new_tokens=8,
            settings={"model": self.model_name},
        )
        scores = self.scores_of(file)
        scores["ordinary"] = score_ordinary(self.records_of("ordinary", file), self.n_boot)
        return {"setting": setting, "file": file, **scores}

    def against(self, vanilla: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
        """An arm minus vanilla, paired by image."""
        ordinary = (self.records_of("ordinary", vanilla["file"]), self.records_of("ordinary", arm["file"]))
        return {
            "pope": self.compare("pope", vanilla["file"], arm["file"], ("f1", "accuracy")),
            "chair": self.compare("chair", vanilla["file"], arm["file"], ("chair_i", "chair_s", "recall", "len")),
            "ordinary": compare_ordinary(*ordinary, self.n_boot),
        }


def split_images(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(tuning images, reported images), disjoint; both have enough objects for POPE."""
    data = tiny_coco(config["data"])
    from vlattn.eval.coco import read_coco

    able = [i.image_id for i in read_coco(data.instances).image_objects() if len(i.objects) >= PER_IMAGE]
    tune = [i for i in able if is_training_image(i)]
    report = [i for i in able if not is_training_image(i)]
    return (
        choose_images(tune, min(config["tune_images"], len(tune)), config["seed"]),
        choose_images(report, min(config["report_images"], len(report)), config["seed"]),
    )


def value(arm: dict[str, Any], metric: str) -> float:
    found = {
        "f1": arm["pope"]["mean_f1"],
        "accuracy": arm["pope"]["mean_accuracy"],
        "chair_i": arm["chair"]["chair_i"],
        "chair_s": arm["chair"]["chair_s"],
        "recall": arm["chair"]["recall"],
        "chair_f1": arm["chair"]["f1"],
        "ordinary": arm["ordinary"]["all"],
    }[metric]
    return float(found["value"])


def choose(vanilla: dict[str, Any], arms: Sequence[dict[str, Any]], slack: float) -> str | None:
    """The setting with the lowest CHAIR_i among those that lose little else on the tuning images; None for none."""
    fit = [
        arm
        for arm in arms
        if all(value(arm, metric) >= value(vanilla, metric) - slack for metric in ("f1", "ordinary"))
    ]
    best = min(fit, key=lambda arm: value(arm, "chair_i"), default=None)
    return None if best is None else best["setting"]


def report(console: Console, found: dict[str, Any]) -> None:
    table = Table(
        "setting", "POPE F1", "CHAIR_i", "CHAIR_s", "recall", "length", "ordinary", "CHAIR_i minus vanilla",
        title="reported images",
    )  # fmt: skip
    for arm in found["reported"]:
        cells = [f"{value(arm, m):.3f}" for m in ("f1", "chair_i", "chair_s", "recall")]
        difference = arm.get("against_vanilla", {}).get("chair", {}).get("chair_i")
        shown = "" if difference is None else _signed(difference)
        table.add_row(arm["setting"], *cells, f"{arm['chair']['length']:.1f}", f"{value(arm, 'ordinary'):.3f}", shown)
    console.print(table)


def _signed(d: dict[str, Any]) -> str:
    return f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/hallucination_tiny.yaml"))
    parser.add_argument("--work", type=Path, default=Path("hallucination_work"), help="where answers are kept")
    parser.add_argument("--methods", nargs="+", help="some of the methods (default all)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    logging.set_verbosity_error()
    config = yaml.safe_load(args.config.read_text())
    tune_ids, report_ids = split_images(config)
    methods = {n: s for n, s in config["methods"].items() if not args.methods or n in args.methods}
    tune = Part(args.work / "tune", config, tune_ids)
    base = tune.run("vanilla", console)
    sweeps = {name: [tune.run(setting, console) for setting in settings] for name, settings in methods.items()}
    chosen = {name: choose(base, arms, config["slack"]) for name, arms in sweeps.items()}
    part = Part(args.work / "report", config, report_ids)
    vanilla = part.run("vanilla", console)
    reported = [{"method": "vanilla", "role": "vanilla", **vanilla}]
    for name, settings in methods.items():
        roles = {settings[0]: "default"}
        if chosen[name] is not None:
            roles[chosen[name]] = "default and tuned" if chosen[name] == settings[0] else "tuned"
        for setting in config["controls"].get(name, ()):
            roles.setdefault(setting, "control")
        for setting, role in roles.items():
            arm = part.run(setting, console)
            reported.append({"method": name, "role": role, **arm, "against_vanilla": part.against(vanilla, arm)})
    found = {
        "benchmark": "hallucination_tiny",
        "machine": describe_machine(),
        "config": config,
        "images": {"tune": len(tune_ids), "reported": len(report_ids)},
        "questions": {"pope": len(part.pope), "ordinary": len(part.ordinary)},
        "tuning": {"vanilla": base, "sweeps": sweeps, "chosen": chosen},
        "reported": reported,
    }
    report(console, found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
