"""DyVTE on the tiny model: accuracy against the layer after which visual tokens leave.

Trains gates of several sizes on the third of tiny COCO `val` that is set aside, then asks POPE questions about the
other images, never about one that trained. One run for each forced exit answers everything: up to its exit a prompt
does not know that it will exit, so under a threshold it answers as under the forced exit that its gates then choose.
That is checked against the method itself; the result says how many answers differ.

    python benchmarks/dyvte_curve.py --out benchmarks/results/dyvte_tiny.json

Figures: POPE accuracy and F1 (unweighted means over the three splits), CHAIR_i and object recall of captions, each with
a 95% bootstrap interval over images, against the mean number of decoder layers that visual tokens take part in.
`--work` keeps gates, answers and tasks; a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import vlattn
from vlattn.assets.paths import tiny_coco
from vlattn.eval.answer import chat_prompt, read_image
from vlattn.eval.chair import chair_metrics, score_chair
from vlattn.eval.chair_io import captions_of
from vlattn.eval.coco import CocoSet, read_coco
from vlattn.eval.items import CHAIR_PROMPT, Item
from vlattn.eval.pope_build import build_pope
from vlattn.eval.pope_score import score_pope, split_means
from vlattn.eval.records import Record, read_records
from vlattn.eval.run import run_items
from vlattn.eval.stats import interval, resample_totals
from vlattn.interventions.dyvte_gates import CONFIG, DyVTEGates, load_gates
from vlattn.models.registry import adapter_for
from vlattn.runtime.machine import describe_machine
from vlattn.training.dyvte import DyVTETrainer, DyVTETraining
from vlattn.training.tiny_examples import is_training_image, tiny_examples

BATCH, PER_IMAGE = 60, 3
THRESHOLDS = (0.0, 0.01, 0.02, *(round(t / 20, 2) for t in range(1, 21)))
EPOCHS, LR = 8, 3e-3
"""Chosen on a fifth of the training images; the same for all sizes."""

Model = Any
Processor = Any
Prompt = tuple[str, str]
"""Image file and question."""


# What is asked --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Asked:
    """Questions of one task about images that trained nothing, and which of `prompts` each of them is."""

    task: str
    items: list[Item]
    place: NDArray[np.int64]
    new_tokens: int


def asked_things(limit: int | None) -> tuple[list[Prompt], Asked, Asked, CocoSet]:
    """Every prompt once, POPE (all three splits), captions, and the annotations; `limit` bounds the images."""
    coco = read_coco(tiny_coco("val").instances, tiny_coco("val").captions)
    images = [image for image in coco.image_objects() if not is_training_image(image.image_id)]
    candidates = sum(len(image.objects) >= PER_IMAGE for image in images)
    built = build_pope(images, min(limit or candidates, candidates), PER_IMAGE)
    questions = [question for split in built.values() for question in split]
    pope = [Item(q.item_id, q.image_id, q.image, q.text, q.label, {"split": q.category}) for q in questions]
    captions = [Item(str(i.image_id), i.image_id, i.file_name, CHAIR_PROMPT) for i in images[:limit]]
    prompts = list(dict.fromkeys((item.image, item.prompt) for item in [*pope, *captions]))
    index = {prompt: number for number, prompt in enumerate(prompts)}

    def asked(task: str, items: list[Item], new_tokens: int) -> Asked:
        return Asked(task, items, np.array([index[item.image, item.prompt] for item in items]), new_tokens)

    return prompts, asked("pope", pope, 16), asked("chair", captions, 80), coco


# Gates ----------------------------------------------------------------------------------------------------------------
def trained_gates(
    model: Model, processor: Processor, work: Path, settings: DyVTETraining, limit: int | None, console: Console
) -> DyVTEGates:
    """Gates of one size and seed: those in `work`, or trained now."""
    folder = work / f"gates_{settings.gate_hidden}_{settings.seed}"
    if not (folder / CONFIG).is_file():
        start = time.perf_counter()
        trainer = DyVTETrainer(
            model, processor, tiny_examples()[:limit], folder, settings, name="tiny", data="tiny:val"
        )
        trainer.collect(work / "tasks")
        trainer.run()
        console.print(f"{folder.name}: trained in {time.perf_counter() - start:.0f} s")
    return load_gates(folder)


@torch.inference_mode()
def probabilities(
    model: Model, processor: Processor, prompts: Sequence[Prompt], gates: Mapping[str, DyVTEGates]
) -> dict[str, NDArray[np.float64]]:
    """What each set of gates says after each layer while nobody exits, {name: [prompts, layers]}."""
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in gates}
    images = tiny_coco("val").images
    with ExitStack() as stack:
        # All of them at once, on one pass: at threshold 1 none of them acts.
        traces = {
            name: stack.enter_context(vlattn.DyVTE(each, threshold=1.0, batch_policy="mask")(model))
            for name, each in gates.items()
        }
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            inputs = processor(
                images=[read_image(images / image) for image, _ in batch],
                text=[chat_prompt(processor, text) for _, text in batch],
                return_tensors="pt",
                padding=True,
            )
            model(**inputs, use_cache=True)
            for name, trace in traces.items():
                said: Any = trace.notes["exit_probability"]
                found[name].append(np.array([said[layer] for layer in sorted(said)]).T)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def chosen_exits(probability: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """The first layer whose gate is above the threshold, [prompts]; the last layer, which changes nothing, for none."""
    wants = probability > threshold if threshold > 0 else np.ones_like(probability, dtype=bool)
    return np.where(wants.any(1), wants.argmax(1), probability.shape[1] - 1)


# Answers --------------------------------------------------------------------------------------------------------------
class Runs:
    """Answers of the model under one method after the other, kept in files that a later start completes."""

    def __init__(self, model: Model, processor: Processor, folder: Path, console: Console) -> None:
        self.model, self.processor, self.folder, self.console = model, processor, folder, console

    def records(self, asked: Asked, name: str, method: str, batch: int = BATCH) -> list[Record]:
        path = self.folder / f"{asked.task}_{name}.jsonl"
        start = time.perf_counter()
        run_items(
            self.model,
            self.processor,
            asked.items,
            task=asked.task,
            method=method,
            images=tiny_coco("val").images,
            out=path,
            batch_size=batch,
            max_new_tokens=asked.new_tokens,
            settings={"model": "tiny"},
        )
        self.console.print(f"{path.stem}: {time.perf_counter() - start:.0f} s")
        by_id = {record.id: record for record in read_records(path)}
        return [by_id[item.id] for item in asked.items]

    def by_exit(self, asked: Asked, layers: int) -> list[list[Record]]:
        """The records of each forced exit; an exit after the last layer is the vanilla model."""
        forced = [self.records(asked, f"exit_{layer}", f"dyvte:exit_layer={layer}") for layer in range(layers - 1)]
        return [*forced, self.records(asked, "vanilla", "vanilla")]


@dataclass(frozen=True)
class Scorer:
    """Scores of records, with 95% intervals over images."""

    coco: CocoSet
    n_boot: int

    def pope(self, records: Sequence[Record]) -> dict[str, Any]:
        """Accuracy and F1, means over the splits."""
        result = score_pope(records)
        samples = split_means(resample_totals(result.table, result.image_ids, self.n_boot))
        return self._with_intervals(result.mean, samples, ("accuracy", "f1"), len(set(result.image_ids)))

    def chair(self, records: Sequence[Record]) -> dict[str, Any]:
        """CHAIR_i and recall."""
        result = score_chair(captions_of(records), self.coco)
        samples = chair_metrics(resample_totals(result.table(), [r.image_id for r in records], self.n_boot))
        return self._with_intervals(result.metrics, samples, ("chair_i", "recall"), len(records))

    def _with_intervals(
        self, values: Mapping[str, float | None], samples: Mapping[str, Any], names: Sequence[str], images: int
    ) -> dict[str, Any]:
        found = {}
        for name in names:
            value = values[name]
            bounds = interval(np.nan if value is None else value, samples[name], images)
            found[name] = {"value": value, "low": bounds.low, "high": bounds.high}
        return found

    def point(self, asked: Asked, exits: NDArray[np.int64], by_exit: Sequence[Sequence[Record]]) -> dict[str, Any]:
        """Scores where prompt p exits after layer `exits[p]`, and how many layers see visual tokens in the mean."""
        of_item = exits[asked.place]
        records = [by_exit[layer][number] for number, layer in enumerate(of_item.tolist())]
        score = self.pope if asked.task == "pope" else self.chair
        return {"mean_layers": float(of_item.mean() + 1), **score(records)}


# The whole ------------------------------------------------------------------------------------------------------------
def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    model, processor = vlattn.load("tiny")
    layers = len(adapter_for(model).decoder_layers)
    prompts, pope, chair, coco = asked_things(args.images)
    console.print(f"{len(pope.items)} questions, {len(chair.items)} captions, {len(prompts)} prompts")

    gates: dict[str, DyVTEGates] = {}
    for hidden in args.hidden:
        for seed in args.seeds:
            settings = DyVTETraining(
                gate_hidden=hidden, epochs=args.epochs, lr=args.lr, batch_size=32, layers_per_step=layers, seed=seed
            )
            gates[f"{hidden}/{seed}"] = trained_gates(model, processor, args.work, settings, args.examples, console)
    said = probabilities(model, processor, prompts, gates)
    runs, scorer = Runs(model, processor, args.work / "records", console), Scorer(coco, args.n_boot)
    by_exit = {asked.task: runs.by_exit(asked, layers) for asked in (pope, chair)}

    def both(exits: NDArray[np.int64]) -> dict[str, Any]:
        return {asked.task: scorer.point(asked, exits, by_exit[asked.task]) for asked in (pope, chair)}

    unchanged = np.full(len(prompts), layers - 1)
    for asked in (pope, chair):
        lower_to_unchanged(unchanged, asked, by_exit[asked.task])
    chosen = f"{args.check}/{args.seeds[0]}"
    trained = tiny_examples()[: args.examples]
    return {
        "benchmark": "dyvte_curve",
        "machine": describe_machine(),
        "settings": {
            "model": "tiny",
            "evaluated_on": "tiny COCO val, images that vlattn.training.tiny_examples.is_training_image leaves",
            "pope_images": len({item.image_id for item in pope.items}),
            "pope_questions": len(pope.items),
            "captions": len(chair.items),
            "training_images": len({example.image for example in trained}),
            "training_examples": len(trained),
            "epochs": args.epochs,
            "lr": args.lr,
            "batch_size": 32,
            "seeds": args.seeds,
            "intervals": f"95% bootstrap over images, {args.n_boot} samples",
        },
        "labels": gates[chosen].training_record["labels"],
        "forced": [{"exit_layer": layer, **both(np.full(len(prompts), layer))} for layer in range(layers)],
        "earliest_unchanged": both(unchanged),
        "gates": {
            name: {
                "gate_hidden": each.gate_hidden,
                "parameters": sum(weight.numel() for weight in each.parameters()),
                "mean_layers_by_kind": by_kind(pope, chair, chosen_exits(said[name], 0.5)),
                "curve": [{"threshold": t, **both(chosen_exits(said[name], t))} for t in THRESHOLDS],
            }
            for name, each in gates.items()
        },
        "check": check(runs, args, (pope, chair), chosen_exits(said[chosen], 0.5), by_exit, chosen),
    }


def lower_to_unchanged(exits: NDArray[np.int64], asked: Asked, by_exit: Sequence[Sequence[Record]]) -> None:
    """Lower each prompt's exit to the first from which on the answer is the vanilla model's: perfect foresight."""
    for number, place in enumerate(asked.place):
        while exits[place] > 0 and by_exit[exits[place] - 1][number].raw == by_exit[-1][number].raw:
            exits[place] -= 1


def by_kind(pope: Asked, chair: Asked, exits: NDArray[np.int64]) -> dict[str, float]:
    """Mean number of layers with visual tokens by what is asked."""
    labels = np.array([item.label for item in pope.items])
    found = {f"answer is {label}": float(exits[pope.place[labels == label]].mean() + 1) for label in ("yes", "no")}
    return {**found, "detailed caption": float(exits[chair.place].mean() + 1)}


def check(
    runs: Runs,
    args: argparse.Namespace,
    tasks: Sequence[Asked],
    exits: NDArray[np.int64],
    by_exit: Mapping[str, Sequence[Sequence[Record]]],
    name: str,
) -> dict[str, Any]:
    """Ask the method itself at 0.5, a batch and one prompt at a time, and count answers that differ from above."""
    folder = args.work / f"gates_{name.replace('/', '_')}"
    found: dict[str, Any] = {"gates": name, "threshold": 0.5}
    for policy, size in (("mask", BATCH), ("single", 1)):
        for asked in tasks:
            few = asked if policy == "mask" else dataclasses.replace(asked, items=asked.items[: args.single])
            records = runs.records(few, policy, f"dyvte:gates={folder},batch_policy={policy}", size)
            expected = [by_exit[asked.task][exits[asked.place[n]]][n].raw for n in range(len(records))]
            differ = sum(record.raw != answer for record, answer in zip(records, expected, strict=True))
            found[f"{asked.task} {policy}"] = {"answers": len(records), "differ": differ}
    return found


# What is shown --------------------------------------------------------------------------------------------------------
SHOWN = (("pope", "accuracy", "POPE accuracy"), ("pope", "f1", "POPE F1"), ("chair", "recall", "caption recall"))


def size_table(found: Mapping[str, Any], threshold: float = 0.5) -> list[dict[str, Any]]:
    """By gate size, means over the seeds at one threshold."""
    by_size: dict[int, list[Mapping[str, Any]]] = {}
    for each in found["gates"].values():
        by_size.setdefault(each["gate_hidden"], []).append(each)
    rows = []
    for hidden, same in sorted(by_size.items()):
        points = [next(p for p in each["curve"] if p["threshold"] == threshold) for each in same]
        row: dict[str, Any] = {"gate_hidden": hidden, "parameters": same[0]["parameters"], "seeds": len(same)}
        for task in ("pope", "chair"):
            row[f"{task}_mean_layers"] = float(np.mean([p[task]["mean_layers"] for p in points]))
        for task, metric in (("pope", "accuracy"), ("pope", "f1"), ("chair", "chair_i"), ("chair", "recall")):
            row[metric] = float(np.mean([p[task][metric]["value"] for p in points]))
        rows.append(row)
    return rows


def show(found: Mapping[str, Any], console: Console) -> None:
    heads = ("layers", "accuracy", "F1", "layers", "CHAIR_i", "recall")
    table = Table("exit after", *heads, title="forced exits: POPE, then captions", title_justify="left")
    for row in found["forced"]:
        cells = []
        for task, names in (("pope", ("accuracy", "f1")), ("chair", ("chair_i", "recall"))):
            cells += [f"{row[task]['mean_layers']:.2f}", *(_range(row[task][name]) for name in names)]
        table.add_row(str(row["exit_layer"]), *cells)
    console.print(table)
    table = Table("hidden", "weights", *heads, title="gates at 0.5, means over seeds", title_justify="left")
    for row in found["sizes"]:
        cells = [f"{row['pope_mean_layers']:.2f}", f"{row['accuracy']:.3f}", f"{row['f1']:.3f}"]
        cells += [f"{row['chair_mean_layers']:.2f}", f"{row['chair_i']:.3f}", f"{row['recall']:.3f}"]
        table.add_row(str(row["gate_hidden"]), f"{row['parameters']:,}", *cells)
    console.print(table)


def _range(metric: Mapping[str, float]) -> str:
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Scores against mean layers: gates of each size (first seed) over the threshold, beside forced exits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    settings, forced = found["settings"], found["forced"]
    for axis, (task, metric, title) in zip(figure.subplots(1, 3), SHOWN, strict=True):

        def line(points: Sequence[Mapping[str, Any]], task: str = task, metric: str = metric) -> tuple[Any, Any]:
            return [p[task]["mean_layers"] for p in points], [p[task][metric]["value"] for p in points]

        x, y = line(forced)
        low, high = ([p[task][metric][end] for p in forced] for end in ("low", "high"))
        axis.fill_between(x, low, high, color="0.9", lw=0)
        axis.plot(x, y, "s--", color="0.45", ms=5, label="forced exit (band: 95% interval)")
        for key, each in found["gates"].items():
            if key.endswith(f"/{settings['seeds'][0]}"):
                axis.plot(*line(each["curve"]), "o-", ms=3, lw=1.1, label=f"gates, hidden {each['gate_hidden']}")
        axis.plot(*line([found["earliest_unchanged"]]), "*", color="k", ms=11, label="answer as vanilla, earliest")
        axis.set_xlabel(f"decoder layers with visual tokens, mean (of {len(forced)})")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    figure.suptitle(
        f"DyVTE on the tiny LLaVA, tiny COCO val without training images: {settings['pope_questions']} questions about "
        f"{settings['pope_images']} images, {settings['captions']} captions",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def as_text(found: Mapping[str, Any]) -> str:
    """JSON with each innermost object or list on one line."""
    text = json.dumps(_rounded(found), indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[16, 64, 256, 2048], help="gate sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--check", type=int, default=64, help="gate size with which the method itself is asked")
    parser.add_argument(
        "--single", type=int, default=200, help="questions, and captions, asked one at a time in that check"
    )
    parser.add_argument("--images", type=int, help="fewer evaluation images, to try the program")
    parser.add_argument("--examples", type=int, help="fewer training examples, to try the program")
    parser.add_argument("--n-boot", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/dyvte"), help="kept files")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a picture of the same name goes beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    found = measure(args, console)
    found["sizes"] = size_table(found)
    show(found, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(as_text(found))
    plot(found, args.out.with_suffix(".png"))
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
