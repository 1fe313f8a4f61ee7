"""How fast this machine can be at best: peak matrix products and memory bandwidth, and the bound on time they give.

The roofline model ("Roofline: An Insightful Visual Performance Model for Multicore Architectures", Communications of
the ACM 52(4), 2009): work that needs f operations and moves b bytes takes at least max(f / peak, b / bandwidth). A
prefill of hundreds of tokens is bound by the first term, which shrinks with the tokens that are dropped. A decode step
at batch 1 reads every weight once for a handful of tokens and is bound by the second, in which the KV cache, all that
pruning shortens, is a small part. Launch overhead, activations and what a method spends on choosing are left out, so
small models stay far above their bound; one that fits into the processor's cache may read faster than memory can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from vlattn.errors import InputError
from vlattn.runtime.timing import Timing, interleave, synchronize

SIZES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096)}
BUFFER = {"cpu": 1 << 28, "cuda": 1 << 30, "mps": 1 << 28}


@dataclass(frozen=True)
class Bound:
    """The least time that some work can take, and what sets it."""

    seconds: float
    by: Literal["compute", "memory"]


@dataclass(frozen=True)
class Roofline:
    """What was measured on one device.

    device, dtype, threads: where, for which matrices, and with how many CPU threads.
    matmul: {n: operations per second of an n x n by n x n product, best round}.
    bandwidth: {"copy": bytes per second read and written, "read": read by a sum}, best round.
    """

    device: str
    dtype: str
    threads: int
    matmul: dict[int, float]
    bandwidth: dict[str, float]

    @property
    def flops_per_second(self) -> float:
        return max(self.matmul.values())

    @property
    def bytes_per_second(self) -> float:
        return max(self.bandwidth.values())

    def bound(self, flops: float, bytes_moved: float) -> Bound:
        """The least time for `flops` operations (two per MAC) that move `bytes_moved` bytes."""
        compute, memory = flops / self.flops_per_second, bytes_moved / self.bytes_per_second
        return Bound(compute, "compute") if compute >= memory else Bound(memory, "memory")

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
            "matmul": {str(n): rate for n, rate in self.matmul.items()},
            "bandwidth": dict(self.bandwidth),
        }


def measure_roofline(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    sizes: Sequence[int] | None = None,
    buffer_bytes: int | None = None,
    seconds: float = 1.5,
) -> Roofline:
    """Measure a device: square matrix products of a few sizes and passes over a large buffer, each in interleaved
    rounds of which the best counts.

    Args:
        device: what to measure.
        dtype: of the matrices; rates differ by a factor of two and more between dtypes.
        sizes: of the square matrices; default 256 to 1024 on a CPU, 2048 to 8192 on CUDA. Sizes too slow for the time
            that is left are not taken.
        buffer_bytes: of the buffer that is read and copied, larger than any cache; default 256 MiB, on CUDA 1 GiB.
        seconds: to spend on products, and again on memory; a single round may exceed it.

    Raises:
        InputError: a dtype that is not floating point, or a size, buffer or time that is not positive.
    """
    place = torch.device(device)
    if not dtype.is_floating_point:
        raise InputError(f"dtype: got {dtype}; give a floating-point dtype such as torch.float32")
    sizes = SIZES.get(place.type, SIZES["cpu"]) if sizes is None else sizes
    size = BUFFER.get(place.type, BUFFER["cpu"]) if buffer_bytes is None else buffer_bytes
    if not sizes or min(sizes) < 1 or size < 8 or seconds <= 0:
        raise InputError(
            f"sizes, buffer_bytes, seconds: got {list(sizes)}, {size}, {seconds}; "
            "give at least one size from 1, 8 bytes or more, and a time above 0"
        )
    with torch.inference_mode():
        matmul = _matmul_rates(place, dtype, sizes, seconds)
        bandwidth = _bandwidth(place, size, seconds)
    return Roofline(str(place), str(dtype).removeprefix("torch."), torch.get_num_threads(), matmul, bandwidth)


def _matmul_rates(device: torch.device, dtype: torch.dtype, sizes: Sequence[int], seconds: float) -> dict[int, float]:
    arms: dict[str, Callable[[], object]] = {}
    spent, rate = 0.0, 0.0
    for n in sorted(sizes):
        # Three rounds of all sizes so far must fit; the smallest is taken whatever it costs.
        if arms and 3 * (spent + 2 * n**3 / rate) > seconds:
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        arm = partial(torch.mm, a, b.t(), out=out)  # laid out as a linear layer has its weight
        arm()  # the first product of a size sets up
        once = _once(arm)
        arms[str(n)], spent, rate = arm, spent + once, 2 * n**3 / once
    found = _best(arms, spent, seconds)
    return {int(n): 2 * int(n) ** 3 / best for n, best in found.items()}


def _bandwidth(device: torch.device, size: int, seconds: float) -> dict[str, float]:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    arms: dict[str, Callable[[], object]] = {"copy": partial(target.copy_, source), "read": source.sum}
    for arm in arms.values():
        arm()
    found = _best(arms, sum(map(_once, arms.values())), seconds)
    moved = {"copy": 2 * source.nbytes, "read": source.nbytes}
    return {name: moved[name] / best for name, best in found.items()}


def _once(arm: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    arm()
    synchronize()
    return time.perf_counter() - start


def _best(arms: Mapping[str, Callable[[], object]], spent: float, seconds: float) -> dict[str, float]:
    """The fastest round of each arm in seconds, in as many rounds (3 to 50) as fit."""
    rounds = max(3, min(50, int(seconds / max(spent, 1e-9))))
    timed: dict[str, Timing] = interleave(arms, rounds, warmup=1)
    return {name: max(min(timing.nanoseconds), 1) / 1e9 for name, timing in timed.items()}
