"""OPERA on live models: against stock beam search, against plain loops, in batches, and through its rollbacks."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.opera import OPERA
from vlattn.interventions.opera_beams import Candidates, Continuations, PromptSearch
from vlattn.interventions.opera_stream import Stream
from vlattn.interventions.pai import PAI

Llava = Callable[..., Any]
Prompts = Callable[..., dict[str, torch.Tensor]]
BACK: dict[str, Any] = {"threshold": 2, "warmup": 2}  # goes back often, in short answers


@pytest.fixture(scope="module")
def naive_opera(tiny: ModuleType) -> ModuleType:
    """`tests/naive_opera.py`: OPERA in plain loops, without a cache."""
    path = Path(__file__).parents[1] / "naive_opera.py"
    spec = importlib.util.spec_from_file_location("vlattn_tests_naive_opera", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vlattn_tests_naive_opera"] = module
    spec.loader.exec_module(module)
    return module


class TopOnly(LogitsProcessor):
    """Keeps the `count` best tokens of each beam, which then share all probability."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        least = scores.topk(self.count).values[:, -1:]
        return scores.masked_fill(scores < least, -torch.inf).log_softmax(-1)


def small(llava: Llava, **options: Any) -> Any:
    return llava(**{"decoder_layers": 2, "image_size": 12, "layers": 3, **options})


def answers(model: Any, inputs: dict[str, torch.Tensor], new: int = 12, **options: Any) -> list[list[int]]:
    """The new tokens of each prompt."""
    found = model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def alone(inputs: dict[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
    """Prompt b of a batch with one image each, without its padding."""
    valid = inputs["attention_mask"][b].bool()
    found = {name: inputs[name][b : b + 1, valid] for name in ("input_ids", "attention_mask")}
    return {**found, "pixel_values": inputs["pixel_values"][b : b + 1]}


def until(row: list[int], ends: list[int]) -> list[int]:
    """An answer up to its end: what pads the shorter ones differs."""
    return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]


# Stock beam search ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length_penalty", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("ends", [[], [21], [21, 43, 8]])
def test_without_penalty_and_rollback_it_is_stock_beam_search_over_the_best_tokens(
    llava: Llava, prompts: Prompts, ends: list[int], early_stopping: bool | str, length_penalty: float
) -> None:
    model = small(llava, dtype=torch.float32)
    inputs = prompts(model, images=(1, 1, 1))
    beams = 3
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
        "eos_token_id": ends or None,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
    }
    count = max(2, 1 + len(ends)) * beams
    stock = model.generate(**inputs, **options, num_beams=beams, logits_processor=[TopOnly(count)], output_scores=True)
    neutral = OPERA(num_beams=beams, num_attn_candidates=count, penalty_weights=0, threshold=math.inf)
    with neutral(model):
        mine = model.generate(**inputs, **options)
    torch.testing.assert_close(mine.sequences_scores, stock.sequences_scores, rtol=1e-5, atol=1e-6)
    start = inputs["input_ids"].shape[1]
    for a, b in zip(mine.sequences[:, start:].tolist(), stock.sequences[:, start:].tolist(), strict=True):
        assert until(a, ends) == until(b, ends)


def test_without_renormalising_it_is_plain_beam_search(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1))
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": 21}
    stock = answers(model, inputs, num_beams=4, **options)
    neutral = OPERA(num_beams=4, num_attn_candidates=8, penalty_weights=0, threshold=math.inf, renormalize=False)
    with neutral(model):
        mine = answers(model, inputs, **options)
    assert [until(row, [21]) for row in mine] == [until(row, [21]) for row in stock]
    with OPERA(num_beams=4, num_attn_candidates=8, threshold=math.inf, penalty_weights=9, warmup=30)(model):
        assert answers(model, inputs, **options) != mine  # the reward for looking at the image


# Plain loops ----------------------------------------------------------------------------------------------------------
CASES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "goes back": (1, BACK, True),
    "monotone": (1, {**BACK, "monotone": True}, True),
    "short window": (0, {"threshold": 1, "warmup": 0, "window": 5}, True),
    "whole vocabulary": (1, {"threshold": 3, "warmup": 3, "renormalize": False, "score_scale": 1e-3}, True),
    "strong penalty": (1, {"threshold": 2, "warmup": 2, "scale_factor": 8.0, "score_scale": 0.1}, True),
    "penalty alone": (0, {"threshold": math.inf, "score_scale": 1.0, "warmup": 4}, False),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_it_says_what_plain_loops_without_a_cache_say(
    llava: Llava, prompts: Prompts, tiny: ModuleType, naive_opera: ModuleType, case: str
) -> None:
    seed, settings, goes_back = CASES[case]
    model = small(llava)
    inputs = prompts(model, images=(1,), seed=seed)
    method = OPERA(num_beams=3, num_attn_candidates=4, **settings)
    with torch.no_grad():
        found = naive_opera.answer(small(llava, attn="eager"), inputs, 14, method, [tiny.IMAGE])
    with method(model) as trace:
        assert answers(model, inputs, 14) == [found.tokens]
    assert trace.notes["rollbacks"] == [found.rollbacks]
    assert bool(found.rollbacks) == goes_back


