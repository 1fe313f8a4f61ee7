"""Finding the heads in which attention calibration helps: screens, trials, the joint check, and the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.act_heads import HeadCalibration, calibrate_heads
from vlattn.interventions.act_margins import MarginBatch, margins
from vlattn.interventions.act_screen import screen

LAYERS = 5
THETA = 0.06
METHOD = vlattn.ACT("all", theta=THETA, min_rows=4)
Make = Callable[..., Any]


@pytest.fixture
def model(llava: Make) -> Any:
    return llava(decoder_layers=LAYERS, seed=3)


@pytest.fixture
def items(model: Any, prompts: Make) -> list[MarginBatch]:
    """Four batches of two questions with answers drawn at random: what helps is a matter of luck, but certain."""
    torch.manual_seed(0)
    return [
        MarginBatch(
            (f"{n}a", f"{n}b"),
            prompts(model, (1, 1), text=9, seed=n),
            torch.randint(3, 30, (2,)),
            torch.randint(30, 60, (2,)),
        )
        for n in range(4)
    ]


def margin_by_hand(model: Any, items: list[MarginBatch], method: vlattn.ACT | None) -> torch.Tensor:
    found = []
    for batch in items:
        with torch.no_grad():
            if method is None:
                logits = model(**batch.inputs).logits
            else:
                with method(model):
                    logits = model(**batch.inputs).logits
        for b in range(2):
            found.append(logits[b, -1, batch.right[b]] - logits[b, -1, batch.wrong[b]])
    return torch.stack(found)


# Trials ---------------------------------------------------------------------------------------------------------------


def test_margins_are_the_lead_of_the_right_answer_s_token(model: Any, items: list[MarginBatch]) -> None:
    for method in (None, vlattn.ACT({2: [0, 1]}, theta=THETA, min_rows=4)):
        torch.testing.assert_close(margins(model, items, method), margin_by_hand(model, items, method))


@pytest.fixture
def found(model: Any, items: list[MarginBatch]) -> HeadCalibration:
    return calibrate_heads(model, items, method=METHOD, rule="gain")


def test_gains_are_paired_differences_of_margins_with_their_standard_errors(
    found: HeadCalibration, model: Any, items: list[MarginBatch]
) -> None:
    vanilla = margin_by_hand(model, items, None)
    assert found.margin == pytest.approx(float(vanilla.mean()))
    assert found.accuracy == pytest.approx(float((vanilla > 0).double().mean()))
    assert len(found.single) == 8
    assert found.joint
    for gain in [*found.single, *found.joint]:
        heads: dict[int, list[int]] = {}
        for layer, head in gain.heads:
            heads.setdefault(layer, []).append(head)
        now = margin_by_hand(model, items, dataclasses.replace(METHOD, heads=heads))
        difference = (now - vanilla).tolist()
        mean = sum(difference) / 8
        error = (sum((d - mean) ** 2 for d in difference) / 7 / 8) ** 0.5
        assert gain.gain == pytest.approx(mean)
        assert gain.error == pytest.approx(error)
        assert gain.accuracy == pytest.approx(float((now > 0).double().mean()))


def test_layers_2_to_l_minus_2_are_searched_and_others_on_demand(
    found: HeadCalibration, model: Any, items: list[MarginBatch]
) -> None:
    assert {one.layer for one in found.screened} == {2, 3}
    other = calibrate_heads(model, items[:1], method=METHOD, layers=[4], verify=1)
    assert {(one.layer, one.head) for one in other.screened} == {(4, head) for head in range(4)}


def test_the_best_alone_are_tried_together_in_growing_numbers_and_the_best_number_is_kept(
    found: HeadCalibration,
) -> None:
    helpful = sorted((g for g in found.single if g.gain > 0), key=lambda g: -g.gain)
    names = [gain.heads[0] for gain in helpful]
    assert 2 < len(names) < 8
    sizes = [len(gain.heads) for gain in found.joint]
    assert sizes == sorted({1, 2, min(4, len(names)), len(names)})
    assert [gain.heads for gain in found.joint] == [tuple(names[:size]) for size in sizes]
    best = max(found.joint, key=lambda gain: gain.gain)
    assert {(layer, head) for layer, heads in found.heads.items() for head in heads} == set(best.heads)


def test_a_head_must_gain_its_standard_error_unless_any_gain_is_asked_for(model: Any, items: list[MarginBatch]) -> None:
    strict = calibrate_heads(model, items, method=METHOD)
    significant = {gain.heads[0] for gain in strict.single if gain.gain > gain.error}
    assert 0 < len(significant) < len([gain for gain in strict.single if gain.gain > 0])
    assert set(max(strict.joint, key=lambda gain: len(gain.heads)).heads) == significant


def test_where_nothing_helps_no_heads_are_named_and_act_changes_nothing(
    model: Any, items: list[MarginBatch], tmp_path: Path, found: HeadCalibration
) -> None:
    hurts = [gain.heads[0] for gain in found.single if gain.gain < 0]
    swapped = [MarginBatch(batch.ids, batch.inputs, batch.wrong, batch.right) for batch in items]
    layer = hurts[0][0]
    file = tmp_path / "heads.json"
    # One question is asked both ways round, so that whatever an edit does to one it undoes at the other.
    both = [items[0], swapped[0]]
    none = calibrate_heads(model, both, method=METHOD, layers=[layer], out=file)
    assert none.heads == {}
    with torch.no_grad(), vlattn.ACT(file, theta=THETA)(model):
        edited = model(**items[0].inputs).logits
    with torch.no_grad():
        assert torch.equal(edited, model(**items[0].inputs).logits)


def test_calibrating_leaves_the_model_as_it_was(model: Any, items: list[MarginBatch], tiny: ModuleType) -> None:
    model.lm_head.weight.requires_grad_(False)
    model(**items[0].inputs)  # which leaves attributes of its own
    before = tiny.hooks_of(model), tiny.settings_of(model), [p.requires_grad for p in model.parameters()]
    calibrate_heads(model, items[:1], method=METHOD, verify=1)
    assert (tiny.hooks_of(model), tiny.settings_of(model), [p.requires_grad for p in model.parameters()]) == before
    assert all(p.grad is None for p in model.parameters())


# Screens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("literal", [False, True])
def test_slopes_are_those_of_an_edit_faded_in_by_hand(
    literal: bool, model: Any, items: list[MarginBatch], naive_act: ModuleType
) -> None:
    act = dataclasses.replace(METHOD, literal=literal)
    heads = {2: (0, 1, 2, 3), 3: (0, 1, 2, 3)}
    found = {(one.layer, one.head): one for one in screen(model, items, act, heads)}
    known = {f.name for f in dataclasses.fields(naive_act.Settings)} & {f.name for f in dataclasses.fields(act)}
    given, step = {name: getattr(act, name) for name in known}, 0.02  # norms of the model are fp32: no smaller steps
    sloped = 0
    for layer, chosen in heads.items():
        for head in chosen:
            slope = with_sinks = 0.0
            for batch in items:
                for b in range(2):
                    embeds, visual = naive_act.embedded(
                        model, batch.inputs["input_ids"][b], batch.inputs["pixel_values"][b : b + 1]
                    )
                    n = batch.inputs["input_ids"].shape[1]
                    real = batch.inputs["attention_mask"][b].bool()
                    embeds, visual = embeds[real], [v for v, r in zip(visual, real.tolist(), strict=True) if r]
                    start = n - len(embeds)
                    ahead = []
                    for fade in (step, -step):
                        settings = naive_act.Settings(**given, fade=fade)
                        logits, sinks = naive_act.run(model, embeds, visual, {layer: [head]}, settings, start=start)
                        ahead.append(float(logits[-1, batch.right[b]] - logits[-1, batch.wrong[b]]))
                    slope += (ahead[0] - ahead[1]) / (2 * step) / 8
                    with_sinks += bool(sinks[layer, head]) / 8
            assert found[layer, head].share == pytest.approx(with_sinks)
            assert found[layer, head].slope == pytest.approx(slope, rel=1e-2, abs=1e-4)
            sloped += abs(slope) > 1e-2
    assert sloped >= 3


def test_heads_are_tried_by_slope_and_without_slopes_by_how_often_they_have_sinks(
    model: Any, items: list[MarginBatch]
) -> None:
    by_slope = calibrate_heads(model, items, method=METHOD, verify=3)
    slopes = [one.slope for one in by_slope.screened]
    assert slopes == sorted(slopes, key=lambda s: -s)  # type: ignore[operator]
    tried = [(one.layer, one.head) for one in by_slope.screened if one.share >= 0.1][:3]
    assert [gain.heads[0] for gain in by_slope.single] == tried
    by_share = calibrate_heads(model, items, method=METHOD, verify=3, slopes=False)
    assert [one.slope for one in by_share.screened] == [None] * 8
    shares = [one.share for one in by_share.screened]
    assert shares == sorted(shares, reverse=True)


def test_heads_with_sinks_in_few_questions_are_not_tried(model: Any, items: list[MarginBatch]) -> None:
    found = calibrate_heads(model, items, method=dataclasses.replace(METHOD, theta=0.12), share=1.0)
    often = {(one.layer, one.head) for one in found.screened if one.share == 1.0}
    assert 0 < len(often) < 8
    assert {gain.heads[0] for gain in found.single} == often


# The file -------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def counting(model: Any, calls: list[int]) -> Any:
    return model.register_forward_hook(lambda module, args, output: calls.append(1))


def test_a_run_that_was_cut_off_goes_on_and_ends_as_one_that_was_not(
    model: Any, items: list[MarginBatch], tmp_path: Path
) -> None:
    whole = calibrate_heads(model, items, method=METHOD, rule="gain", out=tmp_path / "whole.json", name="random")

    def kill(what: str, done: int, total: int) -> None:
        if (what, done) == ("single", 5):
            raise Killed

    file = tmp_path / "cut.json"
    with pytest.raises(Killed):
        calibrate_heads(model, items, method=METHOD, rule="gain", out=file, name="random", report=kill)
    with pytest.raises(InputError, match="a calibration that was cut off"):
        vlattn.ACT(file)(model).attach()
    calls: list[int] = []
    hook = counting(model, calls)
    resumed = calibrate_heads(model, items, method=METHOD, rule="gain", out=file, name="random")
    hook.remove()
    assert resumed == whole
    assert len(calls) == len(items) * (1 + 3 + len(whole.joint))
    assert file.read_text() == (tmp_path / "whole.json").read_text()


def test_the_file_serves_act_and_says_what_it_was_made_from(
    model: Any, items: list[MarginBatch], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "heads.json"
    found = calibrate_heads(model, items, method=METHOD, rule="gain", out=file, name="random")
    assert found.heads
    with torch.no_grad():
        with vlattn.ACT(str(file), theta=THETA, min_rows=4)(model):
            read = model(**items[0].inputs).logits
        with vlattn.ACT(found.heads, theta=THETA, min_rows=4)(model):
            given = model(**items[0].inputs).logits
    assert torch.equal(read, given)
    content = json.loads(file.read_text())
    assert content["items"]["ids"] == [one for batch in items for one in batch.ids]
    assert content["settings"]["theta"] == THETA
    assert content["settings"]["layers"] == [2, 3]
    assert content["model"]["name"] == "random"
    assert content["vanilla"]["margin"] == found.margin
    assert len(content["single"]) == len(found.single)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"method": dataclasses.replace(METHOD, beta=0.5)}, "other beta"),
        ({"share": 0.2}, "other share"),
        ({"layers": [1]}, "other layers"),
    ],
)
def test_a_file_of_other_settings_is_refused(
    more: dict[str, Any], what: str, model: Any, items: list[MarginBatch], tmp_path: Path
) -> None:
    file = tmp_path / "heads.json"
    calibrate_heads(model, items, method=METHOD, verify=1, out=file)
    with pytest.raises(InputError, match=what):
        calibrate_heads(model, items, **{"method": METHOD, "verify": 1, "out": file, **more})


def test_a_file_of_other_questions_or_weights_or_of_something_else_is_refused(
    model: Any, items: list[MarginBatch], tmp_path: Path, llava: Make
) -> None:
    file = tmp_path / "heads.json"
    calibrate_heads(model, items, method=METHOD, verify=1, out=file)
    with pytest.raises(InputError, match="other items"):
        calibrate_heads(model, items[:2], method=METHOD, verify=1, out=file)
    with pytest.raises(InputError, match="a model with a mean margin of"):
        calibrate_heads(llava(decoder_layers=LAYERS, seed=4), items, method=METHOD, verify=1, out=file)
    file.write_text("[1]")
    with pytest.raises(InputError, match="holds no calibration"):
        calibrate_heads(model, items, method=METHOD, verify=1, out=file)


def test_heads_of_another_model_and_files_that_hold_none_are_refused(
    model: Any, items: list[MarginBatch], tmp_path: Path, llava: Make
) -> None:
    file = tmp_path / "heads.json"
    calibrate_heads(model, items, method=METHOD, verify=1, out=file)
    with pytest.raises(InputError, match=r"made for another model \(layers 5, not 4\)"):
        vlattn.ACT(file)(llava(decoder_layers=4)).attach()
    for text, message in (("{", "cannot be read"), ("{}", "holds no heads")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            vlattn.ACT(file)(model).attach()
    with pytest.raises(InputError, match="cannot be read"):
        vlattn.ACT(tmp_path / "none.json")(model).attach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.2}, "share: got 1.2"),
        ({"verify": 0}, "verify: got 0"),
        ({"rule": "best"}, "rule: got 'best'"),
        ({"items": []}, "items: got 0 questions"),
        ({"layers": [9]}, "heads: got layer 9"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], message: str, model: Any, items: list[MarginBatch]
) -> None:
    with pytest.raises(InputError, match=message):
        calibrate_heads(**{"model": model, "items": items, "method": METHOD, **settings})
