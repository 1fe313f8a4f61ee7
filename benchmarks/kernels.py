"""Every kernel on the card at hand: equal to its reference, and its time beside flash attention, PyTorch and the floor.

    python benchmarks/kernels.py --out benchmarks/results/kernels_CARD.json
    python benchmarks/kernels.py --check        # correctness alone; without a card interpreted, on small shapes
    python benchmarks/kernels.py --cpu --out benchmarks/results/kernels_cpu.json    # the references, on the CPU

Each case runs an op of `vlattn.ops` on Triton and its reference: the largest error over the largest value stays below
a tolerance, and what is chosen or copied is the same. Then arms are timed, interleaved in one process,
ratios taken round by round; medians and quartiles. The floor is the larger of two times that this card needs: for the
floating-point operations at the rate of its fastest matrix product, and for the bytes that have to be moved at the
bandwidth of a large copy, both measured first. Bytes count inputs and outputs once.

Eager is the same in a few lines of PyTorch: whole matrices of weights, as models give them with
attn_implementation='eager', indexing, products. With --cpu the references, which are what runs there, take the place of
the kernels: they are checked against eager PyTorch and timed beside it, with the memory that each holds above its
inputs. `python benchmarks/kernel_page.py` puts what was found into docs/kernels.md.

Targets, for an H100 in bf16: received attention in at most 1.1 times flash attention's forward and 20 times faster than
eager attention at 2048 tokens; grouped attention in at most 1.25 times flash; at least 80 % of copy bandwidth where 640
of 2880 tokens are chosen and gathered, 70 % where efficient probing pools.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from vlattn import ops
from vlattn.eval.bench_memory import peak_memory
from vlattn.eval.roofline import Roofline, measure_roofline
from vlattn.interventions.var_redistribute import KeySets, Masses, image_centric, redistribute
from vlattn.kernels.grouped_types import Redistribution
from vlattn.runtime.compact_json import as_text
from vlattn.runtime.machine import cpu_name, describe_machine
from vlattn.runtime.timing import interleave

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    run: the op on a backend. checked: the same where `run` would change its inputs, on copies of them.
    others: what it is timed against; "eager" gives what `run` gives. flops, bytes: what it cannot do without.
    targets: {arm: the most that Triton's time over its may be}. copy_share: the least share of copy bandwidth.
    """

    op: str
    shape: str
    run: Run
    flops: float
    bytes: float
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    copy_share: float | None = None
    checked: Run | None = None


class Maker:
    """Seeded inputs on one device in one dtype.

    device: "meta" for shapes without numbers. shapes: "card" or "cpu" to be timed there, "small" to be interpreted.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shapes: str = "card", seed: int = 0) -> None:
        self.device, self.dtype, self.shapes = device, dtype, shapes
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)

    def numbers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self.device)

    def choose(self, card: tuple[int, ...], cpu: tuple[int, ...], small: tuple[int, ...]) -> tuple[int, ...]:
        return {"card": card, "cpu": cpu, "small": small}[self.shapes]


def size(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return run


def weights(q: torch.Tensor, k: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """The whole matrix [B, H, R, N], as models give it with attn_implementation='eager'."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if causal:
        behind = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
        logits = logits.masked_fill(behind, -torch.inf)
    return logits.softmax(-1, dtype=torch.float32).to(q.dtype)


def query_row_attention(make: Maker) -> Iterator[Case]:
    def case(b: int, h: int, kv: int, r: int, n: int, d: int) -> Case:
        q, k = make.noise(b, h, n, d), make.noise(b, kv, n, d)
        rows = q[:, :, n - r :]
        return Case(
            "query_row_attention", f"{b} x {h}/{kv} heads, {r} of {n} rows, D {d}",
            lambda how: ops.query_row_attention(rows, k, scale=d**-0.5, backend=how),
            2 * b * h * r * n * d, size(rows, k) + 4 * b * h * r * n,
            {
                "sdpa": lambda: F.scaled_dot_product_attention(rows, k, k, enable_gqa=h != kv),
                "eager": lambda: weights(q, k)[:, :, n - r :],
            },
        )  # fmt: skip

    yield case(*make.choose((16, 16, 16, 1, 577, 64), (1, 16, 16, 1, 577, 64), (1, 2, 1, 1, 17, 16)))
    yield case(*make.choose((2, 32, 8, 16, 4096, 128), (1, 32, 8, 16, 2048, 128), (1, 4, 2, 3, 33, 16)))


