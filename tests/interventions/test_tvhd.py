"""T-VHD by whole forwards in plain loops, and texts taken apart into words and sentences."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.tvhd import TVHD, spell, token_scores
from vlattn.models.registry import adapter_for

IMAGE = 63
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm", "gemma3",
)  # fmt: skip


def longer(call: dict[str, Any], new: torch.Tensor) -> dict[str, Any]:
    """A prompt of one row with tokens behind it."""
    width = call["input_ids"].shape
    grown = dict(call)
    for name, value in call.items():
        if value.shape == width:
            behind = new if name == "input_ids" else torch.full_like(new, int(name == "attention_mask"))
            grown[name] = torch.cat([value, behind], 1)
    return grown


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_scores_as_whole_forwards_of_each_prompt_alone(
    families: ModuleType, tiny: ModuleType, naive_vhr: ModuleType, matrix: ModuleType, family: str
) -> None:
    model, inputs = matrix.build(family, families, tiny)
    adapter = adapter_for(model)
    generated = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    found = vlattn.tvhd(model, inputs, generated, k=2)
    assert torch.equal(found.ids, generated)
    for b in range(2):
        own = matrix.alone(family, inputs, b)
        blind = naive_vhr.text_only(own, [*adapter.placeholder_ids, *adapter.wrapper_ids])
        new = generated[b : b + 1]
        expected = naive_vhr.t_vhd(model, longer(own, new), longer(blind, new), 5, 4, k=2)
        assert found.scores[b].tolist() == pytest.approx(expected, rel=1e-4)


def test_the_first_token_has_the_score_of_the_map(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 2))
    new = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for by, measure in (("removal", vlattn.vhd), ("knockout", vlattn.vhd_knockout)):
        scores = vlattn.tvhd(model, inputs, new, k=3, by=by).scores  # type: ignore[arg-type]
        expected = measure(model, inputs).sort(-1).values[..., 1:].sum((1, 2))
        torch.testing.assert_close(scores[:, 0], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(vlattn.tvhd(model, inputs, new[:, :1], k=3, by=by).scores, scores[:, :1])  # type: ignore[arg-type]


def test_all_heads_sum_up_one_is_the_maximum_and_more_heads_never_score_less() -> None:
    vhd = torch.rand(2, 3, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(token_scores(vhd, 8), vhd.sum((1, 2)))
    torch.testing.assert_close(token_scores(vhd, 1), vhd.amax(2).sum(1))
    by_k = torch.stack([token_scores(vhd, k) for k in range(1, 9)])
    assert bool((by_k.diff(dim=0) >= 0).all())
    with pytest.raises(InputError, match="k: got 9, but a layer has 8 heads"):
        token_scores(vhd, 9)


def test_the_knockout_scores_token_by_token_what_it_scores_at_once(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 2))
    new = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    for by in ("removal", "knockout"):
        at_once = vlattn.tvhd(model, inputs, new, by=by).scores  # type: ignore[arg-type]
        with vlattn.VHR(alpha=1)(model):  # somebody is attached, and does nothing
            one_by_one = vlattn.tvhd(model, inputs, new, by=by).scores  # type: ignore[arg-type]
        torch.testing.assert_close(one_by_one, at_once)


def test_under_vhr_tokens_are_scored_with_the_heads_of_their_prompt_reinforced(
    tiny: ModuleType, naive_vhr: ModuleType
) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, layers=4)
    own = tiny.prompts(model, images=(1,))
    new = torch.randint(3, 40, (1, 4), generator=torch.Generator().manual_seed(1))
    with vlattn.VHR()(model) as trace:
        found = vlattn.tvhd(model, own, new, k=4).scores[0]
    notes: Any = trace.notes
    heads = {layer: chosen[0].tolist() for layer, chosen in notes["heads"].items()}
    expected = [0.0] * 4
    blind = longer(naive_vhr.text_only(own, [IMAGE]), new)
    for layer in range(4):
        with naive_vhr.scaling(model, heads, 2):
            seeing = naive_vhr.outputs(model, longer(own, new), layer)
        without = naive_vhr.outputs(model, blind, layer)
        for t in range(4):
            expected[t] += sum(naive_vhr.divergence(seeing[t - 5], without[t - 5]))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_under_pruning_it_scores_the_pruned_prompt_and_leaves_the_model_as_it_was(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad():
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    plain = vlattn.tvhd(model, inputs, new).scores
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    with vlattn.compose(vlattn.FlowCut(keep=3, count="per_image"), vlattn.FastV(keep=2, layer=2))(model):
        pruned = vlattn.tvhd(model, inputs, new).scores
        alone = {
            "input_ids": inputs["input_ids"][:1, inputs["attention_mask"][0].bool()],
            "pixel_values": inputs["pixel_values"][:1],
        }
        torch.testing.assert_close(vlattn.tvhd(model, alone, new[:1]).scores, pruned[:1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pruned, plain, rtol=1e-3)
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings


def test_a_prompt_without_an_image_scores_nothing(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=3, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 0))
    for by in ("removal", "knockout"):
        found = vlattn.tvhd(model, inputs, torch.tensor([[5, 6], [7, 8]]), by=by)  # type: ignore[arg-type]
        assert found.scores[1].tolist() == [0, 0]
        assert bool((found.scores[0] > 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generated": torch.zeros(2, 0, dtype=torch.long)}, r"generated: got \[2, 0\]"),
        ({"generated": torch.zeros(1, 3, dtype=torch.long)}, r"new tokens of 2 prompts"),
        ({"generated": torch.zeros(3, dtype=torch.long)}, r"generated: got \[3\]"),
        ({"k": 0}, "k: got 0"),
        ({"k": 5}, "k: got 5, but a layer has 4 heads"),
        ({"by": "zeroing"}, "by: got 'zeroing'"),
    ],
)
def test_bad_input_is_refused(tiny: ModuleType, change: dict[str, Any], message: str) -> None:
    model = tiny.llava(decoder_layers=2, image_size=16, layers=4)
    given: dict[str, Any] = {"generated": torch.tensor([[5, 6], [7, 8]]), **change}
    with pytest.raises(InputError, match=message):
        vlattn.tvhd(model, tiny.prompts(model, images=(1, 1)), **given)


# Words and sentences --------------------------------------------------------------------------------------------------
class Pieces:
    """A tokenizer that spells token i as pieces[i]; bytes that make no letter yet are replacement characters."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **how: Any) -> str:
        assert how == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def test_a_word_is_the_mean_of_the_tokens_that_spell_it() -> None:
    tokenizer = Pieces(b"A", b" ca", b"t", b" sits", b".", b" Not", b" two", b"-fold!", b"")
    found = TVHD(torch.arange(9)[None], torch.tensor([[1.0, 2, 4, 8, 16, 32, 64, 128, 1e9]]))
    assert found.words(tokenizer) == [[("A", 1), ("cat", 3), ("sits", 8), ("Not", 32), ("two-fold", 96)]]
    assert found.sentences(tokenizer) == [[("A cat sits.", 31 / 5), ("Not two-fold!", 224 / 3)]]


