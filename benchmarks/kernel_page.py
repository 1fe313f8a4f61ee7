"""docs/kernels.md, from what the kernel programs found.

    python benchmarks/kernel_page.py

Reads `kernel_resources.json` and every `kernels_*.json` in benchmarks/results; what no file tells is "not measured".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parent
CARDS = {"sm_80": "A100", "sm_90": "H100, H200", "sm_100": "B200", "gfx942": "MI300"}
TARGET_CARD = "H100"
INTRODUCTION = """# Kernels

Written by `python benchmarks/kernel_page.py`; a test keeps it equal to the files that it is made from. What each op
computes, takes and costs is in its docstring in `vlattn/ops.py`, its definition in `kernels/reference.py`.
"""
RESOURCES = """## What they ask of a card

From `python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.json`, which compiles with Triton
{triton} and needs no card. Registers are of a thread (vector registers on AMD), spilled are bytes of a thread that did
not fit into them, shared is the memory of a block (LDS on AMD), each over all configurations of a kernel. The heaviest
configuration is the one that spills most, or else has most registers. Configurations are chosen so that none spills on
sm_80 and sm_90; other targets get the same ones.
"""


def load(name: str) -> ModuleType:
    """A program of this folder, which is no package."""
    full = f"vlattn_benchmark_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# Resources ------------------------------------------------------------------------------------------------------------
def resources(found: Mapping[str, Any]) -> str:
    """A table for each target, of what `kernel_resources.py` wrote."""
    parts = [RESOURCES.format(triton=found["triton"])]
    for target, limit in found["shared_limit"].items():
        parts += [f"### {target} ({CARDS[target]})\n", _summary(found["kernels"], target, limit)]
        head = ("op", "kernel", "numbers", "configurations", "registers", "spilled", "shared, KiB", "heaviest")
        parts.append(table(head, _kernels(found["kernels"], target)))
    return "\n".join(parts)


def _summary(lines: Sequence[Mapping[str, Any]], target: str, limit: int) -> str:
    tried = [line[target] for line in lines if target in line]
    made = [numbers for numbers in tried if not isinstance(numbers, str)]
    spilled = [spill for _, spill, _ in made if spill]
    told = [f"{len(tried)} of {len(lines)} configurations tried"]
    if len(made) < len(tried):
        told.append(f"{len(tried) - len(made)} of them do not compile")
    told.append(f"{len(spilled)} spill, up to {max(spilled)} bytes of a thread" if spilled else "none spills")
    large = sum(shared > limit for _, _, shared in made)
    most = f"{limit // 1024} KiB of shared memory that a block may have"
    told.append(f"{large} ask for more than the {most}" if large else f"none asks for more than the {most}")
    return f"{'; '.join(told)}.\n"


def _kernels(lines: Sequence[Mapping[str, Any]], target: str) -> list[tuple[object, ...]]:
    kernels: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        if target in line:
            kernels.setdefault((line["op"], line["kernel"], line["dtype"]), []).append(line)
    rows: list[tuple[object, ...]] = []
    for key, some in kernels.items():
        made = [line for line in some if not isinstance(line[target], str)]
        failed = f", {len(some) - len(made)} fail" if len(made) < len(some) else ""
        if not made:
            rows.append((*key, f"{len(some)}{failed}", *["-"] * 4))
            continue
        registers, spilled, shared = zip(*(line[target] for line in made), strict=True)
        heaviest = max(made, key=lambda line: (line[target][1], line[target][0], line[target][2]))
        spills = f"{max(spilled)} ({sum(map(bool, spilled))} of them)" if any(spilled) else 0
        title = f"{heaviest['name']}, {heaviest['warps']} warps, {heaviest['stages']} stages"
        kib = _range([round(size / 1024) for size in shared])
        rows.append((*key, f"{len(some)}{failed}", _range(registers), spills, kib, title))
    return rows


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


# Times ----------------------------------------------------------------------------------------------------------------
def times(results: Sequence[Mapping[str, Any]]) -> str:
    """What `kernels.py` timed: each card that it saw, the targets of those that it did not, and references on CPUs."""
    timed = [found for found in results if found["settings"]["timed"]]
    cards = [found for found in timed if "gpu" in found["machine"]]
    cpus = [found for found in timed if "gpu" not in found["machine"]]
    parts = ["## Times on a card\n", _commands("python benchmarks/kernels.py", "kernels_CARD.json")]
    for found in cards:
        parts += [f"### {_machine(found)}\n", _timed(found, "triton", ("targets", _met))]
    if not any(TARGET_CARD in found["machine"]["gpu"] for found in cards):
        kernels = load("kernels")
        maker = kernels.Maker(torch.device("meta"), torch.bfloat16)
        cases = [case for op in kernels.OPS for case in op(maker)]
        rows = [(case.op, case.shape, _wanted(case), "not measured") for case in cases]
        parts += [f"### {TARGET_CARD}\n", table(("op", "shape", "target", "ms"), rows)]
    parts += ["## The references on a CPU\n", _commands("python benchmarks/kernels.py --cpu", "kernels_cpu.json")]
    parts.append("Eager PyTorch makes whole matrices of weights. Memory is what a call holds above its inputs.\n")
    for found in cpus:
        parts += [f"### {_machine(found)}\n", _timed(found, "reference", ("MB held", _held))]
    return "\n".join([*parts, *([] if cpus else ["Not measured.\n"])])


def _commands(command: str, file: str) -> str:
    return f"From `{command} --out benchmarks/results/{file}`. Median (quartiles), arms interleaved.\n"


def _machine(found: Mapping[str, Any]) -> str:
    machine, settings = found["machine"], found["settings"]
    threads = "" if "gpu" in machine else f", {machine['threads']} threads"
    return f"{machine.get('gpu', machine['cpu'])}{threads}, {settings['dtype']}, torch {machine['versions']['torch']}"


def _timed(found: Mapping[str, Any], ours: str, last: tuple[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        spread = case["milliseconds"][ours]
        over = ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in case[f"{ours}_over"].items())
        ms = f"{spread['median']:.3g} ({spread['lower']:.3g} to {spread['upper']:.3g})"
        rows.append((case["op"], case["shape"], ms, over, f"{case['share_of_floor']:.0%}", last[1](case)))
    return table(("op", "shape", "ms", "its time over", "of the floor", last[0]), rows)


def _met(case: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'met' if one['met'] else 'missed'}" for name, one in case["targets"].items())


def _held(case: Mapping[str, Any]) -> str:
    held = case["bytes_above_inputs"].items()
    return ", ".join(f"{name} {most / 1e6:.3g}" for name, most in held if most is not None)


def _wanted(case: Any) -> str:
    told = [f"at most {most:g} of {arm}" for arm, most in case.targets.items()]
    return ", ".join(told + ([] if case.copy_share is None else [f"{case.copy_share:.0%} of copy bandwidth"]))


def page(folder: Path) -> str:
    """From the results in a folder."""
    asked = json.loads((folder / "kernel_resources.json").read_text())
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("kernels_*.json"))]
    return "\n".join([INTRODUCTION, resources(asked), times(results)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "kernels.md")
    args = parser.parse_args(argv)
    args.out.write_text(page(HERE / "results"))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
