"""What each pruning method's prefill costs over the best possible: stock layers run at the lengths they really had.

    python benchmarks/pruning.py --out benchmarks/results/pruning_cpu.json     # adds to what is in the file already
    python benchmarks/pruning.py --device cuda --repeats 20 --out benchmarks/results/pruning_CARD.json

Two models of published widths with random weights, sdpa attention, one image, batch 1: LLaVA-1.5-7B (576 visual tokens
to 64) and LLaVA-NeXT-7B (2880 and newlines to 160), at full depth: 13 GB of weights in bf16, half an hour on two cores.

For every method three arms, interleaved in one process, ratios taken round by round:

method    a whole prefill with the method attached, from pixels to the logits of the last position.
bound     the same stock modules (tower embeddings, norm and layers, projector, decoder layers, head), each run on
          random hidden states of the length that it really ran at under the method: the fed-short bound. What the
          method costs beyond it is choosing, gathering and rewriting masks and positions. Target 1.05.
vanilla   a whole prefill of the model as it is, measured once per shape beside the others; with the FLOPs ratio.

Time does not depend on what the weights say, with one exception: FlowCut drops more patches where CLS attention is
concentrated, and a random tower attends evenly, so that most is left to its last pruning. Its bound runs at the lengths
that this gave, so the overhead is honest; its speed-up here is smaller than on a trained tower
(see benchmarks/flowcut.py, which scales the tower's attention).

DyVTE is forced out after a quarter of the layers; what its gates cost is measured apart, with gates of `--gate-hidden`
that never fire against vanilla (target 1.02).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from vlattn.eval.bench_arms import twin
from vlattn.eval.bench_shapes import random_inputs, random_model
from vlattn.eval.layer_lengths import LayerLengths
from vlattn.eval.model_cost import measured_parts
from vlattn.interventions.base import attach
from vlattn.interventions.registry import parse_method
from vlattn.models.registry import adapter_for
from vlattn.runtime.compact_json import as_text
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import interleave, keep_freed_memory

TARGET, GATES_TARGET = 1.05, 1.02
SHAPES = {"llava-1.5-7b": 64, "llava-next-7b": 160}
"""Visual tokens that the methods leave."""


def settings(shape: str, layers: int) -> dict[str, str]:
    """Every method, as the command line knows it. Cuts inside the decoder are where the papers have them, in proportion
    to the depth: FastV after layer 2 of 32, PyramidDrop after 8, 16 and 24, SparseVLM after 2, 6 and 15."""
    tiled = shape == "llava-next-7b"
    keep = SHAPES[shape]
    tile = 32 if tiled else keep  # of each of five tiles
    quarters = [layers // 4, layers // 2, 3 * layers // 4]
    voted = [round(layers * at / 32) for at in (2, 6, 15)]
    ratios, counts = ([0.5, 0.25, 0.0548], [1500, 550, 155]) if tiled else ([0.5, 0.25, 0.1112], [300, 110, 61])
    dominant, contextual = (27, 5) if tiled else (54, 10)
    return {
        "divprune": f"divprune:keep={keep}",
        "fastv": f"fastv:keep={keep},layer={max(1, layers // 16)}",
        "flowcut": f"flowcut:keep={keep}",
        "hiprune": f"hiprune:keep={tile}",
        "prumerge": f"prumerge:keep={tile}",
        "prumerge+": f"prumerge:keep={tile},plus=true",
        "pyramiddrop": f"pyramiddrop:layers={quarters},ratios={ratios}".replace(" ", ""),
        "random": f"random:keep={keep}",
        "sparsevlm": f"sparsevlm:layers={voted},counts={counts}".replace(" ", ""),
        "tome": f"tome:keep={tile}",
        "uniform": f"uniform:keep={keep}",
        "visionzip": f"visionzip:dominant={dominant},contextual={contextual}",
        "vispruner": f"vispruner:keep={tile}",
        "dyvte": f"dyvte:exit_layer={max(1, layers // 4)}",
    }


Arm = Callable[[], object]


def prefill(model: Any, inputs: dict[str, Any]) -> Any:
    """From pixels to the logits of the last position, filling a cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


