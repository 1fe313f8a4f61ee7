"""DyVTE's gates: what they read, what they say, and the files that hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.dyvte_gates import (
    DyVTEGates,
    Gate,
    GateSpan,
    ModelPrint,
    gate_input,
    gate_span,
    load_gates,
    text_after_image,
    wants_exit,
)
from vlattn.models.registry import adapter_for

TINY = ModelPrint("llava", 6, 3, 64, "toy")


def wave(k: int, *shape: int) -> torch.Tensor:
    """The fractional part of a fast sine, less one half: numbers that any language can make again."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    y = 43758.5453 * torch.sin(12.9898 * (i + 1) + 78.233 * k)
    return (y - y.floor() - 0.5).view(shape)


def span_of(visual: torch.Tensor, prompt: torch.Tensor) -> GateSpan:
    return gate_span(prompt & ~visual, text_after_image(visual, prompt))


def flags(text: str) -> torch.Tensor:
    """`..##` rows as a bool mask, `#` True."""
    return torch.tensor([[c == "#" for c in row] for row in text.split()])


# What a gate reads ----------------------------------------------------------------------------------------------------


def test_input_and_logits_of_the_published_formula_on_a_vector_computed_apart() -> None:
    hidden = 2 * wave(21, 9, 6)[None]  # text stands at 5..8, the image at 2..4
    span = span_of(flags("..###...."), flags("#########"))
    u = gate_input(hidden, span)
    expected = [-0.061646, 0.342273, 0.271872, -0.170517, 0.000066, -0.570900]
    expected += [0.097894, -0.018824, 0.656805, 0.739800, -0.700837, -0.064386]
    torch.testing.assert_close(u[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    gate = Gate(6, 8).double()
    with torch.no_grad():
        gate.w1.copy_(4 * wave(22, 8, 12))
        gate.w2.copy_(4 * wave(23, 2, 8))
    logits = gate(u)
    torch.testing.assert_close(
        logits[0], torch.tensor([-3.843568026, 5.436067036], dtype=torch.float64), atol=1e-8, rtol=0
    )
    assert bool(wants_exit(logits)[0])


@pytest.mark.parametrize(
    ("visual", "prompt", "mean", "last"),
    [
        ("..###...", "########", ".....##.", 7),  # text before the image is not read
        ("...##...", ".#######", ".....##.", 7),  # left padding
        (".##..#...", "#########", "...##.##.", 8),  # two images: the text between them too
        ("..###....", "#######..", ".....#...", 6),  # an answer follows
        ("...###.", "#######", ".......", 6),  # one token after the image: no mean
        (".......", ".######", ".#####.", 6),  # no image: all text
    ],
)
def test_gates_read_text_after_the_first_image_without_the_last_token(
    visual: str, prompt: str, mean: str, last: int
) -> None:
    span = span_of(flags(visual), flags(prompt))
    assert torch.equal(span.mean, flags(mean))
    assert span.last.tolist() == [last]


def test_gate_inputs_of_a_padded_batch_equal_a_loop_over_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 12, 5, generator=generator, dtype=torch.float64)
    visual = flags("....###..... .###.##..... ......###...")
    prompt = flags("...######### ########.... .....#######")
    u = gate_input(hidden, span_of(visual, prompt))
    for row in range(3):
        seen, states = False, []
        last = max(t for t in range(12) if prompt[row, t])
        for t in range(last):
            seen = seen or bool(visual[row, t])
            if prompt[row, t] and seen and not visual[row, t]:
                states.append(hidden[row, t])
        mean = torch.stack(states).mean(0)
        torch.testing.assert_close(u[row], torch.cat([mean, hidden[row, last]]), atol=1e-14, rtol=0)


def test_without_text_after_the_image_both_halves_are_the_last_token() -> None:
    hidden = torch.randn(1, 6, 4)
    u = gate_input(hidden, span_of(flags("..###."), flags("######")))
    assert torch.equal(u[0, :4], hidden[0, -1])
    assert torch.equal(u[0, 4:], hidden[0, -1])


def test_states_at_visual_padding_and_earlier_positions_do_not_matter_even_as_nan() -> None:
    hidden = torch.randn(1, 9, 6)
    span = span_of(flags("...###..."), flags(".########"))
    other = hidden.clone()
    other[:, :6] = torch.nan
    assert torch.equal(gate_input(other, span), gate_input(hidden, span))


def test_half_precision_states_are_averaged_in_fp32() -> None:
    hidden = torch.full((1, 4000, 2), 30.0, dtype=torch.float16)  # their sum is beyond fp16
    span = GateSpan(torch.ones(1, 4000, dtype=torch.bool), torch.tensor([3999]))
    u = gate_input(hidden, span)
    assert u.dtype == torch.float32
    assert torch.equal(u, torch.full((1, 4), 30.0))


def test_a_prompt_that_ends_with_its_image_is_refused() -> None:
    with pytest.raises(InputError, match="put the question after the image"):
        text_after_image(flags("..##. ...##"), flags("##### #####"))


def test_the_span_stays_when_all_tokens_of_the_first_image_have_left() -> None:
    visual, prompt = flags(".##..##..."), flags("##########")
    after = text_after_image(visual, prompt)
    left = ~flags(".##.......")[0]
    span = gate_span((prompt & ~visual)[:, left], after)
    assert torch.equal(span.mean, span_of(visual, prompt).mean[:, left])
    assert span.last.tolist() == [7]


# What it says ---------------------------------------------------------------------------------------------------------


def test_exit_is_a_probability_above_the_threshold_and_never_a_tie() -> None:
    logits = torch.randn(200, 2, dtype=torch.float64)
    logits[0] = 1.25
    for threshold in (0.1, 0.5, 0.9):
        assert torch.equal(wants_exit(logits, threshold), logits.softmax(-1)[:, 1] > threshold)
    assert not wants_exit(logits)[0]


def test_threshold_0_always_exits_and_1_never_does_and_nan_keeps() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert wants_exit(logits, 0.0).tolist() == [True, True]
    assert wants_exit(logits, 1.0).tolist() == [False, False]
    assert wants_exit(torch.full((1, 2), torch.nan), 0.0).tolist() == [False]


def test_swapping_the_output_rows_turns_exit_into_keep_and_equal_rows_never_exit() -> None:
    gate, u = DyVTEGates(TINY, 16, seed=3).gate(0), torch.randn(50, 12)
    before = wants_exit(gate(u))
    assert 0 < int(before.sum()) < 50
    with torch.no_grad():
        gate.w2.copy_(gate.w2.flip(0).clone())
    assert torch.equal(wants_exit(gate(u)), ~before)
    with torch.no_grad():
        gate.w2[0] = gate.w2[1]
    assert not wants_exit(gate(u)).any()


def test_the_gates_activation_is_the_exact_gelu() -> None:
    gate = DyVTEGates(TINY, 16).double().gate(1)
    u = 3 * torch.randn(4, 12, dtype=torch.float64)
    inner = u @ gate.w1.T
    exact = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(gate(u), exact @ gate.w2.T, atol=1e-13, rtol=0)


# The gates of a model -------------------------------------------------------------------------------------------------


def test_a_gate_of_llava_7b_has_as_many_weights_as_the_paper_s() -> None:
    with torch.device("meta"):
        gate = Gate(4096, 2048)
    assert sum(w.numel() for w in gate.parameters()) == 16_781_312


def test_saved_gates_come_back_bit_for_bit_with_what_they_know_of_their_model(tmp_path: Path) -> None:
    gates = DyVTEGates(TINY, 8, seed=5)
    gates.training_record = {"steps": 3}
    gates.save(tmp_path)
    again = load_gates(tmp_path)
    assert again.made_for == TINY
    assert again.training_record == {"steps": 3}
    assert again.state_dict().keys() == gates.state_dict().keys()
    for name, weight in gates.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert not any(w.requires_grad for w in again.parameters())
    config = json.loads((tmp_path / "gates.json").read_text())
    expected = {"model_type": "llava", "hidden_size": 6, "layers": 3, "vocabulary": 64, "name": "toy"}
    assert config["model"] == expected


def test_weights_are_xavier_uniform_and_follow_the_seed() -> None:
    first, again, other = (DyVTEGates(TINY, 512, seed=s) for s in (1, 1, 2))
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        bound = math.sqrt(6 / sum(a.shape))
        assert 0.9 * bound < float(a.detach().abs().max()) <= bound


def test_gates_are_told_apart_by_what_they_print() -> None:
    assert repr(DyVTEGates(TINY, 8, seed=1)) == repr(DyVTEGates(TINY, 8, seed=1))
    assert repr(DyVTEGates(TINY, 8, seed=1)) != repr(DyVTEGates(TINY, 8, seed=2))
    assert len(repr(DyVTEGates(TINY, 8))) < 80


def test_gates_know_the_model_they_were_made_for(llava: Callable[..., Any]) -> None:
    model = llava(decoder_layers=3)
    made_for = ModelPrint.of(adapter_for(model), "toy")
    assert made_for == ModelPrint("llava", 32, 3, 64, "toy")
    DyVTEGates(made_for, 4).check(adapter_for(model))
    with pytest.raises(InputError, match="layers 3, not 2"):
        DyVTEGates(made_for, 4).check(adapter_for(llava(decoder_layers=2)))


def test_gates_of_a_model_of_another_vocabulary_are_refused_and_may_be_adopted(llava: Callable[..., Any]) -> None:
    model = llava(decoder_layers=3)
    gates = DyVTEGates(ModelPrint("llava", 32, 3, 99, "elsewhere"), 4, seed=7)
    with pytest.raises(InputError, match=r"made for elsewhere \(vocabulary 99, not 64"):
        gates.check(adapter_for(model))
    adopted = gates.adopt(model)
    adopted.check(adapter_for(model))
    for a, b in zip(adopted.parameters(), gates.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="only gates of the same shape carry over"):
        gates.adopt(llava(decoder_layers=2))


@pytest.mark.parametrize("width", [0, -3, True, 2.5])
def test_a_width_that_is_no_positive_integer_is_refused(width: Any) -> None:
    with pytest.raises(InputError, match="gate_hidden"):
        DyVTEGates(TINY, width)


def test_a_folder_without_gates_and_broken_files_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no gates\.json"):
        load_gates(tmp_path)
    DyVTEGates(TINY, 8).save(tmp_path)
    whole = (tmp_path / "gates.json").read_text()
    for broken in (
        whole.replace("vlattn-dyvte-1", "other"),
        whole.replace('"gate_hidden": 8', '"gate_hidden": 9'),
        "{",
    ):
        (tmp_path / "gates.json").write_text(broken)
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_gates(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "gates.json").write_text(whole)
    (tmp_path / "gates.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_gates(tmp_path)
