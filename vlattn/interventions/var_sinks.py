"""Sink tokens: positions whose hidden state is all but concentrated in a few channels, which are fixed for a decoder.

"See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vlattn.errors import InputError

TAU = 20.0
"""The paper's threshold."""
RMS_EPS = 1e-6


def sink_strength(hidden: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """phi: the largest of |x_d| / rms(x) over the sink channels; at most sqrt(D).

    Args:
        hidden: residual stream [B, T, D] as it enters a decoder layer, before that layer's norm. The norm's gain does
            not take part.
        dims: the sink channels.

    Returns:
        [B, T], fp32 for half-precision states (the squares overflow in fp16), the states' dtype otherwise.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide)  # [B, T]
    mean_square = norm.square() / hidden.shape[-1]
    peak = hidden[..., list(dims)].to(wide).abs().amax(-1)  # [B, T]
    return peak * (mean_square + RMS_EPS).rsqrt()


# Which channels -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DecoderPrint:
    """What a config tells of a decoder. text_type: the model_type of the text config, which names the base model."""

    model_type: str
    text_type: str
    hidden_size: int
    layers: int
    kv_heads: int

    @classmethod
    def of(cls, config: Any) -> DecoderPrint:
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(config.model_type, text.model_type, text.hidden_size, text.num_hidden_layers, heads)


@dataclass(frozen=True)
class SinkChannels:
    """Sink channels of a decoder, the threshold that goes with them, and where both are from."""

    dims: tuple[int, ...]
    tau: float
    source: str


RELEASED = "the paper's released code, for this base model"
REPORTED = "reported by third parties, not checked here: compare with vlattn.calibrate_sinks(model)"

_KNOWN: dict[DecoderPrint, SinkChannels] = {
    DecoderPrint(model_type, text_type, hidden_size, layers, kv_heads): SinkChannels(dims, TAU, source)
    for model_types, text_type, hidden_size, layers, kv_heads, dims, source in (
        # LLaMA-2 7B and 13B, which Vicuna v1.5 is made from
        (("llava", "llava_next", "video_llava"), "llama", 4096, 32, 32, (1415, 2533), RELEASED),
        (("llava", "llava_next"), "llama", 5120, 40, 40, (2100, 4743), RELEASED),
        # Qwen2-VL 2B, 7B
        (("qwen2_vl",), "qwen2_vl_text", 1536, 28, 2, (1073, 534, 940), REPORTED),
        (("qwen2_vl",), "qwen2_vl_text", 3584, 28, 4, (458, 2570), REPORTED),
        # Qwen2.5-VL 3B, 7B, 32B
        (("qwen2_5_vl",), "qwen2_5_vl_text", 2048, 36, 2, (318, 1874, 1819), REPORTED),
        (("qwen2_5_vl",), "qwen2_5_vl_text", 3584, 28, 4, (458, 2570), REPORTED),
        (("qwen2_5_vl",), "qwen2_5_vl_text", 5120, 64, 8, (4675, 3094), REPORTED),
        # Qwen3-VL 2B, 4B, 8B
        (("qwen3_vl",), "qwen3_vl_text", 2048, 28, 8, (1793, 1999, 1401), REPORTED),
        (("qwen3_vl",), "qwen3_vl_text", 2560, 36, 8, (0,), REPORTED),
        (("qwen3_vl",), "qwen3_vl_text", 4096, 36, 8, (1838,), REPORTED),
        # InternVL2 8B (InternLM2.5, converted to Llama's form); InternVL3.5 1B, 4B, 8B, 38B
        (("internvl",), "llama", 4096, 32, 8, (3584,), REPORTED),
        (("internvl",), "qwen3", 1024, 28, 8, (35, 13), REPORTED),
        (("internvl",), "qwen3", 2560, 36, 8, (4, 396, 0), REPORTED),
        (("internvl",), "qwen3", 4096, 36, 8, (2276, 233), REPORTED),
        (("internvl",), "qwen3", 5120, 64, 8, (731,), REPORTED),
    )
    for model_type in model_types
}


def known_channels(config: Any) -> SinkChannels:
    """The sink channels of a model, by its (outer) config.

    Raises:
        InputError: nobody has told them; says how to calibrate.
    """
    decoder = DecoderPrint.of(config)
    if decoder in _KNOWN:
        return _KNOWN[decoder]
    tiny = _embedded()
    if tiny[0] == decoder and tiny[1] == config.get_text_config().vocab_size:
        return tiny[2]
    raise InputError(
        f"sink_dims: not given, and the sink channels of {decoder.model_type} with a {decoder.text_type} decoder "
        f"({decoder.layers} layers of width {decoder.hidden_size}) are not known; calibrate once, "
        "found = vlattn.calibrate_sinks(model), and give "
        "VAR(sink_dims=found.dims, tau=found.tau)"
    )


@cache
def _embedded() -> tuple[DecoderPrint, int, SinkChannels]:
    """(decoder, vocabulary, channels) of the embedded model, calibrated when it was made."""
    from vlattn.assets.paths import tiny_llava

    stored = json.loads((tiny_llava() / "var.json").read_text(encoding="utf-8"))
    channels = SinkChannels(tuple(stored["sink_dims"]), float(stored["tau"]), stored["source"])
    return DecoderPrint(**stored["decoder"]), int(stored["vocabulary"]), channels
