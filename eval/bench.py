"""What a method costs and saves on a live model, measured so that the arms can be compared.

All arms run in one process on one set of weights, dtype and attention implementation, A B A B, on the same inputs in
the same order; every arm does the same work (greedy, a fixed number of new tokens, ends of sequence suppressed), and
ratios to vanilla are taken round by round. Stages are timed in rounds of their own, because waiting for the device at
their boundaries costs time. Beside the clock stand the KV cache as measured, the operations by formula and by PyTorch's
counter, and the least time that this machine needs for them (`vlattn.eval.roofline`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vlattn.errors import InputError
from vlattn.eval.bench_arms import Arm, BenchArms, FirstToken, Inputs
from vlattn.eval.bench_memory import peak_memory, process_peak
from vlattn.eval.bench_stages import STAGES, StageClock
from vlattn.eval.bench_work import Work, count_arm, look_at_prefill
from vlattn.eval.roofline import Roofline, measure_roofline
from vlattn.interventions.base import Intervention
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import Spread, Timing, interleave

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[[str, int], None]
"""Called as (what is going on, how many steps have just been finished)."""


def bench(
    model: PreTrainedModel,
    inputs_list: Sequence[Inputs],
    methods: Sequence[str | Intervention],
    *,
    new_tokens: int = 32,
    repeats: int = 20,
    warmup: int = 5,
    stage_repeats: int = 5,
    real_length: bool = False,
    neutral: Sequence[str | Intervention] = (),
    roofline: Roofline | None = None,
    step: Step = lambda what, done: None,
) -> dict[str, Any]:
    """Measure vanilla and every method; see the module's text for how.

    Args:
        model: with an adapter, in eval mode, nothing attached to it.
        inputs_list: inputs of `generate`, as the processor returns them, on the model's device. Round r takes entry
            r modulo their number; 20 distinct ones or more tell most. One batch size for all.
        methods: method strings or interventions; vanilla is always there and need not be given.
        new_tokens: N, generated in every timed run.
        repeats, warmup: rounds that count, and rounds before them that do not. Where the inputs differ in shape, all of
            them are warmed up.
        stage_repeats: rounds that are split into stages.
        real_length: also time `generate` as users call it, at most N tokens and the end where the model sets it. A
            method that makes answers shorter gains there, so read it beside the tokens that were generated.
        neutral: settings that should change nothing (keep everything); their tokens must equal vanilla's.
        roofline: of this machine; None: measured now, for the model's device and dtype.
        step: for progress; `bench_steps` tells how many there are.

    Returns:
        Plain data for JSON: `settings`, `machine`, `roofline`, `arms` (vanilla first; `seconds` with median, quartiles
        and n for prefill (to the first token, with tower and projector), decode (N - 1 tokens) and total;
        `ratio` of each to vanilla, round by round; `stages`; tokens, MACs, FLOPs, KV bytes and bounds as
        `vlattn.eval.bench_work.Work.row` gives them; `memory`; `attention`; `same_ids_as_vanilla`), `neutral`, and
        `warnings`: whatever makes an arm's figures mean less than they seem to.

    Raises:
        InputError: nothing to run, a method that the model or the registry refuses, or a model that stops early.
    """
    _check(inputs_list, new_tokens, repeats, stage_repeats)
    device = next(model.parameters()).device
    if len({tuple(inputs["input_ids"].shape) for inputs in inputs_list}) > 1:
        warmup = max(warmup, len(inputs_list))
    with BenchArms(model, methods) as arms:  # first, so that a refused method costs no time
        if roofline is None:
            step("machine", 0)
            roofline = measure_roofline(device, model.dtype)
        works = _works(arms, inputs_list, new_tokens - 1, step)
        times = _times(arms, inputs_list, new_tokens, repeats, warmup, step)
        stages, same = _stages(arms, inputs_list, new_tokens, stage_repeats, step)
        lengths = _real_lengths(arms, inputs_list, new_tokens, repeats, step) if real_length else {}
        step("memory, FLOPs", 0)
        rows = []
        for arm in arms:
            first = inputs_list[0]
            rows.append(
                {
                    "name": arm.name,
                    "attention": arm.attention,
                    "same_ids_as_vanilla": same[arm.name],
                    **times[arm.name],
                    "stages": stages[arm.name],
                    "real_length": lengths.get(arm.name),
                    **works[arm.name].row(works["vanilla"], roofline, count_arm(arm, first)),
                    "memory": peak_memory(partial(arm.generate, first, new_tokens), device),
                }
            )
        warnings = _warnings(rows)
    checks = check_neutral(model, inputs_list, neutral, new_tokens)
    warnings += [f"{c['name']} should change nothing, but its tokens differ" for c in checks if not c["same_ids"]]
    return {
        "title": "vlattn bench",
        "settings": {
            "new_tokens": new_tokens,
            "repeats": repeats,
            "warmup": warmup,
            "stage_repeats": stage_repeats,
            "inputs": len(inputs_list),
            "batch": inputs_list[0]["input_ids"].shape[0],
            "prompt_lengths": sorted({inputs["input_ids"].shape[1] for inputs in inputs_list}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "machine": describe_machine(device),
        "roofline": roofline.as_dict(),
        "process_peak_bytes": process_peak(),
        "arms": rows,
        "neutral": checks,
        "warnings": warnings,
    }


def bench_steps(
    methods: int, inputs: int, repeats: int = 20, warmup: int = 5, stage_repeats: int = 5, real_length: bool = False
) -> int:
    """An upper bound on the steps that `bench` reports, for a progress bar; methods: without vanilla."""
    rounds = max(warmup, inputs) + repeats
    return (1 + methods) * inputs + rounds * (1 + real_length) + stage_repeats


def check_neutral(
    model: PreTrainedModel, inputs_list: Sequence[Inputs], neutral: Sequence[str | Intervention], new_tokens: int
) -> list[dict[str, Any]]:
    """Does a setting that should change nothing change nothing? Greedy tokens and first logits against vanilla's.

    Returns:
        For each setting its name, same_ids, max_logit_difference (largest absolute one of the first token), inputs.
    """
    if not neutral:
        return []
    found = []
    with BenchArms(model, neutral) as (vanilla, *arms):
        expected = [(vanilla.generate(x, new_tokens), look_at_prefill(vanilla, x).logits) for x in inputs_list]
        for arm in arms:
            same, difference = True, 0.0
            for inputs, (ids, logits) in zip(inputs_list, expected, strict=True):
                same &= torch.equal(arm.generate(inputs, new_tokens), ids)
                gap = (look_at_prefill(arm, inputs).logits.double() - logits.double()).abs().max()
                difference = max(difference, float(gap))
            found.append(
                {
                    "name": arm.name,
                    "same_ids": same,
                    "max_logit_difference": difference,
                    "inputs": len(inputs_list),
                }
            )
    return found


# Passes over the arms -------------------------------------------------------------------------------------------------
def _works(arms: Sequence[Arm], inputs_list: Sequence[Inputs], steps: int, step: Step) -> dict[str, Work]:
    works = {arm.name: Work(arm, steps) for arm in arms}
    step("tokens and cache", 0)
    for inputs in inputs_list:
        vanilla = None
        for arm in arms:
            found = works[arm.name].add(inputs, vanilla)
            vanilla = vanilla or found
            step("", 1)
    return works


class _Runs:
    """An arm's timed function: each call takes the next inputs, as all arms of a round do."""

    def __init__(self, arm: Arm, inputs_list: Sequence[Inputs], new_tokens: int, fixed: bool = True) -> None:
        self.arm, self.new_tokens, self.fixed = arm, new_tokens, fixed
        self.turn: Iterator[Inputs] = itertools.cycle(inputs_list)
        self.first: list[int] = []

    def __call__(self) -> torch.Tensor:
        inputs, watch = next(self.turn), FirstToken()
        ids = self.arm.generate(inputs, self.new_tokens, fixed=self.fixed, watch=watch)
        self.first.append(watch.nanoseconds)
        return ids


