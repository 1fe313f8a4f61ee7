"""Attention of a language model on objects: it is eager's own, in the right boxes, and says where the model looks."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vlattn
from vlattn.assets.paths import tiny_gaze
from vlattn.errors import InputError
from vlattn.gaze.baselines import path_trial
from vlattn.gaze.box_cover import box_cover, seen_window
from vlattn.gaze.bridge import ObjectAttention, chosen, named_rows, object_attention, presence_question
from vlattn.gaze.bridge_choice import Reading, choose_reading
from vlattn.gaze.bridge_report import ask_bridge
from vlattn.gaze.grounding import attention_paths, grounding
from vlattn.gaze.metrics.gaze_paths import one_of_each
from vlattn.gaze.trial import GazeSet, Scene, SceneObject, Trial, read_gaze
from vlattn.image_file import read_rgb

QUESTION = "Is there a {target} in the image? Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def searches() -> GazeSet:
    """24 searches in scenes of tiny COCO, of one subject each."""
    gaze = read_gaze(tiny_gaze())
    mine = [trial for trial in gaze.trials if trial.scene.startswith("coco") and trial.subject == "s1"]
    return replace(gaze, trials=tuple(mine[:24]))


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return vlattn.load("tiny")


# Boxes and tokens -----------------------------------------------------------------------------------------------------
def test_cover_is_the_share_of_pixels_of_a_token_in_a_box() -> None:
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.integers(-10, 80, (9, 2)), rng.integers(1, 50, (9, 2))], 1).astype(float)
    pixels = np.zeros((9, 60, 90))
    for one, (x, y, w, h) in zip(pixels, boxes.astype(int), strict=True):
        one[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = 1
    naive = pixels.reshape(9, 6, 10, 9, 10).mean((2, 4))
    np.testing.assert_allclose(box_cover(boxes, (90, 60), (6, 9)), naive, atol=1e-12)


def test_a_window_shifts_and_stretches_the_boxes() -> None:
    box = np.array([[50, 0, 50, 100]], float)
    cover = box_cover(box, (200, 100), (2, 2), (0.25, 0.0, 0.75, 1.0))
    np.testing.assert_allclose(cover[0], [[1, 0], [1, 0]])
    assert box_cover(np.array([[0, 0, 40, 100.0]]), (200, 100), (2, 2), (0.25, 0, 0.75, 1)).sum() == 0


def processor(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**settings)


def test_the_window_is_what_centre_cropping_leaves() -> None:
    clip = processor(
        do_center_crop=True, crop_size={"height": 96, "width": 96}, do_resize=True, size={"shortest_edge": 96}
    )
    assert seen_window(clip, 96, 96) == (0, 0, 1, 1)
    np.testing.assert_allclose(seen_window(clip, 200, 100), (0.25, 0, 0.75, 1))
    np.testing.assert_allclose(seen_window(clip, 30, 60), (0, 0.25, 1, 0.75))
    squeezed = processor(
        do_center_crop=True, crop_size={"height": 96, "width": 96}, do_resize=True, size={"height": 96, "width": 96}
    )
    np.testing.assert_allclose(seen_window(squeezed, 200, 100), (0, 0, 1, 1))
    assert seen_window(processor(do_center_crop=False), 200, 100) == (0, 0, 1, 1)


# Reading --------------------------------------------------------------------------------------------------------------
def inputs_of(proc: Any, gaze: GazeSet, trial: Trial) -> Any:
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": QUESTION.format(target=trial.target)}],
    }
    text = proc.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return proc(images=[read_rgb(gaze.image_path(gaze.scene_of(trial)))], text=[text], return_tensors="pt")


@pytest.mark.parametrize("rows", ["prompt", "target"])
def test_what_is_read_is_eagers_own_attention(searches: GazeSet, tiny: tuple[Any, Any], rows: Any) -> None:
    few = replace(searches, trials=searches.trials[:5])
    found = object_attention(*tiny, few, prompt=QUESTION, rows=rows, batch_size=3)
    eager, proc = vlattn.load("tiny", attn_implementation="eager")
    for trial in few.trials:
        inputs = inputs_of(proc, few, trial)
        with torch.no_grad():
            weights = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0]  # [L, H, T, T]
        visual = inputs["input_ids"][0] == eager.config.image_token_id
        ids = inputs["input_ids"][0].tolist()
        picked = torch.zeros(len(ids), dtype=torch.bool)
        if rows == "prompt":
            picked[-1] = True
        else:
            name = proc.tokenizer(trial.target, add_special_tokens=False)["input_ids"]
            start = max(i for i in range(len(ids)) if ids[i : i + len(name)] == name)
            picked[start : start + len(name)] = True
        expected = weights[:, :, picked][..., visual].mean(2).unflatten(-1, (12, 12)).numpy()
        one = found[trial.scene, trial.target]
        np.testing.assert_allclose(one.tokens, expected, rtol=1e-4, atol=2e-6)
        boxes = few.scene_of(trial).boxes()
        cover = box_cover(boxes, (96, 96), (12, 12))
        np.testing.assert_allclose(one.area, boxes[:, 2:].prod(1) / 64)
        for index in range(len(boxes)):
            np.testing.assert_allclose(one.objects[..., index], (expected * cover[index]).sum((-1, -2)), atol=1e-5)


def test_the_model_is_left_as_it_was_also_by_an_error(searches: GazeSet, tiny: tuple[Any, Any]) -> None:
    model, proc = tiny
    inputs = inputs_of(proc, searches, searches.trials[0])
    before, attention = model(**inputs).logits, model.config.get_text_config()._attn_implementation
    object_attention(model, proc, replace(searches, trials=searches.trials[:1]))
    with pytest.raises(InputError, match="does not name the target"):
        object_attention(model, proc, searches, prompt="What is this?", rows="target")
    assert model.config.get_text_config()._attn_implementation == attention
    assert torch.equal(model(**inputs).logits, before)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_answers_are_averaged_over_the_rows_that_their_tokens_come_from(
    searches: GazeSet, tiny: tuple[Any, Any]
) -> None:
    model, proc = tiny
    few = replace(searches, trials=searches.trials[:3])
    ask = "Please describe this image in detail."
    found = object_attention(model, proc, few, prompt=ask, rows="answer", max_new_tokens=9, batch_size=3)
    eager, _ = vlattn.load("tiny", attn_implementation="eager")
    for trial in few.trials:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ask}]}
        text = proc.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        picture = read_rgb(few.image_path(few.scene_of(trial)))
        inputs = proc(images=[picture], text=[text], return_tensors="pt")
        asked = inputs["input_ids"].shape[1]
        whole = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        words = int((whole[0, asked:] != model.generation_config.eos_token_id).sum())
        inputs.update(input_ids=whole, attention_mask=torch.ones_like(whole))
        with torch.no_grad():
            weights = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0]
        visual = whole[0] == eager.config.image_token_id
        rows = weights[:, :, asked - 1 : asked - 1 + words][..., visual]
        assert rows.shape[2] == words > 1
        np.testing.assert_allclose(
            found[trial.scene, trial.target].tokens, rows.mean(2).unflatten(-1, (12, 12)), atol=5e-6
        )


def test_searches_of_several_subjects_are_asked_once(searches: GazeSet, tiny: tuple[Any, Any]) -> None:
    one = searches.trials[0]
    twice = replace(searches, trials=(one, replace(one, id="again", subject="s2")))
    done: list[int] = []
    assert len(object_attention(*tiny, twice, advance=done.append)) == 1
    assert done == [1]


def test_inside_a_pruning_context_only_kept_tokens_are_attended(searches: GazeSet, tiny: tuple[Any, Any]) -> None:
    model, proc = tiny
    few = replace(searches, trials=searches.trials[:2])
    with vlattn.FlowCut(keep=36, count="per_image")(model):
        found = object_attention(model, proc, few, prompt=QUESTION)
    for one in found.values():
        assert ((one.tokens > 0).any((0, 1)).sum()) == 36


def test_prompts_that_cannot_be_asked_are_refused(searches: GazeSet, tiny: tuple[Any, Any]) -> None:
    trial = searches.trials[0]
    scene = searches.scene_of(trial)
    with pytest.raises(InputError, match="rows: got 'last'"):
        object_attention(*tiny, searches, rows="last")  # type: ignore[arg-type]
    blank = replace(searches, scenes={scene.id: replace(scene, image=None)}, trials=(trial,))
    with pytest.raises(InputError, match="has no picture"):
        object_attention(*tiny, blank)
    empty = replace(searches, scenes={scene.id: replace(scene, objects=())}, trials=(trial,))
    with pytest.raises(InputError, match="has no objects to attend to"):
        object_attention(*tiny, empty)


def test_the_question_has_the_article_that_the_target_needs() -> None:
    asked = [presence_question(Trial("1", "s", target, "p", (), ())) for target in ("orange", "wine glass")]
    assert asked == ["Is there an orange in the image?", "Is there a wine glass in the image?"]


def test_names_are_found_where_they_stand_last(tiny: tuple[Any, Any]) -> None:
    _, proc = tiny
    texts = ["is the dog a dog or a cat?", "is there a wine glass here and a dog"]
    ids = proc.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    trials = [Trial("1", "s", "dog", "p", (), ()), Trial("2", "s", "Wine Glass", "p", (), ())]
    mask = named_rows(proc, ids, trials)
    tail = ids[:, -mask.shape[1] :]
    found = [proc.tokenizer.decode(row[picked]).strip() for row, picked in zip(tail, mask, strict=True)]
    assert found == ["dog", "wine glass"]
    assert int(mask[0].nonzero()[0]) + ids.shape[1] - mask.shape[1] > ids[0].tolist().index(int(tail[0][mask[0]][0]))


# Scores ---------------------------------------------------------------------------------------------------------------
def made_up() -> tuple[GazeSet, dict[tuple[str, str], ObjectAttention]]:
    """Three objects on a grid of 1 x 6 tokens: a over 3 of them, b over 1, c over 1; two layers of one head."""
    boxes = {"a": (0, 0, 30, 10), "b": (30, 0, 10, 10), "c": (40, 0, 10, 10)}
    scene = Scene("s", 60, 10, tuple(SceneObject(label, box) for label, box in boxes.items()))
    trials = [
        Trial(f"{label}/{p}", "s", label, p, (), (), target_object=place)
        for place, label in enumerate("abc")
        for p in ("p", "q")
    ]
    cover = box_cover(scene.boxes(), (60, 10), (1, 6))
    rows = np.array([[[[0.1, 0.1, 0.1, 0.2, 0.05, 0.45]]], [[[0, 0, 0, 0, 0.4, 0]]]], np.float32)  # [L, H, 1, 6]
    one = ObjectAttention(np.einsum("lhrc,prc->lhp", rows, cover), cover.sum((1, 2)), rows, cover)
    return GazeSet({"s": scene}, tuple(trials)), {("s", label): one for label in "abc"}


def test_paths_visit_objects_by_descending_attention_up_to_the_target() -> None:
    gaze, found = made_up()
    paths = attention_paths(gaze, found, layers=[0], name="lvlm")
    assert [one.objects for one in paths.trials[::2]] == [(0,), (0, 1), (0, 1, 2)]
    assert {one.subject for one in paths.trials} == {"lvlm"}
    assert paths.trials[0].id == "a/p/0"
    dense = attention_paths(gaze, found, layers=[0], per_area=True, to_target=False)
    assert {one.objects for one in dense.trials} == {(1, 0, 2)}
    assert {one.objects for one in attention_paths(gaze, found, heads=[(1, 0)], to_target=False).trials} == {(2, 0, 1)}


def test_a_target_that_is_missing_ends_no_path() -> None:
    gaze, found = made_up()
    absent = replace(gaze, trials=(replace(gaze.trials[0], target_object=None),))
    assert attention_paths(absent, found, layers=[0]).trials[0].objects == (0, 1, 2)


def test_grounding_counts_searches_by_hand() -> None:
    gaze, found = made_up()
    first = grounding(gaze, found, layers=[0])
    # Per token b has the most (0.2); the token with the most attention is in no box.
    assert (first.per_area, first.pointing, first.n_valid, first.n_total) == (pytest.approx(1 / 3), 0, 3, 3)
    assert first.chance_per_area == pytest.approx(1 / 3)
    assert first.chance_pointing == pytest.approx((3 + 1 + 1) / 6 / 3)
    second = grounding(gaze, found, layers=[1])
    assert (second.per_area, second.pointing) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    np.testing.assert_allclose(second.by_head, [[1 / 3], [1 / 3]])


def test_lone_objects_and_missing_targets_count_in_no_score() -> None:
    gaze, found = made_up()
    lone = Scene("lone", 60, 10, gaze.scenes["s"].objects[:1])
    more = (
        Trial("x", "lone", "a", "p", (), (), target_object=0),
        Trial("y", "s", "horse", "p", (), ()),
    )
    one = found["s", "a"]
    both = {
        **found,
        ("lone", "a"): replace(one, objects=one.objects[..., :1], area=one.area[:1], cover=one.cover[:1]),
        ("s", "horse"): one,
    }
    scenes = {**gaze.scenes, "lone": lone}
    score = grounding(replace(gaze, scenes=scenes, trials=gaze.trials + more), both)
    assert (score.n_valid, score.n_total) == (3, 5)
    with pytest.raises(InputError, match="no search has its target in a scene of several objects"):
        grounding(replace(gaze, scenes=scenes, trials=more), both)


def test_intervals_of_grounding_are_quantiles_of_resampled_means() -> None:
    gaze, found = made_up()
    score = grounding(gaze, found, layers=[1], n_boot=500, seed=3)
    draws = np.random.default_rng(3).multinomial(3, [1 / 3] * 3, 500)
    means = draws @ np.array([0, 1, 0]) / 3  # of the three targets attention singles out b
    assert score.per_area_interval == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    assert score.pointing_interval is not None
    assert grounding(gaze, found, layers=[1]).per_area_interval is None


# What to read ---------------------------------------------------------------------------------------------------------
def test_the_reading_with_the_best_score_on_val_is_chosen() -> None:
    gaze, found = made_up()
    # People go to the objects in the order of layer 1: c first.
    orders = {"a": (2, 0), "b": (2, 0, 1), "c": (2,)}
    people = replace(
        gaze,
        trials=tuple(
            path_trial(trial, gaze.scenes["s"], orders[trial.target], "person", n)
            for n, trial in enumerate(gaze.trials)
        ),
    )
    best, tried = choose_reading(one_of_each(gaze), people, {"prompt": found})
    assert best == Reading("prompt", 1, False)
    assert [(one["layer"], one["per_area"]) for one in tried] == [(0, False), (0, True), (1, False), (1, True)]
    assert tried[2]["ss"] == max(one["ss"] for one in tried) == pytest.approx(1)


def test_readings_are_named_by_a_short_text() -> None:
    assert Reading.parse("target:0") == Reading("target", 0)
    assert Reading.parse("answer:12:area") == Reading("answer", 12, True)
    assert Reading.parse("answer:12:area").text == "answer:12:area"
    for text in ("target", "all:0", "target:x", "target:1:box"):
        with pytest.raises(InputError, match=r"attention: got .* give ROWS:LAYER"):
            Reading.parse(text)


def test_the_bridge_chooses_on_val_and_says_so(searches: GazeSet, tiny: tuple[Any, Any]) -> None:
    val, asked = (replace(searches, trials=searches.trials[part]) for part in (slice(0, 6), slice(6, 12)))
    paths, told = ask_bridge(*tiny, asked, val, n_boot=20)
    assert told["chosen_by"] == "ss on val"
    assert len(told["tried"]) == 2 * 6 * 2
    again, same = ask_bridge(*tiny, asked, None, Reading.parse(told["reading"]), n_boot=20)
    assert again == paths
    assert same["grounding"] == told["grounding"]
    assert (same["chosen_by"], same["tried"]) == (None, None)
    assert [one.objects[-1] for one in paths.trials] == [one.target_object for one in asked.trials]  # type: ignore[index]
    low, high = told["grounding"]["per_area_interval"]
    assert low <= told["grounding"]["per_area"] <= high
    json.dumps(told, allow_nan=False)
    with pytest.raises(InputError, match="attention: got auto, but there is no val part"):
        ask_bridge(*tiny, asked)


def test_scores_of_what_was_not_read_are_refused() -> None:
    gaze, found = made_up()
    with pytest.raises(InputError, match="found: has nothing of trial 'a/p'"):
        grounding(gaze, {})
    with pytest.raises(InputError, match=r"got \(2, 0\); the decoder has 2 layers of 1 heads"):
        attention_paths(gaze, found, layers=[2])
    with pytest.raises(InputError, match="got both"):
        grounding(gaze, found, layers=[0], heads=[(0, 0)])
    with pytest.raises(InputError, match="got none to average over"):
        chosen(np.zeros((2, 2, 3)), [], None)


def test_layers_and_heads_are_averaged_as_asked() -> None:
    attention = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4)
    np.testing.assert_allclose(chosen(attention, None, None), attention.mean((0, 1)))
    np.testing.assert_allclose(chosen(attention, [1], None), attention[1].mean(0))
    np.testing.assert_allclose(chosen(attention, None, [(0, 2), (1, 0)]), (attention[0, 2] + attention[1, 0]) / 2)


def test_tiny_llava_looks_at_the_target_from_the_targets_name(searches: GazeSet, tiny: tuple[Any, Any]) -> None:
    found = object_attention(*tiny, searches, prompt=QUESTION, rows="target")
    score = grounding(searches, found, layers=[0])
    assert score.per_area > score.chance_per_area + 0.25
    assert score.by_head[0].mean() > score.by_head[1:].mean() + 0.15
