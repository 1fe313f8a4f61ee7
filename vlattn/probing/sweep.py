"""Every pooler on every subject under several seeds: accuracy with intervals beside parameters, operations and time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.data.named import named_data
from vlattn.probing.head import ProbeHead, make_head
from vlattn.probing.intervals import LEVEL, mean_interval, paired_difference
from vlattn.probing.named_backbone import named_backbone
from vlattn.probing.poolers.registry import parse_pooler
from vlattn.probing.sources import TokenSources
from vlattn.probing.step_time import step_times
from vlattn.probing.sweep_config import ProbeSubject, ProbeSweepConfig, file_name
from vlattn.probing.train import train_probe
from vlattn.probing.train_result import ProbeResult
from vlattn.probing.train_state import begun
from vlattn.runtime.machine import describe_machine

Report = Callable[[str, int], object]


class ProbeSweep:
    """A sweep in a folder, which a second call goes on with: finished runs are read, new poolers and seeds are added.

    config: what to run.
    out: folder for runs, times and results.
    work: folder for tokens and trained backbones.
    device: of the backbone and of training.
    """

    def __init__(self, config: ProbeSweepConfig, out: Path, work: Path, device: str | None = None) -> None:
        self.config, self.out, self.work, self.device = config, out, work, device

    @property
    def steps(self) -> int:
        """Runs in all."""
        return len(self.config.subjects) * len(self.config.all_poolers) * len(self.config.seeds)

    def run(self, report: Report = lambda what, done: None) -> dict[str, Any]:
        """Train what is missing, and gather all results.

        Args:
            report: hears what is done next and how many runs are done.

        Returns:
            Plain data: config, machine, and for each subject its arms.

        Raises:
            InputError: a backbone, data set or pooler that does not work; all poolers are tried before any is trained.
        """
        subjects = [self._subject(subject, report) for subject in self.config.all_subjects]
        drawn = "weights and order" if self.config.shots is None else "weights, order and training images"
        return {
            "level": LEVEL,
            "interval": f"Student's t over seeds of {drawn}; the val images are the same",
            "seeds": list(self.config.seeds),
            "config": self.config.to_json(),
            "machine": describe_machine(self.device or "cpu"),
            "subjects": subjects,
        }

    def _subject(self, subject: ProbeSubject, report: Report) -> dict[str, Any]:
        report(f"{subject.backbone} on {subject.data}", 0)
        backbone = named_backbone(
            subject.backbone,
            self.work,
            layer=subject.layer,
            device=self.device,
            progress=lambda step, loss: report(f"{subject.backbone}: step {step}, loss {loss:.3f}", 0),
        )
        sources = TokenSources(
            backbone,
            named_data(subject.data, subject.val),
            self.work / "tokens",
            batch_size=self.config.batch_size,
            augment=self.config.augmented,
            shots=self.config.shots,
        )
        samples = {name: sources.sample(parse_pooler(name)[2]) for name in self.config.all_poolers}
        classes = len(sources.data.classes)
        heads = {name: _try(name, sample.cpu().float(), classes, backbone.grid) for name, sample in samples.items()}
        runs: dict[str, dict[int, ProbeResult]] = {}
        for seed in self.config.seeds:
            for name in self.config.all_poolers:
                report(f"{name}, seed {seed}", 0)
                runs.setdefault(name, {})[seed] = self._train(subject, sources, name, seed, samples[name].shape[-1])
                report("", 1)
        report("times", 0)
        branched = sorted(name for name, head in heads.items() if head.pooler.branch_losses is not None)
        times = self._times(subject, sources, branched)
        return {
            "name": subject.file,
            **sources.describe(),
            "metric": next(iter(runs[self.config.all_poolers[0]].values())).metric,
            "images": {"train": sources.train_images, "val": len(sources.data.val)},
            **gather(runs, list(self.config.linear), {name: s.shape[1] for name, s in samples.items()}, times),
        }

    def _train(self, subject: ProbeSubject, sources: TokenSources, name: str, seed: int, dim: int) -> ProbeResult:
        kind = parse_pooler(name)[2]
        out = self.out / "runs" / subject.file / file_name(name) / f"seed_{seed}"
        return train_probe(
            sources.train(kind, seed),
            sources.val(kind),
            name,
            len(sources.data.classes),
            sources.settings(self.config.settings(seed)),
            dim=dim,
            grid=sources.backbone.grid,
            out=out,
            resume=begun(out),
            device=self.device or "cpu",
            about={**sources.describe(), "asked": vars(subject)},
            departures=sources.departures(),
        )

    def _times(self, subject: ProbeSubject, sources: TokenSources, branched: list[str]) -> dict[str, Any]:
        """Measured anew where a pooler is missing or the machine is another, all together. `branched` are the poolers
        that are trained on losses of their branches, too."""
        path = self.out / "times" / f"{subject.file}.json"
        machine = describe_machine(self.device or "cpu")
        asked = {"poolers": sorted(self.config.all_poolers), "machine": json.loads(json.dumps(machine))}
        asked |= {"rounds": self.config.step_rounds, "batch_size": self.config.batch_size}
        if branched:  # a step with such losses takes longer than one without, which older files hold
            asked["branch_losses"] = branched
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if kept["asked"] == asked:
                found: dict[str, Any] = kept["times"]
                return found
        device = torch.device(self.device or "cpu")
        tokens, labels = {}, torch.empty(0)
        batches: dict[str, torch.Tensor] = {}
        for name in self.config.all_poolers:
            kind = parse_pooler(name)[2]
            if kind not in batches:
                batch, labels = next(iter(sources.val(kind)))
                batches[kind] = batch.to(device, torch.float32)
            tokens[name] = batches[kind]
        times = step_times(
            tokens,
            labels.to(device),
            len(sources.data.classes),
            self.config.settings(0),
            grid=sources.backbone.grid,
            rounds=self.config.step_rounds,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"asked": asked, "times": times}, indent=1) + "\n", encoding="utf-8")
        return times


def gather(
    runs: Mapping[str, Mapping[int, ProbeResult]],
    linear: list[str],
    tokens: Mapping[str, int],
    times: Mapping[str, Any],
) -> dict[str, Any]:
    """Results of one subject.

    Args:
        runs: {pooler: {seed: result}}.
        linear: poolers among them that are linear probes.
        tokens: {pooler: tokens of an image that it gets}.
        times: {pooler: milliseconds of a step}.

    Returns:
        linear: the linear probe with the highest mean, which differences are taken to; departures: where all runs leave
        the published protocol; arms: for each pooler value and difference in points with 95% t intervals over seeds,
        parameters (pooler and classifier, and what only training needs), training_only (how many no prediction needs),
        pooler_parameters, macs of an image (pooler and classifier), step, departures (of this pooler besides).
    """
    values = {name: {seed: best_value(name, seed, one) for seed, one in by.items()} for name, by in runs.items()}
    reference = max(linear, key=lambda name: mean_interval(list(values[name].values()))["mean"])
    told = [one.departures for by_seed in runs.values() for one in by_seed.values()]
    common = [text for text in told[0] if all(text in texts for texts in told)]
    arms = []
    for name, by_seed in runs.items():
        any_run = next(iter(by_seed.values()))
        head = make_head(name, any_run.dim, any_run.classes, grid=any_run.grid)
        pooled = sum(p.numel() for p in head.pooler.parameters() if p.requires_grad)
        arms.append(
            {
                "pooler": name,
                "value": mean_interval(list(values[name].values())),
                "difference": None if name == reference else paired_difference(values[name], values[reference]),
                "parameters": any_run.trainable,
                "training_only": any_run.training_only,
                "pooler_parameters": pooled,
                "macs": head.pooler.macs(tokens[name]) + head.pooler.width * any_run.classes,
                "step": times[name],
                "rates": [one.best.rate for one in by_seed.values()],
                "departures": [text for text in any_run.departures if text not in common],
            }
        )
    return {"linear": reference, "departures": common, "arms": arms}


def _try(name: str, sample: torch.Tensor, classes: int, grid: tuple[int, int] | None) -> ProbeHead:
    """A head of a pooler; one that cannot take these tokens [1, N, D] is refused by its name."""
    try:
        head = make_head(name, sample.shape[-1], classes, grid=grid, seed=0).eval()
        head(sample)
    except InputError as error:
        raise InputError(f"poolers: {name}: {error}") from None
    return head


def best_value(name: str, seed: int, result: ProbeResult) -> float:
    """The metric at the best epoch and rate; InputError where every rate diverged."""
    if not math.isfinite(result.best.best):
        raise InputError(f"rates: {name} diverged at every learning rate under seed {seed}; give smaller ones")
    return result.best.best