def bound(model: Any, inputs: dict[str, Any], seen: LayerLengths, rows: int) -> Arm:
    """The fed-short bound: the stock modules one by one at the lengths in `seen`; `rows` went through the projector."""
    adapter = adapter_for(model)
    tower: Any = getattr(adapter.tower, "vision_model", adapter.tower)
    pixels = inputs["pixel_values"].flatten(0, -4)
    width, decoder = adapter.text_config.hidden_size, adapter.language_model
    lengths = zip(adapter.vision_layers, seen.tower, strict=True)
    vision = [(layer, _states(model, len(n), n[0], layer)) for layer, n in lengths]
    features = torch.randn(1, rows, vision[0][1].shape[-1], dtype=model.dtype, device=model.device)
    steps = []
    for layer, n in zip(adapter.decoder_layers, seen.decoder, strict=True):
        hidden = torch.randn(1, n, width, dtype=model.dtype, device=model.device)
        ids = torch.arange(n, device=model.device)[None]
        steps.append((layer, hidden, ids))

    def run() -> object:
        tower.pre_layrnorm(tower.embeddings(pixels))
        # All hidden states of the tower are kept, as stock LLaVA asks for them.
        states = [layer(hidden, None) for layer, hidden in vision]
        adapter.projector(features)
        decoder.get_input_embeddings()(inputs["input_ids"])
        tables: dict[int, Any] = {}
        kept = []
        for layer, hidden, ids in steps:
            n = hidden.shape[1]
            if n not in tables:
                tables[n] = decoder.rotary_emb(hidden, ids)
            cache = _KeyStore()
            layer(hidden, position_embeddings=tables[n], position_ids=ids, **{_cache_name(layer): cache})
            kept.append(cache)
        return model.lm_head(decoder.norm(steps[-1][1])[:, -1:]), kept, states

    return run


class _KeyStore:
    """A cache of one layer that keeps what it is given, as a prefill does."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # A dynamic cache joins what comes with the (empty) rest, which copies.
        self.key, self.value = torch.cat([key[:, :, :0], key], -2), torch.cat([value[:, :, :0], value], -2)
        return self.key, self.value


def _cache_name(layer: nn.Module) -> str:
    import inspect

    names = inspect.signature(layer.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _states(model: Any, tiles: int, n: int, layer: Any) -> torch.Tensor:
    width = layer.layer_norm1.weight.shape[0]
    return torch.randn(tiles, n, width, dtype=model.dtype, device=model.device)


def measure(
    shape: str, args: argparse.Namespace, console: Console, done: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """All chosen methods on one shape, each handed to `done` when measured; returns what is said of vanilla."""
    dtype = getattr(torch, args.dtype)
    model: Any = random_model(shape, layers=args.layers, dtype=dtype, device=args.device, attn="sdpa")
    inputs = dict(random_inputs(model, count=1, text=60)[0])
    stock = twin(model)
    with torch.inference_mode(), LayerLengths(stock) as seen:
        prefill(stock, inputs)
    full = measured_parts(adapter_for(stock), seen).total
    vanilla = interleave({"vanilla": lambda: prefill(stock, inputs)}, max(args.vanilla_repeats, 1), 1)["vanilla"]
    every = settings(shape, args.layers)
    chosen = {name: text for name, text in every.items() if not args.methods or name in args.methods}
    for name, text in chosen.items():
        method = parse_method(text)
        assert method is not None
        other: Any = twin(model)
        with torch.inference_mode(), method(other) as trace, LayerLengths(other) as lengths:
            rows = _projector_rows(other, inputs)
            parts = measured_parts(adapter_for(other), lengths)
        handle = attach(other, method)
        try:
            arms: dict[str, Arm] = {
                "method": lambda other=other: prefill(other, inputs),  # type: ignore[misc]
                "bound": bound(stock, inputs, lengths, rows),
            }
            times = interleave(arms, args.repeats, args.warmup)
        finally:
            handle.detach()
        ratio = times["method"].over(times["bound"])
        implementation = other.config.get_text_config()._attn_implementation
        row = {
            "setting": text,
            "visual_tokens": trace.budget(),
            "decoder_lengths": lengths.decoder,
            "tower_lengths": [n[0] for n in lengths.tower],
            "flops_ratio": round(parts.total / full, 4),
            "over_bound": ratio.rounded(),
            "target": TARGET,
            "met": ratio.median <= TARGET,
            "attention": implementation,
            "milliseconds": {arm: t.seconds.milliseconds() for arm, t in times.items()},
            "time_ratio": round(times["method"].seconds.median / vanilla.seconds.median, 4),
        }
        done(name, row)
        console.print(
            f"{shape} {name}: {ratio.median:.3f} of the bound ({ratio.lower:.3f}-{ratio.upper:.3f}), "
            f"FLOPs {parts.total / full:.3f} of vanilla"
        )
    return {"vanilla_milliseconds": vanilla.seconds.milliseconds(), "lengths": seen.decoder}


def _projector_rows(model: Any, inputs: dict[str, Any]) -> int:
    """Run one prefill; how many features went through the projector."""
    rows: list[int] = []
    hook = adapter_for(model).projector.linear_1.register_forward_hook(
        lambda module, args, output: rows.append(output.numel() // output.shape[-1])
    )
    prefill(model, inputs)
    hook.remove()
    return sum(rows)


def gates(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """What DyVTE's gates cost a prefill when none of them fires."""
    from vlattn.interventions.dyvte import DyVTE
    from vlattn.interventions.dyvte_gates import DyVTEGates, ModelPrint

    dtype = getattr(torch, args.dtype)
    model: Any = random_model(shape, layers=args.layers, dtype=dtype, device=args.device, attn="sdpa")
    inputs = dict(random_inputs(model, count=1, text=60)[0])
    made = DyVTEGates(ModelPrint.of(adapter_for(model)), args.gate_hidden)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()  # equal logits keep
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder))
        handle = attach(other := twin(model), DyVTE(gates=folder))
        arms: dict[str, Arm] = {"gates": lambda: prefill(other, inputs), "vanilla": lambda: prefill(model, inputs)}
        times = interleave(arms, args.gate_repeats, 1)
        handle.detach()
    ratio = times["gates"].over(times["vanilla"])
    return {
        "gate_hidden": args.gate_hidden,
        "over_vanilla": ratio.rounded(),
        "target": GATES_TARGET,
        "met": ratio.median <= GATES_TARGET,
    }


