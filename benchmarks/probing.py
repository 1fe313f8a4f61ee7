"""What attentive probes cost in time: efficient probing against multi-head attention, all poolers, and banks of heads.

    python benchmarks/probing.py --out benchmarks/results/probing_cpu.json
    python benchmarks/probing.py --device cuda --repeats 50 --out benchmarks/results/probing_CARD.json

Tokens are random, as many and as wide as a ViT-B/16 gives (196 of 768), frozen: no gradient goes to them. One step is
forward and backward of the pooler on a batch. Arms interleaved in one process, ratios taken round by round.

ep        re-associated, against `nn.MultiheadAttention` with 12 heads and one learned query (target 18 times faster),
          and against EP's direct form (target 8 times faster). On a CPU twice: with the system's allocator, as training
          runs, which hands large tensors back to the system and zeroes new ones; and with freed memory kept, as in all
          other parts, which is kinder to whatever makes many large tensors.
poolers   a step of every pooler over a step of EP, beside parameters and multiply-accumulates.
bank      a step of 8 heads (pooler, norm, classifier, optimiser of the published protocol) that are trained at once,
          over a step of one head (target 2), for linear probing and EP: on tokens that are there already, as from a
          cache, and with a ViT-B/16 computing them in every step, as in training on newly augmented images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from vlattn.probing.head import make_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.poolers.registry import POOLERS, make_pooler
from vlattn.probing.settings import ProbeSettings
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import interleave, keep_freed_memory

TARGETS = {"mha": 18.0, "direct": 8.0, "bank": 2.0}
CLASSES = 1000
Arm = Callable[[], object]


class OneQuery(nn.Module):
    """`nn.MultiheadAttention` with one learned query: what the paper measures against."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]


def step(module: nn.Module, tokens: torch.Tensor) -> Arm:
    """Forward and backward from a fixed gradient of the feature."""
    with torch.no_grad():
        gradient = torch.randn_like(module(tokens))
    trained = any(p.requires_grad for p in module.parameters())

    def run() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            out = module(tokens)
            if trained:
                module.zero_grad(set_to_none=True)
                out.backward(gradient)

    return run


