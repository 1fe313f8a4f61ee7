"""Attention calibration on live models, against plain loops with full attention matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.registry import parse_method
from vlattn.kernels.reference import ROW_BLOCK
from vlattn.runtime.hooks import cache_of
from vlattn.runtime.trace import Trace

LAYERS = 5
HEADS = {1: (0, 3), 2: (1,), 3: (0, 1, 2, 3)}
Make = Callable[..., Any]
Inputs = dict[str, torch.Tensor]

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "relative": {"threshold": "relative", "alpha": 2.0},
    "deleted": {"beta": 0.0, "theta": 0.04},
    "visual to text": {"donors": "visual", "recipients": "text", "theta": 0.04},
    "all to visual": {"recipients": "visual", "theta": 0.04},
    "text to all": {"donors": "text", "theta": 0.04},
    "all rows": {"literal": True, "theta": 0.05},
    "all rows to visual": {"literal": True, "recipients": "visual", "theta": 0.05, "min_rows": 3},
    "released code": {"literal": True, "min_rows": 1, "spare": "first_detected", "theta": 0.06},
    "counted on all, edited in text": {"stat_rows": "all", "theta": 0.05},
    "counted on text, edited in all": {"edit_rows": "all", "theta": 0.05},
}


@pytest.fixture
def model(llava: Make) -> Any:
    return llava(decoder_layers=LAYERS, seed=3)


def method(name: str, **more: Any) -> vlattn.ACT:
    return vlattn.ACT(HEADS, **{**SETTINGS[name], **more})


def alone(inputs: Inputs, b: int, images: tuple[int, ...]) -> Inputs:
    """Prompt `b` without its padding, with its own images."""
    real = inputs["attention_mask"][b].bool()
    before = sum(images[:b])
    return {
        "input_ids": inputs["input_ids"][b : b + 1, real],
        "attention_mask": inputs["attention_mask"][b : b + 1, real],
        "pixel_values": inputs["pixel_values"][before : before + images[b]],
    }


def as_naive(naive_act: ModuleType, act: vlattn.ACT, **more: Any) -> Any:
    known = {f.name for f in dataclasses.fields(naive_act.Settings)}
    return naive_act.Settings(
        **{f.name: getattr(act, f.name) for f in dataclasses.fields(act) if f.name in known}, **more
    )


def by_loops(
    naive_act: ModuleType,
    model: Any,
    inputs: Inputs,
    b: int,
    act: vlattn.ACT,
    generated: torch.Tensor | None = None,
    *,
    start: int | None = None,
    images: tuple[int, ...] = (1, 2),
) -> tuple[torch.Tensor, dict[tuple[int, int], list[int]]]:
    """Logits [T, V] of prompt `b` without its padding, and of tokens generated behind it; and the sinks.

    start: position id of its first token; None: where it stands in the batch, as a plain forward counts.
    """
    single = alone(inputs, b, images)
    embeds, visual = naive_act.embedded(model, single["input_ids"][0], single["pixel_values"])
    prompt = len(embeds)
    if start is None:
        start = inputs["input_ids"].shape[1] - prompt
    if generated is not None:
        embeds = torch.cat([embeds, model.get_input_embeddings()(generated)])
        visual = [*visual, *[False] * len(generated)]
    return naive_act.run(model, embeds, visual, HEADS, as_naive(naive_act, act), prompt, start)


def sinks_of(trace: Trace) -> Any:
    return trace.notes["sinks"]


IMAGES = (1, 2)


@pytest.fixture
def inputs(model: Any, prompts: Make) -> Inputs:
    """A left-padded batch of a prompt with one image and one with two."""
    return prompts(model, IMAGES, text=9)


# Prefill --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_and_sinks_of_a_padded_batch_are_those_of_loops_over_one_prompt_each(
    name: str, model: Any, inputs: Inputs, naive_act: ModuleType
) -> None:
    act = method(name)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with act(model) as trace:
            logits = model(**inputs).logits
    changed = 0
    for b in range(2):
        expected, sinks = by_loops(naive_act, model, inputs, b, act)
        n = len(expected)
        torch.testing.assert_close(logits[b, -n:], expected, atol=1e-9, rtol=0)
        for (layer, head), places in sinks.items():
            found = sinks_of(trace)[layer]
            row = found.found[b, found.heads.index(head)]
            assert (row.nonzero()[:, 0] - (len(row) - n)).tolist() == places
            changed += len(places)
    assert changed > 3
    assert not torch.equal(logits[:, -1], vanilla[:, -1])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["default", "released code"])
def test_single_precision_agrees_with_the_loops_on_both_attentions(
    name: str, attn: str, llava: Make, prompts: Make, naive_act: ModuleType
) -> None:
    model = llava(decoder_layers=LAYERS, seed=3, attn=attn, dtype=torch.float32)
    batch = prompts(model, IMAGES, text=9)
    with torch.no_grad(), method(name)(model):
        logits = model(**batch).logits
    for b in range(2):
        expected, _ = by_loops(naive_act, model, batch, b, method(name))
        torch.testing.assert_close(logits[b, -len(expected) :], expected, atol=2e-4, rtol=0)


def test_the_weights_that_eager_attention_returns_are_the_edited_ones(llava: Make, prompts: Make) -> None:
    model = llava(decoder_layers=LAYERS, attn="eager", dtype=torch.float32, seed=3)
    inputs = prompts(model, (1,), text=9)
    act = vlattn.ACT({2: [1]}, theta=0.04, beta=0.25)
    with torch.no_grad():
        before = model(**inputs, output_attentions=True).attentions
        with act(model) as trace:
            after = model(**inputs, output_attentions=True).attentions
    sinks = sinks_of(trace)[2].found[0, 0]
    text = slice(-9, None)
    assert bool(sinks.any())
    torch.testing.assert_close(after[2][0, 1, text][:, sinks], 0.25 * before[2][0, 1, text][:, sinks])
    torch.testing.assert_close(after[2].sum(-1), before[2].sum(-1))
    assert torch.equal(after[2][0, [0, 2, 3]], before[2][0, [0, 2, 3]])
    assert torch.equal(after[2][0, 1, :-9], before[2][0, 1, :-9])
    assert torch.equal(after[1], before[1])


def head_outputs(model: Any, inputs: Inputs, layer: int, act: vlattn.ACT | None) -> torch.Tensor:
    """What enters the output projection [B, N, H, d]."""
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        handle = act(model) if act is not None else None
        if handle is not None:
            handle.attach()
        projection = model.model.language_model.layers[layer].self_attn.o_proj
        hook = projection.register_forward_pre_hook(lambda module, args: kept.append(args[0].clone()))
        model(**inputs)
        hook.remove()
        if handle is not None:
            handle.detach()
    return kept[0].unflatten(-1, (4, -1))


@pytest.mark.parametrize("literal", [False, True])
def test_other_heads_other_layers_and_rows_that_see_no_sink_are_bit_identical(
    literal: bool, model: Any, inputs: Inputs
) -> None:
    act = vlattn.ACT({2: [1]}, theta=0.04, literal=literal)
    for layer in (0, 1):
        assert torch.equal(head_outputs(model, inputs, layer, None), head_outputs(model, inputs, layer, act))
    before, after = head_outputs(model, inputs, 2, None), head_outputs(model, inputs, 2, act)
    assert torch.equal(before[:, :, [0, 2, 3]], after[:, :, [0, 2, 3]])
    with torch.no_grad(), act(model) as trace:
        model(**inputs)
    found = sinks_of(trace)[2].found[:, 0]
    for b in range(2):
        changed = (before[b, :, 1] != after[b, :, 1]).any(-1).nonzero()[:, 0].tolist()
        text = (inputs["input_ids"][b] != model.config.image_token_id).nonzero()[:, 0].tolist()
        assert len(changed) > 4
        assert min(changed) >= int(found[b].int().argmax())
        assert literal or set(changed) <= set(text)


# Neutral settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        vlattn.ACT(HEADS, beta=1.0, theta=0.01),
        vlattn.ACT({}, theta=0.01),
        vlattn.ACT({2: []}, theta=0.01),
        vlattn.ACT(HEADS, theta=1.01),
        vlattn.ACT(HEADS, theta=1.01, literal=True, min_rows=1),
    ],
    ids=["beta 1", "no heads", "a layer without heads", "theta above 1", "theta above 1, all rows"],
)
def test_neutral_settings_give_the_vanilla_logits_and_tokens_bit_for_bit(
    act: vlattn.ACT, model: Any, inputs: Inputs
) -> None:
    with torch.no_grad():
        vanilla, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with act(model):
            assert torch.equal(model(**inputs).logits, vanilla)
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("name", ["default", "all rows", "relative"])
def test_leaving_the_context_restores_the_model(name: str, model: Any, inputs: Inputs, tiny: ModuleType) -> None:
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)  # which leaves attributes of its own
        before = tiny.hooks_of(model), tiny.settings_of(model)
        vanilla = model(**inputs).logits
        with method(name, decode="running")(model):
            model.generate(**inputs, max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, vanilla)
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


# Decoding -------------------------------------------------------------------------------------------------------------


def greedy(model: Any, inputs: Inputs, steps: int, tiny: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B, steps], the logits that follow prompt and each token [B, steps + 1, V])."""
    with torch.no_grad():
        output, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
        tokens, logits = [], [output.logits[:, -1]]
        for _ in range(steps):
            tokens.append(tiny.next_token(output.logits))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            output = model(input_ids=tokens[-1], attention_mask=mask, **{tiny.CACHE: cache_of(output)})
            logits.append(output.logits[:, -1])
    return torch.cat(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("decode", ["frozen", "running", "off"])
@pytest.mark.parametrize("name", ["default", "all rows", "all to visual", "relative"])
def test_cached_decoding_is_that_of_loops_over_prompt_and_tokens_with_the_same_sinks(
    name: str, decode: str, model: Any, inputs: Inputs, naive_act: ModuleType, tiny: ModuleType
) -> None:
    act = method(name, decode=decode)
    with act(model):
        tokens, logits = greedy(model, inputs, 10, tiny)
    for b in range(2):
        expected, _ = by_loops(naive_act, model, inputs, b, act, tokens[b])
        torch.testing.assert_close(logits[b], expected[-11:], atol=1e-9, rtol=0)


def test_how_decoding_goes_on_matters(model: Any, inputs: Inputs, tiny: ModuleType) -> None:
    last = []
    for decode in ("frozen", "running", "off"):
        with method("visual to text", decode=decode, min_rows=4)(model):
            last.append(greedy(model, inputs, 10, tiny)[1][:, -1])
    assert not torch.equal(last[0], last[1])
    assert not torch.equal(last[0], last[2])


@pytest.mark.parametrize("name", ["default", "all rows"])
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(name: str, model: Any, inputs: Inputs) -> None:
    with torch.no_grad(), method(name)(model):
        dynamic = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        static = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_beams_score_their_sequences_as_loops_over_them_do(
    decode: str, model: Any, prompts: Make, naive_act: ModuleType
) -> None:
    # One image each: older versions of transformers give beams of others the wrong images.
    inputs = prompts(model, (1, 1), text=9)
    act, new = method("default", decode=decode, min_rows=2, theta=0.06), 8
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0, "do_sample": False}
    with torch.no_grad(), act(model):
        found = model.generate(
            **inputs, max_new_tokens=new, **options, return_dict_in_generate=True, output_scores=True
        )
    for n, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        tokens = sequence[-new:]
        logits, _ = by_loops(naive_act, model, inputs, n // 4, act, tokens, start=0, images=(1, 1))
        said = logits[-new - 1 : -1].log_softmax(-1).gather(1, tokens[:, None]).sum()
        torch.testing.assert_close(score.double(), said, atol=1e-5, rtol=0)


def test_the_cache_forgets_who_followed_it(model: Any, inputs: Inputs) -> None:
    with torch.no_grad(), method("default", decode="running")(model):
        cache = cache_of(model(**inputs, use_cache=True))
        assert "reorder_cache" in vars(cache)
    assert "reorder_cache" not in vars(cache)


def test_a_prompt_in_pieces_is_refused(model: Any, inputs: Inputs, tiny: ModuleType) -> None:
    longer = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    with torch.no_grad():
        for decode, refused in (("frozen", True), ("running", True), ("off", False)):
            with method("default", decode=decode)(model):
                cache = cache_of(model(**inputs, use_cache=True))
                step = {"input_ids": torch.full((2, 2), 7), "attention_mask": longer, tiny.CACHE: cache}
                if refused:
                    with pytest.raises(InputError, match="cache: 2 x 2 new positions"):
                        model(**step)
                else:
                    assert model(**step).logits.shape[1] == 2


# With other methods ---------------------------------------------------------------------------------------------------

PRUNERS = [
    "flowcut:keep=8,count=per_image",
    "fastv:keep=7,layer=2",
    "dyvte:exit_layer=2,batch_policy=all",
    "tome:keep=9",
]


@pytest.mark.parametrize("name", ["default", "all rows"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_beside_a_pruner_a_prompt_says_in_a_padded_batch_what_it_says_alone(
    pruner: str, name: str, model: Any, inputs: Inputs
) -> None:
    first = parse_method(pruner)
    assert first is not None
    both = vlattn.compose(first, method(name, theta=0.05))
    with torch.no_grad():
        with first(model):
            pruned = model(**inputs).logits[:, -1]
        with both(model) as trace:
            together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
            logits = model(**inputs).logits[:, -1]
        for layer, sinks in sinks_of(trace).items():
            assert sinks.visual.sum(1).tolist() == trace.visual_by_layer[layer]
            assert not bool((sinks.found & (sinks.slot == -1)[:, None] & sinks.visual[:, None]).any())
        assert not torch.equal(logits, pruned)
        for b in range(2):
            with both(model):
                single = alone(inputs, b, IMAGES)
                assert torch.equal(
                    model.generate(**single, max_new_tokens=4, do_sample=False)[:, -4:], together[b : b + 1]
                )
                # Positions count from the padding in a plain forward, and rotary tables are fp32.
                torch.testing.assert_close(model(**single).logits[0, -1], logits[b], atol=1e-5, rtol=0)


def test_text_keeps_its_sinks_where_all_visual_tokens_have_left(model: Any, inputs: Inputs) -> None:
    both = vlattn.compose(vlattn.DyVTE(exit_layer=1, batch_policy="all"), vlattn.ACT({3: [0, 1, 2, 3]}, theta=0.05))
    with torch.no_grad(), both(model) as trace:
        model(**inputs)
    sinks = sinks_of(trace)[3]
    assert not bool(sinks.visual.any())
    assert int(sinks.counts()["text"].sum()) > 0


def test_all_rows_beside_another_edit_of_the_same_rows_are_refused(model: Any, inputs: Inputs) -> None:
    other = vlattn.ACT({2: [0]}, theta=0.04)
    both = vlattn.compose(vlattn.ACT({2: [1]}, theta=0.04, edit_rows="all"), other)
    with torch.no_grad(), both(model), pytest.raises(InputError, match="edit_rows: 'all' works on what attention puts"):
        model(**inputs)


def test_edits_of_text_rows_may_share_a_layer(model: Any, inputs: Inputs) -> None:
    one, other = vlattn.ACT({2: [1]}, theta=0.04), vlattn.ACT({2: [0, 3]}, theta=0.06, beta=0.1)
    with torch.no_grad(), one(model), other(model):
        both = head_outputs(model, inputs, 2, None)
    vanilla = head_outputs(model, inputs, 2, None)
    for act, heads in ((one, [1]), (other, [0, 3])):
        by_itself = head_outputs(model, inputs, 2, act)[:, :, heads]
        assert torch.equal(both[:, :, heads], by_itself)
        assert not torch.equal(by_itself, vanilla[:, :, heads])


# Memory ---------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside has had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


@pytest.mark.parametrize("name", ["default", "counted on all, edited in text", "all rows", "all rows to visual"])
def test_no_matrix_of_all_rows_by_all_keys_is_made(name: str, llava: Make, prompts: Make) -> None:
    model = llava(layers=2, decoder_layers=2, dtype=torch.float32, image_size=256)  # 4096 visual tokens
    inputs = prompts(model, (1,), text=9)
    length = inputs["input_ids"].shape[1]
    act = vlattn.ACT({1: [0, 2]}, **{**SETTINGS[name], "theta": 1e-3})
    with torch.no_grad(), act(model) as trace, Largest() as largest:
        model(**inputs, logits_to_keep=1)
    assert bool(sinks_of(trace)[1].found.any())
    assert largest.elements <= 2 * ROW_BLOCK * length < length * length / 10


# Errors ---------------------------------------------------------------------------------------------------------------


def test_without_heads_the_way_to_find_them_is_told() -> None:
    with pytest.raises(InputError, match=r"heads: not given.*vlattn\.calibrate_heads"):
        vlattn.ACT()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.5}, "beta: got 1.5"),
        ({"beta": -0.1}, "beta: got -0.1"),
        ({"theta": -1}, "theta: got -1"),
        ({"alpha": True}, "alpha: got True"),
        ({"min_rows": 0}, "min_rows: got 0"),
        ({"literal": 1}, "literal: got 1"),
        ({"threshold": "mean"}, "threshold: got 'mean'"),
        ({"donors": "image"}, "donors: got 'image'"),
        ({"recipients": "none"}, "recipients: got 'none'"),
        ({"stat_rows": "last"}, "stat_rows: got 'last'"),
        ({"edit_rows": "last"}, "edit_rows: got 'last'"),
        ({"decode": "on"}, "decode: got 'on'"),
        ({"spare": "bos"}, "spare: got 'bos'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vlattn.ACT(HEADS, **settings)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({5: [0]}, "got layer 5; this decoder has layers 0 to 4"),
        ({"2": [0]}, "got layer '2'"),
        ({2: [4]}, "got 4 in layer 2; query heads are 0 to 3"),
        ({2: 1}, "got 1 for layer 2"),
        ({2: "01"}, "got '01' for layer 2"),
        ([[2, 0]], "heads: got"),
    ],
)
def test_heads_that_the_model_does_not_have_are_refused(heads: Any, message: str, model: Any) -> None:
    with pytest.raises(InputError, match=message):
        vlattn.ACT(heads)(model).attach()


def test_a_decoder_too_short_for_the_usual_layers_is_refused(llava: Make) -> None:
    with pytest.raises(InputError, match="a decoder of 3 layers"):
        vlattn.ACT("all")(llava(decoder_layers=3)).attach()
