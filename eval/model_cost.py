"""What pruning saves on a live model: its widths and what a `Trace` says was dropped, put into `vlattn.eval.cost`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.eval.cost import cost_ratio, decoder_macs, encoder_macs, flops, paper_flops
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class Parts:
    """MACs of one prompt's prefill, and the tokens that entered each layer."""

    tower_lengths: tuple[int, ...]
    decoder_lengths: tuple[int, ...]
    tower: int
    projector: int
    decoder: int

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.decoder


def model_cost(model: nn.Module, trace: Trace, *, images: int = 1) -> dict[str, Any]:
    """Prefill cost of the last prompt that `trace` saw, beside the cost of the same prompt without pruning.

    Counted as `vlattn.eval.cost` says: linear layers and attention of the tower, the projector and the decoder. Layers
    behind the feature layer count too, since they run. What a method spends on choosing does not.

    Args:
        model: any model that has an adapter.
        trace: of a context that has seen a prefill; of several prompts in a batch, the longest is counted.
        images: images of that one prompt.

    Returns:
        Plain numbers for JSON: tower_macs, projector_macs, decoder_macs (prefill), total_macs, paper_flops (= MACs),
        flops (= 2 x MACs), the same parts and total of the unpruned prompt under `vanilla`, ratio (total to vanilla),
        tower_ratio and decoder_ratio, tower_lengths and decoder_lengths (tokens that entered each layer).

    Raises:
        InputError: the trace has seen no prefill, or the decoder is a mixture of experts.
    """
    if not trace.prompt_length:
        raise InputError("trace: it has seen no prefill; run the model inside the context first")
    adapter = adapter_for(model)
    full = prefill_parts(adapter, trace.prompt_length, images=images)
    kept = None if trace.kept is None else trace.kept.shape[1]
    alive = {layer: ids.shape[1] for layer, ids in trace.kept_by_layer.items()}
    now = prefill_parts(adapter, trace.kept_length, kept=kept, alive=alive, images=images)
    return {
        "tower_macs": now.tower,
        "projector_macs": now.projector,
        "decoder_macs": now.decoder,
        "total_macs": now.total,
        "paper_flops": paper_flops(now.total),
        "flops": flops(now.total),
        "vanilla": {
            "tower_macs": full.tower,
            "projector_macs": full.projector,
            "decoder_macs": full.decoder,
            "total_macs": full.total,
        },
        "ratio": cost_ratio(now.total, full.total),
        "tower_ratio": cost_ratio(now.tower, full.tower),
        "decoder_ratio": cost_ratio(now.decoder, full.decoder),
        "tower_lengths": list(now.tower_lengths),
        "decoder_lengths": list(now.decoder_lengths),
    }


def prefill_parts(
    adapter: Adapter,
    prompt: int,
    *,
    kept: int | None = None,
    alive: dict[int, int] | None = None,
    images: int = 1,
) -> Parts:
    """MACs of one prompt.

    Args:
        adapter: of the model.
        prompt: positions that enter the decoder.
        kept: patches per image that enter the projector; None for all.
        alive: {vision layer index: patches that it hands on}, for layers that drop some.
        images: images of the prompt.
    """
    vision, text = adapter.config.vision_config, adapter.text_config
    tower_lengths = _tower_lengths(adapter, alive or {})
    tower = images * encoder_macs(tower_lengths, vision.hidden_size, vision.intermediate_size)
    features = int(adapter.cls_in_features) + (adapter.patches if kept is None else kept)
    weights = sum(m.in_features * m.out_features for m in adapter.projector.modules() if isinstance(m, nn.Linear))

    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    decoder_lengths = (prompt,) * text.num_hidden_layers
    decoder = decoder_macs(
        decoder_lengths,
        text.hidden_size,
        text.intermediate_size,
        kv_heads * head_dim,
        _ffn_mats(adapter),
        query_width=heads * head_dim,
    )
    return Parts(tower_lengths, decoder_lengths, tower, images * features * weights, decoder)


def _tower_lengths(adapter: Adapter, alive: dict[int, int]) -> tuple[int, ...]:
    """Tokens that enter each vision layer: a layer that drops patches completes on all it was given."""
    now, lengths = adapter.patches, []
    for layer in range(len(adapter.vision_layers)):
        lengths.append(int(adapter.has_cls) + now)
        now = alive.get(layer, now)
    return tuple(lengths)


def _ffn_mats(adapter: Adapter) -> int:
    names = {name.rpartition(".")[2] for name, _ in adapter.language_model.named_modules()}
    if names & {"experts", "block_sparse_moe"}:
        raise InputError(
            "model: its decoder is a mixture of experts, whose active width no config field names alike; "
            "call vlattn.eval.cost.decoder_macs with the active FFN width"
        )
    return 3 if names & {"gate_proj", "gate_up_proj"} else 2


def cache_bytes(cache: Any) -> dict[str, int]:
    """Measure a transformers KV cache from its tensors, in bytes, summed over layers.

    Returns:
        used: keys and values of the positions that hold tokens (left padding is cached and counts). allocated: the
        memory behind them, which static and sliding-window caches make larger; shared storage counts once.

    Raises:
        InputError: the cache has no list of layers, or keeps its keys quantised.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise InputError(f"cache: {type(cache).__name__} has no layers; give a transformers Cache such as out.cache")
    used = 0
    storages: dict[tuple[int, torch.device], int] = {}
    for layer in layers:
        if hasattr(layer, "_quantized_keys"):
            raise InputError(f"cache: {type(layer).__name__} keeps keys quantised, which shapes do not tell")
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(states, torch.Tensor) or not states.numel():
                continue
            held = min(int(layer.get_seq_length()), states.shape[-2])
            used += states.numel() // states.shape[-2] * held * states.element_size()
            storage = states.untyped_storage()
            storages[storage.data_ptr(), states.device] = storage.nbytes()
    return {"used": used, "allocated": sum(storages.values())}
