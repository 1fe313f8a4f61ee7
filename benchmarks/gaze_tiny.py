"""How well OAT learns the embedded searches, beside all that it can be held against, and what its settings change.

    OMP_NUM_THREADS=1 python benchmarks/gaze_tiny.py --work gaze_work --out benchmarks/results/gaze_tiny.json

Runs of `vlattn gaze train` on tiny-gaze, parted by scene, and of `vlattn gaze eval` on the test part; the commands are
in the results.

SEEDED    trained from several seeds: the epoch chosen by delta on val, as published, or by the loss on val.
ABLATED   trained from one seed, each unlike the second of these in one setting.
BASELINES on the same test trials: chance, centre, saliency, similarity, the searcher that made the data (no model
          can predict them better), one fixation on the target, and the attention of the embedded language model, read
          where its Sequence Score is best on the val part, with its grounding score. People: each against the others.

Values have 95% bootstrap intervals over stimuli, which are pairs of a scene and a target; settings with several seeds
have the mean, lowest and highest of their values too. `epoch_seconds` is a median, with all
that other work on the machine did to it. What is finished in `--work` is neither trained nor evaluated again; what was
cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlattn.cli import app
from vlattn.runtime.compact_json import as_text
from vlattn.runtime.machine import describe_machine

COMMON = "--data tiny-gaze --split scene --size small --lr 0.0005 --batch-size 32"
FEATURES = "--appearance lvlm/tiny --dropout 0.2"
BY_LOSS = f"{FEATURES} --select loss --patience 8"
SEEDED = {"delta": FEATURES, "loss": BY_LOSS}
ABLATED = {
    "sinusoidal positions": f"{BY_LOSS} --positions sinusoidal",
    "target place hidden": f"{BY_LOSS} --hide-target",
    "crops and convolutions": f"{BY_LOSS} --appearance cnn",
}
OURS = ("OAT", "OAT greedy")
BASELINES = "random,centre,saliency,similarity,searcher,direct,bridge"
SHOWN = ("ss", "ed_norm", "scanmatch", "multimatch.mean4", "target_found", "behaviour_delta")
Record = dict[str, Any]


def run(name: str, words: str, seed: int, args: argparse.Namespace) -> Record:
    """Train and evaluate, or read what came of it before."""
    out = folder(args.work, name, seed)
    trained = f"gaze train {COMMON} {words} --epochs {args.epochs} --seed {seed} --init-seed {seed} --out".split()
    trained.append(str(out))
    if not (out / "result.json").is_file():
        _command([*trained, *(["--resume"] if (out / "log.jsonl").is_file() else [])])
    judged, report = judge(out, "none", out / "eval.json", args)
    result = json.loads((out / "result.json").read_text())
    seconds = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "commands": [_told(command, args.work) for command in (trained, judged)],
        **{key: result[key] for key in ("best_epoch", "epochs", "parameters", "trials", "val", "test")},
        "epoch_seconds": statistics.median(seconds),
        "models": report["models"],
    }


def against(run: Path, args: argparse.Namespace) -> Record:
    """All but OAT, on the test trials of a run."""
    judged, report = judge(run, BASELINES, args.work / "baselines.json", args)
    models = {name: one for name, one in report["models"].items() if not name.startswith("OAT")}
    shared = {key: report[key] for key in ("human", "random", "bridge", "about", "counts", "settings")}
    return {"command": _told(judged, args.work), "models": models, **shared}


def judge(run: Path, baselines: str, out: Path, args: argparse.Namespace) -> tuple[list[str], Record]:
    """The command that evaluates a run, and its report."""
    words = f"gaze eval --metrics all --samples {args.samples} --n-boot {args.n_boot} --baselines {baselines}".split()
    words += ["--out", str(out), str(run)]
    if not out.is_file():
        _command(words)
    return words, json.loads(out.read_text())


def folder(work: Path, name: str, seed: int) -> Path:
    return work / name.replace(" ", "_") / f"seed_{seed}"


def _command(words: list[str]) -> None:
    Console().print("vlattn", *words, soft_wrap=True, highlight=False)
    app(words, standalone_mode=False)


def _told(words: Sequence[str], work: Path) -> str:
    """A command as it can be given anywhere."""
    return "vlattn " + " ".join(words).replace(str(work), work.name)


def over_seeds(runs: Sequence[Record]) -> Record:
    """Mean, lowest and highest over seeds, by model and score; None where a seed has no value."""
    found: Record = {}
    for model in OURS:
        reports = [one["models"][model] for one in runs]
        scores = {name: [r["metrics"][name]["value"] for r in reports] for name in reports[0]["metrics"]}
        scores |= {name: [r[name] for r in reports] for name in ("loss", "sim") if name in reports[0]}
        found[model] = {
            name: None
            if None in values
            else {"mean": statistics.mean(values), "lowest": min(values), "highest": max(values)}
            for name, values in scores.items()
        }
    return found


def show(found: Record, console: Console) -> None:
    table = Table(title="test part; + higher is better, - lower")
    about = found["baselines"]["about"]
    signs = {name: "+" if about[name]["better"] == "higher" else "-" for name in SHOWN}
    for column in ("model", "loss -", "sim +", *(f"{name} {signs[name]}" for name in SHOWN)):
        table.add_column(column, justify="left" if column == "model" else "right")
    for setting, one in found["settings"].items():
        for model, scores in one["over_seeds"].items():
            cells = [_mean(scores.get(name)) for name in ("loss", "sim", *SHOWN)]
            table.add_row(f"{model}, {setting} ({len(one['runs'])})", *cells)
    for name, model in found["baselines"]["models"].items():
        cells = [_value(model.get(key)) for key in ("loss", "sim")]
        table.add_row(name, *cells, *(_value(model["metrics"][key]["value"]) for key in SHOWN))
    table.add_row("people", "", "", *(_value(found["baselines"]["human"][key]["value"]) for key in SHOWN))
    console.print(table)


def _mean(cell: dict[str, float] | None) -> str:
    return "" if cell is None else _value(cell["mean"])


def _value(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("gaze_work"), help="folder of the runs")
    parser.add_argument("--settings", nargs="+", choices=[*SEEDED, *ABLATED], help="these alone; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="of the settings that have several")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--samples", type=int, default=20, help="paths a stimulus")
    parser.add_argument("--n-boot", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    planned = {name: (words, args.seeds) for name, words in SEEDED.items()}
    planned |= {name: (words, 1) for name, words in ABLATED.items()}
    settings: Record = {}
    for name in args.settings or planned:
        words, seeds = planned[name]
        runs = [run(name, words, seed, args) for seed in range(seeds)]
        settings[name] = {"over_seeds": over_seeds(runs), "runs": runs}
    first = next(iter(settings))
    found = {
        "benchmark": "gaze_tiny",
        "machine": describe_machine(),
        "samples": args.samples,
        "settings": settings,
        "baselines": against(folder(args.work, first, 0), args),
    }
    show(found, console)
    if args.out:
        args.out.write_text(as_text(found))
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