def report(console: Console, found: dict[str, Any]) -> None:
    for shape, result in found["shapes"].items():
        table = Table("method", "final", "average", "over bound", "quartiles", "", "time", "FLOPs", title=shape)
        for name, row in result["methods"].items():
            over, budget = row["over_bound"], row["visual_tokens"]
            table.add_row(
                name, f"{budget['final']:.0f}", f"{budget['average']:.0f}", f"{over['median']:.3f}",
                f"{over['lower']:.3f}-{over['upper']:.3f}", "met" if row["met"] else "MISSED",
                f"{row['time_ratio']:.3f}", f"{row['flops_ratio']:.3f}",
            )  # fmt: skip
        console.print(table)
    for shape, row in found["gates"].items():
        over = row["over_vanilla"]
        console.print(
            f"{shape}, DyVTE's gates that never fire: {over['median']:.3f} of vanilla (target {GATES_TARGET})"
        )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", help="some of the methods, or `gates` (default all)")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default 32, as the models have)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7, help="rounds of method and bound (default 7)")
    parser.add_argument("--vanilla-repeats", type=int, default=3, help="rounds of vanilla (default 3)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before, not counted (default 1)")
    parser.add_argument("--gate-repeats", type=int, default=9, help="rounds of the gates (default 9)")
    parser.add_argument("--gate-hidden", type=int, default=256, help="width of DyVTE's gates (the paper: 2048)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    keep_freed_memory()
    before: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    found: dict[str, Any] = {
        "benchmark": "pruning",
        "machine": describe_machine(args.device),
        "settings": {
            "model": "random weights of published widths",
            "decoder_layers": args.layers,
            "dtype": args.dtype,
            "batch": 1,
            "text_tokens": 60,
            "repeats": args.repeats,
            "warmup": args.warmup,
            "seed": args.seed,
        },
        "shapes": before.get("shapes", {}),
        "gates": before.get("gates", {}),
    }

    def save() -> None:  # after each method: nothing is lost if a later one fails
        if args.out:
            args.out.write_text(as_text(found))

    for shape in args.shapes:
        result = found["shapes"].setdefault(shape, {"methods": {}})

        def done(name: str, row: dict[str, Any], result: dict[str, Any] = result) -> None:
            result["methods"][name] = row
            save()

        if args.methods != ["gates"]:
            result |= measure(shape, args, console, done)
        gc.collect()  # a second model would not fit beside the first
        if not args.methods or "gates" in args.methods:
            found["gates"][shape] = gates(shape, args)
            gc.collect()
        save()
    report(console, found)
    if args.out:
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
