"""What every Triton kernel asks of a card in every configuration: registers, spills and shared memory. No card needed.

    python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.json
    python benchmarks/kernel_resources.py --targets sm_90 --only pooled_probe --jobs 2

Kernels are compiled for the targets (sm_80: A100, sm_90: H100 and H200, sm_100: B200, gfx942: MI300) with the compilers
that Triton brings along. A configuration that spills registers (bytes of a thread) or asks for more shared memory
than a block may have is marked; on AMD, registers are vector registers and shared memory is LDS.

What is compiled is what `compilations()` of each kernel's file lists: every configuration, for usual widths of heads
and tokens, in bf16 and fp32, with all that one call can ask for. What only interventions and some towers need (a mask
for each row, lengths that 16 does not divide, heads of 72 channels) is compiled in bf16 alone. Views whose last
dimension is not contiguous run, but are not compiled here. `python benchmarks/kernel_page.py` puts the results into
docs/kernels.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlattn import ops

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def find(only: Sequence[str] = ()) -> list[tuple[str, int]]:
    """(module, place in its `compilations()`) of everything that there is to compile."""
    import vlattn.kernels

    found, seen = [], set()
    names = [module.name for module in pkgutil.iter_modules(vlattn.kernels.__path__)]
    # Ops first: a list that an op takes over from a module beside it counts as the op's.
    for name in sorted(names, key=lambda name: (not hasattr(ops, name), name)):
        listed = getattr(importlib.import_module(f"vlattn.kernels.{name}"), "compilations", None)
        if listed is None or listed in seen or (only and name not in only):
            continue
        seen.add(listed)
        found += [(name, place) for place in range(len(listed()))]
    return found


def firsts(work: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """One configuration of each kernel and dtype."""
    found: dict[tuple[str, str, bool], tuple[str, int]] = {}
    for name, place in work:
        one = importlib.import_module(f"vlattn.kernels.{name}").compilations()[place]
        found.setdefault((name, one.kernel.__name__, "*bf16" in one.signature.values()), (name, place))
    return list(found.values())


def measure(what: tuple[str, int], target: str) -> dict[str, Any]:
    """One row: what one compilation needs, or why it fails."""
    from vlattn.kernels.compilation import SHARED_LIMIT, resources

    name, place = what
    one = importlib.import_module(f"vlattn.kernels.{name}").compilations()[place]
    numbers = [kind.lstrip("*") for kind in one.signature.values() if kind.startswith("*")]
    row: dict[str, Any] = {
        "op": name,
        "kernel": one.kernel.__name__,
        "name": one.name,
        "dtype": next((kind for kind in numbers if kind in ("bf16", "fp16")), numbers[0]),
        "warps": one.warps,
        "stages": one.stages,
        "target": target,
        "shared_limit": SHARED_LIMIT[target],
    }
    try:
        return row | asdict(resources(one, target))
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}


def fits(row: dict[str, Any]) -> bool:
    return "error" not in row and not row["spilled"] and row["shared"] <= row["shared_limit"]


def report(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("op", "kernel and configuration", "dtype", "target", "registers", "spilled", "shared", "")
    for row in rows:
        numbers = [str(row.get(key, "-")) for key in ("registers", "spilled", "shared")]
        mark = "" if fits(row) else row.get("error", "does not fit")
        table.add_row(row["op"], row["name"], row["dtype"], row["target"], *numbers, mark)
    console.print(table)
    bad = sum(not fits(row) for row in rows)
    console.print(f"{len(rows)} compilations, {bad} of them spill, exceed the shared memory or do not compile")


def as_text(rows: Sequence[dict[str, Any]], triton: str) -> str:
    """JSON with a line for each configuration: under each target [registers, spilled, shared], or why it fails."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        named = {key: row[key] for key in ("op", "kernel", "name", "dtype", "warps", "stages")}
        numbers = row.get("error") or [row[key] for key in ("registers", "spilled", "shared")]
        lines.setdefault(tuple(named.values()), named)[row["target"]] = numbers
    limits = {row["target"]: row["shared_limit"] for row in rows}
    head = {"benchmark": "kernel_resources", "triton": triton, "shared_limit": limits}
    listed = ",\n".join(f"  {json.dumps(line)}" for line in lines.values())
    return json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{listed}\n ]\n}}\n'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="ops of vlattn.ops; all without it")
    parser.add_argument("--first", action="store_true", help="only one configuration of each kernel and dtype")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if one does not compile, spills or exceeds")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, console = parser.parse_args(argv), Console()
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    import triton

    chosen = firsts(find(args.only)) if args.first else find(args.only)
    work = [(what, target) for target in args.targets for what in chosen]
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(measure, *zip(*work, strict=True), chunksize=4))
    else:
        rows = [measure(*one) for one in work]
    report(console, rows)
    if args.out:
        args.out.write_text(as_text(rows, triton.__version__))
        console.print(f"wrote {args.out}")
    if args.strict and not all(map(fits, rows)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
