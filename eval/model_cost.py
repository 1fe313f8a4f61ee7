"""What pruning saves on a live model: its widths and what a `Trace` says was dropped, put into `vlattn.eval.cost`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.eval.cost import (
    cost_ratio,
    decode_macs,
    decoder_macs,
    encoder_macs,
    flops,
    kv_bytes_formula,
    layer_macs,
    paper_flops,
)
from vlattn.eval.layer_lengths import LayerLengths
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class Parts:
    """MACs of a prefill, and the tokens that entered each layer.

    tower_lengths: tokens of one image; where they were measured, of all images.
    decoder_lengths: positions of one prompt; `batch` prompts of that length are counted.
    """

    tower_lengths: tuple[int, ...]
    decoder_lengths: tuple[int, ...]
    tower: int
    projector: int
    decoder: int
    batch: int = 1

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.decoder


def model_cost(
    model: nn.Module,
    trace: Trace,
    *,
    images: int = 1,
    new_tokens: int = 100,
    lengths: LayerLengths | None = None,
    vanilla: LayerLengths | None = None,
) -> dict[str, Any]:
    """Cost of the last prompt that `trace` saw, beside the cost of the same prompt without pruning.

    Counted as `vlattn.eval.cost` says: linear layers and attention of the tower, the projector and the decoder. Layers
    behind the feature layer count too, since they run. What a method spends on choosing does not.

    Args:
        model: any model that has an adapter.
        trace: of a context that has seen a prefill; of several prompts in a batch, the longest is counted.
        images: encoder images (images, tiles, frames) of that one prompt.
        new_tokens: tokens generated after it, for the decoding part; HoliTom (arXiv 2505.21334) takes 100.
        lengths, vanilla: what `LayerLengths` saw of the same inputs inside the context and outside. Then the whole
            call is counted, batch and padding included, in any family. Without them the tower is taken to be a plain
            one, where every patch becomes a visual token.

    Returns:
        Plain numbers for JSON: tower_macs, projector_macs, decoder_macs (prefill), total_macs, paper_flops (= MACs),
        flops (= 2 x MACs), decode_macs of `new_tokens`, kv_bytes after the prefill (by formula, at the model's dtype);
        all of them but the FLOPs for the unpruned prompt under `vanilla`; ratio (total to vanilla), tower_ratio,
        decoder_ratio (image and text tokens: the headline), image_only_ratio (decoder with the image tokens alone, as
        some papers count; None where the trace does not tell), decode_ratio, kv_ratio; budget (`Trace.budget`: visual
        tokens in three senses); tower_lengths and decoder_lengths (tokens that entered each layer).

    Raises:
        InputError: the trace or the lengths have seen no prefill, new_tokens is less than 1, the decoder is a mixture
            of experts, or the tower is no plain one and lengths are missing.
    """
    if not trace.prompt_length:
        raise InputError("trace: it has seen no prefill; run the model inside the context first")
    if new_tokens < 1:
        raise InputError(f"new_tokens: got {new_tokens}; give at least 1")
    if (lengths is None) != (vanilla is None):
        raise InputError("lengths, vanilla: give both or neither; each is a LayerLengths that has seen the same inputs")
    adapter = adapter_for(model)
    if lengths is not None and vanilla is not None:
        now, full = measured_parts(adapter, lengths), measured_parts(adapter, vanilla)
    else:
        full = prefill_parts(adapter, trace.prompt_length, images=images)
        alive = {layer: ids.shape[1] for layer, ids in trace.kept_by_layer.items()}
        kept = alive[max(alive)] if alive else None  # what is chosen behind the tower has been projected already
        entered = trace.decoder_lengths or trace.kept_length
        now = prefill_parts(adapter, entered, kept=kept, alive=alive, images=images)
    return {
        **_numbers(adapter, now, new_tokens),
        "paper_flops": paper_flops(now.total),
        "flops": flops(now.total),
        "new_tokens": new_tokens,
        "vanilla": _numbers(adapter, full, new_tokens),
        "ratio": cost_ratio(now.total, full.total),
        "tower_ratio": cost_ratio(now.tower, full.tower),
        "decoder_ratio": cost_ratio(now.decoder, full.decoder),
        "image_only_ratio": image_only_ratio(adapter, trace, images),
        "decode_ratio": cost_ratio(decoding_macs(adapter, now, new_tokens), decoding_macs(adapter, full, new_tokens)),
        "kv_ratio": cost_ratio(sum(now.decoder_lengths), sum(full.decoder_lengths)),
        "budget": trace.budget(),
        "tower_lengths": list(now.tower_lengths),
        "decoder_lengths": list(now.decoder_lengths),
    }


def _numbers(adapter: Adapter, parts: Parts, new_tokens: int) -> dict[str, int]:
    return {
        "tower_macs": parts.tower,
        "projector_macs": parts.projector,
        "decoder_macs": parts.decoder,
        "total_macs": parts.total,
        "decode_macs": decoding_macs(adapter, parts, new_tokens),
        "kv_bytes": kv_bytes(adapter, parts),
    }


def prefill_parts(
    adapter: Adapter,
    prompt: int | Sequence[int],
    *,
    kept: int | None = None,
    alive: dict[int, int] | None = None,
    images: int = 1,
) -> Parts:
    """MACs of one prompt, from config and numbers of tokens.

    Args:
        adapter: of a model whose tower makes a visual token of each patch.
        prompt: positions that enter the decoder, or that enter each of its layers.
        kept: patches per image that enter the projector; None for all.
        alive: {vision layer index: patches that it hands on}, for layers that drop some.
        images: encoder images of the prompt.
    """
    if not adapter.patchwise:
        raise InputError(
            f"lengths: the tower of {type(adapter.model).__name__} merges patches, so their number has to be measured; "
            "give lengths= and vanilla=, two vlattn.eval.layer_lengths.LayerLengths that have seen the inputs"
        )
    vision = adapter.config.vision_config
    tower_lengths = _tower_lengths(adapter, alive or {})
    tower = images * encoder_macs(tower_lengths, vision.hidden_size, vision.intermediate_size)
    features = int(adapter.cls_in_features) + (adapter.patches if kept is None else kept)
    weights = sum(m.in_features * m.out_features for m in adapter.projector.modules() if isinstance(m, nn.Linear))
    entered = (prompt,) * len(adapter.decoder_layers) if isinstance(prompt, int) else tuple(prompt)
    decoder = decoder_macs(entered, **decoder_widths(adapter))
    return Parts(tower_lengths, entered, tower, images * features * weights, decoder)


def measured_parts(adapter: Adapter, seen: LayerLengths) -> Parts:
    """MACs of a whole call, from the shapes that were seen in it."""
    seen.require()
    tower = sum(map(layer_macs, seen.tower, seen.tower_weights, seen.tower_width))
    decoder = seen.batch * decoder_macs(seen.decoder, **decoder_widths(adapter))
    return Parts(tuple(map(sum, seen.tower)), tuple(seen.decoder), tower, seen.projector, decoder, seen.batch)


def decoding_macs(adapter: Adapter, parts: Parts, new_tokens: int) -> int:
    """MACs of generating `new_tokens` in each prompt, after a prefill that left `decoder_lengths` in the cache."""
    return parts.batch * decode_macs(parts.decoder_lengths, new_tokens, **decoder_widths(adapter))


def kv_bytes(adapter: Adapter, parts: Parts) -> int:
    """Bytes of the KV cache after the prefill, by formula, in the model's own dtype."""
    text = adapter.text_config
    itemsize = torch.empty((), dtype=adapter.model.dtype).element_size()
    return kv_bytes_formula(parts.batch, parts.decoder_lengths, _kv_heads(text), _head_dim(text), itemsize)


def image_only_ratio(adapter: Adapter, trace: Trace, images: int = 1) -> float | None:
    """The decoder's cost with its image tokens alone, pruned over full, summed over the prompts of the batch.

    Papers that leave the text out get lower ratios than the prompt as a whole has.
    """
    layers, widths = len(adapter.decoder_layers), decoder_widths(adapter)
    if trace.visual_by_layer and any(trace.visual_full):
        entering = [n for layer in trace.visual_by_layer[:layers] for n in layer]
        full = sum(decoder_macs([n] * layers, **widths) for n in trace.visual_full)
        return cost_ratio(decoder_macs(entering, **widths), full)
    if not trace.visual_tokens:
        return None
    total = images * trace.visual_tokens
    left = total - (trace.prompt_length - trace.kept_length)
    return cost_ratio(decoder_macs([left], **widths), decoder_macs([total], **widths))


def decoder_widths(adapter: Adapter) -> dict[str, int]:
    """The decoder's widths by the names that `decoder_macs` and `decode_macs` take."""
    text = adapter.text_config
    return {
        "hidden": text.hidden_size,
        "ffn": text.intermediate_size,
        "kv_width": _kv_heads(text) * _head_dim(text),
        "ffn_mats": _ffn_mats(adapter),
        "query_width": text.num_attention_heads * _head_dim(text),
    }


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _kv_heads(text: Any) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


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
