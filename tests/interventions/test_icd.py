"""ICD's disturbed prompts; that they are read as they should be is in test_two_streams.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.icd import ICD, Edit, disturb, edits_of

IMAGE, CLOSE, BOS = 63, 61, 1


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 0, 1, 8, 63, 63, 61, 9], [1, 7, 63, 61, 63, 61, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids == IMAGE).long()}


def places(**how: Any) -> list[Edit]:
    given = {"at": "start", "system": None, "first": (), "wrappers": ()}
    inputs = batch()
    ids = inputs["input_ids"]
    return edits_of(ids, inputs["attention_mask"].bool(), ids == IMAGE, **{**given, **how})


def test_a_disturbance_goes_in_front_of_the_text_but_behind_bos() -> None:
    assert places() == [Edit(2), Edit(0)]
    assert places(first=(BOS,)) == [Edit(3), Edit(1)]


def test_a_disturbance_goes_behind_the_last_image_and_what_closes_it() -> None:
    assert places(at="after_image") == [Edit(6), Edit(5)]
    assert places(at="after_image", wrappers=(CLOSE,)) == [Edit(7), Edit(6)]


def test_a_system_message_is_found_where_it_stands() -> None:
    assert places(system=(1,)) == [Edit(2, 1), Edit(0, 1)]
    assert places(system=(1,), first=(BOS,), at="after_image") == places(system=(1,))  # it alone says where


@pytest.mark.parametrize(("system", "count"), [((8, 9), 0), ((63,), 2)])
def test_a_system_message_that_is_not_there_exactly_once_is_refused(system: tuple[int, ...], count: int) -> None:
    with pytest.raises(InputError, match=rf"system: prompt 0 has it {count} times, as token ids \["):
        places(system=system)


def test_rows_are_rewritten_and_padded_anew_with_types_and_positions_following() -> None:
    found = disturb({**batch(), "other": 5}, [Edit(3, 1), Edit(1)], (40, 41), mrope=False)
    assert found["input_ids"].tolist() == [
        [0, 0, 0, 1, 40, 41, 63, 63, 61, 9],
        [1, 40, 41, 7, 63, 61, 63, 61, 4, 5],
    ]
    assert found["attention_mask"].tolist() == [[0] * 3 + [1] * 7, [1] * 10]
    assert torch.equal(found["token_type_ids"], (found["input_ids"] == IMAGE).long())
    assert found["position_ids"].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5, 6], list(range(10))]
    assert found["other"] == 5


def test_positions_in_three_dimensions_follow_the_edit_and_words_count_on_from_where_they_are_put_in() -> None:
    # Two rows of text around an image of 1x2 cells; the second is padded by one, and its edit is at the very end.
    ids = torch.tensor([[4, 5, 63, 63, 6], [0, 7, 63, 63, 8]])
    mask = torch.tensor([[1] * 5, [0] + [1] * 4])
    time = [[0, 1, 2, 2, 4], [0, 0, 1, 1, 3]]
    height = [[0, 1, 2, 2, 4], [0, 0, 1, 1, 3]]
    width = [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.tensor([time, height, width])}
    found = disturb(inputs, [Edit(1, 1), Edit(5)], (40, 41, 42), mrope=True)
    assert found["input_ids"].tolist() == [[4, 40, 41, 42, 63, 63, 6], [7, 63, 63, 8, 40, 41, 42]]
    assert found["position_ids"][0].tolist() == [[0, 1, 2, 3, 4, 4, 6], [0, 1, 1, 3, 4, 5, 6]]
    assert found["position_ids"][2].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_positions_in_three_dimensions_that_were_not_given_are_left_to_the_model() -> None:
    assert "position_ids" not in disturb(batch(), [Edit(2), Edit(0)], (40,), mrope=True)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_with_the_instruction_in_its_own_place_the_kept_logits_are_vanilla(families: Any, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, batch=1)
    same = tuple(inputs["input_ids"][0, :2].tolist())
    with torch.no_grad():
        vanilla = model(**inputs).logits[:, -1]
        with ICD(same, system=same)(model):
            found = model(**inputs).logits[:, -1]
    kept = vanilla >= vanilla.max() + math.log(0.1)
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(found[kept], vanilla[kept], atol=1e-9, rtol=0)
    assert found[~kept].max().item() < -900


def test_a_text_becomes_the_ids_that_the_processors_tokenizer_gives_it() -> None:
    model, processor = vlattn.load("tiny")
    text = "is there a dog ?"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    inputs = prompts_of(model, processor)
    with torch.no_grad():
        found = []
        for method in (
            ICD(text, processor=processor),
            ICD(text, processor=processor.tokenizer),
            ICD(tuple(ids)),
            ICD(list(ids)),  # type: ignore[arg-type]
        ):
            with method(model):
                found.append(model(**inputs).logits)
        vanilla = model(**inputs).logits
    assert all(torch.equal(one, found[0]) for one in found)
    assert not torch.equal(found[0], vanilla)


def prompts_of(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    count = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    words = processor.tokenizer("what is here ?", add_special_tokens=False)["input_ids"]
    side = model.config.vision_config.image_size
    return {
        "input_ids": torch.tensor([[*words, *[model.config.image_token_id] * count, *words]]),
        "pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"disturbance": "be vague"}, "disturbance: a text needs processor=... to become token ids"),
        ({"disturbance": (5,), "system": "be kind"}, "system: a text needs processor"),
        ({"disturbance": ()}, r"disturbance: got \(\); give a text, or a sequence of token ids"),
        ({"disturbance": ""}, "disturbance: got ''"),
        ({"disturbance": (5, -1)}, "disturbance: got"),
        ({"disturbance": 5}, "disturbance: got 5"),
        ({"disturbance": (5,), "at": "end"}, "at: got 'end'; give 'start' or 'after_image'"),
        ({"disturbance": (5,), "alpha": -1}, "alpha: got -1"),
        ({"disturbance": (5,), "beta": 3}, "beta: got 3"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_to_give(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ICD(**settings)


def test_the_method_is_hashable_and_shows_no_processor() -> None:
    method = ICD([5, 6], processor=object())  # type: ignore[arg-type]
    assert hash(method) == hash(ICD((5, 6)))
    assert "processor" not in repr(method)
