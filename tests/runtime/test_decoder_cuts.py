"""Cuts inside the decoder equal plain loops over the layers, cached or not, dropped or hidden, whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.models.registry import adapter_for
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet, cache_of
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.session import close_if_empty, session_of
from vlattn.runtime.trace import Trace

LAYERS = 4


@contextmanager
def cutting(model: Any, *requests: Request) -> Iterator[Trace]:
    session, hooks, trace, member = session_of(model, adapter_for), HookSet(), Trace(), object()
    session.members.append(member)
    session.traces.append(trace)
    try:
        for request in requests:
            session.cuts.after(request, hooks)
        yield trace
    finally:
        hooks.remove()
        session.members.remove(member)
        close_if_empty(session)


def strided(state: LayerState, stride: int, offset: int) -> Cut:
    """Every `stride`-th visual token stays, and more of them in prompts with more images."""
    return Cut(~state.visual | (state.slot % stride == offset))


def requests(positions: str, hide: bool = False) -> tuple[Request, ...]:
    """After layer 0 every third visual token stays, after layer 2 every second of those."""
    return (
        Request(0, lambda state: strided(state, 3, 1), positions, hide),
        Request(2, lambda state: strided(state, 6, 4), positions, hide),
    )


def choose(visual: list[int]) -> Any:
    """The same rule for `naive.run`; `visual`: positions of the prompt's visual tokens."""

    def rule(layer: int, hidden: torch.Tensor, places: list[int]) -> list[int] | None:
        stride, offset = {0: (3, 1), 2: (6, 4)}.get(layer, (0, 0))
        if not stride:
            return None
        return [p for p in places if p not in visual or visual.index(p) % stride == offset]

    return rule


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("naive_decoder", Path(__file__).parents[1] / "naive_decoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpadded(model: Any, tiny: ModuleType, inputs: dict[str, Any]) -> list[tuple[torch.Tensor, list[int]]]:
    """Each prompt alone: its embeddings [T, D] with the image features put in, and its visual positions."""
    rows, used = [], 0
    features = tiny.features(model, inputs["pixel_values"]).flatten(0, 1)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        ids = ids[mask]
        visual = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
        embeds = model.get_input_embeddings()(ids).detach().clone()
        embeds[visual] = features[used : used + len(visual)].detach().to(embeds.dtype)
        used += len(visual)
        rows.append((embeds, visual))
    return rows


@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("images", [(1,), (1, 2), (1, 0, 3)], ids=str)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-10), ({"kv_heads": 1}, 1e-10), ({"attn": "eager", "dtype": torch.float32}, 2e-5)],
    ids=["sdpa-fp64", "mqa-fp64", "eager-fp32"],
)
def test_prefill_equals_a_plain_loop_over_the_layers(
    llava: Any, tiny: ModuleType, prompts: Any, plain: ModuleType,
    positions: str, images: tuple[int, ...], options: dict[str, Any], tolerance: float,
) -> None:  # fmt: skip
    model = llava(decoder_layers=LAYERS, **options)
    inputs = prompts(model, images=images)
    given = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), cutting(model, *requests(positions)) as trace:
        out = model(**inputs, position_ids=given, use_cache=True)
    lengths: list[list[int]] = []
    for b, (embeds, visual) in enumerate(unpadded(model, tiny, inputs)):
        expected, entered = plain.run(model, embeds, choose(visual), compact=positions == "compact")
        torch.testing.assert_close(out.logits[b, -len(expected) :], expected, rtol=tolerance, atol=tolerance)
        lengths.append([len(e) for e in entered])
        assert [layer[b] for layer in trace.visual_by_layer] == [len(set(e) & set(visual)) for e in entered]
        for layer in (0, 2):
            kept = [slot for slot in trace.kept_in_decoder[layer][b].tolist() if slot >= 0]
            assert kept == [visual.index(p) for p in entered[layer + 1] if p in visual]
    assert trace.decoder_lengths == [max(column) for column in zip(*lengths, strict=True)][:-1]
    cache = cache_of(dict(out))
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [
        max(len_[layer] for len_ in lengths) if layer else inputs["input_ids"].shape[1] for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_cached_decoding_equals_recomputing_everything_with_the_same_kept_set(
    llava: Any, tiny: ModuleType, prompts: Any, plain: ModuleType, positions: str, images: tuple[int, ...]
) -> None:
    model, steps = llava(decoder_layers=LAYERS), 4
    inputs = prompts(model, images=images)
    with torch.no_grad(), cutting(model, *requests(positions)):
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    new = out.sequences[:, -steps:]
    for b, (embeds, visual) in enumerate(unpadded(model, tiny, inputs)):
        whole = torch.cat([embeds, model.get_input_embeddings()(new[b, :-1]).detach()])
        expected, _ = plain.run(model, whole, choose(visual), compact=positions == "compact", prompt=embeds.shape[0])
        for step in range(steps):
            # generate hands logits on in fp32
            torch.testing.assert_close(out.logits[step][b], expected[step - steps].float(), rtol=2e-6, atol=2e-6)
    assert len(set(new.flatten().tolist())) > 2


def test_dropping_equals_hiding_the_dropped_keys_where_positions_are_preserved(
    llava: Any, tiny: ModuleType, prompts: Any, plain: ModuleType
) -> None:
    model = llava(decoder_layers=LAYERS)
    inputs = prompts(model, images=(1, 2))
    given = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with cutting(model, *requests("preserve")):
            dropped = model(**inputs, position_ids=given).logits
            said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with cutting(model, *requests("preserve", hide=True)) as trace:
            hidden = model(**inputs, position_ids=given).logits
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), said)
    assert trace.masked
    torch.testing.assert_close(dropped[:, -3:], hidden[:, -3:], rtol=1e-10, atol=1e-10)
    for b, (embeds, visual) in enumerate(unpadded(model, tiny, inputs)):
        expected, _ = plain.run(model, embeds, choose(visual), hide=True)
        torch.testing.assert_close(hidden[b, -len(expected) :], expected, rtol=1e-10, atol=1e-10)
    assert trace.decoder_lengths == [int(inputs["attention_mask"].sum(1).max())] * LAYERS


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hide", [False, True])
def test_dropping_nothing_is_bit_identical_to_the_stock_model(
    llava: Any, prompts: Any, attn: str, dtype: torch.dtype, hide: bool
) -> None:
    model = llava(decoder_layers=LAYERS, attn=attn, dtype=dtype)
    inputs = prompts(model, images=(1, 2))
    everything = Request(1, lambda state: Cut(torch.ones_like(state.visual)), hide=hide, projections="qkv")
    with torch.no_grad():
        expected, said = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with cutting(model, everything) as trace:
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), said)
        assert torch.equal(model(**inputs).logits, expected)
    assert trace.kept_in_decoder == {}