def received_attention(make: Maker) -> Iterator[Case]:
    def case(causal: bool, b: int, h: int, kv: int, n: int, d: int) -> Case:
        q, k = make.noise(b, h, n, d), make.noise(b, kv, n, d)
        return Case(
            "received_attention", f"{b} x {h}/{kv} heads, N {n}, D {d}{', causal' if causal else ''}",
            lambda how: ops.received_attention(q, k, scale=d**-0.5, causal=causal, backend=how),
            4 * b * h * n * n * d / (1 + causal), size(q, k) + 4 * b * h * n,
            {
                "flash": flash(q, k, torch.randn_like(k), causal),
                "eager": lambda: weights(q, k, causal).sum(2, dtype=torch.float32),
            },
            {"flash": 1.1, "eager": 1 / 20},
        )  # fmt: skip

    yield case(False, *make.choose((4, 16, 16, 2048, 64), (1, 16, 16, 2048, 64), (1, 2, 2, 17, 16)))
    yield case(True, *make.choose((2, 32, 8, 4096, 128), (1, 32, 8, 2048, 128), (1, 4, 2, 33, 16)))


def flowcut_statistics(make: Maker) -> Iterator[Case]:
    b, h, n, d = make.choose((64, 16, 577, 64), (4, 16, 577, 64), (2, 2, 17, 16))
    q, k, v, average = (
        make.noise(b, h, n, d),
        make.noise(b, h, n, d),
        make.noise(b, h, n, d),
        make.noise(b, n - 1).abs(),
    )
    average = average.float()

    def eager() -> tuple[torch.Tensor, ...]:
        """As the paper's formulas read."""
        row = weights(q, k)[:, :, 0].float().mean(1)[:, 1:]
        likeness = (v.float() @ v[:, :, 0, :, None].float())[..., 0].softmax(-1).mean(1)[:, 1:]
        share, likeness = row / row.sum(-1, keepdim=True), likeness / likeness.sum(-1, keepdim=True)
        score = (share + likeness) * v.float().mean(1)[:, 1:].abs().sum(-1)
        return score, row, 0.5 * average + 0.5 * score, -(share * share.log()).sum(-1)

    yield Case(
        "flowcut_statistics", f"{b} x {h} heads, {n} tokens, D {d}",
        lambda how: ops.flowcut_statistics(
            v, cls_query=q[:, :, 0], k=k, scale=d**-0.5, average=average, backend=how
        ),
        4 * b * h * n * d, size(k, v), {"eager": eager},
    )  # fmt: skip


def select_tokens(make: Maker) -> Iterator[Case]:
    b, n, kept, d, head = make.choose((8, 2880, 640, 4096, 128), (1, 2880, 640, 4096, 128), (2, 33, 9, 24, 8))
    # No two scores of a row are the same: topk may choose either.
    score, hidden = make.noise(b, n).float().argsort(1).float(), make.noise(b, n, d)
    cos, sin = make.noise(1, n, head), make.noise(1, n, head)
    place, mask = torch.arange(n, device=make.device)[None], make.numbers(2, b, n) > 0
    tensors = (hidden, place, cos, sin, mask)

    def eager() -> tuple[torch.Tensor, ...]:
        index = score.topk(kept).indices.sort().values
        return index, *(x.expand(b, *x.shape[1:])[torch.arange(b, device=make.device)[:, None], index] for x in tensors)

    moved = 2 * (size(hidden[:, :kept], mask[:, :kept]) + b * kept * (8 + 2 * head * hidden.element_size()))
    yield Case(
        "select_tokens", f"{b} x {n} to {kept}, D {d}, with positions, rotary tables and mask",
        lambda how: ops.select_tokens(score, kept, *tensors, backend=how),
        0, size(score) + moved, {"topk": lambda: score.topk(kept).indices, "eager": eager}, copy_share=0.8,
    )  # fmt: skip


