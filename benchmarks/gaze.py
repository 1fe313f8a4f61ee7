"""What the Object-Level Attention Transformer costs in time: drawing scanpaths, and a step of training.

    OMP_NUM_THREADS=2 python benchmarks/gaze.py --out benchmarks/results/gaze_cpu.json
    python benchmarks/gaze.py --device cuda --out benchmarks/results/gaze_CARD.json

The published model (18.3 million parameters, random weights) on random pictures of shelves of 2 x 11. Arms interleaved
in one process, ratios taken round by round.

paths     100 samples for each of 64 searches, batched and with caches, over one path at a time without a cache (target
          20 times faster). Both draw the same paths, which is checked. A round of the slow arm draws `--single` of the
          6,400 and is scaled up. Beside it the same with scenes encoded beforehand, untimed: decoding alone.
training  a step (forward, backward, clipping, Adam) over one of a `nn.Transformer` of as many layers and as wide, with
          a linear map to the classes (target at most 1.3): once from crops, with the same convolutions in front of
          both, once from features, where next to nothing but the transformer is left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from vlattn.gaze.decode import Decoding, generate, uniform_draws
from vlattn.gaze.decode_draw import draw_paths
from vlattn.gaze.decode_steps import PrefixSteps
from vlattn.gaze.oat import OAT, make_oat
from vlattn.gaze.oat_batch import OATBatch, OATData, Search
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.trial import GazeSet, Scene, SceneObject
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import Timing, interleave, keep_freed_memory

TARGETS = {"paths": 20.0, "training": 1.3}
ROWS, COLUMNS = 2, 11
FEATURES = 768
Arm = Callable[[], object]


class RandomLooks:
    """Pictures, or features, that nobody drew."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self._kept = shape, dict[str, torch.Tensor]()

    def of(self, scene: Scene) -> torch.Tensor:
        if scene.id not in self._kept:
            generator = torch.Generator().manual_seed(len(self._kept))
            pixels = torch.randint(0, 256, (len(scene.objects), *self.shape), dtype=torch.uint8, generator=generator)
            self._kept[scene.id] = pixels if len(self.shape) == 3 else pixels.float() / 128 - 1
        return self._kept[scene.id]

    def describe(self) -> dict[str, Any]:
        return {"looks": "random"}


class Plain(nn.Module):
    """A transformer of PyTorch's on the same tokens and places, with classes by a linear map."""

    def __init__(self, oat: OAT) -> None:
        super().__init__()
        config = oat.config
        self.appearance, self.positions = oat.appearance, oat.positions
        self.transformer = nn.Transformer(
            config.dim, config.heads, config.encoder_layers, config.decoder_layers, config.ffn, config.dropout,
            batch_first=True,
        )  # fmt: skip
        self.classes = nn.Linear(config.dim, ROWS * COLUMNS + 2)

    def loss(self, batch: OATBatch) -> torch.Tensor:
        rows = torch.arange(batch.size, device=batch.target.device)
        seen = self.appearance(batch.looks)[batch.index]
        begun = self.appearance(self.appearance.start()).expand(batch.size, 3, -1)
        cells = F.pad(batch.cells, (0, 1))
        placed = self.positions(torch.cat((cells, F.pad(batch.start[:, None], (0, 1)).expand(-1, 3, -1)), 1))
        tokens = torch.cat((torch.cat((seen, begun), 1), placed), -1)
        source = torch.cat((tokens[:, : batch.objects], tokens[rows, batch.target][:, None]), 1)
        path = tokens.gather(1, batch.inputs[..., None].expand(-1, -1, tokens.shape[-1]))
        ahead = nn.Transformer.generate_square_subsequent_mask(path.shape[1], device=path.device)
        logits = self.classes(self.transformer(source, path, tgt_mask=ahead, tgt_is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), batch.wanted.flatten(), ignore_index=batch.pad)


def shelves(count: int, shape: tuple[int, ...]) -> OATData:
    cells = [(93.0 * c, 150.0 * r, 93.0, 150.0) for r in range(ROWS) for c in range(COLUMNS)]
    objects = tuple(SceneObject(str(n), box) for n, box in enumerate(cells))
    scenes = {str(n): Scene(str(n), 93 * COLUMNS, 150 * ROWS, objects) for n in range(count)}
    return OATData(GazeSet(scenes, ()), RandomLooks(shape))