# Candidates -----------------------------------------------------------------------------------------------------------
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm",
)  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_in_one_masked_forward_are_those_of_separate_forwards(
    families: ModuleType, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, attn: str
) -> None:
    options: dict[str, Any] = {"attn": attn, "dtype": torch.float32, "decoder_layers": 2}
    if family == "llava":
        model = tiny.llava(image_size=12, layers=3, **options)
        inputs = tiny.prompts(model, images=(1, 1))
    else:
        model = families.model(family, **options)
        inputs = families.inputs(family, model)
    tried, compared = Stream.attempt, []

    def both(stream: Stream, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert stream.at_once
        runs = stream.forwards
        once = tried(stream, tokens)
        assert stream.forwards == runs + 1
        stream.at_once = False
        each = tried(stream, tokens)
        assert stream.forwards == runs + 1 + tokens.shape[1]
        stream.at_once = True
        torch.testing.assert_close(once, each, rtol=2e-4, atol=1e-6)
        compared.append(tokens)
        return each

    monkeypatch.setattr(Stream, "attempt", both)
    with OPERA(num_beams=2, num_attn_candidates=3, **BACK)(model):
        answers(model, inputs, 6)
    assert len(compared) >= 6
    assert all(tokens.shape == (4, 3) for tokens in compared)


def test_a_candidate_that_cannot_be_chosen_is_not_shown_to_the_model(
    llava: Llava, prompts: Prompts, tiny: ModuleType
) -> None:
    """A placeholder that the model says would ask for an image."""
    model = small(llava)
    inputs = prompts(model, images=(1,))
    model.generation_config.suppress_tokens = None
    few = OPERA(num_beams=2, num_attn_candidates=tiny.VOCABULARY, **BACK)
    with few(model):
        (row,) = answers(model, inputs, 6, bad_words_ids=[[token] for token in range(3, 60)])
    assert set(row) <= {0, 1, 2, 60, 61, 62}


# Rollbacks ------------------------------------------------------------------------------------------------------------
def test_what_was_chosen_before_a_rollback_is_not_chosen_again_there(
    llava: Llava, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int, Any]] = []
    step, back = PromptSearch.step, PromptSearch.roll_back

    def spied_step(search: PromptSearch, candidates: Candidates, best: Continuations, ends: torch.Tensor) -> None:
        before = search.beams.ids.tolist()
        step(search, candidates, best, ends)
        # Which beam a row came from is told by its tokens; equal prefixes are equal beams.
        events.append(("on", len(before[0]), [tuple(row) for row in search.beams.ids.tolist()]))

    def spied_back(search: PromptSearch, winners: torch.Tensor) -> bool:
        went = back(search, winners)
        if went:
            events.append(("back", search.beams.length, search.beams.ids.tolist()))
        return went

    monkeypatch.setattr(PromptSearch, "step", spied_step)
    monkeypatch.setattr(PromptSearch, "roll_back", spied_back)
    model = small(llava)
    method = OPERA(num_beams=3, num_attn_candidates=4, threshold=1, warmup=0)
    with method(model) as trace:
        answers(model, prompts(model, images=(1,)), 16)
    assert trace.notes["rollbacks"] == [[(4, 1), (4, 1), (3, 2), (4, 2), *trace.notes["rollbacks"][0][4:]]]  # type: ignore[index]
    chosen: dict[int, list[tuple[int, ...]]] = {}
    ruled_out: dict[int, set[tuple[int, ...]]] = {}
    times: Counter[int] = Counter()
    repeated = 0
    for kind, length, rows in events:
        if kind == "back":
            times[length] += 1
            ruled_out.setdefault(length, set()).update(chosen[length])
            ruled_out = {place: pairs for place, pairs in ruled_out.items() if place <= length}
            repeated += times[length] > 1
        else:
            assert not ruled_out.get(length, set()) & set(rows)
            chosen[length] = rows
    assert repeated > 0
    assert max(times.values()) <= 4


def test_prompts_of_a_batch_go_back_for_themselves(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1, 1, 1), seed=1)
    with OPERA(num_beams=3, num_attn_candidates=4, **BACK)(model) as trace:
        together = answers(model, inputs, 20)
        rollbacks = trace.notes["rollbacks"]
        assert isinstance(rollbacks, list)
        for b in range(4):
            assert answers(model, alone(inputs, b), 20) == [together[b]]
            assert trace.notes["rollbacks"] == [rollbacks[b]]
    assert sum(bool(found) for found in rollbacks) >= 2
    assert len({tuple(found) for found in rollbacks}) > 2


