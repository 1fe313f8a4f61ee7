"""What FlowCut costs and saves, in time: its overhead over the best possible, and a whole prefill against its FLOPs.

    python benchmarks/flowcut.py --out benchmarks/results/flowcut_cpu.json
    python benchmarks/flowcut.py --device cuda --layers 32 --dtype float16 --prefill-repeats 20 --out ...

The model is a LLaVA-1.5 of real widths with random weights: a CLIP-L/14-336 tower (24 layers, 1024, 577 tokens), the
projector, and a LLaMA-7B decoder (4096, 11008, 32 heads) of `--layers` layers, without its head; one image, batch 1,
sdpa in every arm. Time does not depend on what the weights say, with one exception: FlowCut drops more patches where
CLS attention is concentrated, and a random tower attends so evenly that everything would be left to the last pruning.
So the query and key projections of each vision layer are scaled until the entropy of its head-mean CLS attention over
patches is `--entropy` of the maximum, 0.8 by default. That number is our assumption about trained CLIP towers, not a
measurement of one; it decides how fast the tower shortens, and nothing else.

What is compared, arms interleaved in one process, ratios taken round by round:

decoder   the decoder under FlowCut's sequence edit, given the full prompt with its marks, against the stock decoder
          given the surviving tokens only (the fed-short bound): what the edit costs. Target 1.03.
tower     the tower under FlowCut against the stock embeddings, norm and layers, run one by one on random hidden
          states of the lengths that FlowCut's layers ran at: what scoring and gathering cost. Target 1.05.
keep all  a whole prefill with FlowCut keeping every token against the vanilla model. Target 1.02.
prefill   whole prefills (tower, projector, decoder) with FlowCut against vanilla, for several `--keep`, beside the
          ratio of FLOPs (`vlattn.eval.model_cost`) and the same prefill put together from stock parts at the short
          lengths.

The overhead of the first two is taken at the smallest `--keep`. FlowCut stays attached throughout, as in use; each
arm has a model object of its own, and all share one set of weights. Before timing, the outputs of the decoder arms
and of the keep-all arms are checked to be the same bit for bit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

import vlattn
from vlattn.eval.bench_arms import twin
from vlattn.eval.model_cost import cache_bytes, model_cost
from vlattn.models.registry import adapter_for
from vlattn.ops import query_row_attention
from vlattn.runtime.compact_json import as_text
from vlattn.runtime.hooks import cache_of
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import Spread, Timing, interleave

IMAGE_ID, TEXT = 63, 60
TARGETS = {"decoder": 1.03, "tower": 1.05, "keep all": 1.02}
Arm = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. vision and text: hidden, FFN, heads, layers."""

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    image_size: int
    patch_size: int


def shape_of(layers: int, tiny: bool) -> Shape:
    """LLaVA-1.5-7B with `layers` decoder layers, or a toy of the same make."""
    if tiny:
        return Shape((32, 64, 4, 8), (64, 128, 4, layers), 56, 7)
    return Shape((1024, 4096, 16, 24), (4096, 11008, 32, layers), 336, 14)


# The model ------------------------------------------------------------------------------------------------------------


def build(shape: Shape, dtype: torch.dtype, device: str) -> LlavaModel:
    """A random model of the shape, sdpa attention."""
    hidden, ffn, heads, layers = shape.vision
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    hidden, ffn, heads, layers = shape.text
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        vocab_size=1024,  # looking a word up takes as long in a table of 32 000
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    with torch.device(device):
        return LlavaModel._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


@torch.no_grad()
def concentrate(model: LlavaModel, pixels: torch.Tensor, target: float) -> None:
    """Scale q and k of each vision layer, first to last, until its CLS entropy is `target` of the maximum."""
    for attention, normed in _attention_inputs(model, pixels):
        q, k = _heads(attention, attention.q_proj(normed[:, :1])), _heads(attention, attention.k_proj(normed))
        low, high = 1e-3, 1e7  # factor on the logits; entropy falls as it grows
        for _ in range(50):
            middle = math.sqrt(low * high)
            row = query_row_attention(q, k, scale=attention.scale * middle)
            low, high = (middle, high) if _entropy(row) > target else (low, middle)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(math.sqrt(low))
            projection.bias.mul_(math.sqrt(low))


