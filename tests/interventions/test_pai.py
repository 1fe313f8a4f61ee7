"""PAI on live models: its attention edit against plain loops, its refinement against the stock model without image."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.contrast import contrast
from vlattn.interventions.pai import PAI

Numbers = Callable[[str], torch.Tensor]
EDIT = PAI(gamma=1.0)
NEW = 4


def expected_logits(
    tools: tuple[Any, Any, Any], model: Any, inputs: dict[str, Any], b: int, new: list[int], **how: Any
) -> torch.Tensor:
    """[n, V] of prompt b and what follows it, every visual key raised by alpha in layers from 2 on."""
    tiny, pruners, boost = tools
    row = pruners.start(tiny, model, inputs, b, new)
    gamma = [how.pop("alpha", 0.5)] * len(row.visual)
    return boost.run(pruners, model, row, gamma, how.pop("layers", range(2, 4)), **how)


@pytest.fixture
def tools(tiny: ModuleType, naive_pruners: ModuleType, naive_boost: ModuleType) -> tuple[Any, Any, Any]:
    return tiny, naive_pruners, naive_boost


@pytest.mark.parametrize(
    ("method", "how"),
    [
        (EDIT, {}),
        (PAI(gamma=1.0, alpha=0.9, start_layer=0, end_layer=3), {"alpha": 0.9, "layers": range(3)}),
        (PAI(gamma=1.0, start_layer=1, end_layer=2), {"layers": [1]}),
        (PAI(gamma=1.0, released_code=True), {"at_prefill": False}),
    ],
    ids=["default", "shallow", "one layer", "released code"],
)
@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
def test_every_step_has_the_logits_of_plain_loops(
    tools: tuple[Any, Any, Any], method: PAI, how: dict[str, Any], siglip: bool
) -> None:
    tiny = tools[0]
    model = tiny.llava(decoder_layers=4, image_size=16, siglip=siglip)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with method(model):
            found = model(**inputs).logits
            out = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    new = out.sequences[:, -NEW:].tolist()
    for b in range(2):
        expected = expected_logits(tools, model, inputs, b, new[b], **how)
        length = int(inputs["attention_mask"][b].sum())
        torch.testing.assert_close(found[b, -length:], expected[:length], rtol=1e-5, atol=2e-5)
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[b].double(), expected[length - 1 + step], rtol=1e-5, atol=2e-5)
    # Rows of the prompt before the last are not computed again.
    assert torch.equal(found[:, :-1], vanilla[:, :-1])
    assert torch.equal(found[:, -1], vanilla[:, -1]) == method.released_code


def test_several_tokens_at_once_have_the_logits_of_one_after_the_other(tools: tuple[Any, Any, Any]) -> None:
    tiny = tools[0]
    model = tiny.llava(decoder_layers=4, image_size=16)
    inputs = tiny.prompts(model)
    new = torch.tensor([[5, 9, 31]])
    with torch.no_grad(), EDIT(model):
        first = model(**inputs)
        found = model(input_ids=new, **{tiny.CACHE: first.get("cache") or first.past_key_values}).logits
    expected = expected_logits(tools, model, inputs, 0, new[0].tolist())
    torch.testing.assert_close(found[0], expected[-3:], rtol=1e-5, atol=2e-5)


def test_the_refined_logits_are_the_published_ones(formula: Callable[..., torch.Tensor], numbers: Numbers) -> None:
    main, bare = 6 * formula(2, 8), 6 * formula(3, 8)
    method = PAI()
    found = contrast(main.log_softmax(-1), bare.log_softmax(-1), method.gamma, 1 - method.gamma, method.cutoff)
    kept = torch.tensor([3, 5, 6, 7])
    assert found.isfinite().nonzero().flatten().tolist() == kept.tolist()
    expected = numbers("-.13925519 -2.63681542 -2.31127226 -2.69072641")
    torch.testing.assert_close(found[kept], expected, atol=6e-9, rtol=0)
    expected = numbers("-.24231848 -2.73987870 -2.41433555 -2.79378970")
    torch.testing.assert_close(found.log_softmax(-1)[kept], expected, atol=6e-9, rtol=0)


def without_image(tiny: Any, inputs: dict[str, Any], b: int, new: list[int]) -> torch.Tensor:
    ids, alive = inputs["input_ids"][b], inputs["attention_mask"][b].bool()
    return torch.cat([ids[alive & (ids != tiny.IMAGE)], torch.tensor(new, dtype=ids.dtype)])[None]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_second_stream_without_image_refines_every_step_and_feels_no_edit(
    tools: tuple[Any, Any, Any], alpha: float
) -> None:
    tiny = tools[0]
    model = tiny.llava(decoder_layers=4, image_size=16)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad(), PAI(alpha=alpha, gamma=1.5)(model):
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    new = out.sequences[:, -NEW:].tolist()
    for b in range(2):
        length = int(inputs["attention_mask"][b].sum())
        main = expected_logits(tools, model, inputs, b, new[b], alpha=alpha)
        with torch.no_grad():
            bare = model(input_ids=without_image(tiny, inputs, b, new[b][:-1])).logits[0, -NEW:]
        for step, logits in enumerate(out.logits):
            l, l0 = (x.log_softmax(-1) for x in (main[length - 1 + step], bare[step]))  # noqa: E741
            expected = 1.5 * l - 0.5 * l0
            expected[l < l.max() + torch.tensor(0.1).log()] = -torch.inf
            found = logits[b].double().softmax(-1)
            torch.testing.assert_close(found, expected.softmax(-1), rtol=2e-5, atol=0)
            assert torch.equal(found > 0, expected.isfinite())
            assert found[main[length - 1 + step].argmax()] > 0


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_switched_off_it_gives_the_stock_logits_bit_for_bit_and_installs_nothing(tiny: ModuleType, attn: str) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, attn=attn, dtype=torch.float32)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with PAI(alpha=0.0, gamma=1.0)(model):
            assert model.config.text_config._attn_implementation == attn
            assert torch.equal(model(**inputs).logits, vanilla)


def test_leaving_gives_the_model_back_as_it_was(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16)
    inputs = tiny.prompts(model)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        before = (
            tiny.hooks_of(model),
            tiny.settings_of(model),
        )  # behind a first forward, which puts hooks of its own
        with PAI()(model):
            assert tiny.hooks_of(model) != before[0]
            model.generate(**inputs, max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, vanilla)
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


@pytest.mark.parametrize(
    "pruner",
    [vlattn.FlowCut(keep=6, count="per_image"), vlattn.FastV(keep=5), vlattn.DyVTE(exit_layer=2)],
    ids=["flowcut", "fastv", "dyvte"],
)
def test_beside_a_pruner_the_edit_follows_the_tokens_that_are_left(
    tools: tuple[Any, Any, Any], pruner: vlattn.Intervention
) -> None:
    tiny, pruners, boost = tools
    model = tiny.llava(decoder_layers=4, image_size=16)
    inputs = tiny.prompts(model, images=(1, 2))
    method = vlattn.compose(pruner, EDIT)
    entered: list[torch.Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), method(model) as trace:
        found = model(**inputs).logits[:, -1]
        together = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    hook.remove()
    stages = {}
    if isinstance(pruner, vlattn.FastV):
        stages = pruners.fastv(2, 5)
    if isinstance(pruner, vlattn.DyVTE):
        stages = {2: lambda row, weights: pruners.dropped(row, [], False)}
    for b in range(2):
        full = pruners.start(tiny, model, inputs, b, [])
        if isinstance(pruner, vlattn.FlowCut):
            images = trace.kept[:1] if b == 0 else trace.kept[1:]
            left = [16 * i + patch for i, image in enumerate(images.tolist()) for patch in image]
            full = full.taken([i for i, slot in enumerate(full.slots) if slot < 0 or slot in left], True)
            full.x = entered[0][b, -len(full.x) :]
        expected = boost.run(pruners, model, full, [0.5] * 32, range(2, 4), stages=stages)
        torch.testing.assert_close(found[b], expected[-1], rtol=1e-5, atol=2e-5)
        alive = inputs["attention_mask"][b].bool()
        one = {
            "input_ids": inputs["input_ids"][b : b + 1, alive],
            "pixel_values": inputs["pixel_values"][:1] if b == 0 else inputs["pixel_values"][1:],
        }
        with torch.no_grad(), method(model):
            assert torch.equal(
                model.generate(**one, max_new_tokens=NEW, do_sample=False)[:, -NEW:], together[b : b + 1]
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, "alpha: got 1.0; give a number from 0"),
        ({"alpha": -0.1}, "alpha: got -0.1"),
        ({"gamma": 0.9}, "gamma: got 0.9; give a number of at least 1"),
        ({"gamma": "x"}, "gamma: got 'x'"),
        ({"start_layer": -1}, "start_layer: got -1"),
        ({"start_layer": 3, "end_layer": 3}, "end_layer: got 3; give an integer of at least 4"),
        ({"cutoff": 1.5}, "cutoff: got 1.5"),
        ({"released_code": 1}, "released_code: got 1; give True or False"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PAI(**settings)


def test_layers_that_the_decoder_lacks_are_refused_and_leave_the_model_alone(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=2, image_size=16)
    before = tiny.hooks_of(model), tiny.settings_of(model)
    for method in (PAI(), PAI(start_layer=0, end_layer=3)):
        with pytest.raises(InputError, match="this decoder has layers 0 to 1"):
            method(model).attach()
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


def test_prompts_padded_on_the_right_are_refused(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16)
    inputs = tiny.prompts(model, images=(1, 2))
    with torch.no_grad(), PAI()(model):
        flipped = {
            **inputs,
            "input_ids": inputs["input_ids"].flip(1),
            "attention_mask": inputs["attention_mask"].flip(1),
        }
        with pytest.raises(InputError, match="padded on the right"):
            model(**flipped)
