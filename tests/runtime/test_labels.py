"""Training on pruned prompts: the loss is what the stock model says of the short sequence with the same labels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.uniform_prune import UniformPrune, uniform_indices
from vlattn.models.registry import adapter_for
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import session_of


def labelled(inputs: dict[str, torch.Tensor], image: int) -> torch.Tensor:
    """Labels on text alone."""
    text = (inputs["input_ids"] != image) & inputs["attention_mask"].bool()
    return torch.where(text, inputs["input_ids"], -100)


@pytest.mark.parametrize("images", [(1,), (2, 1)], ids=str)
def test_the_loss_is_that_of_the_stock_model_on_the_short_sequence(
    llava: Any, tiny: ModuleType, prompts: Any, images: tuple[int, ...]
) -> None:
    model = llava()
    inputs = prompts(model, images=images)
    labels = labelled(inputs, model.config.image_token_id)
    stock = tiny.features(model, inputs["pixel_values"])
    slots = uniform_indices(36, 7)
    short, _ = tiny.short_sequence(model, inputs, [tiny.with_slots(rows[slots], slots) for rows in stock])
    short_labels = torch.full_like(short["attention_mask"], -100)
    for b, row in enumerate(labels.tolist()):
        alive = inputs["attention_mask"][b].tolist()
        visual = (inputs["input_ids"][b] == model.config.image_token_id).tolist()
        kept, seen = [], 0
        for position, label in enumerate(row):
            if not alive[position]:
                continue
            if visual[position]:
                if seen % 36 in slots.tolist():
                    kept.append(-100)
                seen += 1
            else:
                kept.append(label)
        short_labels[b, -len(kept) :] = torch.tensor(kept)
    expected = model(**short, labels=short_labels).loss
    expected.backward()
    wanted = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    model.zero_grad()
    with UniformPrune(keep=7)(model):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.model.multi_modal_projector.linear_1.weight.grad, wanted, rtol=1e-8, atol=1e-10)
    assert list(out)[:2] == ["loss", "logits"]
    with UniformPrune(keep=7)(model):
        as_tuple = model(**inputs, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected.detach(), rtol=1e-10, atol=1e-10)


def test_a_cut_inside_the_decoder_takes_the_labels_of_what_it_drops_along(llava: Any, prompts: Any) -> None:
    model = llava(decoder_layers=3)
    inputs = prompts(model, images=(1, 2))
    labels = labelled(inputs, model.config.image_token_id)
    # Stock code has the padding in front of a row predict its first token; leave that out.
    labels[torch.arange(2), inputs["attention_mask"].argmax(1)] = -100
    session, hooks = session_of(model, adapter_for), HookSet()
    session.cuts.after(Request(0, lambda state: Cut(~(state.visual & (state.slot % 4 > 0)))), hooks)
    out = model(**inputs, labels=labels)
    visual = inputs["input_ids"] == model.config.image_token_id
    keep = inputs["attention_mask"].bool() & ~(visual & ((visual.cumsum(1) - 1) % 4 > 0))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(2):
        target = labels[b][keep[b]]
        logits = out.logits[b][-len(target) :]
        total = total + F.cross_entropy(logits[:-1], target[1:], ignore_index=-100, reduction="sum")
        count += int((target[1:] >= 0).sum())
    torch.testing.assert_close(out.loss, (total / count).float(), rtol=1e-5, atol=1e-5)  # the model takes it in fp32
    hooks.remove()
    session.close()


def test_labels_that_do_not_fit_the_prompt_are_refused(llava: Any, prompts: Any) -> None:
    model = llava()
    inputs = prompts(model)
    with vlattn.FlowCut(keep=8)(model):
        with pytest.raises(InputError, match="labels: expected"):
            model(**inputs, labels=inputs["input_ids"][:, 1:])
        with pytest.raises(InputError, match="logits_to_keep"):
            model(**inputs, labels=inputs["input_ids"], logits_to_keep=1)
    with vlattn.FlowCut(keep=36)(model):
        assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