@torch.no_grad()
def entropies(model: LlavaModel, pixels: torch.Tensor) -> list[float]:
    """Entropy of the head-mean CLS attention over patches, over its maximum, of each vision layer without pruning."""
    found = []
    for attention, normed in _attention_inputs(model, pixels):
        q, k = _heads(attention, attention.q_proj(normed[:, :1])), _heads(attention, attention.k_proj(normed))
        found.append(_entropy(query_row_attention(q, k, scale=attention.scale)))
    return found


def _attention_inputs(model: LlavaModel, pixels: torch.Tensor) -> Any:
    """(attention module, what it is given) of each vision layer; a layer runs after its pair was handed out."""
    embeddings, norm, layers = _tower_parts(model)
    hidden = norm(embeddings(pixels))
    layer: Any
    for layer in layers:
        yield layer.self_attn, layer.layer_norm1(hidden)
        hidden = _first(layer(hidden, None))


def _tower_parts(model: LlavaModel) -> tuple[nn.Module, nn.Module, Sequence[nn.Module]]:
    adapter = adapter_for(model)
    tower: Any = getattr(adapter.tower, "vision_model", adapter.tower)
    return tower.embeddings, tower.pre_layrnorm, adapter.vision_layers


def _heads(attention: Any, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _entropy(row: torch.Tensor) -> float:
    p = row[:, :, 0, 1:].double().mean(1)
    p = p / p.sum(-1, keepdim=True)
    return float(torch.special.entr(p).sum(-1).mean()) / math.log(p.shape[-1])


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


# Arms -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """A model that FlowCut is attached to, after one prefill."""

    keep: int
    model: LlavaModel
    cost: dict[str, Any]
    marked: dict[str, Any]  # the decoder's call before the sequence edit: full length, dropped features marked
    short: dict[str, Any]  # the same call after it: what the decoder really got
    cache: dict[str, int]


@torch.inference_mode()
def prune(model: LlavaModel, keep: int, inputs: dict[str, torch.Tensor]) -> Pruned:
    """A twin with FlowCut attached for good, and what it did to `inputs`."""
    other = twin(model)
    decoder = adapter_for(other).language_model
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({name: kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "position_ids")})

    first = decoder.register_forward_pre_hook(record, with_kwargs=True)
    handle = vlattn.attach(other, vlattn.FlowCut(keep=keep))
    last = decoder.register_forward_pre_hook(record, with_kwargs=True)
    cache = cache_bytes(cache_of(other(**inputs, use_cache=True)))
    first.remove()
    last.remove()
    return Pruned(keep, other, model_cost(other, handle.trace), calls[0], calls[1], cache)


def run_decoder(model: LlavaModel, call: dict[str, Any]) -> torch.Tensor:
    """The decoder alone, filling a cache as a prefill does."""
    return adapter_for(model).language_model(**call, use_cache=True).last_hidden_state


def _random_states(model: LlavaModel, pixels: torch.Tensor, tokens: int) -> torch.Tensor:
    vision: Any = model.config.vision_config
    return torch.randn(1, tokens, vision.hidden_size, dtype=pixels.dtype, device=pixels.device)


def stock_tower(model: LlavaModel, pixels: torch.Tensor, lengths: Sequence[int]) -> Arm:
    """Stock embeddings, norm and layers, each layer on random hidden states of its length."""
    embeddings, norm, layers = _tower_parts(model)
    states = {n: _random_states(model, pixels, n) for n in set(lengths)}

    def run() -> None:
        norm(embeddings(pixels))
        for layer, n in zip(layers, lengths, strict=True):
            layer(states[n], None)

    return run


