"""Pruning together with edits of attention, of heads and of logits: every pair, and longer rows on several families.

That an edit follows the dropped tokens is shown against plain loops in the tests of each method; here is
what must hold whatever the methods are. Combinations that contradict themselves are refused, with the reason.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.registry import parse_method
from vlattn.models.registry import adapter_for

NEW = 4
PRUNERS = {
    "dyvte": "dyvte:exit_layer=2",
    "fastv": "fastv:keep=3,layer=2",
    "flowcut": "flowcut:keep=5,count=per_image",
    "prumerge": "prumerge:keep=5",
    "sparsevlm": "sparsevlm:layers=[1,2],counts=[6,4]",
    "tome": "tome:keep=5",
    "uniform": "uniform:keep=5",
    "visionzip": "visionzip:dominant=4,contextual=1",
}
EDITS = {
    "act": "act:heads=all,theta=0.02,min_rows=1",
    "icd": "icd:disturbance=[5,6,7],beta=0",
    "m3id": "m3id:lam=0.5,beta=0",
    "opera": "opera:num_beams=2,num_attn_candidates=4,warmup=0",
    "pai": "pai:cutoff=0",
    "pai's edit": "pai:gamma=1",
    "paint": "paint:spatial_ratio=0.1,start_layer=1",
    "sid": "sid:layer=2,keep=3,beta=0",
    "var": "var:sink_dims=[3,7],tau=1.2,min_visual_mass=0.05,rho_nonsink=0.3",
    "vcd": "vcd:beta=0",
    "vhr": "vhr",
}
# The same edits at the setting that does nothing.
NEUTRAL = {"act": "act:heads=all,beta=1", "pai": "pai:alpha=0,gamma=1", "paint": "paint:alpha=0,beta=0",
           "var": "var:sink_dims=[3,7],tau=1.0,move=0", "vhr": "vhr:alpha=1"}  # fmt: skip
# A search edits the choice of the next tokens, not the forward pass.
SEARCHES = {"opera"}
# Edits of tokens that keep their own places, beside pruners that mix them into new ones.
REFUSED = dict.fromkeys(
    [("prumerge", "paint"), ("tome", "paint"), ("visionzip", "paint")], "mixes patches into new tokens"
)
ROWS = {
    "flowcut+var": ("flowcut", "var"),
    "dyvte+vhr": ("dyvte", "vhr"),
    "flowcut+dyvte+paint": ("flowcut", "dyvte", "paint"),
    "uniform+fastv+var": ("uniform", "fastv", "var"),
    "flowcut+fastv+dyvte": ("flowcut", "fastv", "dyvte"),
    "uniform+dyvte+pai+vcd": ("uniform", "dyvte", "pai's edit", "vcd"),
    "fastv+vhr+m3id": ("fastv", "vhr", "m3id"),
    "uniform+var+vhr": ("uniform", "var", "vhr"),
}
# On these families FlowCut itself ranks in the decoder, or mixes patches.
IMPOSSIBLE = [
    ("flowcut+fastv+dyvte", {"llava_next", "llava_onevision", "qwen2_5_vl"}, "already ranks visual tokens"),
    ("flowcut+dyvte+paint", {"qwen2_5_vl"}, "mixes patches into new tokens"),
]
FAMILIES = ("llava_next", "llava_onevision", "video_llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3")


def made(*names: str) -> list[Intervention]:
    methods = [parse_method((PRUNERS | EDITS)[name]) for name in names]
    return [method for method in methods if method is not None]


@pytest.fixture(scope="module")
def stock(tiny: ModuleType) -> tuple[Any, dict[str, Any]]:
    model = tiny.llava(decoder_layers=4, image_size=16, layers=4, dtype=torch.float32)
    return model, tiny.prompts(model, images=(1, 1))


def logits(model: Any, inputs: dict[str, Any], *methods: Intervention) -> torch.Tensor:
    with torch.no_grad(), vlattn.compose(*methods)(model):
        return model(**inputs).logits[:, -1]


def said(model: Any, inputs: dict[str, Any], *methods: Intervention) -> torch.Tensor:
    with torch.no_grad(), vlattn.compose(*methods)(model):
        return model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]


def one(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """Prompt `b` of a batch in which each has one image, without its padding."""
    seen = inputs["attention_mask"][b].bool()
    shape = inputs["input_ids"].shape
    return {
        name: value[b : b + 1, seen] if value.shape[:2] == shape else value[b : b + 1] for name, value in inputs.items()
    }


PAIRS = [(pruner, edit) for pruner in PRUNERS for edit in EDITS if (pruner, edit) not in REFUSED]


@pytest.mark.parametrize(("pruner", "edit"), PAIRS)
def test_a_pair_does_what_both_do_in_either_order_and_leaves_the_model_as_it_was(
    stock: tuple[Any, dict[str, Any]], pruner: str, edit: str
) -> None:
    model, inputs = stock
    first, second = made(pruner, edit)
    with torch.no_grad():
        vanilla = model(**inputs).logits[:, -1]
    both = logits(model, inputs, first, second)
    torch.testing.assert_close(both, logits(model, inputs, second, first), rtol=1e-5, atol=1e-5)
    assert not torch.equal(both, vanilla)
    assert torch.equal(both, logits(model, inputs, first)) == (edit in SEARCHES)
    assert not torch.equal(both, logits(model, inputs, second))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[:, -1], vanilla)


@pytest.mark.parametrize("edit", NEUTRAL)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_beside_an_edit_that_does_nothing_pruning_gives_its_own_logits_bit_for_bit(
    stock: tuple[Any, dict[str, Any]], pruner: str, edit: str
) -> None:
    model, inputs = stock
    nothing = parse_method(NEUTRAL[edit])
    assert nothing is not None
    (method,) = made(pruner)
    assert torch.equal(logits(model, inputs, method, nothing), logits(model, inputs, method))


PAIRS = [(pruner, edit) for pruner in PRUNERS for edit in EDITS if (pruner, edit) not in REFUSED]


@pytest.mark.parametrize(("pruner", "edit"), PAIRS)
def test_a_pair_says_in_a_batch_what_it_says_alone(stock: tuple[Any, dict[str, Any]], pruner: str, edit: str) -> None:
    model, inputs = stock
    methods = made(pruner, edit)
    together = said(model, inputs, *methods)
    assert torch.equal(together, torch.cat([said(model, one(inputs, b), *methods) for b in range(2)]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS)
def test_longer_rows_work_on_every_family_that_all_of_them_claim(families: ModuleType, row: str, family: str) -> None:
    model = families.model(family, dtype=torch.float32)
    inputs = families.inputs(family, model, images=2 if family == "llava_onevision" else 1)
    methods = made(*ROWS[row])
    refusals = [reason for m in methods if (reason := m.refuses(type(adapter_for(model)))) is not None]
    refusals += [reason for at, families_, reason in IMPOSSIBLE if at == row and family in families_]
    if refusals:
        with pytest.raises(InputError) as caught:
            vlattn.compose(*methods)(model).attach()
        assert any(reason in str(caught.value) for reason in refusals)
        return
    with torch.no_grad():
        vanilla = model(**inputs).logits
    with torch.no_grad(), vlattn.compose(*methods)(model) as trace:
        first = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(first, again)
    assert trace.budget()["final"] < sum(trace.visual_full) / len(trace.visual_full)
    # A handful of tokens may hold no sink, or nothing else.
    changed: Any = trace.notes.get("changed", {})
    acted = any(float(torch.as_tensor(found).sum()) > 0 for found in changed.values())
    for left_out in range(len(methods)):
        fewer = [m for i, m in enumerate(methods) if i != left_out]
        if ROWS[row][left_out] != "var" or acted:
            assert not torch.equal(logits(model, inputs, *methods), logits(model, inputs, *fewer)), ROWS[row][left_out]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize(("pruner", "edit"), REFUSED)
def test_a_pair_that_cannot_work_is_refused_in_either_order(
    stock: tuple[Any, dict[str, Any]], pruner: str, edit: str
) -> None:
    for methods in (made(pruner, edit), made(edit, pruner)):
        with pytest.raises(InputError, match=REFUSED[pruner, edit]):
            vlattn.compose(*methods)(stock[0]).attach()


def _contradicting() -> list[tuple[str, str, str]]:
    selectors = ["flowcut", "prumerge", "tome", "visionzip"]
    rankers = ["fastv", "sparsevlm"]
    pairs = [(a, b, "already chooses the image features") for a, b in itertools.combinations(selectors, 2)]
    return pairs + [(a, b, "already ranks visual tokens") for a, b in itertools.combinations(rankers, 2)]


@pytest.mark.parametrize(("first", "second", "reason"), _contradicting())
def test_what_contradicts_itself_is_refused_in_compose_and_in_nested_contexts(
    stock: tuple[Any, dict[str, Any]], first: str, second: str, reason: str
) -> None:
    a, b = made(first, second)
    with pytest.raises(InputError, match=reason):
        vlattn.compose(a, b)
    with a(stock[0]), pytest.raises(InputError, match=reason):
        b(stock[0]).attach()


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("vcd", "m3id", "two contrasts do not add up"),
        ("sid", "icd", "two contrasts do not add up"),
        ("pai", "vcd", "two contrasts do not add up"),
        ("vhr", "vhr", "VHR"),
        ("var", "var", "VAR"),
        ("opera", "opera", "another OPERA"),
    ],
)
def test_two_methods_that_edit_the_same_thing_are_refused(
    stock: tuple[Any, dict[str, Any]], first: str, second: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        vlattn.compose(*made(first, second))(stock[0]).attach()