def test_a_cut_after_the_last_layer_shortens_the_output_and_nothing_else(llava: Any, prompts: Any) -> None:
    model = llava(decoder_layers=LAYERS)
    inputs = prompts(model, images=(1, 2))
    text = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        with cutting(model, Request(LAYERS - 1, lambda state: Cut(~state.visual))):
            found = model(**inputs).logits
    for b in range(2):
        assert torch.equal(found[b, -int(text[b].sum()) :], expected[b][text[b]])


@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_beams_equal_those_of_each_prompt_alone(llava: Any, prompts: Any, positions: str) -> None:
    model = llava(decoder_layers=LAYERS)
    more = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    inputs = prompts(model, images=(1, 1))
    with torch.no_grad(), cutting(model, *requests(positions)):
        together = model.generate(**inputs, **more)[:, -6:]
        for b in range(2):
            alive = inputs["attention_mask"][b].bool()
            one = {
                "input_ids": inputs["input_ids"][b : b + 1, alive],
                "attention_mask": inputs["attention_mask"][b : b + 1, alive],
                "pixel_values": inputs["pixel_values"][b : b + 1],
            }
            assert torch.equal(model.generate(**one, **more)[:, -6:], together[3 * b : 3 * b + 3])


@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
@pytest.mark.parametrize("hide", [False, True])
def test_a_static_cache_says_what_a_dynamic_one_says(
    llava: Any, prompts: Any, positions: str, images: tuple[int, ...], hide: bool
) -> None:
    model = llava(decoder_layers=LAYERS)
    inputs = prompts(model, images=images)
    more = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), cutting(model, *requests(positions, hide)):
        expected = model.generate(**inputs, **more)
        assert torch.equal(model.generate(**inputs, **more, cache_implementation="static"), expected)