def stock_prefill(model: LlavaModel, pixels: torch.Tensor, pruned: Pruned) -> Arm:
    """The fed-short bound of a whole prefill: stock tower layers, projector and decoder at FlowCut's lengths."""
    adapter = adapter_for(model)
    tower = stock_tower(model, pixels, pruned.cost["tower_lengths"])
    features = _random_states(model, pixels, pruned.keep)

    def run() -> object:
        tower()
        adapter.projector(features)
        return run_decoder(model, pruned.short)

    return run


# Comparisons ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One arm's time over another's."""

    name: str
    arm: str
    over: str
    ratio: Spread
    target: float | None = None
    flops_ratio: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio.median <= self.target


class Bench:
    """Runs groups of arms and keeps what came out."""

    def __init__(self, console: Console, warmup: int) -> None:
        self.console, self.warmup = console, warmup
        self.timings: dict[str, dict[str, Timing]] = {}
        self.comparisons: list[Comparison] = []

    def run(self, group: str, arms: dict[str, Arm], repeats: int) -> None:
        self.console.print(f"timing {group}: {', '.join(arms)}; {self.warmup} + {repeats} rounds")
        self.timings[group] = interleave(arms, repeats, self.warmup)

    def compare(self, group: str, arm: str, over: str, flops_ratio: float | None = None) -> None:
        ratio = self.timings[group][arm].over(self.timings[group][over])
        self.comparisons.append(Comparison(group, arm, over, ratio, TARGETS.get(group), flops_ratio))


def same_outputs(model: LlavaModel, everything: Pruned, fewest: Pruned, inputs: dict[str, torch.Tensor]) -> None:
    """Stop if an arm does not compute what it is compared with."""
    with torch.inference_mode():
        stock, edited = run_decoder(model, fewest.short), run_decoder(fewest.model, fewest.marked)
        vanilla, kept = (m(**inputs).last_hidden_state for m in (model, everything.model))
    if not (torch.equal(stock, edited) and torch.equal(vanilla, kept)):
        raise SystemExit("the pruned and the stock arm differ in their outputs; timing them would compare two things")


def report(console: Console, bench: Bench) -> None:
    for group, timings in bench.timings.items():
        table = Table("arm", "median ms", "quartiles", "n", title=group, title_justify="left")
        for name, timing in timings.items():
            s = timing.seconds
            table.add_row(name, f"{s.median * 1e3:.2f}", f"{s.lower * 1e3:.2f} - {s.upper * 1e3:.2f}", str(s.n))
        console.print(table)
    table = Table("time ratio", "median", "quartiles", "target", "FLOPs", title="ratios", title_justify="left")
    for c in bench.comparisons:
        target = "" if c.target is None else f"{c.target} {'met' if c.met else 'MISSED'}"
        quartiles = f"{c.ratio.lower:.3f} - {c.ratio.upper:.3f}"
        share = "" if c.flops_ratio is None else f"{c.flops_ratio:.3f}"
        table.add_row(f"{c.name}: {c.arm} / {c.over}", f"{c.ratio.median:.3f}", quartiles, target, share)
    console.print(table)


