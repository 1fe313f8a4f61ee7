"""Train a probe: a pooler under batch norm and a classifier, at one or several learning rates, on any source of tokens.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178; the defaults are its
protocol, and a result says where a run leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.head import make_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.poolers.registry import parse_pooler
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_progress import progress_bar
from vlattn.probing.train_result import EpochRecord, ProbeResult
from vlattn.probing.train_run import ProbeRun
from vlattn.probing.train_seed import seeded
from vlattn.probing.train_source import Source
from vlattn.probing.train_state import ProbeFolder, load_result
from vlattn.probing.train_world import join_world
from vlattn.runtime.machine import describe_machine


def train_probe(
    train: Source,
    val: Source,
    pooler: str,
    classes: int,
    settings: ProbeSettings | None = None,
    *,
    dim: int | None = None,
    grid: tuple[int, int] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    about: Mapping[str, Any] | None = None,
    departures: Sequence[str] = (),
    report: Callable[[EpochRecord], None] = lambda record: None,
    progress: bool = False,
) -> ProbeResult:
    """Train a probe on `train` and choose its best epoch on `val`.

    Several learning rates in `settings` are trained at once on one stream of tokens. Under `accelerate launch` or
    `torchrun` each process trains on its own sources, which give equally many full batches everywhere; see
    `vlattn.probing.train_world`.

    A pooler with `branch_losses` (`acmil`, `acmil_mha`) is trained on the sum of the loss of the bag and these; see
    `vlattn.probing.train_loss.training_losses`. Its weights are settings of the pooler: "acmil:w_branch=0,w_div=0" has
    the loss of the bag alone, as other poolers do.

    Args:
        train: (tokens, labels) batches of equal size; one that is smaller than the first is left out, as are those that
            do not fill an update. Tokens are [B, N, D] of any floating-point dtype, or `Tokens` to choose from; labels
            are int64 [B] for cross-entropy, or [B, K] of 0 and 1 for binary cross-entropy. See
            `vlattn.probing.train_source`.
        val: batches of any size.
        pooler: "ep:queries=32", "ep_all", "cls", ...; see `vlattn.probing.poolers`.
        classes: number of classes K.
        settings: None is the published protocol.
        dim, grid: width of the tokens, and (rows, columns) of the patches; None reads off the first batch of `val`.
        out: folder for checkpoint, log, result and best head; None keeps nothing.
        resume: go on with the run that `out` holds, to the same weights bit for bit; a finished one is read.
        device: None is CUDA where there is one, else the CPU.
        about: plain data to keep with the result, such as `backbone.describe()`.
        departures: where the caller leaves the published protocol, in words; the result's begin with those of settings.
        report: hears of every epoch.
        progress: whether to show a bar.

    Raises:
        InputError: sources without a length or without a full update, labels that do not fit, a folder in use.
    """
    settings = ProbeSettings() if settings is None else settings
    world = join_world(device)
    if dim is None:
        with seeded(settings.seed, "look", 0):
            dim, grid = _look(val, parse_pooler(pooler)[2], grid)
    made = {"pooler": pooler, "dim": dim, "classes": classes, "grid": grid}
    about = dict(about or {})
    head = make_head(pooler, dim, classes, grid=grid, seed=settings.seed)
    decides: dict[str, Any] = {**made, **vars(settings), "about": about, "processes": world.size}
    extra = head.pooler.branch_losses
    if extra is not None:  # a run of the same pooler on the loss of the bag alone is another run
        decides["branch_losses"] = vars(extra)
    folder = ProbeFolder(out, decides, world.rank == 0)
    bank = HeadBank(head, len(settings.given_rates)).to(world.device)
    run = ProbeRun(train, val, bank, parse_pooler(pooler)[2], classes, settings, world)
    state, done = folder.start(resume)
    if done is not None:
        assert folder.path is not None
        return load_result(folder.path)
    if state is not None:
        run.load_state_dict(state)
    with progress_bar(settings.epochs, len(run.epochs), progress and world.rank == 0) as heard:
        while not run.done:
            record = run.epoch(heard)
            folder.log(record)
            if record.val:
                folder.save(run.state_dict())
            heard.epoch(record)
            report(record)
    result = ProbeResult(
        **made,  # type: ignore[arg-type]
        metric=run.metric,
        settings=settings,
        batch=run.batch,
        trainable=head.trainable(),
        rates=run.rates(),
        epochs=tuple(run.epochs),
        departures=(
            *settings.departures(run.batch, getattr(train, "augmented", None)),
            *departures,
            *([] if extra is None else extra.departures()),
        ),
        machine=describe_machine(world.device),
        about=about,
        kept=tuple(range(bank.copies)),
        states={name: value.cpu() for name, value in run.best.items()},
        training_only=head.training_only(),
    )
    folder.finish(result)
    return result


def _look(source: Source, kind: str, grid: tuple[int, int] | None) -> tuple[int, tuple[int, int] | None]:
    """Width of the tokens that a source gives, and where it tells, their grid."""
    for tokens, _ in source:
        if isinstance(tokens, torch.Tensor):
            return tokens.shape[-1], grid
        return tokens.choose(kind).shape[-1], tokens.grid if grid is None else grid
    raise InputError("val: it gave no images; give a source with at least one")
