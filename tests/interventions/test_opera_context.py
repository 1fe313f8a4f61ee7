"""What a model is inside an OPERA context and after it, what its `generate` takes there, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import StaticCache

from vlattn.errors import InputError
from vlattn.interventions.opera import OPERA

Llava = Callable[..., Any]
Prompts = Callable[..., dict[str, torch.Tensor]]
BACK: dict[str, Any] = {"threshold": 2, "warmup": 2}  # goes back often, in short answers


def small(llava: Llava, **options: Any) -> Any:
    return llava(**{"decoder_layers": 2, "image_size": 12, "layers": 3, **options})


def answers(model: Any, inputs: dict[str, torch.Tensor], new: int = 12, **options: Any) -> list[list[int]]:
    """The new tokens of each prompt."""
    found = model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def test_the_model_is_as_it_was_afterwards(llava: Llava, prompts: Prompts, tiny: ModuleType) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1))
    vanilla = answers(model, inputs)
    before = tiny.hooks_of(model), tiny.settings_of(model), vanilla, model.generate
    with torch.no_grad():
        logits = model(**inputs).logits
    with OPERA(**BACK)(model), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
        assert answers(model, inputs) != vanilla
        assert answers(model, inputs) == answers(model, inputs)
    with pytest.raises(RuntimeError, match="on purpose"), OPERA()(model):
        raise RuntimeError("on purpose")
    assert (tiny.hooks_of(model), tiny.settings_of(model), answers(model, inputs), model.generate) == before


def test_two_models_decode_for_themselves(llava: Llava, prompts: Prompts) -> None:
    one, other = small(llava), small(llava, seed=1)
    inputs = prompts(one, images=(1,))
    with OPERA(num_beams=2)(one):
        mine = answers(one, inputs)
        theirs = answers(other, inputs, num_beams=2)
        with OPERA(num_beams=3)(other):
            answers(other, inputs)
            assert answers(one, inputs) == mine
        assert answers(other, inputs, num_beams=2) == theirs


def test_embedded_prompts_and_criteria_and_half_precision_work(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embedded = {"inputs_embeds": embeds, **{k: v for k, v in inputs.items() if k != "input_ids"}}
    with OPERA(num_beams=3, **BACK)(model):
        mine = answers(model, inputs)
        assert model.generate(**embedded, max_new_tokens=12, do_sample=False).tolist() == mine

        def short(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= inputs["input_ids"].shape[1] + 4)

        assert {len(row) for row in answers(model, inputs, stopping_criteria=[short])} == {4}
    half = small(llava, dtype=torch.bfloat16)
    with OPERA(num_beams=3, **BACK)(half):
        rows = answers(half, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    assert {len(row) for row in rows} == {12}


def test_fewer_candidates_than_beams_are_said_and_one_is_greedy_search(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    inputs = prompts(model, images=(1, 1))
    with pytest.warns(UserWarning, match="num_attn_candidates: 1 is less than num_beams, 3"):
        single = OPERA(num_beams=3, num_attn_candidates=1, threshold=math.inf)
    greedy = answers(model, inputs)
    with single(model):
        assert answers(model, inputs) == greedy
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_return_sequences=3)
    assert found.shape == (6, inputs["input_ids"].shape[1] + 3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"do_sample": True}, r"do_sample: got True; .*give do_sample=False"),
        ({"num_beams": 2}, r"num_beams: got 2, but this is OPERA\(num_beams=5\)"),
        ({"num_beams": 1}, r"num_beams: got 1"),
        ({"use_cache": False}, r"use_cache: got False"),
        ({"cache_implementation": "static"}, r"cache_implementation: got 'static'.*give 'dynamic'"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, r"assistant_model: got Linear; .*leave it out"),
        ({"prompt_lookup_num_tokens": 3}, r"prompt_lookup_num_tokens: got 3"),
        ({"custom_generate": "somebody/else"}, r"custom_generate: got somebody/else"),
        ({"output_attentions": True}, r"output_attentions: got True"),
        ({"output_scores": True}, r"output_scores: got True; .*sequences_scores"),
        ({"guidance_scale": 1.5}, r"guidance_scale: got 1.5"),
        ({"prefill_chunk_size": 4}, r"prefill_chunk_size: got 4"),
        ({"stop_strings": "."}, r"stop_strings: got \.; give stopping_criteria"),
    ],
)
def test_what_the_search_cannot_do_is_refused_by_name(
    llava: Llava, prompts: Prompts, asked: dict[str, Any], message: str
) -> None:
    model = small(llava)
    with OPERA()(model), pytest.raises(InputError, match=message):
        model.generate(**prompts(model), **{"max_new_tokens": 3, "do_sample": False, **asked})


def test_settings_of_the_models_generation_config_are_seen_too(llava: Llava, prompts: Prompts) -> None:
    model = small(llava)
    model.generation_config.do_sample = True
    with OPERA()(model), pytest.raises(InputError, match="do_sample"):
        model.generate(**prompts(model), max_new_tokens=3)
    model.generation_config.do_sample, model.generation_config.num_beams = False, 3
    with OPERA()(model), pytest.raises(InputError, match=r"num_beams: got 3"):
        model.generate(**prompts(model), max_new_tokens=3)
    with OPERA(num_beams=3)(model):
        assert len(model.generate(**prompts(model), max_new_tokens=3)) == 1


def test_caches_that_cannot_give_tokens_back_are_refused(llava: Llava, prompts: Prompts, tiny: ModuleType) -> None:
    model = small(llava)
    inputs = prompts(model)
    with OPERA()(model):
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        with pytest.raises(InputError, match="StaticCache does not allow"):
            answers(model, inputs, **{tiny.CACHE: static})
        with torch.no_grad():
            cache = getattr(model(**inputs, use_cache=True), tiny.CACHE)
        longer = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=5)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with pytest.raises(InputError, match=r"it holds \d+ positions already"):
            answers(model, longer, **{tiny.CACHE: cache})


def test_only_one_search_can_act_and_only_where_there_is_a_head(
    llava: Llava, families: ModuleType, tiny: ModuleType
) -> None:
    model = small(llava)
    before = tiny.hooks_of(model), tiny.settings_of(model)
    with OPERA()(model), pytest.raises(InputError, match="replaced already"):
        OPERA()(model).attach()
    with pytest.raises(InputError, match="LlavaModel has no generate"):
        OPERA()(model.model).attach()
    with pytest.raises(InputError, match="sliding window"):
        OPERA()(families.model("gemma3")).attach()
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 1}, "num_beams: got 1; give an integer of at least 2"),
        ({"num_attn_candidates": 0}, "num_attn_candidates: got 0"),
        ({"scale_factor": 0}, "scale_factor: got 0"),
        ({"score_scale": -1.0}, "score_scale: got -1.0"),
        ({"threshold": math.nan}, "threshold: got nan"),
        ({"penalty_weights": -1}, "penalty_weights: got -1"),
        ({"window": 0}, "window: got 0"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"renormalize": 1}, "renormalize: got 1"),
        ({"monotone": "no"}, "monotone: got 'no'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OPERA(**settings)