def as_json(
    bench: Bench, args: argparse.Namespace, shape: Shape, reached: list[float], pruned: Sequence[Pruned]
) -> dict[str, Any]:
    """All that was set, measured and concluded, as plain data."""
    return {
        "benchmark": "flowcut",
        "machine": describe_machine(args.device),
        "settings": {
            "model": "random weights; " + ("toy widths" if args.tiny else "LLaVA-1.5-7B widths, no LM head"),
            **asdict(shape),
            "dtype": args.dtype,
            "attention": "sdpa",
            "batch": 1,
            "images": 1,
            "text_tokens": TEXT,
            "keep": args.keep,
            "repeats": args.repeats,
            "prefill_repeats": args.prefill_repeats,
            "warmup": args.warmup,
            "seed": args.seed,
        },
        "entropy": {
            "what": "entropy of head-mean CLS attention over patches / its maximum, unpruned; q and k scaled to it",
            "target": args.entropy,
            "reached_by_layer": [round(h, 4) for h in reached],
        },
        "pruning": {str(p.keep): {**p.cost, "kv_cache_bytes": p.cache} for p in pruned},
        "timings_ms": {
            group: {
                name: {
                    **timing.seconds.milliseconds(4),
                    "raw": [round(ns / 1e6, 4) for ns in timing.nanoseconds],
                }
                for name, timing in timings.items()
            }
            for group, timings in bench.timings.items()
        },
        "ratios": [
            {
                "what": c.name,
                "arm": c.arm,
                "over": c.over,
                **{name: round(value, 4) for name, value in asdict(c.ratio).items()},
                "target": c.target,
                "met": c.met,
                "flops_ratio": c.flops_ratio,
            }
            for c in bench.comparisons
        ],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers; LLaVA-1.5-7B has 32 (default 4)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--keep", type=int, nargs="+", help="visual tokens to keep (default 64 128 192 of 576)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the overhead comparisons")
    parser.add_argument("--prefill-repeats", type=int, default=8, help="rounds of the whole prefills")
    parser.add_argument("--warmup", type=int, help="rounds before each, not counted (default 2, on cuda 5)")
    parser.add_argument("--entropy", type=float, default=0.8, help="normalised entropy of CLS attention to scale to")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the program; times mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.warmup is None:
        args.warmup = 5 if args.device == "cuda" else 2
    args.keep = sorted(args.keep or ([8, 16, 24] if args.tiny else [64, 128, 192]))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = shape_of(args.layers, args.tiny)
    model = build(shape, getattr(torch, args.dtype), args.device)
    patches = adapter_for(model).patches
    pixels = torch.randn(1, 3, shape.image_size, shape.image_size, dtype=model.dtype, device=args.device)
    concentrate(model, pixels, args.entropy)
    reached = entropies(model, pixels)
    console.print(f"CLS entropy by layer, target {args.entropy}:", " ".join(f"{h:.3f}" for h in reached))

    ids = torch.tensor([[1] * (TEXT // 2) + [IMAGE_ID] * patches + [2] * (TEXT - TEXT // 2)], device=args.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    everything = prune(model, patches, inputs)
    pruned = [prune(model, keep, inputs) for keep in args.keep]
    fewest = pruned[0]
    same_outputs(model, everything, fewest, inputs)
    for p in pruned:
        console.print(f"keep {p.keep}: tower ran at", *p.cost["tower_lengths"])

    bench = Bench(console, args.warmup)
    decoder: dict[str, Arm] = {
        "fed short": partial(run_decoder, model, fewest.short),
        f"flowcut {fewest.keep}": partial(run_decoder, fewest.model, fewest.marked),
    }
    bench.run("decoder", decoder, args.repeats)
    bench.compare("decoder", f"flowcut {fewest.keep}", "fed short")

    tower: dict[str, Arm] = {
        "stock layers": stock_tower(model, pixels, fewest.cost["tower_lengths"]),
        f"flowcut {fewest.keep}": partial(adapter_for(fewest.model).tower, pixels),
    }
    bench.run("tower", tower, args.repeats)
    bench.compare("tower", f"flowcut {fewest.keep}", "stock layers")

    vanilla, keep_all = (partial(m, **inputs, use_cache=True) for m in (model, everything.model))
    bench.run("keep all", {"vanilla": vanilla, "flowcut all": keep_all}, args.repeats)
    bench.compare("keep all", "flowcut all", "vanilla")

    prefill: dict[str, Arm] = {"vanilla": vanilla}
    for p in pruned:
        prefill[f"flowcut {p.keep}"] = partial(p.model, **inputs, use_cache=True)
        prefill[f"fed short {p.keep}"] = stock_prefill(model, pixels, p)
    bench.run("prefill", prefill, args.prefill_repeats)
    for p in pruned:
        bench.compare("prefill", f"flowcut {p.keep}", "vanilla", p.cost["ratio"])
        bench.compare("prefill", f"fed short {p.keep}", "vanilla", p.cost["ratio"])
        bench.compare("prefill", f"flowcut {p.keep}", f"fed short {p.keep}")

    report(console, bench)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(as_text(as_json(bench, args, shape, reached, pruned)))
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