def test_generation_without_a_cache_chooses_at_every_step_and_stays_whole(llava: Any, prompts: Any) -> None:
    model = llava(decoder_layers=LAYERS)
    inputs = prompts(model, images=(1, 2))
    more = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), cutting(model, *requests("preserve")):
        assert torch.equal(model.generate(**inputs, **more, use_cache=False), model.generate(**inputs, **more))


def test_several_tokens_in_one_cached_step_equal_one_at_a_time(llava: Any, tiny: ModuleType, prompts: Any) -> None:
    model = llava(decoder_layers=LAYERS)
    for images in ((1,), (1, 2)):
        inputs = prompts(model, images=images)
        with torch.no_grad(), cutting(model, *requests("compact")):
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(images), 3, dtype=torch.long)], 1)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            tokens = torch.full((len(images), 3), 7)
            singles, out = [], model(**inputs, position_ids=places[:, :-3])
            for step in range(3):
                end = mask.shape[1] - 2 + step
                out = model(
                    input_ids=tokens[:, step : step + 1], attention_mask=mask[:, :end],
                    position_ids=places[:, end - 1 : end], **{tiny.CACHE: out[tiny.CACHE]},
                )  # fmt: skip
                singles.append(out.logits)
            out = model(**inputs, position_ids=places[:, :-3])
            out = model(
                input_ids=tokens, attention_mask=mask, position_ids=places[:, -3:], **{tiny.CACHE: out[tiny.CACHE]}
            )
        torch.testing.assert_close(out.logits, torch.cat(singles, 1), rtol=1e-10, atol=1e-10)


def test_the_layers_rows_are_those_of_eager_attention(llava: Any, prompts: Any) -> None:
    seen: dict[int, torch.Tensor] = {}

    def look(state: LayerState) -> None:
        rows = torch.tensor([[state.last, state.last - 2]]).expand(state.hidden.shape[0], -1)
        seen[state.layer] = state.attention_rows(rows)

    model = llava(decoder_layers=LAYERS, dtype=torch.float32, kv_heads=2)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad(), cutting(model, *(Request(layer, look, projections="qk") for layer in range(LAYERS))):
        model(**inputs)
    eager = llava(decoder_layers=LAYERS, dtype=torch.float32, kv_heads=2, attn="eager")
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    for layer in range(LAYERS):
        torch.testing.assert_close(seen[layer], attentions[layer][:, :, [-1, -3]], rtol=1e-4, atol=1e-6)


