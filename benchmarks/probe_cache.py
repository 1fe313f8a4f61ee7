"""How fast a probe trains from a token cache, against merely reading and summing the same cache.

    python benchmarks/probe_cache.py --out benchmarks/results/probe_cache_cpu.json
    python benchmarks/probe_cache.py --images 50000 --device cuda --out benchmarks/results/probe_cache_CARD.json

A cache of random tokens of published size (ViT-B/16: 196 x 768 and CLS) is written once. Then all arms go through all
of its images, interleaved in one process, ratios taken round by round:

sum            read in file order, made fp32, and summed. What a rate of 1 stands for.
shuffled       batches in a shuffled order, images gathered one by one, and nothing done with them.
blocks         the same with blocks of 64 neighbours shuffled as one.
train HEAD     a head trained on shuffled batches: pooler, batch norm, classifier, cross-entropy, SGD step.
compute HEAD   the same steps on one batch over and over: what training costs where reading costs nothing.

Target: `train` goes at least at 0.6 of the rate of `sum`, for a head that is not itself slower than that (`compute`
tells). `--drop` asks the system to forget the files before each arm, where it can (Linux), so that the disk is read.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from vlattn.probing.cache import TokenCache
from vlattn.probing.cache_layout import part_path
from vlattn.probing.head import ProbeHead
from vlattn.probing.poolers.registry import make_pooler, parse_pooler
from vlattn.probing.tokens import Tokens
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import Spread, interleave, keep_freed_memory

TARGET = 0.6
Arm = Callable[[], object]


class RandomTokens(nn.Module):
    """Gives random tokens of a fixed size in place of a backbone."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim
        self.generator = torch.Generator().manual_seed(0)

    def describe(self) -> dict[str, Any]:
        return {"name": "random", "tokens": self.tokens, "dim": self.dim}

    def forward(self, pixels: torch.Tensor) -> Tokens:
        drawn = torch.randn(len(pixels), self.tokens + 1, self.dim, generator=self.generator)
        return Tokens(drawn[:, 1:], drawn[:, 0])


class BlackImages:
    """One black pixel per image, and labels in turn."""

    multi_label = False

    def __init__(self, images: int, classes: int) -> None:
        self.images, self.classes = images, [str(label) for label in range(classes)]

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(3, 1, 1), torch.tensor(index % len(self.classes))


def sum_cache(cache: TokenCache, pieces: int = 4) -> torch.Tensor:
    """A few images at a time, so that they are summed while in the processor's cache: faster than torch's own sum of
    half-precision numbers into fp32."""
    patches = cache.part("patches")
    wide = torch.empty(pieces, *patches.shape[1:])
    return torch.stack([wide[: len(some)].copy_(some).sum() for some in patches.split(pieces)]).sum()


def read_batches(batches: Iterable[Any]) -> int:
    return sum(len(labels) for _, labels in batches)


class Training:
    """A head and its steps."""

    def __init__(self, head: str, dim: int, classes: int, device: torch.device) -> None:
        torch.manual_seed(0)
        name, settings, self.kind = parse_pooler(head)
        self.head = ProbeHead(make_pooler(name, dim, **settings), classes).to(device).train()
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)
        self.device = device

    def __call__(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            for tokens, labels in batches:
                with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                    loss = F.cross_entropy(self.head(tokens), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()


def arms_of(cache: TokenCache, args: argparse.Namespace) -> dict[str, Arm]:
    device = torch.device(args.device)
    settings: dict[str, Any] = {"shuffle": True, "device": device, "drop_last": True}
    if device.type == "cpu":
        settings["dtype"] = torch.float32  # what a head computes in
    shuffled = cache.batches(args.batch, **settings)
    blocks = cache.batches(args.batch, block=64, **settings)
    arms: dict[str, Arm] = {
        "sum": lambda: sum_cache(cache),
        "shuffled": partial(read_batches, shuffled),
        "blocks": partial(read_batches, blocks),
    }
    for head in args.heads:
        training = Training(head, args.dim, args.classes, device)
        batches = cache.batches(args.batch, kind=training.kind, **settings)
        tokens, labels = next(iter(batches))
        kept = [(tokens.clone(), labels)] * len(batches)
        arms[f"train {head}"] = partial(training, batches)
        arms[f"compute {head}"] = partial(training, kept)
    return arms


def forgetting(cache: TokenCache, arm: Arm) -> Arm:
    """The arm, before which the system is asked to drop what it holds of the files."""

    def run() -> object:
        for part in cache.layout.parts:
            with part_path(cache.folder, part).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return arm()

    return run


def measure(cache: TokenCache, args: argparse.Namespace) -> dict[str, Any]:
    arms = arms_of(cache, args)
    if args.drop:
        arms = {name: forgetting(cache, arm) for name, arm in arms.items()}
    times = interleave(arms, args.repeats, args.warmup)
    bytes_read = cache.layout.part_bytes("patches")
    found = {}
    for name, timing in times.items():
        ratio = times["sum"].over(timing)
        spread = timing.seconds
        found[name] = {
            "seconds": asdict(spread),
            "images_per_second": len(cache) / spread.median,
            "gb_per_second": bytes_read / spread.median / 1e9,
            "rate_over_sum": asdict(ratio),
            "met": ratio.median >= TARGET if name.startswith("train") else None,
        }
    return found


def table_of(found: dict[str, Any]) -> Table:
    table = Table(title="one pass over the cache", box=box.SIMPLE_HEAD)
    for column in ("arm", "seconds", "images/s", "GB/s", "rate / sum", f"at least {TARGET}"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in found.items():
        ratio = Spread(**row["rate_over_sum"])
        table.add_row(
            name,
            f"{row['seconds']['median']:.3f}",
            f"{row['images_per_second']:.0f}",
            f"{row['gb_per_second']:.2f}",
            f"{ratio.median:.2f} [{ratio.lower:.2f}, {ratio.upper:.2f}]",
            {None: "", True: "yes", False: "no"}[row["met"]],
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--heads", nargs="+", default=["gap", "ep:queries=8"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's choice.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--drop", action="store_true", help="forget the files before each arm")
    parser.add_argument("--folder", type=Path, help="where the cache lies; default a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        cache = TokenCache.write(
            RandomTokens(args.tokens, args.dim),
            BlackImages(args.images, args.classes),
            args.folder or temporary,
            dtype=args.dtype,
        )
        console.print(f"ready after {time.perf_counter() - start:.1f} s")
        found = measure(cache, args)
    console.print(table_of(found))
    if args.out is not None:
        names = ("images", "tokens", "dim", "classes", "dtype", "batch", "repeats", "warmup", "drop")
        settings = {name: getattr(args, name) for name in names}
        content = {"settings": settings, "machine": describe_machine(args.device), "target": TARGET, "arms": found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