def gather_kv(make: Maker) -> Iterator[Case]:
    b, heads, n, kept, d = make.choose((8, 32, 2880, 640, 128), (1, 32, 2880, 640, 128), (2, 2, 33, 9, 16))
    key, value = make.noise(b, heads, n, d), make.noise(b, heads, n, d)
    index = make.noise(b, n).float().argsort(1)[:, :kept].sort(1).values
    rows = index[:, None, :, None].expand(-1, heads, -1, d)

    def shorten(how: Any, in_place: bool, copied: bool = False) -> Any:
        layer = (key.clone(), value.clone()) if copied else (key, value)
        return ops.gather_kv(*layer, index, in_place=in_place, backend=how)

    shape, moved = f"{b} x {heads} heads, {n} to {kept}, D {d}", 4 * size(key[:, :, :kept])
    others = {"eager": lambda: (key.gather(2, rows), value.gather(2, rows))}
    yield Case("gather_kv", shape, lambda how: shorten(how, False), 0, moved, others, copy_share=0.8)
    yield Case(
        "gather_kv", f"{shape}, in place", lambda how: shorten(how, True), 0, moved, others,
        checked=lambda how: shorten(how, True, copied=True),
    )  # fmt: skip


def pooled_probe(make: Maker) -> Iterator[Case]:
    b, m, n, d = make.choose((256, 32, 196, 768), (16, 32, 196, 768), (2, 3, 17, 40))
    tokens, query = make.noise(b, n, d), (make.noise(m, d) * 0.02).requires_grad_()
    pull, scale = make.noise(b, m, d), d**-0.5
    shape = f"efficient probing, {b} x {n} tokens, D {d}, {m} queries"
    flops, moved = 4 * b * m * n * d, size(tokens, pull)

    def step(pool: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Forward and the gradient of the queries."""

        def run() -> torch.Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(pool(), query, pull)[0]

        return run

    def eager() -> torch.Tensor:
        return (query @ tokens.mT * scale).softmax(-1) @ tokens

    def fused(how: Any) -> torch.Tensor:
        return ops.pooled_probe(query, tokens, scale=scale, backend=how)

    yield Case("pooled_probe", shape, fused, flops, moved, {"eager": eager}, copy_share=0.7)
    yield Case(
        "pooled_probe", f"{shape}, with backward", lambda how: step(lambda: fused(how))(),
        2.5 * flops, 2 * moved, {"eager": step(eager)},
    )  # fmt: skip
    b, h, n, d = make.choose((256, 12, 196, 64), (16, 12, 196, 64), (2, 2, 17, 16))
    one, k, v = make.noise(h, 1, d), make.noise(b, h, n, d), make.noise(b, h, n, d)
    yield Case(
        "pooled_probe", f"one query, {b} x {h} heads, {n} tokens, D {d}",
        lambda how: ops.pooled_probe(one, k, v, scale=d**-0.5, backend=how), 4 * b * h * n * d, size(k, v),
        {
            "sdpa": lambda: F.scaled_dot_product_attention(one[None].expand(b, -1, -1, -1), k, v),
            "eager": lambda: weights(one[None], k) @ v,
        },
    )  # fmt: skip


def grouped_attention(make: Maker) -> Iterator[Case]:
    def case(title: str, edited: bool, rows: int, b: int, h: int, kv: int, n: int, d: int) -> Case:
        q, k, v = make.noise(b, h, rows, d), make.noise(b, kv, n, d), make.noise(b, kv, n, d)
        groups = torch.zeros(b, n, dtype=torch.uint8, device=make.device)
        # No threshold that rounding could put a row on either side of.
        rule = Redistribution(rho_nonsink=0.0, min_visual_mass=0.0)
        groups[:, n // 8 : n // 2], groups[:, n // 4], groups[:, 0] = 1, 2, 3
        sets = KeySets(groups >= 2, (groups == 1) | (groups == 2))
        head_scale = make.noise(b, h).abs().float()
        edit: dict[str, Any] = {"redistribution": rule, "head_scale": head_scale} if edited else {}

        def run(how: Any) -> torch.Tensor:
            return ops.grouped_attention(q, k, v, groups, scale=d**-0.5, causal=True, backend=how, **edit).output

        def eager() -> torch.Tensor:
            made = weights(q, k, causal=True)
            if edited:
                wide = made.float()
                masses = Masses.of(wide, sets)
                made = redistribute(wide, sets, masses, image_centric(masses, sets, rule), rule.move).to(q.dtype)
            output = made @ v.repeat_interleave(h // kv, 1)
            return (output * head_scale[:, :, None, None]).to(q.dtype) if edited else output

        return Case(
            "grouped_attention", f"{title}{', VAR and VHR' if edited else ''}, {b} x {h}/{kv} heads, N {n}, D {d}", run,
            4 * b * h * rows * n * d / (2 if rows > 1 else 1), size(q, k, v, q),
            {"flash": flash(q, k, v, causal=rows > 1), "eager": eager}, {"flash": 1.25},
        )  # fmt: skip

    for edited in (False, True):
        shape = make.choose((1, 32, 8, 4096, 128), (1, 32, 8, 2048, 128), (1, 4, 2, 33, 16))
        yield case("prefill", edited, shape[3], *shape)
        yield case("decode", edited, 1, *make.choose((8, 32, 8, 4096, 128), (1, 32, 8, 4096, 128), (2, 4, 2, 33, 16)))


def head_scale(make: Maker) -> Iterator[Case]:
    b, t, h, d = make.choose((1, 4096, 32, 128), (1, 2048, 32, 128), (2, 5, 2, 8))
    x, scale = make.noise(b, t, h * d), make.noise(b, h)
    # One line of PyTorch on every device; fused it is `grouped_attention(..., head_scale=...)`.
    yield Case(
        "head_scale", f"{b} x {t}, {h} heads, D {d}", lambda how: ops.head_scale(x, scale), b * t * h * d, 2 * size(x),
        {"eager": lambda: x * scale.repeat_interleave(d, 1)[:, None]},
    )  # fmt: skip


OPS: tuple[Callable[[Maker], Iterator[Case]], ...] = (
    query_row_attention, received_attention, flowcut_statistics, select_tokens, gather_kv, pooled_probe,
    grouped_attention, head_scale,
)  # fmt: skip


def check(case: Case, dtype: torch.dtype, cpu: bool = False) -> dict[str, Any]:
    """How far Triton is from the reference, on a CPU the reference from eager PyTorch: floating-point results by error,
    others by being the same."""
    run = case.checked or case.run
    found, expected = (run("reference"), case.others["eager"]()) if cpu else (run("triton"), run("reference"))
    error, same = 0.0, True
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not a.is_floating_point():
            same &= torch.equal(a, b)
            continue
        a, b = a.detach().double(), b.detach().double()
        off = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
        error = max(error, float(off)) if bool(off.isfinite()) else float("inf")
    return {"error": error, "tolerance": TOLERANCE[dtype], "ok": same and error <= TOLERANCE[dtype]}


def time(case: Case, roofline: Roofline, args: argparse.Namespace) -> dict[str, Any]:
    ours = "reference" if args.cpu else "triton"
    arms = {name: partial(case.run, name) for name in dict.fromkeys((ours, "reference"))} | case.others
    times = interleave(arms, args.repeats, args.warmup)
    first = times[ours]
    found: dict[str, Any] = {
        "milliseconds": {name: one.seconds.milliseconds(4) for name, one in times.items()},
        f"{ours}_over": {name: first.over(one).rounded(3) for name, one in times.items() if name != ours},
        "targets": {},
    }
    seconds = first.seconds.median
    copy = case.bytes / roofline.bandwidth["copy"] / seconds
    found["share_of_copy_bandwidth"] = round(copy, 3)
    found["share_of_floor"] = round(max(copy, case.flops / roofline.flops_per_second / seconds), 3)
    found["bytes_above_inputs"] = {name: _peak(arm, roofline.device) for name, arm in arms.items()}
    if args.cpu:
        return found  # targets are those of a card
    for arm, most in case.targets.items():
        ratio = found["triton_over"][arm]["median"]
        found["targets"][f"over {arm}"] = {"at_most": round(most, 3), "met": ratio <= most}
    if case.copy_share is not None:
        found["targets"]["share of copy bandwidth"] = {"at_least": case.copy_share, "met": copy >= case.copy_share}
    return found


def _peak(arm: Callable[[], Any], device: str) -> int | None:
    """The most that a call holds above what was there, its result included; None where nothing is told."""
    with torch.inference_mode():
        return peak_memory(arm, torch.device(device)).get("above")


def report(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("op", "shape", "error", "ms", "over", "MB above inputs", "of the floor", "targets")
    for row in rows:
        error = f"{row['check']['error']:.1e}" + ("" if row["check"]["ok"] else " WRONG")
        ms = over = memory = floor = targets = "not measured"
        if "milliseconds" in row:
            ours, spread = next(iter(row["milliseconds"].items()))
            ms = f"{spread['median']:.3f}"
            over = ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in row[f"{ours}_over"].items())
            held = row["bytes_above_inputs"]
            memory = ", ".join(f"{name} {most / 1e6:.1f}" for name, most in held.items() if most is not None)
            floor = f"{row['share_of_floor']:.0%}"
            targets = ", ".join(f"{name} {'met' if one['met'] else 'missed'}" for name, one in row["targets"].items())
        table.add_row(row["op"], row["shape"], error, ms, over, memory, floor, targets)
    console.print(table)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="correctness alone, without timing")
    parser.add_argument("--cpu", action="store_true", help="references against eager PyTorch on the CPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", choices=[op.__name__ for op in OPS])
    parser.add_argument(
        "--dtype", help="bfloat16 on a card, float32 with --cpu, or another", choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    card = torch.cuda.is_available() and not args.cpu
    if not (card or args.check or args.cpu):
        raise SystemExit(
            "No GPU here, so there is no kernel to time: run this on a card, or with --check, which interprets the "
            "kernels on the CPU and compares them with their references on small shapes, or with --cpu, which times "
            "the references."
        )
    shapes = "card" if card else "cpu" if args.cpu and not args.check else "small"
    if not (card or args.cpu):
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        console.print("No GPU here: kernels are interpreted on small shapes; nothing is timed.")
    args.dtype = args.dtype or ("float32" if args.cpu else "bfloat16")
    device, dtype = torch.device("cuda" if card else "cpu"), getattr(torch, args.dtype)
    console.print(f"{torch.cuda.get_device_name() if card else cpu_name()}, {args.dtype}")
    roofline = None if args.check else measure_roofline(device, dtype)
    rows: list[dict[str, Any]] = []
    for op in OPS:
        if args.only and op.__name__ not in args.only:
            continue
        for case in op(Maker(device, dtype, shapes, args.seed)):
            row: dict[str, Any] = {"op": case.op, "shape": case.shape, "flops": case.flops, "bytes": case.bytes}
            row["check"] = check(case, dtype, args.cpu)
            rows.append(row if roofline is None else row | time(case, roofline, args))
    report(console, rows)
    found = {
        "benchmark": "kernels",
        "machine": describe_machine(device),
        "settings": {
            "dtype": args.dtype,
            "repeats": args.repeats,
            "warmup": args.warmup,
            "timed": roofline is not None,
        },
        "roofline": None if roofline is None else roofline.as_dict(),
        "cases": rows,
    }
    if args.out:
        args.out.write_text(as_text(found))
        console.print(f"wrote {args.out}")
    wrong = [f"{row['op']} ({row['shape']})" for row in rows if not row["check"]["ok"]]
    if wrong:
        raise SystemExit(f"Not equal: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