def step(module: Any, batch: OATBatch) -> Arm:
    """A whole update."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    module.train()

    def run() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            module.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

    return run


def paths(args: argparse.Namespace, config: OATConfig, console: Console) -> dict[str, Any]:
    model, data = make_oat(config).to(args.device).eval(), shelves(args.searches, (3, *config.crop))
    asked = [Search(str(n), n % (ROWS * COLUMNS)) for n in range(args.searches)]
    keys = [one.scene for one in asked]
    many, single = Decoding("sample", args.samples), Decoding("sample", 1, cached=False)
    some = [n % args.searches for n in range(args.single)]
    with torch.inference_mode():
        batches = [data.batch([one]).to(args.device) for one in asked]
        encoded = [model.encode(batch) for batch in batches]
    longest = args.longest
    draws = [torch.from_numpy(uniform_draws(0, key, 1, longest))[None].to(args.device) for key in keys]

    def batched() -> Any:
        return generate(model, data, asked, many, keys=keys)

    def one_by_one() -> Any:
        return [generate(model, data, [asked[n]], single, keys=[keys[n]])[0][0] for n in some]

    def decoded_only() -> None:
        for n in some:
            steps = PrefixSteps(model, encoded[n], longest)
            draw_paths(steps, 1, batches[n].objects, longest, 1.0, draws[n], torch.device(args.device))

    drawn, alone = batched(), one_by_one()
    same = sum(drawn[n][0].objects == path.objects for n, path in zip(some, alone, strict=True))
    arms = {"batched": batched, "one_by_one": one_by_one, "decoded_only": decoded_only}
    times = interleave(arms, args.rounds, 0)
    scale = args.searches * args.samples / args.single
    found: dict[str, Any] = {
        "paths": args.searches * args.samples,
        "mean_length": sum(len(path.objects) for part in drawn for path in part) / (args.searches * args.samples),
        "same_paths": f"{same} of {args.single}",
        "batched_seconds": times["batched"].seconds.rounded(3),
        "one_path_milliseconds": Timing(
            tuple(ns // args.single for ns in times["one_by_one"].nanoseconds)
        ).seconds.milliseconds(3),
    }
    for name in ("one_by_one", "decoded_only"):
        scaled = Timing(tuple(round(ns * scale) for ns in times[name].nanoseconds))
        ratio = scaled.over(times["batched"])
        found[f"{name}_over_batched"] = ratio.rounded(2)
        console.print(f"{name} over batched: {ratio.median:.1f} ({ratio.lower:.1f}-{ratio.upper:.1f})")
    ratio = found["one_by_one_over_batched"]
    ratio |= {"target": TARGETS["paths"], "met": ratio["median"] >= TARGETS["paths"]}
    return found


def training(args: argparse.Namespace, config: OATConfig, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("crops", "features"):
        changes = {} if name == "crops" else {"appearance": "features", "features": FEATURES}
        given = OATConfig(**{**config.to_json(), **changes})
        data = shelves(args.batch, (3, *config.crop) if name == "crops" else (FEATURES,))
        draws = torch.randint(ROWS * COLUMNS, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
        searches = [Search(str(n), n % (ROWS * COLUMNS), tuple(row)) for n, row in enumerate(draws.tolist())]
        batch = data.batch(searches).to(args.device)
        oat, other = make_oat(given).to(args.device), Plain(make_oat(given)).to(args.device)
        times = interleave({"oat": step(oat, batch), "plain": step(other, batch)}, args.repeats, args.warmup)
        ratio = times["oat"].over(times["plain"])
        found[name] = {
            "oat_over_plain": {
                **ratio.rounded(3),
                "target": TARGETS["training"],
                "met": ratio.median <= TARGETS["training"],
            },
            "milliseconds": {arm: time.seconds.milliseconds() for arm, time in times.items()},
            "parameters": {
                arm: sum(p.numel() for p in one.parameters()) for arm, one in (("oat", oat), ("plain", other))
            },
        }
        console.print(f"training step from {name}: {ratio.median:.2f} of plain ({ratio.lower:.2f}-{ratio.upper:.2f})")
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["paths", "training"])
    parser.add_argument("--searches", type=int, default=64)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--longest", type=int, default=20, help="fixations of a path at most")
    parser.add_argument("--single", type=int, default=64, help="paths that a round of the slow arm draws")
    parser.add_argument("--rounds", type=int, default=3, help="of drawing paths")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--length", type=int, default=12, help="fixations of a path in training")
    parser.add_argument("--repeats", type=int, default=10, help="training steps that count")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    keep_freed_memory()
    config = OATConfig(
        dim=args.dim, ffn=args.dim, encoder_layers=args.layers, decoder_layers=args.layers, longest=args.longest
    )
    found: dict[str, Any] = {
        "benchmark": "gaze",
        "machine": describe_machine(args.device),
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "device", "only")},
    }
    for name, measure in (("paths", paths), ("training", training)):
        if args.only in (None, name):
            found[name] = measure(args, config, console)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
