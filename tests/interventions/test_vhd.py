"""VHD by its definition in plain loops, and over layers and heads of live models."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.text_only import TextPrompt
from vlattn.interventions.vhd import joined, select_heads, vhd_scores, watch_prompt, without_outliers
from vlattn.interventions.vhr import VHR

IMAGE = 63


def pair(seed: int, heads: int = 8, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Head outputs [3, H, 5] with and without the image; some heads are large without it."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 3, heads, 5, generator=generator, dtype=torch.float64)
    both[1] *= 1 + 3 * torch.rand(3, heads, 1, generator=generator, dtype=torch.float64) ** 6
    return scale * both[0], scale * both[1]


@pytest.mark.parametrize("heads", [2, 5, 8, 32])
@pytest.mark.parametrize("seed", range(10))
def test_scores_outliers_and_choice_are_those_of_plain_loops(naive_vhr: ModuleType, seed: int, heads: int) -> None:
    seeing, blind = pair(seed, heads)
    scores = vhd_scores(seeing, blind)
    kept = without_outliers(scores, blind)
    for b in range(3):
        expected = naive_vhr.divergence(seeing[b].tolist(), blind[b].tolist())
        assert scores[b].tolist() == pytest.approx(expected, rel=1e-12)
        expected = naive_vhr.drop_outliers(expected, blind[b].tolist())
        assert kept[b].tolist() == pytest.approx(expected, rel=1e-12)
        assert select_heads(kept[b]).tolist() == naive_vhr.above_median(expected)


def test_an_outlier_needs_both_conditions_is_set_to_zero_and_never_chosen() -> None:
    # Eight heads of width 1. VHD: head 6 and 7 stand out; squared activation: head 5 and 7 do.
    blind = torch.tensor([1.0, 1, 1, 1, 1, 9, 1, 9])[:, None]
    vhd = torch.tensor([1.0, 2, 3, 4, 5, 6, 40, 40])
    found = without_outliers(vhd, blind)
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 40, 0]
    assert select_heads(vhd).tolist() == [False] * 4 + [True] * 4
    assert select_heads(found).tolist() == [False, False, False, True, True, True, True, False]


def test_the_rule_takes_the_squared_activation_and_the_unbiased_deviation() -> None:
    # |A| = 1, 1, 1, 1.9: the last is above mean + deviation of |A|^2 by either deviation (3.21 of mean 1.6).
    blind = torch.tensor([1.0, 1, 1, 1.9], dtype=torch.float64)[:, None]
    # VHD 0, 0, 0, x: x > x/4 + x/2 always; 0, 0, 1, x with the unbiased deviation holds from a larger x on.
    vhd = torch.tensor([0.0, 0, 1, 1.05], dtype=torch.float64)
    biased = vhd.mean() + vhd.std(correction=0)
    unbiased = vhd.mean() + vhd.std(correction=1)
    assert biased < 1.05 < unbiased
    assert without_outliers(vhd, blind).tolist() == vhd.tolist()
    vhd[3] = 3.0
    assert without_outliers(vhd, blind)[3] == 0


@pytest.mark.parametrize("heads", [2, 4, 7, 32])
def test_exactly_half_of_distinct_heads_are_chosen_and_never_more(heads: int) -> None:
    values = torch.rand(50, heads, generator=torch.Generator().manual_seed(heads), dtype=torch.float64)
    assert select_heads(values).sum(-1).tolist() == [heads // 2] * 50
    tied = (values * 3).round()
    assert int(select_heads(tied).sum(-1).max()) <= heads // 2


def test_equal_outputs_have_no_divergence_and_choose_nobody() -> None:
    seeing, _ = pair(0)
    assert vhd_scores(seeing, seeing).tolist() == [[0.0] * 8] * 3
    assert not select_heads(vhd_scores(seeing, seeing)).any()


@pytest.mark.parametrize("seed", range(5))
def test_heads_may_be_renamed_and_scaling_all_of_them_leaves_the_choice(seed: int) -> None:
    seeing, blind = pair(seed)
    kept = without_outliers(vhd_scores(seeing, blind), blind)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    renamed = without_outliers(vhd_scores(seeing[:, order], blind[:, order]), blind[:, order])
    torch.testing.assert_close(renamed, kept[:, order], rtol=1e-14, atol=0)
    assert torch.equal(select_heads(renamed), select_heads(kept)[:, order])
    larger = without_outliers(vhd_scores(7 * seeing, 7 * blind), 7 * blind)
    torch.testing.assert_close(larger, 7 * kept)
    assert torch.equal(select_heads(larger), select_heads(kept))


def test_half_precision_is_measured_in_single() -> None:
    seeing, blind = (x.to(torch.float16) * 200 for x in pair(3))  # squares overflow fp16
    scores = vhd_scores(seeing, blind)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, vhd_scores(seeing.float(), blind.float()), rtol=0, atol=0)
    assert without_outliers(scores, blind).isfinite().all()


# On models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("remove", [False, True])
def test_the_map_of_a_batch_is_that_of_plain_loops_on_each_prompt_alone(
    llava: Callable[..., Any], prompts: Callable[..., Any], naive_vhr: ModuleType, remove: bool
) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=4)
    inputs = prompts(model, images=(1, 2, 1))
    found = vlattn.vhd(model, inputs, remove_outliers=remove)
    assert found.shape == (3, 4, 4)
    assert found.dtype == torch.float64
    for b, images in enumerate((slice(0, 1), slice(1, 3), slice(3, 4))):
        alive = inputs["attention_mask"][b].bool()
        own = {"input_ids": inputs["input_ids"][b : b + 1, alive], "pixel_values": inputs["pixel_values"][images]}
        blind = naive_vhr.text_only(own, [IMAGE])
        for layer in range(4):
            without = naive_vhr.outputs(model, blind, layer)[-1]
            expected = naive_vhr.divergence(naive_vhr.outputs(model, own, layer)[-1], without)
            if remove:
                expected = naive_vhr.drop_outliers(expected, without)
            # Rotary tables are made in fp32, and padding shifts the positions in a batch.
            assert found[b, layer].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_prompt_without_an_image_has_none(llava: Callable[..., Any], prompts: Callable[..., Any]) -> None:
    model = llava(decoder_layers=3, image_size=16, layers=4)
    found = vlattn.vhd(model, prompts(model, images=(1, 0)))
    assert found[1].tolist() == [[0.0] * 4] * 3
    assert found[0].gt(0).all()


def test_the_map_leaves_no_trace_on_the_model(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=3, image_size=16, layers=4)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad():
        vanilla = model(**inputs).logits
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    vlattn.vhd(model, inputs)
    vlattn.vhd_knockout(model, inputs)
    with pytest.raises(InputError, match="no visual tokens"):
        vlattn.vhd(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vanilla)


def test_inside_a_context_the_prompt_with_images_is_seen_as_the_context_leaves_it(
    llava: Callable[..., Any], prompts: Callable[..., Any]
) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=4)
    inputs = prompts(model, images=(1, 2))
    plain = vlattn.vhd(model, inputs)
    with vlattn.FastV(keep=3, layer=2)(model):
        pruned = vlattn.vhd(model, inputs)
    assert torch.equal(pruned[:, :2], plain[:, :2])
    assert not torch.allclose(pruned[:, 2:], plain[:, 2:])
    with VHR(layers=(1, 3), reinforce_both=False)(model) as trace:
        reinforced = vlattn.vhd(model, inputs)
    # VHR reads heads before it scales them, and so does the map.
    assert torch.equal(reinforced[:, :2], plain[:, :2])
    for layer in (1, 3):
        assert torch.equal(reinforced[:, layer], trace.notes["vhd"][layer])  # type: ignore[index]
    with VHR(layers=(1, 3))(model):
        both = vlattn.vhd(model, inputs)
    assert torch.equal(both, reinforced)


def test_a_prompt_of_nothing_but_an_image_is_refused(llava: Callable[..., Any], prompts: Callable[..., Any]) -> None:
    model = llava(decoder_layers=2, image_size=16, layers=4)
    inputs = prompts(model, images=(1,))
    bare = {"input_ids": torch.full((1, 16), IMAGE), "pixel_values": inputs["pixel_values"]}
    with pytest.raises(InputError, match="nothing is left of prompt 0"):
        vlattn.vhd(model, bare)


def test_padding_on_the_right_is_refused(llava: Callable[..., Any], prompts: Callable[..., Any]) -> None:
    model = llava(decoder_layers=2, image_size=16, layers=4)
    inputs = prompts(model, images=(1, 1))
    flipped = {**inputs, "input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(InputError, match="padded on the right"):
        vlattn.vhd(model, flipped)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_text_only_forward_is_the_stock_one_bit_for_bit(
    llava: Callable[..., Any], prompts: Callable[..., Any], naive_vhr: ModuleType, attn: str
) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=4, attn=attn, dtype=torch.float32)
    inputs = prompts(model, images=(1,))
    blind = naive_vhr.text_only(inputs, [IMAGE])
    with (
        vlattn.FlowCut(keep=2, count="per_image")(model),
        vlattn.FastV(keep=1, layer=1)(model),
        joined(model) as (
            session,
            hooks,
        ),
    ):
        seen: list[TextPrompt] = watch_prompt(session, hooks)
        with torch.no_grad():
            model(**inputs)
        found = seen[0].run(session, range(4))
    for layer in range(4):
        expected = torch.tensor(naive_vhr.outputs(model, blind, layer)[-1], dtype=torch.float32)
        assert torch.equal(found[layer][0], expected)
