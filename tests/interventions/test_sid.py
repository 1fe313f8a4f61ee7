"""SID: which image tokens its second stream sees, and what it says then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn import compose
from vlattn.errors import InputError
from vlattn.interventions.flowcut import FlowCut
from vlattn.interventions.sid import SID, least_attended

FAMILIES = (
    "llava_next", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
    "smolvlm", "gemma3",
)  # fmt: skip


# Selection ------------------------------------------------------------------------------------------------------------
@dataclass
class State:
    """What the selection reads of a layer."""

    weights: torch.Tensor  # [B, H, N] of the last row
    visual: torch.Tensor

    @property
    def hidden(self) -> torch.Tensor:
        return self.weights.new_zeros(self.weights.shape[0], self.weights.shape[2], 1)

    @property
    def last(self) -> int:
        return self.weights.shape[2] - 1

    def attention_rows(self, rows: torch.Tensor) -> torch.Tensor:
        assert rows.tolist() == [[self.last]] * self.weights.shape[0]
        return self.weights[:, :, None]


def random_state(batch: int = 2) -> Any:
    generator = torch.Generator().manual_seed(0)
    visual = torch.zeros(batch, 12, dtype=torch.bool)
    visual[0, 2:8] = True
    visual[1:, 4:11] = True
    return State(torch.rand(batch, 4, 12, generator=generator).softmax(-1), visual)


@pytest.mark.parametrize("keep", [1, 3, 6, 50])
def test_the_least_attended_image_tokens_of_each_prompt_stay(keep: int) -> None:
    state = random_state()
    found = least_attended(state, keep)
    for b in range(2):
        mean = state.weights[b].mean(0)
        candidates = sorted(state.visual[b].nonzero().flatten().tolist(), key=lambda i: (mean[i].item(), i))
        assert found[b].nonzero().flatten().tolist() == sorted(candidates[:keep])


def test_the_selection_does_not_depend_on_the_order_of_heads_nor_on_the_rest_of_the_batch() -> None:
    state = random_state()
    found = least_attended(state, 3)
    assert torch.equal(least_attended(State(state.weights[:, [2, 0, 3, 1]], state.visual), 3), found)  # type: ignore[arg-type]
    for b in range(2):
        alone = State(state.weights[b : b + 1], state.visual[b : b + 1])
        assert torch.equal(least_attended(alone, 3)[0], found[b])  # type: ignore[arg-type]


def test_ties_go_to_the_lower_position() -> None:
    state = State(torch.full((1, 2, 6), 1 / 6), torch.tensor([[False, True, True, True, True, False]]))
    assert least_attended(state, 2).tolist() == [[False, True, True, False, False, False]]  # type: ignore[arg-type]


# The stream -----------------------------------------------------------------------------------------------------------
class PlainStream:
    """A Llama decoder step by step, its keys and values in lists, hiding image tokens from layer A on."""

    def __init__(self, model: Any, visual: list[bool], first: int, keep: int) -> None:
        self.model, self.visual, self.first, self.keep = model, visual, first, keep
        self.decoder = model.model.language_model
        self.keys: list[list[torch.Tensor]] = [[] for _ in self.decoder.layers]
        self.values: list[list[torch.Tensor]] = [[] for _ in self.decoder.layers]
        self.chosen: list[set[int]] = []

    def step(self, embeds: torch.Tensor) -> torch.Tensor:
        """Logits of the last of the new positions, whose embeddings are [N, D]."""
        start = len(self.keys[0])
        ids = torch.arange(start, start + len(embeds))
        cos, sin = (table[0] for table in self.decoder.rotary_emb(embeds[None], ids[None]))
        hidden, unseen = embeds, set()
        for number, layer in enumerate(self.decoder.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                project(x).unflatten(-1, (-1, attention.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (self.turned(y, cos, sin) for y in (q, k))
            self.keys[number] += list(k)
            self.values[number] += list(v)
            rows, last = [], torch.zeros(0)
            for n in range(len(embeds)):
                places = [i for i in range(start + n + 1) if i not in unseen or i == start + n]
                heads = []
                weights = torch.zeros(q.shape[1], start + n + 1, dtype=q.dtype)
                for head in range(q.shape[1]):
                    own = head * k.shape[1] // q.shape[1]
                    keys = torch.stack([self.keys[number][i][own] for i in places])
                    values = torch.stack([self.values[number][i][own] for i in places])
                    row = (keys @ q[n, head] / math.sqrt(attention.head_dim)).softmax(0)
                    weights[head, places] = row
                    heads.append(row @ values)
                rows.append(torch.cat(heads))
                last = weights.mean(0)
            hidden = hidden + attention.o_proj(torch.stack(rows))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if number == self.first - 1:
                images = [i for i, is_image in enumerate(self.visual) if is_image]
                stay = sorted(images, key=lambda i: (last[i].item(), i))[: self.keep]
                unseen = set(images) - set(stay)
                self.chosen.append(set(stay))
        return self.model.lm_head(self.decoder.norm(hidden))[-1]

    @staticmethod
    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]


@pytest.mark.parametrize(("first", "keep"), [(1, 3), (2, 2), (2, 7), (3, 1)])
def test_each_step_is_that_of_a_decoder_in_plain_loops(
    llava: Any, prompts: Any, tiny: ModuleType, first: int, keep: int
) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=3)
    inputs = prompts(model, images=(2,))
    taken: list[int] = []
    with torch.no_grad():
        with SID(layer=first, keep=keep, beta=0)(model):
            out = model(**inputs)
            found = [out.logits[0, -1]]
            for _ in range(5):
                token = tiny.next_token(out.logits)
                taken.append(int(token))
                cache = out.cache if tiny.CACHE == "cache" else out.past_key_values
                out = model(input_ids=token, **{tiny.CACHE: cache})
                found.append(out.logits[0, -1])
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)[0].clone()
        visual = ids[0] == tiny.IMAGE
        embeds[visual] = tiny.features(model, inputs["pixel_values"]).flatten(0, 1)
        plain = PlainStream(model, visual.tolist(), first, keep)
        news = [embeds, *model.get_input_embeddings()(torch.tensor(taken)).split(1)]
        for step, new in enumerate(news):
            grown = torch.cat([ids, torch.tensor([taken[:step]], dtype=torch.long)], 1)
            main = model(input_ids=grown, pixel_values=inputs["pixel_values"]).logits[0, -1]
            torch.testing.assert_close(found[step], 2 * main - plain.step(new), atol=1e-9, rtol=0)
    assert len({frozenset(chosen) for chosen in plain.chosen}) > 1  # chosen anew at every step


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_is_that_of_a_model_whose_upper_layers_are_masked_by_hand(families: Any, family: str) -> None:
    model = families.model(family, attn="eager", dtype=torch.float32)
    inputs = families.inputs(family, model, batch=1)
    first, keep = 2, 3
    with torch.no_grad():
        vanilla = model(**inputs, output_attentions=True)
        images = ((inputs["input_ids"] == 63) | (inputs["input_ids"] == 62))[0].nonzero().flatten().tolist()
        score = vanilla.attentions[first - 1][0, :, -1].mean(0)
        stay = sorted(images, key=lambda i: score[i].item())[:keep]
        unseen = sorted(set(images) - set(stay))

        def hide(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            mask = kwargs["attention_mask"].clone()
            mask[..., unseen] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        text = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
        handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in text.layers[first:]]
        masked = model(**inputs).logits[:, -1]
        for handle in handles:
            handle.remove()
        with SID(layer=first, keep=keep, beta=0)(model):
            found = model(**inputs).logits[:, -1]
    assert not torch.allclose(masked, vanilla.logits[:, -1], atol=1e-3)
    torch.testing.assert_close(found, 2 * vanilla.logits[:, -1] - masked, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_where_every_image_token_stays_the_kept_logits_are_vanilla(
    families: Any, family: str, how: dict[str, Any]
) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    with torch.no_grad():
        vanilla = model.generate(**inputs, max_new_tokens=4, do_sample=False, **how)
        with SID(layer=2, keep=1000, beta=0)(model):  # a mask would change the scores of beams
            found = model.generate(**inputs, max_new_tokens=4, do_sample=False, **how)
        with SID(layer=2, keep=1000)(model):
            logits = model(**inputs).logits[:, -1]
        own = model(**inputs).logits[:, -1]
    assert torch.equal(found, vanilla)
    kept = own >= own.amax(-1, keepdim=True) + math.log(0.1)
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(logits[kept], own[kept], atol=1e-9, rtol=0)


def test_the_streams_are_one_up_to_the_layer_that_ranks_and_part_above_it(llava: Any, prompts: Any) -> None:
    model = llava(decoder_layers=4)
    inputs = prompts(model, images=(1, 2))
    seen: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.language_model.layers):

        def keep(module: Any, args: tuple, output: Any, number: int = number) -> None:
            seen.setdefault(number, []).append(output[0] if isinstance(output, tuple) else output)

        layer.register_forward_hook(keep)
    with torch.no_grad(), SID(layer=2, keep=4)(model):
        model(**inputs)
    alive = inputs["attention_mask"].bool()
    for number in range(4):
        main, second = seen[number]
        assert torch.allclose(main[alive], second[alive], atol=1e-12) == (number < 2)


def test_beams_of_a_prompt_with_a_pruner_say_in_a_batch_what_they_say_alone(families: Any) -> None:
    # The pruner has touched the features, so the second stream's are computed anew, and repeated for the beams.
    model = families.model("llava_next")
    singles = [families.inputs("llava_next", model, batch=1, seed=seed) for seed in (0, 1)]
    both = {name: torch.cat([single[name] for single in singles]) for name in singles[0]}
    with torch.no_grad(), compose(FlowCut(keep=2, count="per_image"), SID(keep=2))(model):
        together = model.generate(**both, max_new_tokens=4, do_sample=False, num_beams=3)[:, -4:]
        alone = [model.generate(**single, max_new_tokens=4, do_sample=False, num_beams=3)[:, -4:] for single in singles]
    assert torch.equal(together, torch.cat(alone))


# Settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "layer: got 0; give an integer of at least 1"),
        ({"keep": 0}, "keep: got 0"),
        ({"alpha": -2}, "alpha: got -2"),
        ({"beta": 1.5}, "beta: got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_to_give(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SID(**settings)


def test_a_layer_that_the_decoder_does_not_have_is_refused_with_those_it_has(llava: Any) -> None:
    with pytest.raises(InputError, match="layer: got 2, but this decoder has layers 0 to 1; give 1 <= layer <= 1"):
        SID()(llava(decoder_layers=2)).attach()