def _times(
    arms: Sequence[Arm], inputs_list: Sequence[Inputs], new_tokens: int, repeats: int, warmup: int, step: Step
) -> dict[str, dict[str, Any]]:
    step("timing, arms interleaved", 0)
    runs = {arm.name: _Runs(arm, inputs_list, new_tokens) for arm in arms}
    timed = interleave(runs, repeats, warmup, after_round=lambda: step("", 1))
    by_arm: dict[str, dict[str, Timing]] = {}
    for name, whole in timed.items():
        first = Timing(tuple(runs[name].first[warmup:]))
        by_arm[name] = {"prefill": first, "decode": whole.minus(first), "total": whole}
        if new_tokens == 1:
            del by_arm[name]["decode"]
    vanilla = by_arm[arms[0].name]
    found: dict[str, dict[str, Any]] = {}
    for name, parts in by_arm.items():
        found[name] = {
            "seconds": {stage: asdict(timing.seconds) for stage, timing in parts.items()},
            "ratio": {stage: asdict(timing.over(vanilla[stage])) for stage, timing in parts.items()},
            "tokens_per_second": None,
            "nanoseconds": {stage: list(timing.nanoseconds) for stage, timing in parts.items()},
        }
        if new_tokens > 1:
            tokens = inputs_list[0]["input_ids"].shape[0] * (new_tokens - 1)
            found[name]["tokens_per_second"] = tokens / parts["decode"].seconds.median
    return found


