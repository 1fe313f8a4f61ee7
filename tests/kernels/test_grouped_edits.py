"""Methods that edit rows of attention give on the kernel, forced onto the CPU, what they give on dense weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn import ops
from vlattn.interventions.paint import PAINT
from vlattn.interventions.var import VAR
from vlattn.runtime.routing import AttentionEdits

pytest.importorskip("triton")

METHODS = {
    "VAR": VAR(tau=1.5, sink_dims=(3, 7), min_visual_mass=0.05, rho_nonsink=0.3, skip_first_layers=1),
    "PAI": vlattn.PAI(alpha=0.5, gamma=1, start_layer=1),
    "PAINT": PAINT(alpha=0.7, beta=0.4, start_layer=1),
    "PAINT by head": PAINT(alpha=0.7, beta=0.4, start_layer=1, head_weights="visual_mass"),
}


@pytest.fixture
def model(tiny: ModuleType) -> Any:
    return tiny.llava(decoder_layers=4, image_size=16, layers=3, dtype=torch.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of `grouped_attention` from here on."""
    made: list[Any] = []
    whole = ops.grouped_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["backend"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(ops, "grouped_attention", counted)
    return made


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Any], method: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    with method(model) as trace:
        made = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return made.sequences, torch.stack(made.logits), trace.notes


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_the_kernel_is_the_method_on_dense_weights(
    model: Any, tiny: ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inputs, method = tiny.prompts(model, images=(1, 2)), METHODS[name]
    tokens, logits, notes = outputs(model, inputs, method)
    assert not calls
    with torch.no_grad():
        vanilla = model(**inputs).logits[:, -1]
    assert float((logits[0] - vanilla).abs().max()) > 1e-3
    monkeypatch.setattr(AttentionEdits, "backend", "triton")
    tokens_too, logits_too, notes_too = outputs(model, inputs, method)
    assert len(calls) >= 4
    assert torch.equal(tokens, tokens_too)
    torch.testing.assert_close(logits_too, logits, rtol=2e-5, atol=2e-5)
    for key in ("changed", "visual_sinks"):
        assert notes_too.get(key) == notes.get(key)


def test_the_knock_out_on_the_kernel_is_the_one_on_dense_logits(
    model: Any, tiny: ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.prompts(model, images=(1, 2))
    dense = vlattn.vhd_knockout(model, inputs, remove_outliers=True)
    assert not calls
    monkeypatch.setattr(AttentionEdits, "backend", "triton")
    torch.testing.assert_close(vlattn.vhd_knockout(model, inputs, remove_outliers=True), dense, rtol=1e-5, atol=1e-5)
    assert calls == ["triton"] * 4


def test_eager_attention_and_two_methods_at_once_stay_on_dense_weights(
    model: Any, tiny: ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.prompts(model, images=(1, 2))
    monkeypatch.setattr(AttentionEdits, "backend", "triton")
    with METHODS["VAR"](model), torch.no_grad():
        with METHODS["PAI"](model):
            model(**inputs)
        both = len(calls)
        model(**inputs)
    assert both == 1  # in the last layer, which VAR leaves alone
    assert len(calls) > both
    calls.clear()
    eager = tiny.llava(decoder_layers=4, image_size=16, layers=3, dtype=torch.float32, attn="eager")
    outputs(eager, inputs, METHODS["VAR"])
    assert not calls
