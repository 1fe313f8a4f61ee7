"""The frozen model's part in training DyVTE: what gates read, and what happens to answers without visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import vlattn
from vlattn.errors import InputError
from vlattn.models.registry import adapter_for
from vlattn.training.dyvte_branches import AnsweredPrompts, Branches, GateTask, answered_prompts
from vlattn.training.examples import open_image
from vlattn.training.tiny_examples import tiny_examples

ANSWER = 2


class Head(nn.Module):
    """A head that remembers the logits it gave."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.said = head, list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.said.append(self.head(x))
        return self.said[-1]


def answered(inputs: dict[str, torch.Tensor]) -> AnsweredPrompts:
    """A batch of prompts whose last tokens are taken for the answer."""
    mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    prompt = mask.bool()
    prompt[:, -ANSWER:] = False
    return AnsweredPrompts(inputs, prompt)


def run(model: Any, batch: AnsweredPrompts, layers: Sequence[int]) -> tuple[dict[int, GateTask], list[torch.Tensor]]:
    """The tasks, and the logits of branch K and of branch X for each layer [B, ANSWER, V]."""
    branches = Branches(model)
    head = branches.head = Head(branches.head)
    return branches.run(batch, layers), head.said


@torch.no_grad()
def short_answer_logits(model: Any, inputs: dict[str, torch.Tensor], row: int, layer: int) -> torch.Tensor:
    """Logits [ANSWER, V] of one unpadded prompt whose visual positions are cut out by hand after `layer`."""
    language = model.model.language_model
    alive = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row, alive]
    visual = ids == model.config.image_token_id
    hidden = language.embed_tokens(ids.masked_fill(visual, 0))
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    hidden[visual] = features[row].to(hidden.dtype)
    place = torch.arange(len(ids))
    for number, module in enumerate(language.layers):
        if number == layer + 1:
            hidden, place = hidden[~visual], place[~visual]
        causal = torch.full((len(place), len(place)), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        tables = language.rotary_emb(hidden[None], place[None])
        out = module(hidden[None], attention_mask=causal[None, None], position_embeddings=tables)
        hidden = (out[0] if isinstance(out, tuple) else out)[0]
    return model.lm_head(language.norm(hidden))[-ANSWER - 1 : -1]


# Rotary tables and the softmax of eager attention are fp32 in stock code: padding, which shifts positions, shows there.
@pytest.mark.parametrize(("attn", "rows", "atol"), [("sdpa", 1, 1e-10), ("sdpa", 2, 1e-4), ("eager", 1, 1e-4)])
def test_masking_visual_keys_gives_answers_the_logits_of_a_sequence_without_them(
    attn: str, rows: int, atol: float, llava: Callable[..., Any], prompts: Callable[..., Any]
) -> None:
    model = llava(decoder_layers=4, attn=attn)
    inputs = prompts(model, (1,) * rows, text=4)
    _, said = run(model, answered(inputs), range(4))
    assert len(said) == 5
    gap = 0.0
    for layer in range(4):
        for row in range(rows):
            expected = short_answer_logits(model, inputs, row, layer)
            torch.testing.assert_close(said[1 + layer][row], expected, atol=atol, rtol=0)
            gap = max(gap, float((said[1 + layer] - said[0]).abs().max()))
    assert gap > 1e-2  # visual tokens matter to this model, so that equality above says something


def test_branch_k_gives_the_model_s_own_logits_and_an_exit_after_the_last_layer_is_it(
    llava: Callable[..., Any], prompts: Callable[..., Any]
) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, (1, 1))
    tasks, said = run(model, answered(inputs), [2])
    with torch.no_grad():
        vanilla = model(**inputs).logits[:, -ANSWER - 1 : -1]
    assert torch.equal(said[0], vanilla)
    assert torch.equal(said[1], vanilla)
    assert tasks[2].y.tolist() == [True, True]


def test_gate_inputs_are_layer_outputs_before_the_final_norm_averaged_over_the_prompt_alone(
    llava: Callable[..., Any], prompts: Callable[..., Any], tiny: ModuleType
) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, (1,), text=5)
    tasks, _ = run(model, answered(inputs), range(3))
    outputs: list[torch.Tensor] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(**inputs)
    first = 5 + tiny.per_image(model)  # text behind the image: five words, of which two are the answer
    for number, hidden in enumerate(outputs):
        expected = torch.cat([hidden[0, first : first + 2].mean(0), hidden[0, first + 2]])
        torch.testing.assert_close(tasks[number].u[0], expected, atol=1e-12, rtol=0)


