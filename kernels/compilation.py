"""What a kernel needs of a card, found by compiling it for the card: no card has to be there.

Not under TRITON_INTERPRET=1, where `triton.jit` gives a function that has nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory (LDS on AMD) that one block may have."""


@dataclass(frozen=True)
class Compilation:
    """A kernel with the types of its arguments and one configuration.

    kernel: a function under `triton.jit`.
    signature: {argument: type}, as "*bf16", "fp32", "i32"; those in `constants` are left out.
    constants: {argument: value} of the constexpr arguments.
    aligned: arguments that 16 divides, addresses and strides: without them no load is wider than one number.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    aligned: Collection[str] = ()


@dataclass(frozen=True)
class Resources:
    """registers: of a thread. spilled: bytes of a thread that went to local memory. shared: bytes of a block."""

    registers: int
    spilled: int
    shared: int


def resources(what: Compilation, target: str) -> Resources:
    """Compile for one of TARGETS and read what the binary asks for."""
    types = {name: what.signature.get(name, "constexpr") for name in what.kernel.arg_names}
    known = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(types) if name in what.aligned}
    source = ASTSource(fn=what.kernel, signature=types, constexprs=dict(what.constants), attrs=known)
    options = {"num_warps": what.warps, "num_stages": what.stages}
    built = triton.compile(source, target=TARGETS[target], options=options)
    if "cubin" in built.asm:
        registers, spilled = _cubin_usage(built.asm["cubin"])
    else:
        registers, spilled = _amdgcn_usage(built.asm["amdgcn"])
    return Resources(registers, spilled, built.metadata.shared)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and the stack of a thread: these kernels keep nothing there but what did not fit in registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed nothing that can be read: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def _amdgcn_usage(text: str) -> tuple[int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size")
