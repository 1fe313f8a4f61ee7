"""Which heads gain from attention calibration: each one tried alone on held-out questions, then the best together.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", arXiv 2406.15765, tries every head alone on a held-out set and logs the accuracy. Ours: margins in place
of accuracy, for which fewer questions suffice; two screens that spare most trials; standard errors; and the check of
heads together, since gains of single heads need not add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.act import ACT
from vlattn.interventions.act_head_file import HeadMap, default_layers, every_head
from vlattn.interventions.act_log import CalibrationLog
from vlattn.interventions.act_margins import Gain, Head, MarginBatch, accuracy, margins, mean_and_error
from vlattn.interventions.act_screen import Screened, screen
from vlattn.models.registry import adapter_for

Rule = Literal["gain", "standard_error"]
_LEAST = {"gain": 0.0, "standard_error": 1.0}
"""How many standard errors a head alone must gain."""


@dataclass
class HeadCalibration:
    """What was found.

    heads: {layer: heads} for `ACT`; empty where nothing helps.
    margin, error, accuracy: of the model as it is, over questions.
    screened: every head, those to be tried first at the front.
    single: heads tried alone. joint: the best of them together, in growing numbers.
    """

    heads: HeadMap
    margin: float
    error: float
    accuracy: float
    screened: list[Screened] = field(default_factory=list)
    single: list[Gain] = field(default_factory=list)
    joint: list[Gain] = field(default_factory=list)


def calibrate_heads(
    model: nn.Module,
    items: Sequence[MarginBatch],
    *,
    method: ACT | None = None,
    layers: Sequence[int] | None = None,
    share: float = 0.1,
    verify: int = 64,
    slopes: bool = True,
    rule: Rule = "standard_error",
    out: str | Path | None = None,
    name: str = "",
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> HeadCalibration:
    """Find the heads in which calibrating sinks raises the margin of right answers, on questions held out for that.

    One pass over the questions finds sinks, with a backward pass for the slopes of all heads at once; then there is one
    pass for each head that is tried, and about log2 of the number kept for the joint check. Use a balanced set,
    disjoint from whatever the method is evaluated on.

    Args:
        model: left as it was.
        items: held-out questions, at least two.
        method: ACT with the settings to calibrate for, whose heads do not matter; None for the defaults.
        layers: where to look; None for 2 to L - 2.
        share: heads with a sink in a smaller share of the questions are not tried.
        verify: how many heads are tried at most: the steepest, or without slopes those with sinks in most questions.
        slopes: whether to take them, which needs memory for a backward pass through the decoder.
        rule: a head alone must gain anything ("gain"), or more than its standard error.
        out: JSON file for the heads and all that was measured, written after each trial; `ACT(heads=out)` reads it. A
            run that was cut off is gone on with.
        name: what to call the model in the file.
        report: called as (what is going on, how much of it is done, of how much).

    Returns:
        The heads kept are the first m by single gain, for the m with the best joint margin; none if that is no gain.

    Raises:
        InputError: too few questions, settings out of range, or a file of other settings, questions or weights.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share: got {share!r}; give a share of the questions, from 0 to 1")
    if verify < 1:
        raise InputError(f"verify: got {verify!r}; give the number of heads to try, at least 1")
    if rule not in _LEAST:
        raise InputError(f"rule: got {rule!r}; give 'gain' or 'standard_error'")
    ids = [one for batch in items for one in batch.ids]
    if len(ids) < 2:
        raise InputError(f"items: got {len(ids)} questions; a standard error takes at least 2, better some hundreds")
    adapter = adapter_for(model)
    method = dataclasses.replace(method or ACT(heads="all"), heads={})
    heads = every_head(adapter, default_layers(adapter) if layers is None else layers)
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name != "heads"}
    settings |= {"layers": list(heads), "share": share, "verify": verify, "slopes": slopes, "rule": rule}
    log = CalibrationLog(out, adapter, name, settings, ids)

    vanilla = margins(model, items)
    found = HeadCalibration({}, *mean_and_error(vanilla), accuracy(vanilla))
    log.vanilla(found.margin, found.error, found.accuracy)
    if (screened := log.screened) is None:
        screened = screen(model, items, method, heads, slopes, lambda done: report("screen", done, len(items)))
        log.screen(screened)
    found.screened = screened

    def trials(kind: str, sets: list[list[Head]]) -> list[Gain]:
        known = {gain.heads: gain for gain in log.gains(kind)}
        for done, chosen in enumerate(map(tuple, sets), 1):
            if chosen not in known:
                now = margins(model, items, dataclasses.replace(method, heads=_by_layer(chosen)))
                known[chosen] = Gain(chosen, *mean_and_error(now - vanilla), accuracy(now))
                log.add(kind, known[chosen])
            report(kind, done, len(sets))
        return [known[tuple(chosen)] for chosen in sets]

    worth = [(one.layer, one.head) for one in found.screened if one.share > 0 and one.share >= share]
    found.single = trials("single", [[head] for head in worth[:verify]])
    kept = [gain for gain in found.single if gain.gain > max(0.0, _LEAST[rule] * gain.error)]
    best = [gain.heads[0] for gain in sorted(kept, key=lambda gain: -gain.gain)]
    found.joint = trials("joint", [best[:size] for size in _sizes(len(best))])
    winner = max(found.joint, key=lambda gain: gain.gain, default=None)
    found.heads = _by_layer(winner.heads) if winner is not None and winner.gain > 0 else {}
    log.finish(found.heads)
    return found


def _by_layer(heads: Sequence[Head]) -> HeadMap:
    return {layer: tuple(sorted(h for at, h in heads if at == layer)) for layer in sorted({at for at, _ in heads})}


def _sizes(total: int) -> list[int]:
    """1, 2, 4, ... and all."""
    sizes = [2**n for n in range(total.bit_length()) if 2**n < total]
    return [*sizes, total] if total else []