def test_the_answer_does_not_show_in_gate_inputs(llava: Callable[..., Any], prompts: Callable[..., Any]) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, (1,))
    tasks, said = run(model, answered(inputs), range(3))
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -ANSWER:] = 7
    again, said_again = run(model, answered(other), range(3))
    assert not torch.equal(said[0], said_again[0])
    for layer in range(3):
        torch.testing.assert_close(again[layer].u, tasks[layer].u, atol=1e-12, rtol=0)


def test_without_visual_tokens_both_branches_are_the_same_bit_for_bit(llava: Callable[..., Any]) -> None:
    model = llava(decoder_layers=4)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    tasks, said = run(model, answered({"input_ids": ids}), range(4))
    for layer in range(4):
        assert torch.equal(said[1 + layer], said[0])
        assert tasks[layer].y.tolist() == [True, True, True]


def test_the_model_keeps_its_hooks_its_weights_and_its_gradients(
    llava: Callable[..., Any], prompts: Callable[..., Any], tiny: ModuleType
) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, (1,))
    model(**inputs)  # transformers sets hooks of its own on the first call
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tasks, _ = run(model, answered(inputs), [0, 1])
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings
    assert not tasks[0].u.requires_grad
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.grad is None
        assert weight.requires_grad


def test_a_failing_forward_leaves_no_hooks_behind(
    llava: Callable[..., Any], prompts: Callable[..., Any], tiny: ModuleType
) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, (1,))
    model(**inputs)
    hooks = tiny.hooks_of(model)
    with pytest.raises(ValueError):
        run(model, answered({**inputs, "pixel_values": inputs["pixel_values"][:, :, :8]}), [0])
    assert tiny.hooks_of(model) == hooks


@pytest.mark.parametrize(
    "family", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3"]
)
def test_masking_keys_and_removing_tokens_agree_on_every_family(family: str, families: ModuleType) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, batch=2)
    layers = range(len(adapter_for(model).decoder_layers))
    _, said = run(model, answered(dict(inputs)), layers)
    for layer in layers:
        with vlattn.DyVTE(exit_layer=layer)(model), torch.no_grad():
            removed = model(**inputs).logits[:, -ANSWER - 1 : -1]
        torch.testing.assert_close(said[1 + layer], removed, atol=1e-9, rtol=0)


# Examples as model inputs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> Any:
    return vlattn.load("tiny")


def test_prompts_end_where_generation_would_start_and_answers_end_with_the_end_token(loaded: Any) -> None:
    model, processor = loaded
    examples = tiny_examples()[2:7]  # yes/no, a count, captions: answers of different lengths
    batch = answered_prompts(processor, examples, model.device)
    for row, example in enumerate(examples):
        text = f"USER: <image>\n{example.question} ASSISTANT:"
        image = open_image(example.image)
        alone = processor(images=image, text=text, return_tensors="pt")
        ids = batch.inputs["input_ids"][row]
        assert ids[batch.prompt[row]].tolist() == alone["input_ids"][0].tolist()
        answer = ids[batch.inputs["attention_mask"][row].bool() & ~batch.prompt[row]]
        assert answer[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(answer[:-1]).strip() == example.answer.lower()


def test_a_processor_that_pads_on_the_right_is_refused(loaded: Any) -> None:
    model, processor = loaded
    processor.tokenizer.padding_side = "right"
    try:
        with pytest.raises(InputError, match="padding_side = 'left'"):
            answered_prompts(processor, tiny_examples()[:2], model.device)
    finally:
        processor.tokenizer.padding_side = "left"


def test_a_model_without_a_head_or_under_an_intervention_that_drops_tokens_is_refused(
    llava: Callable[..., Any], prompts: Callable[..., Any]
) -> None:
    model = llava(decoder_layers=3)
    with pytest.raises(InputError, match="no language model head"):
        Branches(model.model)
    batch = answered(prompts(model, (1,)))
    with vlattn.UniformPrune(keep=9)(model), pytest.raises(InputError, match="train the gates on the bare model"):
        Branches(model).run(batch, [0])