def test_choosing_anew_at_every_step_equals_choosing_by_the_whole_sequence_so_far(
    llava: Any, tiny: ModuleType, prompts: Any, plain: ModuleType
) -> None:
    """Visual tokens are ranked by the current last token at each step; a plain loop does the same without a cache."""
    model, layer, keep, steps = llava(decoder_layers=LAYERS), 1, 5, 4

    def best(state: LayerState) -> Cut:
        last = torch.full((state.hidden.shape[0], 1), state.last)
        score = state.attention_rows(last).mean(1)[:, 0].masked_fill(~state.visual, -1)
        top = score.topk(keep, dim=1).indices
        return Cut(torch.zeros_like(state.visual).scatter(1, top, True) | ~state.visual)

    inputs = prompts(model, images=(1, 1))
    request = Request(layer, best, hide=True, projections="qk", every_step=True)
    with torch.no_grad(), cutting(model, request):
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    changed = 0
    for b, (embeds, visual) in enumerate(unpadded(model, tiny, inputs)):
        # Keys and values of layers above hold what each step computed: replay step by step with its own choice.
        sequence, chosen_sets = embeds, []
        decoder = model.model.language_model
        state: list[torch.Tensor] = []
        for step in range(steps):
            if step:
                token = out.sequences[b, -steps + step - 1]
                sequence = torch.cat([sequence, model.get_input_embeddings()(token)[None].detach()])
            n, start = len(sequence), (len(sequence) - 1 if step else 0)
            hidden, ids = sequence[None], torch.arange(n)
            tables = decoder.rotary_emb(hidden, ids[None])
            chosen: set[int] = set(visual)
            rows = hidden
            for number, block in enumerate(decoder.layers):
                if step:
                    rows = torch.cat([state[number], rows[:, -1:]], 1) if number < len(state) else rows
                if number < len(state):
                    state[number] = rows
                else:
                    state.append(rows)
                allowed = torch.ones(n, n, dtype=torch.bool).tril()
                if number > layer:
                    for column in visual:
                        if column not in chosen:
                            allowed[:, column] = False
                            allowed[column, column] = True
                mask = torch.zeros(1, 1, n, n, dtype=rows.dtype).masked_fill(~allowed, torch.finfo(rows.dtype).min)
                with torch.no_grad():
                    output = block(rows, attention_mask=mask, position_embeddings=tables, position_ids=ids[None])
                    if number == layer:
                        attention = block.self_attn
                        x = block.input_layernorm(rows)
                        q = attention.q_proj(x).view(1, n, -1, 8).transpose(1, 2)
                        k = attention.k_proj(x).view(1, n, -1, 8).transpose(1, 2)
                        q, k = adapter_for(model).rotate(layer, q, k, *tables)
                        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
                        weights = (q[:, :, -1:] @ k.transpose(-1, -2) * 8**-0.5).softmax(-1).mean(1)[0, 0]
                        chosen = {visual[i] for i in weights[visual].topk(keep).indices.tolist()}
                        chosen_sets.append(chosen)
                rows = output[0] if isinstance(output, tuple) else output
                rows = rows[:, start:] if step else rows
            logits = model.lm_head(decoder.norm(rows))[0, -1]
            torch.testing.assert_close(out.logits[step][b], logits.detach().float(), rtol=2e-6, atol=2e-6)
        changed += len({frozenset(s) for s in chosen_sets}) - 1
    assert changed > 0  # otherwise choosing once would pass too


def test_a_layer_that_is_not_there_is_refused(llava: Any) -> None:
    model = llava(decoder_layers=LAYERS)
    with pytest.raises(InputError, match="layers 0 to 3"), cutting(model, Request(4, lambda state: None)):
        pass


def test_a_cropped_cache_is_refused(llava: Any, tiny: ModuleType, prompts: Any) -> None:
    model = llava(decoder_layers=LAYERS)
    inputs = prompts(model)
    with torch.no_grad(), cutting(model, *requests("preserve")):
        out = model(**inputs)
        cache = out[tiny.CACHE]
        cache.layers[-1].keys = cache.layers[-1].keys[:, :, :-1]
        cache.layers[-1].values = cache.layers[-1].values[:, :, :-1]
        with pytest.raises(InputError, match="must not be cropped"):
            model(input_ids=torch.tensor([[7]]), **{tiny.CACHE: cache})


def test_gradient_checkpointing_is_refused_in_training_only(llava: Any, prompts: Any) -> None:
    model = llava(decoder_layers=LAYERS)
    inputs = prompts(model)
    model.gradient_checkpointing_enable()
    with cutting(model, *requests("preserve")):
        model(**inputs)
        model.train()
        with pytest.raises(InputError, match="gradient_checkpointing_disable"):
            model(**inputs)