def test_each_row_has_its_own_text_and_an_empty_one_has_no_words() -> None:
    tokenizer = Pieces(b"cat", b" dog", b"")
    found = TVHD(torch.tensor([[0, 1], [2, 2], [1, 2]]), torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert found.words(tokenizer) == [[("cat", 1), ("dog", 2)], [], [("dog", 5)]]
    assert found.sentences(tokenizer) == [[("cat dog", 1.5)], [], [("dog", 5)]]


def test_tokens_of_one_letter_add_it_together() -> None:
    tokenizer = Pieces(b"caf", b"\xc3", b"\xa9", b" au", b" lait")
    text, spans = spell(tokenizer, [0, 1, 2, 3, 4])
    assert text == "café au lait"
    assert spans == [(0, 3), (3, 4), (3, 4), (4, 7), (7, 12)]
    found = TVHD(torch.arange(5)[None], torch.tensor([[1.0, 2, 6, 8, 9]]))
    assert found.words(tokenizer) == [[("café", 3), ("au", 8), ("lait", 9)]]


def test_new_lines_end_sentences_and_a_token_on_the_seam_counts_in_both() -> None:
    tokenizer = Pieces(b"One", b" dog\nTwo", b" cats?")
    found = TVHD(torch.arange(3)[None], torch.tensor([[1.0, 3, 5]]))
    assert found.sentences(tokenizer) == [[("One dog", 2), ("Two cats?", 4)]]
    assert found.words(tokenizer) == [[("One", 1), ("dog", 3), ("Two", 3), ("cats", 5)]]


@pytest.mark.slow
def test_the_embedded_model_looks_more_for_objects_than_for_what_stands_between_them() -> None:
    from PIL import Image

    from vlattn.assets.paths import tiny_coco
    from vlattn.eval.answer import chat_prompt

    model: Any
    model, processor = vlattn.load("tiny")
    files = sorted(tiny_coco("val").images.iterdir())[:6]
    text = chat_prompt(processor, "Please describe this image in detail.")
    inputs = processor(images=[[Image.open(f)] for f in files], text=[text] * 6, return_tensors="pt", padding=True)
    with torch.no_grad():
        new = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    found = vlattn.tvhd(model, inputs, new)
    words = [pair for text in found.words(processor.tokenizer) for pair in text]
    between = {"a", "an", "and", "the", "there", "is", "are", "of", "in", "on", "this", "with"}
    objects = [score for word, score in words if word.lower() not in between]
    others = [score for word, score in words if word.lower() in between]
    assert len(objects) > 10
    assert len(others) > 10
    assert sum(objects) / len(objects) > sum(others) / len(others)
    for text, sentences in zip(found.words(processor.tokenizer), found.sentences(processor.tokenizer), strict=True):
        assert " ".join(word for word, _ in text) in " ".join(s for s, _ in sentences).replace(",", "").replace(".", "")