def test_prompts_that_end_early_wait_for_those_that_go_back(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1, 1, 1), seed=1)
    ends = [17, 24]
    with OPERA(num_beams=3, num_attn_candidates=4, **BACK)(model) as trace:
        together = [until(row, ends) for row in answers(model, inputs, 24, eos_token_id=ends)]
        assert any(trace.notes["rollbacks"])  # type: ignore[arg-type]
        for b in range(4):
            assert [until(row, ends) for row in answers(model, alone(inputs, b), 24, eos_token_id=ends)] == [
                together[b]
            ]
    assert len({len(row) for row in together}) > 1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llava"])
def test_rollbacks_in_a_padded_batch_change_no_prompts_answer(
    families: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """With the cache cut and fed again, and with one that is made anew by running every prefix from its prompt."""
    model = families.model(family, decoder_layers=2)
    inputs = families.inputs(family, model)
    method = OPERA(num_beams=2, num_attn_candidates=3, threshold=1, warmup=0)
    with method(model) as trace:
        mine = answers(model, inputs, 10)
        rollbacks = trace.notes["rollbacks"]
    assert any(rollbacks)  # type: ignore[arg-type]
    follow = Stream._follow

    def from_the_prompt(stream: Stream, beams: list[torch.Tensor], done: list[bool]) -> torch.Tensor:
        stream._take_back(stream.held.shape[1])
        stream.held = stream.held[:, :0]
        shortest = min(ids.shape[1] for ids, idle in zip(beams, done, strict=True) if not idle)
        while stream.held.shape[1] < shortest - 1:
            column = follow(stream, beams, done)
            stream._run(stream._model, stream._step_inputs(column))
            stream.held = torch.cat([stream.held, column], 1)
        return follow(stream, beams, done)

    monkeypatch.setattr(Stream, "_follow", from_the_prompt)
    with method(model) as trace:
        assert answers(model, inputs, 10) == mine
        assert trace.notes["rollbacks"] == rollbacks


# With other methods ---------------------------------------------------------------------------------------------------
OTHERS: dict[str, vlattn.Intervention] = {
    "FlowCut": vlattn.FlowCut(keep=4, count="per_image"),
    "FastV": vlattn.FastV(keep=3, layer=2),
    "both": vlattn.compose(vlattn.FlowCut(keep=6, count="per_image"), vlattn.FastV(keep=3, layer=1)),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_on_pruned_prompts_a_batch_says_what_its_prompts_say_alone(llava: Llava, prompts: Prompts, name: str) -> None:
    model = small(llava, decoder_layers=3)
    inputs = prompts(model, images=(1, 1, 1), seed=1)
    vanilla = small(llava, decoder_layers=3)
    opera = OPERA(num_beams=3, num_attn_candidates=4, **BACK)
    with opera(vanilla):
        unpruned = answers(vanilla, inputs, 16)
    with vlattn.compose(opera, OTHERS[name])(model) as trace:
        together = answers(model, inputs, 16)
        assert any(trace.notes["rollbacks"])  # type: ignore[arg-type]
        for b in range(3):
            assert answers(model, alone(inputs, b), 16) == [together[b]]
    assert together != unpruned


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_on_pruned_prompts_it_still_is_beam_search_without_penalty(llava: Llava, prompts: Prompts, name: str) -> None:
    model = small(llava, decoder_layers=3)
    inputs = prompts(model, images=(1, 1))
    with OTHERS[name](model):
        stock = answers(model, inputs, num_beams=2, logits_processor=[TopOnly(4)])
        with OPERA(num_beams=2, num_attn_candidates=4, penalty_weights=0, threshold=math.inf)(model):
            assert answers(model, inputs) == stock
        assert answers(model, inputs, num_beams=2, logits_processor=[TopOnly(4)]) == stock


def test_beside_an_edit_of_attention_candidates_run_one_by_one(llava: Llava, prompts: Prompts) -> None:
    """An edit of one row would miss all candidates but the last in a forward with several."""
    model = small(llava)
    inputs = prompts(model, images=(1, 1), seed=1)
    opera = OPERA(num_beams=2, num_attn_candidates=4, **BACK)
    edit = PAI(alpha=0.9, gamma=1.0, start_layer=0)
    with vlattn.compose(edit, opera)(model) as trace:
        together = answers(model, inputs)
        runs = trace.notes["forwards"]
        for b in range(2):
            assert answers(model, alone(inputs, b)) == [together[b]]
    with opera(model) as trace:
        assert answers(model, inputs) != together
        assert trace.notes["forwards"] < runs  # type: ignore[operator]


def test_a_second_stream_is_refused_while_there_may_be_rollbacks(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1))
    with PAI(alpha=0, gamma=1.5, cutoff=0, start_layer=0)(model):
        stock = answers(model, inputs, num_beams=2, logits_processor=[TopOnly(4)])
        with OPERA(num_beams=2)(model), pytest.raises(InputError, match="second stream"):
            answers(model, inputs)
        with OPERA(num_beams=2, num_attn_candidates=4, penalty_weights=0, threshold=math.inf)(model):
            assert answers(model, inputs) == stock
