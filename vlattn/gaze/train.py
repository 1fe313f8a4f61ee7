"""Train an OAT on searches, keep its best epoch, and test that one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.gaze.crops import FeatureLooks
from vlattn.gaze.oat import OAT, make_oat
from vlattn.gaze.oat_appearance import FeatureLinear
from vlattn.gaze.oat_batch import OATData, Search, searches_of
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.oat_file import load_oat, make_looks, save_oat
from vlattn.gaze.splits import GazeSplit
from vlattn.gaze.train_evaluate import evaluate_oat
from vlattn.gaze.train_run import Heard, OATRun
from vlattn.gaze.train_settings import OATTraining
from vlattn.gaze.train_state import MODEL, TrainFolder
from vlattn.runtime.machine import describe_machine


@dataclass(frozen=True)
class OATResult:
    """model: of the best epoch, in eval mode. record: what result.json holds: best_epoch, epochs, val and test scores
    (see `evaluate_oat`), counts of trials, machine."""

    model: OAT
    record: dict[str, Any]


def train_oat(
    split: GazeSplit,
    config: OATConfig | None = None,
    training: OATTraining | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    backbone: Any = None,
    device: str | torch.device = "cpu",
    about: dict[str, Any] | None = None,
    heard: Heard = lambda share, record: None,
) -> OATResult:
    """Train on `split.train`, choose the epoch by `split.val`, test on `split.test`.

    Trials without fixations, and those whose target is not in the scene, are left out and counted.

    Args:
        config: None is the published model. Its `longest` becomes that of the training paths, where not given.
        training: None is the published training.
        out: folder for checkpoint.pt, log.jsonl and, in the end, model.safetensors and result.json; None keeps nothing.
        resume: go on with the run that `out` holds: the weights become, bit for bit, those of a run that was not cut
            off (on the CPU, with as many threads).
        backbone: take the features that this sees in crops, in place of the CNN; see `FeatureLooks`.
        about: plain data to keep with the model.
        heard: hears of progress.

    Raises:
        InputError: a part without a usable trial, or as `TrainFolder.start` and `OATData.batch` do.
    """
    config, training = config or OATConfig(), training or OATTraining()
    parts = {name: searches_of(getattr(split, name).trials)[0] for name in ("train", "val", "test")}
    for name, part in parts.items():
        if not part:
            raise InputError(f"split: {name} has no trial with fixations on objects and its target in the scene")
    if backbone is not None:
        config = replace(config, appearance="features", features=int(backbone.dim))
    looks = make_looks(split.train, config, backbone)
    if config.longest is None:
        config = replace(config, longest=max(len(one.path or ()) for one in parts["train"]))
    record = {
        "config": config.to_json(),
        "training": training.to_json(),
        "looks": looks.describe(),
        "data": {name: _digest(part) for name, part in parts.items()},
    }
    folder = TrainFolder(out, record)
    state, result = folder.start(resume)
    if result is not None:
        assert folder.path is not None
        return OATResult(load_oat(folder.path, device)[0], result)
    model = make_oat(config, training.init_seed).to(device)
    if isinstance(looks, FeatureLooks) and isinstance(model.appearance, FeatureLinear):
        seen = dict.fromkeys(one.scene for one in parts["train"])
        model.appearance.fit(looks.start(), torch.cat([looks.of(split.train.scenes[name]) for name in seen]))
    data = OATData(split.train, looks, config.rows)
    run = OATRun(model, data, parts["train"], parts["val"], training)
    if state is not None:
        run.load_state_dict(state)
        heard(len(run.epochs), run.epochs[-1])
    while not run.done:
        folder.log(run.epoch(heard))
        if len(run.epochs) % training.save_every == 0 or run.done:
            folder.save(run.state_dict())
    return _finish(run, folder, data, parts, split, about)


def _finish(
    run: OATRun,
    folder: TrainFolder,
    data: OATData,
    parts: dict[str, list[Search]],
    split: GazeSplit,
    about: dict[str, Any] | None,
) -> OATResult:
    tested = "last" if run.settings.test_last else "best"
    if tested == "best":
        run.load_best()
    test = evaluate_oat(run.model, data, parts["test"])
    run.load_best()
    given = {name: len(getattr(split, name).trials) for name in parts}
    result = {
        "best_epoch": run.best_epoch,
        "epochs": len(run.epochs),
        "seconds": round(sum(one["seconds"] for one in run.epochs), 1),
        "val": run.epochs[run.best_epoch]["val"],
        "test": test,
        "tested": tested,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trials": {name: len(part) for name, part in parts.items()},
        "left_out": {name: given[name] - len(part) for name, part in parts.items()},
        "about": about or {},
        "machine": describe_machine(run.device),
    }
    if folder.path is not None:
        save_oat(run.model, folder.path / MODEL, {**(about or {}), "looks": data.looks.describe()})
    folder.write_result(result)
    return OATResult(run.model.eval(), result)


def _digest(searches: Sequence[Search]) -> dict[str, int]:
    """How many, and a checksum of what."""
    return {"count": len(searches), "checksum": zlib.crc32(repr(searches).encode())}
