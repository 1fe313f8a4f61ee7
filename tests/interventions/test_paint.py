"""PAINT on live LLaVAs: every row that it edits against plain loops, and every row that it must not touch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.pai import PAI
from vlattn.interventions.paint import PAINT

NEW = 4
# Layers from 1 on and a low fence, so that small models have something to raise.
METHOD = PAINT(start_layer=1, iqr=0.5)


@pytest.fixture
def tools(
    tiny: ModuleType, naive_pruners: ModuleType, naive_boost: ModuleType, naive_tower: ModuleType
) -> tuple[Any, Any, Any, Any]:
    return tiny, naive_pruners, naive_boost, naive_tower


def build(tiny: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    model = tiny.llava(**{"decoder_layers": 4, "image_size": 24, "layers": 4, **options})
    return model, tiny.prompts(model, images=(1, 2))


def alone(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """Prompt b of the two, without padding."""
    kept = inputs["attention_mask"][b].bool()
    images = inputs["pixel_values"]
    return {"input_ids": inputs["input_ids"][b : b + 1, kept], "pixel_values": images[:1] if b == 0 else images[1:]}


def strengths(tools: Any, model: Any, inputs: dict[str, Any], **how: Any) -> list[list[float]]:
    """gamma of the visual tokens of each prompt."""
    first, *rest = tools[2].strengths(tools[3], model, inputs["pixel_values"], **{"iqr": 0.5, **how})
    return [first, [g for image in rest for g in image]]


def expected_logits(
    tools: Any, model: Any, inputs: dict[str, Any], gamma: list[list[float]], new: list[list[int]], **how: Any
) -> list[torch.Tensor]:
    tiny, pruners, boost, _ = tools
    how = {"layers": range(1, 4), **how}
    return [boost.run(pruners, model, pruners.start(tiny, model, inputs, b, new[b]), gamma[b], **how) for b in range(2)]


def generate(model: Any, inputs: dict[str, Any], **how: Any) -> torch.Tensor:
    how = {"max_new_tokens": NEW, "do_sample": False, **how}
    with torch.no_grad():
        return model.generate(**inputs, **how)[:, -NEW:]


@pytest.mark.parametrize(
    ("options", "method", "selection", "how"),
    [
        ({}, METHOD, {}, {}),
        ({"siglip": True, "feature_layer": -1}, METHOD, {}, {}),
        ({"kv_heads": 1, "feature_layer": -3}, PAINT(start_layer=0, end_layer=2, iqr=0.5), {}, {"layers": range(2)}),
        (
            {},
            PAINT(alpha=0.3, beta=0.9, local_ratio=0.1, iqr=1.0, start_layer=3),
            {"alpha": 0.3, "beta": 0.9, "local": 0.1, "iqr": 1.0},
            {"layers": [3]},
        ),
        ({}, PAINT(head_weights="visual_mass", start_layer=1, iqr=0.5), {}, {"by_head": True}),
        ({"strategy": "full"}, METHOD, {}, {}),
    ],
    ids=["clip", "siglip", "shallow", "strengths", "heads", "cls in features"],
)
def test_every_step_has_the_logits_of_plain_loops(
    tools: Any, options: dict[str, Any], method: PAINT, selection: dict[str, Any], how: dict[str, Any]
) -> None:
    model, inputs = build(tools[0], **options)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with method(model):
            found = model(**inputs).logits
            out = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    gamma = strengths(tools, model, inputs, **selection)
    assert len({g for row in gamma for g in row}) == 3  # none, alpha and beta
    if options.get("strategy") == "full":
        gamma = [[g for at in range(0, len(row), 36) for g in (0.0, *row[at : at + 36])] for row in gamma]
    new = out.sequences[:, -NEW:].tolist()
    for b, expected in enumerate(expected_logits(tools, model, inputs, gamma, new, **how)):
        length = int(inputs["attention_mask"][b].sum())
        torch.testing.assert_close(found[b, -length:], expected[:length], rtol=1e-5, atol=2e-5)
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[b].double(), expected[length - 1 + step], rtol=1e-5, atol=2e-5)
    assert torch.equal(found[:, :-1], vanilla[:, :-1])
    assert not torch.isclose(found[:, -1], vanilla[:, -1]).all(-1).any()


def test_tokens_that_receive_most_attention_join_the_local_ones(tools: Any) -> None:
    tiny, _, boost, tower = tools
    model, inputs = build(tiny)
    with torch.no_grad(), PAINT(spatial_ratio=0.2, start_layer=1, iqr=0.5)(model) as trace:
        model(**inputs)
    early = tower.look(model.model.vision_tower, inputs["pixel_values"], 0).attention.mean(1)  # [B, 1 + P, 1 + P]
    late = tower.look(model.model.vision_tower, inputs["pixel_values"], 2).attention.mean(1)[:, 0, 1:]
    chosen = [[], []]
    for image in range(3):
        best, summary = boost.informed(early[image, 0, 1:], late[image], iqr=0.5)
        received = early[image, :, 1:].sum(0)
        most = sorted(range(36), key=lambda i: -float(received[i]))[: int(36 * 0.2)]
        chosen[image > 0].append(({*best, *most} - {*summary}, {*summary}))
    for b, images in enumerate(chosen):
        places = (inputs["input_ids"][b] == tiny.IMAGE).nonzero().flatten().tolist()
        for name, which in (("local", 0), ("summary", 1)):
            expected = [places[36 * i + patch] for i, image in enumerate(images) for patch in sorted(image[which])]
            assert trace.notes[name][b].nonzero().flatten().tolist() == expected
    assert any(len(local) > 9 for images in chosen for local, _ in images)


def test_every_key_raised_alike_is_pai(tiny: ModuleType) -> None:
    model, inputs = build(tiny)
    with torch.no_grad():
        with PAINT(alpha=0.5, beta=0.5, local_ratio=1.0)(model) as trace:
            found = model(**inputs).logits
            said = generate(model, inputs)
        with PAI(alpha=0.5, gamma=1.0)(model):
            assert torch.equal(model(**inputs).logits, found)
            assert torch.equal(generate(model, inputs), said)
    assert torch.equal(trace.notes["local"] | trace.notes["summary"], inputs["input_ids"] == tiny.IMAGE)
    assert bool(trace.notes["summary"].any())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_switched_off_it_gives_the_stock_logits_bit_for_bit_and_installs_nothing(tiny: ModuleType, attn: str) -> None:
    model, inputs = build(tiny, attn=attn, dtype=torch.float32)
    with torch.no_grad():
        vanilla, said = model(**inputs).logits, generate(model, inputs)
        with PAINT(alpha=0.0, beta=0.0)(model):
            assert model.config.text_config._attn_implementation == attn
            assert torch.equal(model(**inputs).logits, vanilla)
        with PAINT(local_ratio=0.0, iqr=1e9)(model) as trace:  # nothing chosen
            assert torch.equal(model(**inputs).logits, vanilla)
            assert torch.equal(generate(model, inputs), said)
    assert not bool((trace.notes["local"] | trace.notes["summary"]).any())


def weights_of(model: Any, inputs: dict[str, Any], method: PAINT | None = None) -> tuple[list[torch.Tensor], Any]:
    with torch.no_grad():
        if method is None:
            return list(model(**inputs, output_attentions=True).attentions), None
        with method(model) as trace:
            return list(model(**inputs, output_attentions=True).attentions), trace


def test_weights_change_in_the_last_row_of_layers_in_the_range_alone(tiny: ModuleType) -> None:
    model, inputs = build(tiny, attn="eager", dtype=torch.float32)
    stock, _ = weights_of(model, inputs)
    found, trace = weights_of(model, inputs, PAINT(start_layer=1, end_layer=3, iqr=0.5))
    for layer, (before, after) in enumerate(zip(stock, found, strict=True)):
        assert torch.equal(before[:, :, :-1], after[:, :, :-1])
        assert torch.equal(before[:, :, -1], after[:, :, -1]) == (layer == 0)
        torch.testing.assert_close(after.sum(-1)[:, :, -1], torch.ones(2, 4), rtol=0, atol=1e-5)
        padding = inputs["attention_mask"][:, None, None] == 0
        assert bool((after[:, :, -1:].masked_select(padding) == 0).all())
    # In the first layer of the range both runs have the same logits.
    chosen = (trace.notes["local"] | trace.notes["summary"])[:, None].expand(-1, 4, -1)
    before, after = stock[1][:, :, -1], found[1][:, :, -1]
    for b in range(2):
        rest = ~chosen[b] & (before[b] > 1e-6)
        for head in range(4):
            ratio = (after[b] / before[b])[head, rest[head]]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
            assert float(ratio[0]) < 1
    assert bool(((after * chosen).sum(-1) > (before * chosen).sum(-1)).all())


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_mass_on_a_set_of_tokens_grows_with_its_strength(tiny: ModuleType, name: str) -> None:
    model, inputs = build(tiny, attn="eager", dtype=torch.float32)
    mass = []
    for strength in (0.0, 0.2, 0.5, 0.9):
        settings = {"alpha": 0.3, "beta": 0.3, name: strength}
        found, trace = weights_of(model, inputs, PAINT(start_layer=2, iqr=0.5, **settings))
        mine = trace.notes["local" if name == "alpha" else "summary"]
        mass.append((found[2][:, :, -1] * mine[:, None]).sum(-1))
    assert bool((torch.stack(mass).diff(dim=0) > 0).all())


def test_several_tokens_at_once_have_the_logits_of_one_after_the_other(tools: Any) -> None:
    tiny = tools[0]
    model, inputs = build(tiny)
    inputs, new = alone(inputs, 0), [5, 9, 31]
    with torch.no_grad(), METHOD(model):
        first = model(**inputs)
        cache = {tiny.CACHE: first.get("cache") or first.past_key_values}
        found = model(input_ids=torch.tensor([new]), **cache).logits[0]
    batch = build(tiny)[1]
    gamma = strengths(tools, model, batch)
    expected = expected_logits(tools, model, batch, gamma, [new, []])[0]
    torch.testing.assert_close(found, expected[-3:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"cfg": 1.5, "cutoff": 0.05}, {"head_weights": "visual_mass"}])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_prompt_says_in_a_padded_batch_what_it_says_alone(
    tiny: ModuleType, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    model, inputs = build(tiny)
    method, times = PAINT(start_layer=1, iqr=0.5, **settings), how.get("num_return_sequences", 1)
    vanilla = generate(model, inputs, **how)
    with method(model):
        together = generate(model, inputs, **how)
        for b in range(2):
            assert torch.equal(generate(model, alone(inputs, b), **how), together[b * times : (b + 1) * times])
    assert not torch.equal(together, vanilla)


def test_the_next_prompt_has_tokens_of_its_own(tools: Any) -> None:
    tiny = tools[0]
    model, inputs = build(tiny)
    others = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) * 1.5}
    said, notes = [], []
    for one in (inputs, others):
        with METHOD(model) as trace:
            said.append(generate(model, one))
        notes.append(dict(trace.notes))
    assert not torch.equal(notes[0]["local"], notes[1]["local"])
    with METHOD(model) as trace:
        for one, tokens, note in zip((inputs, others, inputs), (*said, said[0]), (*notes, notes[0]), strict=True):
            assert torch.equal(generate(model, one), tokens)
            assert torch.equal(trace.notes["local"], note["local"])
            assert torch.equal(trace.notes["summary"], note["summary"])


# The second stream ----------------------------------------------------------------------------------------------------
def test_cfg_contrasts_with_the_prompt_without_image_where_nothing_is_edited(tools: Any) -> None:
    tiny = tools[0]
    model, inputs = build(tiny)
    method = PAINT(start_layer=1, iqr=0.5, cfg=1.4, cutoff=0.2)
    with torch.no_grad(), method(model):
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    new = out.sequences[:, -NEW:].tolist()
    main = expected_logits(tools, model, inputs, strengths(tools, model, inputs), new)
    for b in range(2):
        ids, kept = inputs["input_ids"][b], inputs["attention_mask"][b].bool()
        text = torch.cat([ids[kept & (ids != tiny.IMAGE)], torch.tensor(new[b][:-1])])[None]
        with torch.no_grad():
            bare = model(input_ids=text).logits[0, -NEW:].log_softmax(-1)
        for step, logits in enumerate(out.logits):
            image = main[b][int(kept.sum()) - 1 + step].log_softmax(-1)
            expected = 1.4 * (image - bare[step]) + bare[step]
            expected[image < image.max() + torch.tensor(0.2).log()] = -torch.inf
            found = logits[b].double().softmax(-1)
            torch.testing.assert_close(found, expected.softmax(-1), rtol=2e-5, atol=0)
            assert torch.equal(found > 0, expected.isfinite())
            assert found[image.argmax()] > 0


def test_the_published_setting_is_the_default_with_cfg(tiny: ModuleType) -> None:
    assert PAINT.published() == PAINT(
        alpha=0.7, beta=0.4, local_ratio=0.25, spatial_ratio=0.0, iqr=1.5, start_layer=2, end_layer=None, cfg=1.1
    )
    model, inputs = build(tiny)
    with torch.no_grad(), PAINT.published()(model):
        published = model(**inputs).logits[:, -1]
    with torch.no_grad(), PAINT()(model):
        plain = model(**inputs).logits[:, -1]
    best = published.softmax(-1) > 0
    assert not bool(best.all())
    assert bool(best.gather(1, plain.argmax(-1, keepdim=True)).all())


# Beside pruners -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", ["batch_max", "per_image"])
def test_beside_flowcut_pruned_patches_vanish_and_the_rest_keeps_its_strength(tools: Any, count: Any) -> None:
    tiny, pruners, boost, tower = tools
    model, inputs = build(tiny)
    flowcut, method = vlattn.FlowCut(keep=14, count=count), PAINT(start_layer=1, iqr=0.5, local_ratio=0.4)
    late_inputs: list[torch.Tensor] = []
    entered: list[torch.Tensor] = []
    layer = tower.layers_of(model.model.vision_tower)[2]

    def keep(to: list[torch.Tensor]) -> Any:
        return lambda module, args, kwargs: to.append(args[0] if args else kwargs["hidden_states"])

    hooks = [
        module.register_forward_pre_hook(keep(to), with_kwargs=True)
        for module, to in ((layer, late_inputs), (model.model.language_model.layers[0], entered))
    ]
    with torch.no_grad(), vlattn.compose(flowcut, method)(model) as trace:
        found = model(**inputs).logits[:, -1]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        early = tower.look(model.model.vision_tower, inputs["pixel_values"], 0).attention.sum(1)[:, 0, 1:]
        late = tower.look_at(layer, late_inputs[0]).attention.sum(1)[:, 0, 1:]
    assert late.shape == (3, 14)
    gamma: list[list[float]] = [[], []]
    slots: list[list[int]] = [[], []]
    vanished = summaries = 0
    for image in range(3):
        kept = trace.kept[image].tolist()
        summary = {kept[i] for i in boost.informed(late[image], late[image], iqr=0.5)[1]}
        local = set(sorted(range(36), key=lambda i: -float(early[image, i]))[: int(36 * 0.4)]) - summary
        gamma[image > 0] += [0.7 * (i in local) + 0.4 * (i in summary) for i in range(36)]
        slots[image > 0] += [36 * max(image - 1, 0) + i for i in kept]
        vanished, summaries = vanished + len(local - set(kept)), summaries + len(summary)
    assert vanished
    assert summaries
    for b in range(2):
        row = pruners.start(tiny, model, inputs, b, [])
        row = row.taken([i for i, slot in enumerate(row.slots) if slot < 0 or slot in slots[b]], True)
        row.x = entered[0][b, -len(row.x) :]
        expected = boost.run(pruners, model, row, gamma[b], range(1, 4))
        torch.testing.assert_close(found[b], expected[-1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("pruner", [vlattn.FastV(keep=20), vlattn.DyVTE(exit_layer=1)], ids=["fastv", "dyvte"])
def test_beside_a_cut_in_the_decoder_strengths_follow_the_tokens_that_are_left(tools: Any, pruner: Any) -> None:
    tiny, pruners = tools[:2]
    model, inputs = build(tiny)
    method = vlattn.compose(pruner, PAINT(start_layer=1, iqr=0.5))
    with torch.no_grad(), method(model):
        found = model(**inputs).logits[:, -1]
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    stages = pruners.fastv(2, 20)
    if isinstance(pruner, vlattn.DyVTE):
        stages = {1: lambda row, weights: pruners.dropped(row, [], False)}
    gamma = strengths(tools, model, inputs)
    new = out.sequences[:, -NEW:].tolist()
    for b, expected in enumerate(expected_logits(tools, model, inputs, gamma, new, stages=stages)):
        torch.testing.assert_close(found[b], expected[-NEW - 1], rtol=1e-5, atol=2e-5)
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[b].double(), expected[step - NEW - 1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "pruners",
    [
        (vlattn.FlowCut(keep=14, count="per_image"),),
        (vlattn.VisPruner(keep=12),),
        (vlattn.DivPrune(keep=12), vlattn.FastV(keep=9, mode="mask")),
        (vlattn.SparseVLM(layers=(1, 2), counts=(20, 12)),),
        (vlattn.FlowCut(keep=14, count="per_image"), vlattn.DyVTE(exit_layer=2)),
    ],
    ids=["flowcut", "vispruner", "divprune and fastv", "sparsevlm", "flowcut and dyvte"],
)
def test_beside_pruners_a_prompt_says_in_a_padded_batch_what_it_says_alone(tiny: ModuleType, pruners: Any) -> None:
    model, inputs = build(tiny)
    method = vlattn.compose(*pruners, METHOD)
    with torch.no_grad():
        with vlattn.compose(*pruners)(model):
            without = model(**inputs).logits[:, -1]
        with method(model):
            assert not torch.isclose(model(**inputs).logits[:, -1], without).all(-1).any()
            together = generate(model, inputs)
            for b in range(2):
                assert torch.equal(generate(model, alone(inputs, b)), together[b : b + 1])


@pytest.mark.parametrize(
    "mixing", [vlattn.ToMe(keep=12), vlattn.PruMerge(keep=12), vlattn.VisionZip(dominant=8, contextual=4)]
)
def test_methods_that_mix_patches_are_refused_in_either_order(tiny: ModuleType, mixing: vlattn.Intervention) -> None:
    model, inputs = build(tiny)
    message = f"PAINT: {type(mixing).__name__} mixes patches into new tokens"
    with pytest.raises(InputError, match=message):
        vlattn.compose(mixing, PAINT())(model).attach()
    with PAINT()(model), mixing(model), pytest.raises(InputError, match=message):
        model(**inputs)
    with torch.no_grad(), vlattn.compose(mixing, PAINT(alpha=0.0, beta=0.0))(model):
        assert bool(model(**inputs).logits[:, -1].isfinite().all())


# What it leaves and what it refuses -----------------------------------------------------------------------------------
def test_leaving_gives_the_model_back_as_it_was(tiny: ModuleType) -> None:
    model, inputs = build(tiny)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        before = (
            tiny.hooks_of(model),
            tiny.settings_of(model),
        )  # behind a first forward, which puts hooks of its own
        with PAINT.published()(model):
            assert tiny.hooks_of(model) != before[0]
            model.generate(**inputs, max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, vanilla)
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1}, "alpha: got 1; give a number from 0"),
        ({"beta": -0.2}, "beta: got -0.2; give a number from 0"),
        ({"local_ratio": 1.2}, "local_ratio: got 1.2; give a number from 0.0 to 1.0"),
        ({"spatial_ratio": -1}, "spatial_ratio: got -1"),
        ({"iqr": -0.5}, "iqr: got -0.5; give a number of at least 0"),
        ({"start_layer": 2.0}, "start_layer: got 2.0"),
        ({"end_layer": 2}, "end_layer: got 2; give an integer of at least 3"),
        ({"head_weights": "mass"}, "head_weights: got 'mass'; give None or 'visual_mass'"),
        ({"cfg": 0.5}, "cfg: got 0.5; give a number of at least 1"),
        ({"cutoff": -0.1}, "cutoff: got -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PAINT(**settings)


def test_layers_that_the_decoder_lacks_are_refused_and_leave_the_model_alone(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=2, image_size=16)
    before = tiny.hooks_of(model), tiny.settings_of(model)
    for method in (PAINT(), PAINT(start_layer=0, end_layer=3)):
        with pytest.raises(InputError, match="this decoder has layers 0 to 1"):
            method(model).attach()
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


def test_prompts_that_it_cannot_choose_from_are_refused(tiny: ModuleType) -> None:
    model, inputs = build(tiny)
    with torch.no_grad(), PAINT()(model):
        flipped = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
        with pytest.raises(InputError, match="padded on the right"):
            model(**{**inputs, **flipped})
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), PAINT()(model), pytest.raises(InputError, match="did not pass through the vision tower"):
        model(**ids)


def test_a_joined_feature_layer_is_refused(tiny: ModuleType) -> None:
    model = tiny.llava(decoder_layers=4, image_size=16, feature_layer=[-2, -3])
    with pytest.raises(InputError, match=r"vision_feature_layer: .* joins several layers"):
        PAINT()(model).attach()
