"""Where sinks are: the measure, the channels that are known, and how channels are found on a live model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf

import vlattn
from vlattn.assets.paths import tiny_llava
from vlattn.errors import InputError
from vlattn.interventions.var import VAR
from vlattn.interventions.var_sinks import known_channels, sink_strength


# phi ------------------------------------------------------------------------------------------------------------------
def states(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0, 3, 5], x[1, 0, 2] = 400.0, -150.0
    return x


def test_strength_is_the_largest_sink_channel_over_the_root_mean_square() -> None:
    x = states(2, 6, 24)
    found = sink_strength(x, (2, 5))
    for b in range(2):
        for t in range(6):
            rms = math.sqrt(sum(float(v) ** 2 for v in x[b, t]) / 24 + 1e-6)
            assert float(found[b, t]) == pytest.approx(max(abs(float(x[b, t, d])) for d in (2, 5)) / rms, rel=1e-12)
    # Root mean squares without eps, by the library's own norm.
    rms_norm = torch.nn.functional.rms_norm(x, (24,))
    assert torch.allclose(found, rms_norm[..., [2, 5]].abs().amax(-1), atol=1e-5)


def test_strength_never_passes_the_root_of_the_width() -> None:
    x = torch.zeros(1, 2, 24, dtype=torch.float64)
    x[0, 0, 5] = 1e4
    x[0, 1] = states(2, 6, 24)[0, 3]
    found = sink_strength(x, (5,))[0]
    assert float(found[0]) == pytest.approx(math.sqrt(24))
    assert 4.8 < float(found[1]) < math.sqrt(24)


def test_sinks_stay_sinks_when_states_are_scaled_or_channels_renamed() -> None:
    x = states(2, 6, 24)
    marks = sink_strength(x, (2, 5)) > 2
    assert 0 < int(marks.sum()) < 12
    for factor in (1e-1, 3.0, 1e3):
        assert torch.equal(sink_strength(factor * x, (2, 5)) > 2, marks)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    renamed = [int((order == d).nonzero()) for d in (2, 5)]
    assert torch.equal(sink_strength(x[..., order], renamed) > 2, marks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_fp32(dtype: torch.dtype) -> None:
    x = (100 * states(2, 6, 24)).to(dtype)  # squares far above the largest fp16
    found = sink_strength(x, (2, 5))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), sink_strength(x.double(), (2, 5)), rtol=1e-5)


# Channels that are known ----------------------------------------------------------------------------------------------
def llama(**sizes: Any) -> Any:
    return hf.LlamaConfig(**sizes)


SEVEN: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
THIRTEEN: dict[str, Any] = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}


def sized(width: int, layers: int, kv_heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_key_value_heads": kv_heads}


CONFIGS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "llava-1.5-7b": (lambda: hf.LlavaConfig(text_config=llama(**SEVEN)), (1415, 2533)),
    "llava-1.5-13b": (lambda: hf.LlavaConfig(text_config=llama(**THIRTEEN)), (2100, 4743)),
    "llava-1.6-vicuna-7b": (lambda: hf.LlavaNextConfig(text_config=llama(**SEVEN)), (1415, 2533)),
    "llava-1.6-vicuna-13b": (lambda: hf.LlavaNextConfig(text_config=llama(**THIRTEEN)), (2100, 4743)),
    "qwen2-vl-2b": (lambda: hf.Qwen2VLConfig(text_config=sized(1536, 28, 2)), (1073, 534, 940)),
    "qwen2-vl-7b": (lambda: hf.Qwen2VLConfig(text_config=sized(3584, 28, 4)), (458, 2570)),
    "qwen2.5-vl-3b": (lambda: hf.Qwen2_5_VLConfig(text_config=sized(2048, 36, 2)), (318, 1874, 1819)),
    "qwen2.5-vl-7b": (lambda: hf.Qwen2_5_VLConfig(text_config=sized(3584, 28, 4)), (458, 2570)),
    "qwen2.5-vl-32b": (lambda: hf.Qwen2_5_VLConfig(text_config=sized(5120, 64, 8)), (4675, 3094)),
    "qwen3-vl-2b": (lambda: hf.Qwen3VLConfig(text_config=sized(2048, 28, 8)), (1793, 1999, 1401)),
    "qwen3-vl-4b": (lambda: hf.Qwen3VLConfig(text_config=sized(2560, 36, 8)), (0,)),
    "qwen3-vl-8b": (lambda: hf.Qwen3VLConfig(text_config=sized(4096, 36, 8)), (1838,)),
    "internvl2-8b": (
        lambda: hf.InternVLConfig(text_config=llama(**SEVEN, num_key_value_heads=8)),
        (3584,),
    ),
    "internvl3.5-1b": (lambda: hf.InternVLConfig(text_config=hf.Qwen3Config(**sized(1024, 28, 8))), (35, 13)),
    "internvl3.5-4b": (lambda: hf.InternVLConfig(text_config=hf.Qwen3Config(**sized(2560, 36, 8))), (4, 396, 0)),
    "internvl3.5-8b": (lambda: hf.InternVLConfig(text_config=hf.Qwen3Config(**sized(4096, 36, 8))), (2276, 233)),
    "internvl3.5-38b": (lambda: hf.InternVLConfig(text_config=hf.Qwen3Config(**sized(5120, 64, 8))), (731,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_channels_of_published_models_are_found_by_their_config(name: str) -> None:
    make, dims = CONFIGS[name]
    found = known_channels(make())
    assert found.dims == dims
    assert found.tau == 20
    assert ("released code" in found.source) == name.startswith("llava")
    assert ("not checked" in found.source) != name.startswith("llava")


@pytest.mark.parametrize(
    "config",
    [
        lambda: hf.LlavaNextConfig(text_config=llama(**SEVEN, num_key_value_heads=8)),  # Llama 3
        lambda: hf.LlavaNextConfig(text_config=hf.MistralConfig(**SEVEN)),
        lambda: hf.Gemma3Config(text_config=hf.Gemma3TextConfig(**sized(2560, 34, 4))),
        lambda: hf.InternVLConfig(text_config=hf.Qwen2Config(**sized(3584, 28, 4))),
    ],
)
def test_a_decoder_that_nobody_measured_is_refused_with_the_way_to_calibrate(config: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=r"not known; calibrate once, found = vlattn.calibrate_sinks\(model\)"):
        known_channels(config())


# Finding them ---------------------------------------------------------------------------------------------------------
def massive(model: Any, channels: dict[int, float], token: int) -> Any:
    """A model whose `token` enters the decoder with large values in some channels."""
    with torch.no_grad():
        for channel, value in channels.items():
            model.get_input_embeddings().weight[token, channel] = value
    model.config.text_config.bos_token_id = token
    return model


@pytest.fixture
def sunk(llava: Callable[..., Any]) -> Any:
    return massive(llava(decoder_layers=8, image_size=16, layers=3), {21: 300.0, 5: -400.0}, 1)


def test_channels_of_a_first_token_are_found_largest_first_without_prompts(sunk: Any) -> None:
    found = vlattn.calibrate_sinks(sunk, tau=2.5)
    assert found.dims == (5, 21)
    assert found.layers == (2, 6)
    assert found.first_layer == 0
    assert found.limit == pytest.approx(math.sqrt(32))
    # Nearly all of the state is in these two channels.
    assert found.means == pytest.approx([math.sqrt(32) * 0.8, math.sqrt(32) * 0.6], rel=0.02)
    assert [d for d, _ in found.strongest[:2]] == [5, 21]
    assert len(found.strongest) == 5
    assert vlattn.calibrate_sinks(sunk, tau=4).dims == (5,)


def test_means_are_those_of_plain_loops_over_prompts(sunk: Any, prompts: Any) -> None:
    calls = [prompts(sunk, images=(1, 2)), prompts(sunk, images=(1,), seed=1)]
    for tokens in ("first", "visual"):
        found = vlattn.calibrate_sinks(sunk, calls, tau=1.2, tokens=tokens)
        values: list[list[float]] = []
        for call in calls:
            with torch.no_grad():
                hidden = sunk.model(**call, output_hidden_states=True).hidden_states
            for b, alive in enumerate(call["attention_mask"].tolist()):
                image = (call["input_ids"][b] == 63).nonzero().flatten().tolist()
                for t in [alive.index(1)] if tokens == "first" else image:
                    for layer in range(2, 7):
                        x = hidden[layer][b, t]
                        values.append((x.abs() / math.sqrt(float(x.square().mean()) + 1e-6)).tolist())
        means = torch.tensor(values, dtype=torch.float64).mean(0)
        best = means.topk(5)
        assert [d for d, _ in found.strongest] == best.indices.tolist()
        assert [m for _, m in found.strongest] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert found.dims == tuple(d for d in best.indices.tolist()[:3] if means[d] > 1.2)
        assert len(found.dims) > 0


def test_a_model_without_massive_channels_has_none(llava: Callable[..., Any]) -> None:
    found = vlattn.calibrate_sinks(llava(decoder_layers=4), tau=3)
    assert found.dims == found.means == ()
    assert found.first_layer is None
    assert 0 < found.strongest[0][1] < 3


def test_calibration_looks_past_interventions_and_leaves_nothing_behind(
    sunk: Any, prompts: Any, tiny: ModuleType
) -> None:
    inputs = prompts(sunk)
    with torch.no_grad():
        sunk(**inputs)
    expected = vlattn.calibrate_sinks(sunk, inputs, tau=1.2, tokens="visual")
    before, settings = tiny.hooks_of(sunk), tiny.settings_of(sunk)
    method = VAR(sink_dims=(3, 7), tau=1.0, min_visual_mass=0, rho_nonsink=0, move=1.0)
    with vlattn.compose(vlattn.FastV(keep=4, layer=1), method)(sunk) as trace:
        assert vlattn.calibrate_sinks(sunk, inputs, tau=1.2, tokens="visual") == expected
        assert vlattn.calibrate_sinks(sunk, tau=2.5).dims == (5, 21)
        assert trace.decoder_lengths == []
    assert tiny.hooks_of(sunk) == before
    assert tiny.settings_of(sunk) == settings


def test_what_is_found_is_what_the_method_takes(sunk: Any, prompts: Any) -> None:
    found = vlattn.calibrate_sinks(sunk, tau=2.5)
    inputs = prompts(sunk)
    inputs["input_ids"][0, 0] = 1
    method = VAR(sink_dims=found.dims, tau=found.tau, require_visual_sink=False, min_visual_mass=0.05)
    with torch.no_grad(), method(sunk) as trace:
        sunk(**inputs)
    notes: Any = trace.notes
    assert notes["sink_source"] == "given"
    assert any(shares[0] > 0 for shares in notes["changed"].values())


FAMILIES = ("llava_next", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_decoder_can_be_calibrated(families: ModuleType, family: str) -> None:
    model = families.model(family)
    # Gemma scales what its table holds.
    massive(model, {17: 500.0}, 2)
    assert vlattn.calibrate_sinks(model, tau=4).dims == (17,)
    found = vlattn.calibrate_sinks(model, families.inputs(family, model), tau=0.5, tokens="visual")
    assert len(found.dims) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"tau: got 20, but .* sqrt\(D\) = 5.657"),
        ({"tau": -1}, "tau: got -1; give a positive number"),
        ({"tau": 2, "tokens": "last"}, "tokens: got 'last'; give 'first' or 'visual'"),
        ({"tau": 2, "tokens": "visual"}, "prompts: tokens='visual' needs prompts with images"),
        (
            {"tau": 2, "tokens": "visual", "prompts": {"input_ids": torch.tensor([[4, 5]])}},
            "prompts: they have no visual tokens",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(sunk: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vlattn.calibrate_sinks(sunk, **options)


# The embedded model ---------------------------------------------------------------------------------------------------
def test_the_stored_calibration_of_the_embedded_model_is_what_its_script_measures() -> None:
    from vlattn.assets.calibrate_var import TAU, background, prompts

    model, processor = vlattn.load("tiny")
    batches = list(prompts(processor, limit=16))
    inputs = [inputs for inputs, _ in batches]
    stored = json.loads((tiny_llava() / "var.json").read_text())
    found = vlattn.calibrate_sinks(model, inputs, tau=TAU, tokens="visual")
    assert list(found.dims) == stored["sink_dims"]
    assert found.means == pytest.approx(stored["visual_tokens"]["means"], rel=0.1)
    assert vlattn.calibrate_sinks(model, inputs, tau=TAU).dims == ()
    assert known_channels(model.config).dims == found.dims
    shares = background(model, batches, found)
    assert shares["background_among_sinks"] > shares["background_among_visual_tokens"] + 0.1
