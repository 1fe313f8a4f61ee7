"""Train DyVTE's gates on any model that vlattn wraps; the model stays frozen.

"Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
arXiv 2411.19628. Labels, optimiser and schedule follow the released code; it draws one layer a step, here several can
share the pass with visual tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.interventions.dyvte_gates import CONFIG, DyVTEGates, ModelPrint
from vlattn.runtime.run_folder import replacing
from vlattn.training.dyvte_branches import Branches, GateTask, answered_prompts
from vlattn.training.dyvte_tasks import CollectedTasks, collect_tasks
from vlattn.training.examples import Example
from vlattn.training.schedule import cosine_with_warmup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

CHECKPOINT, LOG = "checkpoint.pt", "training_log.jsonl"


@dataclass(frozen=True)
class DyVTETraining:
    """How gates are trained.

    gate_hidden: width of each gate's hidden layer.
    epochs: passes over the examples; steps: batches in all, in place of epochs.
    lr: of AdamW without weight decay, after a warm-up over a share `warmup` of the steps, falling as a cosine.
    layers_per_step: how many layers are drawn for each batch; each costs another run of the layers above it. The
        released code draws 1.
    agreement, loss_ratio: when an answer counts as unchanged, see `vlattn.interventions.dyvte_labels.exit_labels`.
    seed: of the gates' first weights, the order of examples and the draw of layers.
    save_every: steps between checkpoints.
    """

    gate_hidden: int = 2048
    epochs: int = 1
    steps: int | None = None
    lr: float = 6e-5
    batch_size: int = 16
    layers_per_step: int = 1
    warmup: float = 0.03
    agreement: float = 0.99
    loss_ratio: float = 1.03
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("gate_hidden", "epochs", "batch_size", "layers_per_step", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}; give at least 1")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps: got {self.steps}; give at least 1, or leave it out and give epochs")
        if not self.lr > 0:
            raise InputError(f"lr: got {self.lr}; give a positive number such as 6e-5")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup: got {self.warmup}; give a share of the steps, from 0 to below 1")


@dataclass(frozen=True)
class Step:
    """What one step did.

    loss: mean over the layers drawn.
    share, right: by layer drawn, the share of exit labels, and of decisions that met them.
    """

    step: int
    steps: int
    lr: float
    loss: float
    share: dict[int, float]
    right: dict[int, float]


@dataclass
class Balance:
    """Labels and decisions of one layer, counted over a run."""

    examples: int = 0
    exits: int = 0
    right: int = 0


class DyVTETrainer:
    """Trains gates on `examples` and writes them to the folder `out`, with a log and, until done, a checkpoint.

    A run that was cut off goes on with `resume=True` and ends with the weights of an uninterrupted one: all that is
    drawn depends on the seed and the step alone.

    Args:
        model: frozen by running it without gradients, in eval mode; its own settings are not touched.
        processor: the model's own.
        examples: questions about images, with answers.
        out: folder for the gates; must not hold any yet.
        settings: see `DyVTETraining`.
        name: what to call the model in the gates' files.
        data: what to call the examples there.
        resume: go on from the checkpoint in `out`.

    Raises:
        InputError: `out` holds gates, an unfinished run without `resume`, or one made with other settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        examples: Sequence[Example],
        out: str | Path,
        settings: DyVTETraining,
        *,
        name: str = "",
        data: str = "",
        resume: bool = False,
    ) -> None:
        if not examples:
            raise InputError("examples: got none; give at least one")
        if model.training:
            raise InputError("model: it is in training mode; call model.eval() first")
        self.model, self.processor, self.examples = model, processor, list(examples)
        self.out, self.settings = Path(out), settings
        self.tasks: CollectedTasks | None = None
        self.branches = Branches(model, settings.agreement, settings.loss_ratio)
        if settings.layers_per_step > self.branches.layers:
            raise InputError(
                f"layers_per_step: got {settings.layers_per_step}; the model has {self.branches.layers} decoder layers"
            )
        made_for = ModelPrint.of(self.branches.adapter, name)
        drawn = {"steps": self.steps, "data": data, "examples": len(self.examples)}
        self.record: dict[str, Any] = {**dataclasses.asdict(settings), **drawn}
        del self.record["save_every"]
        self.gates = DyVTEGates(made_for, settings.gate_hidden, settings.seed).to(model.device)
        self.optimiser = torch.optim.AdamW(self.gates.parameters(), lr=settings.lr, weight_decay=0.0)
        self.balance = {layer: Balance() for layer in range(self.branches.layers)}
        self.first = self._resume() if resume else self._refuse_to_overwrite()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        per_epoch = math.ceil(len(self.examples) / self.settings.batch_size)
        return self.settings.steps or self.settings.epochs * per_epoch

    # What a step draws ------------------------------------------------------------------------------------------------
    def drawn_examples(self, step: int) -> list[int]:
        """Indices of the examples of a step: each epoch goes through all of them in an order of its own."""
        size, total = self.settings.batch_size, len(self.examples)
        per_epoch = math.ceil(total / size)
        order = list(range(total))
        random.Random(f"{self.settings.seed}/order/{step // per_epoch}").shuffle(order)
        start = step % per_epoch * size
        return order[start : start + size]

    def drawn_layers(self, step: int) -> list[int]:
        """The layers whose gates a step trains, ascending."""
        draw = random.Random(f"{self.settings.seed}/layers/{step}")
        return sorted(draw.sample(range(self.branches.layers), self.settings.layers_per_step))

    def collect(self, folder: str | Path, advance: Callable[[int], None] = lambda n: None) -> None:
        """Have gate inputs and labels of all examples and layers in `folder`, and train from them; see
        `vlattn.training.dyvte_tasks`. `advance` hears how many examples are done."""
        size = self.settings.batch_size
        self.tasks = collect_tasks(self.branches, self.processor, self.examples, folder, size, advance)

    # Running ----------------------------------------------------------------------------------------------------------
    def run(self, report: Callable[[Step], None] = lambda step: None, until: int | None = None) -> DyVTEGates:
        """Train to the end, or up to step `until` and leave a checkpoint; `report` hears of every step."""
        self.out.mkdir(parents=True, exist_ok=True)
        stop = self.steps if until is None else min(until, self.steps)
        start = time.monotonic()
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            for step in range(self.first, stop):
                done = self.step(step)
                line = {**dataclasses.asdict(done), "seconds": round(time.monotonic() - start, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                report(done)
                if (step + 1) % self.settings.save_every == 0 or step + 1 == stop:
                    self._save_checkpoint(step + 1)
        self.first = stop
        if stop == self.steps:
            self.gates.training_record = {**self.record, "labels": self._labels()}
            self.gates.save(self.out)
            (self.out / CHECKPOINT).unlink(missing_ok=True)
        return self.gates

    def step(self, step: int) -> Step:
        """One batch: labels from the frozen model, then a step of the gates of the layers that were drawn."""
        lr = self.settings.lr * cosine_with_warmup(step, self.steps, self.settings.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        losses, share, right = [], {}, {}
        for layer, task in self._tasks(step).items():
            logits = self.gates(layer, task.u)  # [B, 2]
            losses.append(F.cross_entropy(logits, task.y.long()))
            hits = (logits[:, 1] > logits[:, 0]) == task.y
            share[layer], right[layer] = float(task.y.float().mean()), float(hits.float().mean())
            count = self.balance[layer]
            count.examples += len(task.y)
            count.exits += int(task.y.sum())
            count.right += int(hits.sum())
        # The sum: a gate learns the same whatever others share its step. Gates that were not drawn have no gradient,
        # so AdamW passes them over.
        loss = torch.stack(losses).sum()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return Step(step + 1, self.steps, lr, float(loss.detach()) / len(losses), share, right)

    def _tasks(self, step: int) -> dict[int, GateTask]:
        drawn, layers = self.drawn_examples(step), self.drawn_layers(step)
        if self.tasks is not None:
            return self.tasks.take(drawn, layers, self.model.device)
        batch = answered_prompts(self.processor, [self.examples[i] for i in drawn], self.model.device)
        return self.branches.run(batch, layers)

    def _labels(self) -> dict[str, list[int]]:
        """By layer: examples seen, and how many of them were labelled exit."""
        counts = self.balance.values()
        return {"examples": [c.examples for c in counts], "exits": [c.exits for c in counts]}

    # Going on where a run was cut off ---------------------------------------------------------------------------------
    def _refuse_to_overwrite(self) -> int:
        if (self.out / CONFIG).is_file():
            raise InputError(f"out: {str(self.out)!r} holds gates already; give another folder")
        if (self.out / CHECKPOINT).is_file():
            raise InputError(f"out: {str(self.out)!r} holds an unfinished run; resume it, or give another folder")
        return 0

    def _save_checkpoint(self, step: int) -> None:
        state = {
            "step": step,
            "record": json.dumps(self.record, sort_keys=True),
            "model": dataclasses.asdict(self.gates.made_for),
            "gates": self.gates.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "balance": [dataclasses.astuple(self.balance[layer]) for layer in range(self.branches.layers)],
        }
        with replacing(self.out / CHECKPOINT) as partial:
            torch.save(state, partial)

    def _resume(self) -> int:
        path = self.out / CHECKPOINT
        if not path.is_file():
            raise InputError(f"resume: {str(self.out)!r} holds no checkpoint; leave resume out to start a run there")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before, now = json.loads(state["record"]), json.loads(json.dumps(self.record))
        differ = sorted(key for key in now if before.get(key) != now[key])
        differ += ModelPrint(**state["model"]).differences(self.gates.made_for)
        if differ:
            raise InputError(
                f"resume: {str(self.out)!r} was begun with other settings ({', '.join(differ)}); repeat those, or give "
                "another folder"
            )
        self.gates.load_state_dict(state["gates"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.balance = {layer: Balance(*counts) for layer, counts in enumerate(state["balance"])}
        self._cut_log(state["step"])
        return int(state["step"])

    def _cut_log(self, step: int) -> None:
        """Steps after the checkpoint are made again, so their lines go."""
        path = self.out / LOG
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        path.write_text("".join(lines[:step]), encoding="utf-8")
