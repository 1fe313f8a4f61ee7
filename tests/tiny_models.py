"""Random LLaVA models of a few thousand weights, prompts for them, and short sequences assembled by hand."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

torch.set_num_threads(1)  # too small to be worth sharing out

VOCABULARY = 64
PAD, IMAGE = 0, 63
CACHE = "cache" if "cache" in inspect.signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"


def llava(
    *,
    layers: int = 6,
    image_size: int = 24,
    width: int = 16,
    heads: int = 2,
    act: str = "quick_gelu",
    feature_layer: int | list[int] = -2,
    strategy: str = "default",
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    kv_heads: int = 2,
    decoder_layers: int = 2,
    siglip: bool = False,
    sharpness: float = 2.0,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Patches of 4 px, so 36 of them at 24 px; 4 query heads in the decoder. Weights are drawn wide, so that attention
    is far from uniform and greedy decoding does not repeat one token.
    """
    common = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": 4,
        "hidden_act": act,
    }
    vision = SiglipVisionConfig(**common, vision_use_head=False) if siglip else CLIPVisionConfig(**common)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full" if siglip else strategy,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn, dtype=torch.float64)
    _draw(model, seed, sharpness)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]  # said again to the model, a placeholder would ask for an image
    return model.to(dtype).eval()


def _draw(model: nn.Module, seed: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if weight.ndim >= 2:
                noise = noise / (weight[0].numel() ** 0.5 if "embed" not in name else 1.0)
                noise = noise * (sharpness if "q_proj" in name or "k_proj" in name else 1.0)
                weight.copy_(noise)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            else:
                weight.copy_(0.3 * noise)


def per_image(model: LlavaForConditionalGeneration) -> int:
    """Placeholders of one image."""
    vision = model.config.vision_config
    cls = vision.model_type == "clip_vision_model" and model.config.vision_feature_select_strategy == "full"
    return (vision.image_size // vision.patch_size) ** 2 + int(cls)


def prompts(
    model: LlavaForConditionalGeneration, images: Sequence[int] = (1,), text: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """One left-padded prompt for each entry of `images`, which says how many images it has.

    Text of `text` tokens stands before, between and after images, 2 * b tokens more at the end of prompt b.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def words(n: int) -> list[int]:
        return torch.randint(3, IMAGE, (n,), generator=generator).tolist()

    rows = []
    for b, count in enumerate(images):
        row = words(text)
        for _ in range(count):
            row += [IMAGE] * per_image(model) + words(text)
        rows.append(row + words(2 * b))
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    side = model.config.vision_config.image_size
    pixels = torch.randn(sum(images), 3, side, side, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(model.dtype)}


def features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the stock model hands its decoder [images, placeholders, D]."""
    return torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))


def short_sequence(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], kept: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The prompt with `kept[i]` [K, D] in place of image i's placeholders, token by token, and the old positions.

    Returns:
        ({inputs_embeds, attention_mask}, position_ids of the surviving tokens in the full prompt); left-padded.
    """
    table = model.get_input_embeddings().weight
    ids, placeholder = inputs["input_ids"], model.config.image_token_id
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    span, image, rows, places = per_image(model), 0, [], []
    for tokens, alive in zip(ids.tolist(), mask.tolist(), strict=True):
        row, place, at, position = [], [], 0, 0
        while at < len(tokens):
            if not alive[at]:
                at += 1
            elif tokens[at] == placeholder:
                assert tokens[at : at + span] == [placeholder] * span
                row += list(kept[image][:, :-1])
                place += [position + int(patch) for patch in kept[image][:, -1]]
                at, position, image = at + span, position + span, image + 1
            else:
                row.append(table[tokens[at]])
                place.append(position)
                at, position = at + 1, position + 1
        rows.append(torch.stack(row))
        places.append(torch.tensor(place))
    longest = max(map(len, rows))
    embeds = torch.zeros(len(rows), longest, table.shape[1], dtype=table.dtype)
    short_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, (row, place) in enumerate(zip(rows, places, strict=True)):
        embeds[b, longest - len(row) :] = row
        short_mask[b, longest - len(row) :] = 1
        positions[b, longest - len(row) :] = place
    return {"inputs_embeds": embeds, "attention_mask": short_mask}, positions


def with_slots(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Features [K, D] and the placeholder each one sits at [K], as one tensor for `short_sequence`."""
    return torch.cat([values, slots[:, None].to(values.dtype)], 1)


def next_token(logits: torch.Tensor) -> torch.Tensor:
    """Greedy choice at the last position [B, 1], never a placeholder."""
    return logits[:, -1:, :IMAGE].argmax(-1)


def hooks_of(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Every hook of every module, in order, by the identity of its function."""
    names = [
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ]
    return {
        f"{path}.{name}": [(key, id(hook)) for key, hook in getattr(module, name).items()]
        for path, module in model.named_modules()
        for name in names
    }


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Config, attention implementations and instance attributes that an intervention could have touched."""
    return {
        "config": model.config.to_dict(),
        "attention": [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
    }
