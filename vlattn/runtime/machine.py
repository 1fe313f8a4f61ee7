"""What a measurement has to say about where it was made."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vlattn", "torch", "transformers", "triton")


def describe_machine(device: str | torch.device = "cpu") -> dict[str, object]:
    """Machine, threads and versions as plain data: names of parts only, nothing about who or where."""
    device = torch.device(device)
    found: dict[str, object] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None}
        | {"torch": str(torch.__version__)},  # says what it was built for, too
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def describe_run(model: Any) -> dict[str, Any]:
    """Where a live model runs and how, as records and reports keep it: flat, and the same keys on every machine.

    model: a transformers model; its first parameter tells device and dtype.
    """
    first = next(model.parameters())
    machine = describe_machine(first.device)
    versions: Any = machine["versions"]
    return {
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "machine": machine.get("gpu", machine["cpu"]),
        "device": machine["device"],
        "system": machine["system"],
        "threads": machine["threads"],
        "cores": machine["cores"],
        "dtype": str(first.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
    }


def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