def training_step(bank: HeadBank, tokens: torch.Tensor, labels: torch.Tensor, copies: int) -> Arm:
    """A whole update of `copies` heads."""
    optimizer = ProbeSettings(blr=tuple(0.1 * (i + 1) for i in range(copies))).make_optimizer(list(bank.parameters()))
    bank.train()

    def run() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            logits = bank(tokens)
            wanted = labels.expand(copies, -1)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(copies, -1).mean(1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()

    return run


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    tokens = torch.randn(args.batch, args.tokens, args.dim, dtype=dtype, device=device)
    side = int(args.tokens**0.5)

    def ready(module: nn.Module) -> nn.Module:
        return module.to(device, dtype)

    found: dict[str, Any] = {}
    for memory in ("system", "kept"):
        if memory == "kept":
            keep_freed_memory()
        found[f"ep_{memory}_memory"] = against_ep(args, tokens, ready, console, memory)
    found["poolers"] = poolers(args, tokens, ready, side, console)
    found["bank"] = banks(args, tokens, ready, console)
    found["bank_live"] = live_banks(args, device, dtype, console)
    return found


def against_ep(
    args: argparse.Namespace, tokens: torch.Tensor, ready: Any, console: Console, memory: str
) -> dict[str, Any]:
    """Multi-head attention and the direct form beside EP."""
    arms = {
        "ep": step(ready(make_pooler("ep", args.dim, queries=args.queries, form="reassociated")), tokens),
        "direct": step(ready(make_pooler("ep", args.dim, queries=args.queries, form="direct")), tokens),
        "mha": step(ready(OneQuery(args.dim, 12)), tokens),
    }
    times = interleave(arms, args.repeats, args.warmup)
    found: dict[str, Any] = {"milliseconds": {name: t.seconds.milliseconds(3) for name, t in times.items()}}
    for other in ("mha", "direct"):
        ratio, target = times[other].over(times["ep"]), TARGETS[other]
        found[f"{other}_over_ep"] = {**ratio.rounded(3), "target": target, "met": ratio.median >= target}
        console.print(f"{memory} memory, {other} over EP: {ratio.median:.1f} ({ratio.lower:.1f}-{ratio.upper:.1f})")
    return found


def poolers(args: argparse.Namespace, tokens: torch.Tensor, ready: Any, side: int, console: Console) -> dict[str, Any]:
    """Every pooler beside EP, a few at a time so that none waits long for its next round."""
    found: dict[str, Any] = {}
    for name in POOLERS:
        if name == "cls":
            continue
        pooler = make_pooler(name, args.dim, grid=(side, side))
        arms = {
            "ep": step(ready(make_pooler("ep", args.dim, queries=args.queries)), tokens),
            name: step(ready(pooler), tokens),
        }
        if name == "ep":
            arms = {"ep": arms["ep"]}
        times = interleave(arms, max(3, args.repeats // 3), 1)
        ratio = times[name].over(times["ep"])
        found[name] = {
            "over_ep": ratio.rounded(3),
            "milliseconds": times[name].seconds.milliseconds(3),
            "parameters": sum(p.numel() for p in pooler.parameters()),
            "macs": pooler.macs(args.tokens),
        }
        console.print(f"{name}: {ratio.median:.2f} of EP")
    return found


def banks(args: argparse.Namespace, tokens: torch.Tensor, ready: Any, console: Console) -> dict[str, Any]:
    labels = torch.randint(CLASSES, (args.batch,), device=tokens.device)
    found: dict[str, Any] = {}
    for name in ("gap", f"ep:queries={args.queries}"):
        arms = {}
        for copies in (1, 8):
            head = make_head(name, args.dim, CLASSES, seed=0)
            arms[str(copies)] = training_step(ready(HeadBank(head, copies)), tokens, labels, copies)
        times = interleave(arms, args.repeats, args.warmup)
        ratio = times["8"].over(times["1"])
        found[name] = {**ratio.rounded(3), "target": TARGETS["bank"], "met": ratio.median <= TARGETS["bank"]}
        console.print(f"8 heads of {name} over one: {ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})")
    return found


def live_banks(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """The same with the backbone in every step, on `--live-batch` images."""
    backbone = timm.create_model("vit_base_patch16_224").to(device, dtype).eval()
    images = torch.randn(args.live_batch, 3, 224, 224, dtype=dtype, device=device)
    labels = torch.randint(CLASSES, (args.live_batch,), device=device)
    found: dict[str, Any] = {"batch": args.live_batch}
    for name in ("gap", f"ep:queries={args.queries}"):
        arms = {}
        for copies in (1, 8):
            bank = HeadBank(make_head(name, backbone.embed_dim, CLASSES, seed=0), copies).to(device, dtype)
            arms[str(copies)] = live_step(backbone, images, bank, labels, copies)
        times = interleave(arms, max(3, args.repeats // 3), 1)
        ratio = times["8"].over(times["1"])
        found[name] = {**ratio.rounded(3), "target": TARGETS["bank"], "met": ratio.median <= TARGETS["bank"]}
        console.print(f"8 heads of {name} over one, live: {ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})")
    return found


def live_step(backbone: Any, images: torch.Tensor, bank: HeadBank, labels: torch.Tensor, copies: int) -> Arm:
    """Features of a batch of images, and an update of the heads on them."""
    tokens = torch.empty(len(images), backbone.patch_embed.num_patches, backbone.embed_dim, dtype=images.dtype)
    tokens = tokens.to(images.device)
    update = training_step(bank, tokens, labels, copies)

    def run() -> None:
        with torch.no_grad():
            tokens.copy_(backbone.forward_features(images)[:, backbone.num_prefix_tokens :])
        update()

    return run


def report(console: Console, found: dict[str, Any]) -> None:
    table = Table("pooler", "parameters", "MMACs", "ms", "over EP")
    for name, row in sorted(found["poolers"].items(), key=lambda item: item[1]["over_ep"]["median"]):
        time, ratio = row["milliseconds"]["median"], row["over_ep"]["median"]
        table.add_row(name, f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}", f"{time:.1f}", f"{ratio:.2f}")
    console.print(table)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--live-batch", type=int, default=16, help="images of a step with the backbone (default 16)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    settings = {n: getattr(args, n) for n in ("batch", "tokens", "dim", "queries", "dtype", "repeats", "warmup")}
    found = {
        "benchmark": "probing",
        "machine": describe_machine(args.device),
        "settings": settings,
        **measure(args, console),
    }
    report(console, found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
