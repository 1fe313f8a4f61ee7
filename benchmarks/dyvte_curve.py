"""DyVTE on the tiny model: accuracy against the layer after which visual tokens leave.

Trains gates of several sizes on the third of tiny COCO `val` that is set aside, then asks POPE questions about the
other images, never about one that trained. One run for each forced exit answers everything: up to its exit a prompt
does not know that it will exit, so under a threshold it answers as under the forced exit that its gates then choose.
That is checked against the method itself; the result says how many answers differ.

    python benchmarks/dyvte_curve.py --out benchmarks/results/dyvte_tiny.json

Figures: POPE accuracy and F1 (unweighted means over the three splits) with 95% bootstrap intervals over images, and the
mean number of decoder layers that visual tokens take part in. `--work` keeps gates, answers and tasks; a run that was
cut off goes on from there.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from vlattn.eval.coco import read_coco
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

BATCH, NEW_TOKENS, PER_IMAGE = 60, 16, 3
THRESHOLDS = tuple(round(t / 20, 2) for t in range(21))
EPOCHS, LR = 8, 3e-3
"""Chosen on a fifth of the training images; the same for all sizes."""

Model = Any
Processor = Any
Prompt = tuple[str, str]
"""Image file and question."""


# What is asked --------------------------------------------------------------------------------------------------------
def evaluation_items(limit: int | None) -> list[Item]:
    """POPE questions about images that trained nothing, all three splits; `limit` bounds the images."""
    coco = read_coco(tiny_coco("val").instances)
    asked = [image for image in coco.image_objects() if not is_training_image(image.image_id)]
    candidates = sum(len(image.objects) >= PER_IMAGE for image in asked)
    built = build_pope(asked, min(limit or candidates, candidates), PER_IMAGE)
    questions = [question for split in built.values() for question in split]
    return [Item(q.item_id, q.image_id, q.image, q.text, q.label, {"split": q.category}) for q in questions]


def prompts_of(items: Sequence[Item]) -> list[Prompt]:
    """Each question once, then a detailed caption of each image."""
    asked = dict.fromkeys((item.image, item.prompt) for item in items)
    return [*asked, *dict.fromkeys((item.image, CHAIR_PROMPT) for item in items)]


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
    wants = probability > threshold
    if threshold <= 0:
        wants[:] = True
    return np.where(wants.any(1), wants.argmax(1), probability.shape[1] - 1)


# Answers --------------------------------------------------------------------------------------------------------------
def answers(
    model: Model, processor: Processor, items: Sequence[Item], method: str, path: Path, console: Console, batch: int
) -> list[Record]:
    """The records of one method on all items; a file that is there is completed."""
    start = time.perf_counter()
    run_items(
        model, processor, items, task="pope", method=method, images=tiny_coco("val").images, out=path, batch_size=batch,
        max_new_tokens=NEW_TOKENS, settings={"model": "tiny"},
    )  # fmt: skip
    console.print(f"{path.stem}: {time.perf_counter() - start:.0f} s")
    by_id = {record.id: record for record in read_records(path)}
    return [by_id[item.id] for item in items]


def score(records: Sequence[Record], n_boot: int) -> dict[str, dict[str, float | None]]:
    """POPE accuracy and F1, means over the splits, with their intervals over images."""
    result = score_pope(records)
    totals = resample_totals(result.table, result.image_ids, n_boot)
    samples = split_means(totals)
    found = {}
    for name in ("accuracy", "f1"):
        value = result.mean[name]
        bounds = interval(np.nan if value is None else value, samples[name], len(set(result.image_ids)))
        found[name] = {"value": value, "low": bounds.low, "high": bounds.high}
    return found


def point(
    items: Sequence[Item],
    index: Mapping[Prompt, int],
    exits: NDArray[np.int64],
    by_exit: Mapping[int, Sequence[Record]],
    n_boot: int,
) -> dict[str, Any]:
    """Scores where prompt p exits after layer `exits[p]`, and how many layers its visual tokens then take part in."""
    of_item = exits[[index[item.image, item.prompt] for item in items]]
    records = [by_exit[int(layer)][number] for number, layer in enumerate(of_item)]
    return {"mean_layers": float(of_item.mean() + 1), **score(records, n_boot)}


# The whole ------------------------------------------------------------------------------------------------------------
def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    model, processor = vlattn.load("tiny")
    layers = len(adapter_for(model).decoder_layers)
    items = evaluation_items(args.images)
    prompts = prompts_of(items)
    index = {prompt: number for number, prompt in enumerate(prompts)}
    console.print(f"{len({i.image_id for i in items})} images, {len(items)} questions, {len(prompts)} prompts")

    gates: dict[str, DyVTEGates] = {}
    for hidden in args.hidden:
        for seed in args.seeds:
            settings = DyVTETraining(
                gate_hidden=hidden, epochs=args.epochs, lr=args.lr, batch_size=32, layers_per_step=layers, seed=seed
            )
            gates[f"{hidden}/{seed}"] = trained_gates(model, processor, args.work, settings, args.examples, console)
    records = args.work / "records"
    by_exit = {
        layer: answers(
            model, processor, items, f"dyvte:exit_layer={layer}", records / f"exit_{layer}.jsonl", console, BATCH
        )
        for layer in range(layers - 1)
    }
    by_exit[layers - 1] = answers(model, processor, items, "vanilla", records / "vanilla.jsonl", console, BATCH)
    said = probabilities(model, processor, prompts, gates)
    questions = len({(item.image, item.prompt) for item in items})

    curves = {
        name: [
            {"threshold": t, **point(items, index, chosen_exits(said[name].copy(), t), by_exit, args.n_boot)}
            for t in THRESHOLDS
        ]
        for name in gates
    }
    chosen = f"{args.check}/{args.seeds[0]}"
    return {
        "benchmark": "dyvte_curve",
        "machine": describe_machine(),
        "settings": {
            "model": "tiny",
            "weights_of_images": "tiny COCO val, images whose hash is not divisible by 3",
            "images": len({item.image_id for item in items}),
            "questions": len(items),
            "different_questions": questions,
            "training_images": len({example.image for example in tiny_examples()[: args.examples]}),
            "training_examples": len(tiny_examples()[: args.examples]),
            "epochs": args.epochs,
            "lr": args.lr,
            "batch_size": 32,
            "seeds": args.seeds,
            "intervals": f"95% bootstrap over images, {args.n_boot} samples",
        },
        "labels": gates[chosen].training_record["labels"],
        "forced": [
            {"exit_layer": layer, **point(items, index, np.full(len(prompts), layer), by_exit, args.n_boot)}
            for layer in range(layers)
        ],
        "earliest_unchanged": point(items, index, earliest_unchanged(items, index, by_exit), by_exit, args.n_boot),
        "gates": {
            name: {
                "gate_hidden": each.gate_hidden,
                "parameters": sum(weight.numel() for weight in each.parameters()),
                "curve": curves[name],
                "mean_layers_by_kind": by_kind(items, index, chosen_exits(said[name].copy(), 0.5)),
            }
            for name, each in gates.items()
        },
        "check": check(model, processor, args, items, index, said[chosen], by_exit, chosen, console),
    }


def earliest_unchanged(
    items: Sequence[Item], index: Mapping[Prompt, int], by_exit: Mapping[int, Sequence[Record]]
) -> NDArray[np.int64]:
    """For each prompt the first exit from which on the answer is that of the vanilla model: what perfect gates know."""
    last = max(by_exit)
    exits = np.full(len(index), last)
    for number, item in enumerate(items):
        place = index[item.image, item.prompt]
        while exits[place] > 0 and by_exit[int(exits[place]) - 1][number].raw == by_exit[last][number].raw:
            exits[place] -= 1
    return exits


def by_kind(items: Sequence[Item], index: Mapping[Prompt, int], exits: NDArray[np.int64]) -> dict[str, float]:
    """Mean number of layers with visual tokens by what is asked."""
    found = {
        f"answer is {label}": float(exits[[index[i.image, i.prompt] for i in items if i.label == label]].mean() + 1)
        for label in ("yes", "no")
    }
    captions = [number for (_, text), number in index.items() if text == CHAIR_PROMPT]
    return {**found, "detailed caption": float(exits[captions].mean() + 1)}


def check(
    model: Model,
    processor: Processor,
    args: argparse.Namespace,
    items: Sequence[Item],
    index: Mapping[Prompt, int],
    probability: NDArray[np.float64],
    by_exit: Mapping[int, Sequence[Record]],
    name: str,
    console: Console,
) -> dict[str, Any]:
    """Ask the method itself, one prompt at a time and a batch at a time, and count answers that differ from above."""
    folder = args.work / f"gates_{name.replace('/', '_')}"
    exits = chosen_exits(probability.copy(), 0.5)
    expected = [by_exit[int(exits[index[item.image, item.prompt]])][n].raw for n, item in enumerate(items)]
    found: dict[str, Any] = {"gates": name, "threshold": 0.5}
    few = items[: args.single]
    for policy, asked, batch in (("mask", items, BATCH), ("single", few, 1)):
        method = f"dyvte:gates={folder},batch_policy={policy}"
        records = answers(model, processor, asked, method, args.work / "records" / f"{policy}.jsonl", console, batch)
        differ = sum(record.raw != answer for record, answer in zip(records, expected, strict=False))
        found[policy] = {"answers": len(records), "differ": differ}
    return found


# What is shown --------------------------------------------------------------------------------------------------------
def size_table(found: Mapping[str, Any], threshold: float = 0.5) -> list[dict[str, Any]]:
    """By gate size, means over the seeds at one threshold, and the range of accuracies."""
    rows: dict[int, list[dict[str, Any]]] = {}
    parameters: dict[int, int] = {}
    for each in found["gates"].values():
        at = next(p for p in each["curve"] if p["threshold"] == threshold)
        rows.setdefault(each["gate_hidden"], []).append(at)
        parameters[each["gate_hidden"]] = each["parameters"]
    return [
        {
            "gate_hidden": hidden,
            "parameters": parameters[hidden],
            "seeds": len(points),
            "mean_layers": float(np.mean([p["mean_layers"] for p in points])),
            "accuracy": float(np.mean([p["accuracy"]["value"] for p in points])),
            "accuracy_of_seeds": [p["accuracy"]["value"] for p in points],
            "f1": float(np.mean([p["f1"]["value"] for p in points])),
        }
        for hidden, points in sorted(rows.items())
    ]


def show(found: Mapping[str, Any], console: Console) -> None:
    table = Table("exit", "mean layers", "accuracy", "F1", title="forced exits", title_justify="left")
    for row in found["forced"]:
        table.add_row(str(row["exit_layer"]), f"{row['mean_layers']:.2f}", _range(row["accuracy"]), _range(row["f1"]))
    console.print(table)
    table = Table("hidden", "weights", "mean layers", "accuracy", "F1", title="gates at 0.5", title_justify="left")
    for row in found["sizes"]:
        numbers = (f"{row['mean_layers']:.2f}", f"{row['accuracy']:.3f}", f"{row['f1']:.3f}")
        table.add_row(str(row["gate_hidden"]), f"{row['parameters']:,}", *numbers)
    console.print(table)


def _range(metric: Mapping[str, float]) -> str:
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy and F1 against mean layers: gates of each size (first seed) over the threshold, beside forced exits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2, sharex=True), ("accuracy", "f1"), strict=True):
        forced = found["forced"]
        x, y = [p["mean_layers"] for p in forced], [p[name]["value"] for p in forced]
        low, high = ([p[name][end] for p in forced] for end in ("low", "high"))
        axis.fill_between(x, low, high, color="0.88", lw=0)
        axis.plot(x, y, "s--", color="0.45", ms=5, label="forced exit (band: 95% interval)")
        seed = found["settings"]["seeds"][0]
        for key, each in found["gates"].items():
            if key.endswith(f"/{seed}"):
                curve = each["curve"]
                xs, ys = [p["mean_layers"] for p in curve], [p[name]["value"] for p in curve]
                axis.plot(xs, ys, "o-", ms=3, lw=1.2, label=f"gates, hidden {each['gate_hidden']}")
        best = found["earliest_unchanged"]
        axis.plot(best["mean_layers"], best[name]["value"], "*", color="k", ms=11, label="perfect gates")
        axis.set_xlabel(f"decoder layers with visual tokens, mean (of {len(forced)})")
        axis.set_ylabel(f"POPE {'accuracy' if name == 'accuracy' else 'F1'}, mean over splits")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    settings = found["settings"]
    figure.suptitle(
        f"DyVTE on the tiny LLaVA: {settings['images']} images of tiny COCO val that trained no gate, "
        f"{settings['questions']} questions",
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
    parser.add_argument("--single", type=int, default=300, help="questions asked one at a time in that check")
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
