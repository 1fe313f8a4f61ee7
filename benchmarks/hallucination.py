"""What methods on attention and heads cost in time: prefill and decode against the model as it is, in one run.

    python benchmarks/hallucination.py --out benchmarks/results/hallucination_cpu.json   # adds to what is in the file
    python benchmarks/hallucination.py --batches 1 --stages decode --methods paint vhr --out ...
    python benchmarks/hallucination.py --device cuda --batch-layers 32 --repeats 20 --out ...

A LLaVA-1.5-7B of published widths with random weights, sdpa attention, prompts of 576 visual and 60 text tokens: at
full depth (13 GB of weights in bf16) for batch 1, with `--batch-layers` decoder layers for batch 8. Arms interleaved in
one process, ratios taken round by round; the peak of memory of one prefill with weights and without.

prefill   from pixels to the logits of the last position.
decode    one token behind the cached prompt, `--steps` of them per round.

Random weights have no attention sinks, so VAR is given settings under which it works at its hardest: channels that mark
about one token in ten, and every head selected. PAINT, PAI and VHR do the same work whatever the weights say. Targets:
prefill VAR 1.10, PAINT 1.05, VHR 1.35 (it adds a prefill of the text alone); decode 1.15, 1.05, 1.03; peak memory 1.05.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vlattn.eval.bench_arms import twin
from vlattn.eval.bench_memory import peak_memory
from vlattn.eval.bench_shapes import random_inputs, random_model
from vlattn.interventions.base import attach
from vlattn.interventions.registry import parse_method
from vlattn.runtime.compact_json import as_text
from vlattn.runtime.hooks import cache_argument, cache_of
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import interleave, keep_freed_memory

FULL_DEPTH = 32
STAGES = ["prefill", "decode", "memory"]


def settings(layers: int) -> dict[str, str]:
    """The methods, as the command line knows them; in fewer layers than the model has they start one layer earlier."""
    sunk = "var:sink_dims=[0,1],tau=2.0,min_visual_mass=0.0,rho_nonsink=0.0"
    if layers == FULL_DEPTH:
        return {"var": sunk, "paint": "paint", "pai": "pai:gamma=1.0", "vhr": "vhr"}
    return {
        "var": f"{sunk},skip_first_layers=1",
        "paint": "paint:start_layer=1",
        "pai": "pai:gamma=1.0,start_layer=1",
        "vhr": "vhr",
    }


TARGETS = {
    "prefill": {"var": 1.10, "paint": 1.05, "vhr": 1.35},
    "decode": {"var": 1.15, "paint": 1.05, "vhr": 1.03},
}
MEMORY_TARGET = 1.05
Arm = Callable[[], object]


@torch.inference_mode()
def prefill(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs, use_cache=True, logits_to_keep=1)


def filling(model: Any, inputs: dict[str, Any]) -> Arm:
    """A function that runs one prefill."""
    return lambda: prefill(model, inputs)


def decoding(model: Any, inputs: dict[str, Any], steps: int) -> Arm:
    """A function that decodes `steps` more tokens; the cache grows alike in every arm."""
    state = {"cache": cache_of(dict(prefill(model, inputs))), "mask": inputs["attention_mask"]}
    token = torch.full((inputs["input_ids"].shape[0], 1), 5, device=model.device)

    def run() -> None:
        for _ in range(steps):
            state["mask"] = torch.cat([state["mask"], torch.ones_like(token)], 1)
            places = state["mask"].sum(1, keepdim=True) - 1
            model(
                input_ids=token,
                attention_mask=state["mask"],
                position_ids=places,
                use_cache=True,
                **{cache_argument(model): state["cache"]},
            )

    return run


def measure(batch: int, args: argparse.Namespace, console: Console, found: dict[str, Any]) -> None:
    """Adds to `found` what was measured of one batch."""
    layers = args.layers if batch == 1 else args.batch_layers
    model: Any = random_model(
        "llava-1.5-7b", layers=layers, dtype=getattr(torch, args.dtype), device=args.device, attn="sdpa"
    )
    inputs = dict(random_inputs(model, batch=batch, count=1, text=60)[0])
    models, handles = {"vanilla": model}, []
    chosen = {name: text for name, text in settings(layers).items() if not args.methods or name in args.methods}
    for name, text in chosen.items():
        models[name] = twin(model)
        method = parse_method(text)
        assert method is not None
        handles.append(attach(models[name], method))
    found["layers"] = layers
    found.setdefault("methods", {}).update(chosen)
    machine = describe_machine(args.device)
    on = machine.get("gpu", machine["cpu"])  # by row: the file is added to, maybe on another machine
    for stage in (stage for stage in STAGES[:2] if stage in args.stages):
        make = partial(decoding, steps=args.steps) if stage == "decode" else filling
        arms: dict[str, Arm] = {name: make(one, inputs) for name, one in models.items()}
        times = interleave(arms, args.repeats if stage == "prefill" else args.decode_repeats, args.warmup)
        found.setdefault(stage, {})["vanilla_milliseconds"] = times["vanilla"].seconds.milliseconds()
        for name in models:
            if name == "vanilla":
                continue
            ratio, target = times[name].over(times["vanilla"]), TARGETS[stage].get(name)
            found[stage][name] = {
                **ratio.rounded(),
                "target": target,
                "met": target is None or ratio.median <= target,
                "on": on,
            }
            console.print(f"batch {batch} {stage} {name}: {ratio.median:.3f} ({ratio.lower:.3f}-{ratio.upper:.3f})")
    if "memory" in args.stages:
        found["peak_memory"] = memory(models, inputs)
        for name, row in found["peak_memory"].items():
            ratios = f"{row['over_vanilla']:.3f}, without weights {row['without_weights_over_vanilla']:.3f}"
            console.print(f"batch {batch} peak memory {name}: {ratios}")
    for handle in handles:
        handle.detach()


def memory(models: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a prefill by model, weights included and not."""
    model = models["vanilla"]
    with torch.inference_mode():
        above = {
            name: peak_memory(lambda one=one: prefill(one, inputs), model.device)["above"]  # type: ignore[misc]
            for name, one in models.items()
        }
    weights = sum(weight.nbytes for weight in model.parameters())
    return {
        name: {
            "bytes": weights + peak,
            "over_vanilla": round((weights + peak) / (weights + above["vanilla"]), 4),
            "without_weights_over_vanilla": round(peak / above["vanilla"], 4),
            "target": MEMORY_TARGET,
        }
        for name, peak in above.items()
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--methods", nargs="+", choices=list(settings(FULL_DEPTH)), help="some of the methods (default all)"
    )
    parser.add_argument(
        "--layers", type=int, default=FULL_DEPTH, help="decoder layers at batch 1 (default 32, as it has)"
    )
    parser.add_argument("--batch-layers", type=int, default=4, help="decoder layers of larger batches (default 4)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what is measured (default all)")
    parser.add_argument("--steps", type=int, default=4, help="tokens decoded per round (default 4)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of prefill (default 5)")
    parser.add_argument("--decode-repeats", type=int, default=15, help="rounds of decode (default 15)")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    torch.manual_seed(0)
    before: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    found: dict[str, Any] = {
        "benchmark": "hallucination",
        "machine": describe_machine(args.device),
        "settings": {"dtype": args.dtype, "steps": args.steps, "text_tokens": 60, "repeats": args.repeats},
        "batches": before.get("batches", {}),
    }
    keep_freed_memory()
    for batch in args.batches:
        measure(batch, args, console, found["batches"].setdefault(str(batch), {}))
        if args.out:  # after each: nothing is lost if a later one fails
            args.out.write_text(as_text(found))
    table = Table("batch", "stage", "method", "over vanilla", "quartiles", "target")
    for batch, stages in found["batches"].items():
        for stage in STAGES[:2]:
            for name, row in stages.get(stage, {}).items():
                if name != "vanilla_milliseconds":
                    target = "" if row["target"] is None else f"{row['target']} {'met' if row['met'] else 'MISSED'}"
                    table.add_row(
                        batch, stage, name, f"{row['median']:.3f}", f"{row['lower']:.3f}-{row['upper']:.3f}", target
                    )
    console.print(table)


if __name__ == "__main__":
    main()
