"""How a Triton kernel with a few configurations is started: tuned on a GPU at its first call, interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """sums + a @ b in fp32, for matrices and batches of them; fp32 inputs are not rounded to TF32."""
    if INTERPRETED:  # the interpreter would multiply bf16 as the integers that it keeps them in
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


INTERPRETED = tl.constexpr(isinstance(dot, InterpretedFunction))
"""Whether kernels run on the CPU, under TRITON_INTERPRET=1."""


class Tuned:
    """A kernel and its configurations. Importing tunes nothing; the first call with new values of `key` on a GPU does.

    kernel: a function under `triton.jit`.
    configs: what to try. Under TRITON_INTERPRET=1, where time means nothing, the first is taken.
    key: names of arguments whose values choose the configuration anew.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> None:
        self.kernel, self.configs, self.key = kernel, list(configs), list(key)
        self._tuner = None if INTERPRETED.value else triton.autotune(configs=self.configs, key=self.key)(kernel)

    def __call__(self, grid: Grid, *args: Any, **constants: Any) -> None:
        """Start the kernel.

        grid: gives the number of programs from the constants and the configuration.
        args: arguments of the kernel in order. constants: its constexpr arguments but those of the configuration.
        """
        if self._tuner is not None:
            self._tuner[grid](*args, **constants)
            return
        first = self.configs[0]
        self.kernel[grid({**constants, **first.kwargs})](*args, **constants, **first.kwargs)
