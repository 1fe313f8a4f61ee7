"""Models of published sizes with random weights: time does not depend on what the weights say, and nothing is fetched.

One exception: methods that drop more where attention is concentrated (FlowCut) find a random tower attending evenly,
and so shorten it later than they would a trained one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vlattn.errors import InputError
from vlattn.models.registry import adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, IMAGE_ID = 32_064, 32_000  # of the published LLaVA checkpoints
TILE, SIDE = 336, 24  # CLIP-L/14-336: pixels and patches per side


def random_model(
    shape: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: Any = "cpu",
    attn: str | None = None,
) -> PreTrainedModel:
    """A model of `shape` ("llava-1.5-7b" or "llava-next-7b") with random weights, in eval mode.

    layers: of the decoder; None for all 32, which take 14 GB in half precision. attn: attention implementation; None is
    transformers' default.
    """
    if shape not in SHAPES:
        raise InputError(f"shape: {shape!r} is unknown; give {' or '.join(SHAPES)}")
    if layers is not None and layers < 1:
        raise InputError(f"layers: got {layers}; give at least 1")
    cls, config = SHAPES[shape](layers or 32)
    with torch.device(device):
        model = cls._from_config(config, attn_implementation=attn, dtype=dtype)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id, generation.suppress_tokens = 0, None, [IMAGE_ID]
    return model.eval()


def random_inputs(
    model: PreTrainedModel, *, batch: int = 1, count: int = 20, text: int = 60, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` batches of random images and words for a model that `random_model` made.

    llava-1.5: one 336 x 336 image, 576 visual tokens. llava-next: one 672 x 672 image in 4 tiles and an overview, 2928
    visual tokens, 48 of which are newlines. text: words around the image, half before it and half behind.
    """
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(seed)
    tiled = adapter_for(model).many_tiles
    visual = SIDE**2 + (2 * SIDE * (2 * SIDE + 1) if tiled else 0)
    found = []
    for _ in range(count):
        words = torch.randint(3, IMAGE_ID, (batch, text), generator=generator)
        image = torch.full((batch, visual), IMAGE_ID)
        ids = torch.cat([words[:, : text // 2], image, words[:, text // 2 :]], 1)  # [B, T]
        size = (batch, 5, 3, TILE, TILE) if tiled else (batch, 3, TILE, TILE)
        inputs = {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "pixel_values": torch.randn(size, generator=generator).to(device, dtype),
        }
        if tiled:
            inputs["image_sizes"] = torch.tensor([[2 * TILE, 2 * TILE]] * batch, device=device)
        found.append(inputs)
    return found


def _llava(layers: int) -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration, LlavaConfig(**_parts(layers))


def _llava_next(layers: int) -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextForConditionalGeneration, LlavaNextConfig(**_parts(layers), image_grid_pinpoints=pinpoints)


def _parts(layers: int) -> dict[str, Any]:
    """CLIP-L/14 at 336 pixels, and Vicuna-7B."""
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=TILE,
        patch_size=TILE // SIDE,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return {"vision_config": vision, "text_config": text, "image_token_id": IMAGE_ID}


SHAPES: dict[str, Callable[[int], tuple[Any, Any]]] = {"llava-1.5-7b": _llava, "llava-next-7b": _llava_next}