def _stages(
    arms: Sequence[Arm], inputs_list: Sequence[Inputs], new_tokens: int, repeats: int, step: Step
) -> tuple[dict[str, dict[str, Any]], dict[str, bool]]:
    """Time by stage, and whether an arm's tokens were vanilla's in all of these rounds."""
    step("stages", 0)
    times: dict[str, list[dict[str, int]]] = {arm.name: [] for arm in arms}
    same = {arm.name: True for arm in arms}
    for turn in range(1 + repeats):
        inputs, expected = inputs_list[turn % len(inputs_list)], None
        for arm in arms:
            with torch.inference_mode(), StageClock(arm.model) as clock:
                ids = arm.generate(inputs, new_tokens)
            expected = ids if expected is None else expected
            same[arm.name] &= torch.equal(ids, expected)
            if turn:  # the first round warms up
                times[arm.name].append(clock.nanoseconds)
        if turn:
            step("", 1)
    stages = {
        name: {stage: asdict(Spread.of([t[stage] / 1e9 for t in found])) for stage in STAGES}
        for name, found in times.items()
    }
    return stages, same


def _real_lengths(
    arms: Sequence[Arm], inputs_list: Sequence[Inputs], new_tokens: int, repeats: int, step: Step
) -> dict[str, dict[str, Any]]:
    step("real lengths", 0)
    runs = {arm.name: _Runs(arm, inputs_list, new_tokens, fixed=False) for arm in arms}
    timed = interleave(runs, repeats, 1, after_round=lambda: step("", 1))
    found = {}
    for arm in arms:
        tokens = [arm.generate(x, new_tokens, fixed=False).shape[1] for x in inputs_list]
        found[arm.name] = {
            "seconds": asdict(timed[arm.name].seconds),
            "ratio": asdict(timed[arm.name].over(timed[arms[0].name])),
            "new_tokens": sum(tokens) / len(tokens),
        }
    return found


# What to mind ---------------------------------------------------------------------------------------------------------
def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    vanilla, found = rows[0], []
    for row in rows[1:]:
        if row["saving"]["kind"] == "masked":
            found.append(
                f"{row['name']}: masked, no real saving; its deepest layer still caches {row['cache_lengths'][-1]} "
                "positions, as vanilla does, so whatever its FLOPs say on paper, nothing is skipped"
            )
        for part, name in row["attention"].items():
            if name.removeprefix("vlattn_") != vanilla["attention"][part]:
                found.append(
                    f"{row['name']}: its {part} runs {name} attention, vanilla {vanilla['attention'][part]}; "
                    "part of the ratio is the difference between the two"
                )
    return found


def _check(inputs_list: Sequence[Inputs], new_tokens: int, repeats: int, stage_repeats: int) -> None:
    if not inputs_list:
        raise InputError("inputs_list: got none; give at least one set of model inputs")
    batches = {inputs["input_ids"].shape[0] for inputs in inputs_list}
    if len(batches) > 1:
        raise InputError(f"inputs_list: batches of {sorted(batches)} prompts; give one batch size")
    for name, value in (("new_tokens", new_tokens), ("repeats", repeats), ("stage_repeats", stage_repeats)):
        if value < 1:
            raise InputError(f"{name}: got {value}; give at least 1")
