"""Gate inputs and labels of all examples and layers, made once and kept: for several epochs, or several gate sizes.

The model is frozen, so they never change. Where each example is seen once, drawing layers on the fly is cheaper.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from vlattn.errors import InputError
from vlattn.eval.answer import fingerprint
from vlattn.interventions.dyvte_gates import ModelPrint
from vlattn.runtime.run_folder import replacing
from vlattn.training.dyvte_branches import Branches, GateTask, answered_prompts
from vlattn.training.examples import Example

if TYPE_CHECKING:
    from transformers import ProcessorMixin

STAMP = "tasks.json"


@dataclass(frozen=True)
class CollectedTasks:
    """u: gate inputs [L, N, 2C]; y: bool [L, N], True for exit; over L layers and N examples."""

    u: torch.Tensor
    y: torch.Tensor

    def take(self, examples: Sequence[int], layers: Sequence[int], device: torch.device) -> dict[int, GateTask]:
        """The tasks of some examples at some layers, {layer: GateTask}."""
        rows = torch.tensor(examples)
        return {layer: GateTask(self.u[layer, rows].to(device), self.y[layer, rows].to(device)) for layer in layers}


def collect_tasks(
    branches: Branches,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    folder: str | Path,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda n: None,
) -> CollectedTasks:
    """Run the frozen model over all examples, one file of `folder` for each batch; batches that are there are read.

    Takes 1 + (L - 1) / 2 passes of the model for each example, and 8 L C bytes on disk (1 MB at 32 layers of 4096).

    Raises:
        InputError: the folder holds the tasks of other examples, another model, other labels or other batches.
    """
    path = Path(folder)
    stamp = _stamp(branches, examples, batch_size)
    path.mkdir(parents=True, exist_ok=True)
    if (path / STAMP).is_file():
        before = json.loads((path / STAMP).read_text(encoding="utf-8"))
        differ = sorted(key for key in stamp if before.get(key) != stamp[key])
        if differ:
            raise InputError(f"tasks: {str(folder)!r} was made with other {', '.join(differ)}; give another folder")
    else:
        (path / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    parts = []
    for start in range(0, len(examples), batch_size):
        file = path / f"{start:08d}.safetensors"
        chunk = examples[start : start + batch_size]
        if not file.is_file():
            found = branches.run(answered_prompts(processor, chunk, branches.model.device), range(branches.layers))
            with replacing(file) as partial:  # a file that is there is whole
                stacked = {name: torch.stack([getattr(t, name).cpu() for t in found.values()]) for name in "uy"}
                save_file(stacked, partial)
        parts.append(load_file(file))
        advance(len(chunk))
    return CollectedTasks(*(torch.cat([part[name] for part in parts], 1) for name in "uy"))


def _stamp(branches: Branches, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    asked = [[e.image.name, e.question, e.answer] for e in examples]
    return {
        "model": dataclasses.asdict(ModelPrint.of(branches.adapter)),
        "weights": fingerprint(branches.model),
        "examples": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "agreement": branches.agreement,
        "loss_ratio": branches.loss_ratio,
        "batch_size": batch_size,
    }
