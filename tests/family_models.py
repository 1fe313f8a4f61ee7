"""Random models of a few thousand weights of every model family, and call arguments for them, made without processors.

Loaded by the fixture `families`, after `tests/tiny_models.py`, whose way of drawing weights it shares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
import vlattn_tests_tiny_models as tiny

PAD, VOCABULARY = tiny.PAD, tiny.VOCABULARY
IMAGE, VIDEO, START, END = 63, 62, 61, 60
WORDS = 56
"""Text is drawn from [3, WORDS)."""

Inputs = dict[str, torch.Tensor]


# Models ---------------------------------------------------------------------------------------------------------------
def model(
    family: str,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    decoder_layers: int = 4,
    vision_layers: int = 3,
    sharpness: float = 2.0,
    **changes: Any,
) -> Any:
    """A tiny random model of `family`: patches of 4 px, 4 query heads on 2 key heads of width 8 in the decoder.

    attn: stock eager attention of left-padded prompts is NaN in fp64 (its softmax in fp32 overflows the mask's lowest
        number); take fp32 with "eager".
    changes: entries of the outer config, in place of those chosen here.
    """
    name, make = _MODELS[family]
    config = make(decoder_layers, vision_layers, changes)
    made = getattr(hf, name)._from_config(config, attn_implementation=attn, dtype=torch.float64)
    tiny._draw(made, seed, sharpness)
    made.generation_config.pad_token_id = PAD
    made.generation_config.eos_token_id = None
    made.generation_config.suppress_tokens = list(range(WORDS, VOCABULARY))
    return made.to(dtype).eval()


def _text(layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
        **more,
    }


def _vision(layers: int, side: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": 4,
        **more,
    }


PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava_next(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    chosen = {
        "vision_config": hf.CLIPVisionConfig(**_vision(vision, 16)),
        "text_config": hf.LlamaConfig(**_text(decoder)),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": PINPOINTS,
        "image_seq_length": 16,
    }
    return hf.LlavaNextConfig(**{**chosen, **changes})


def _llava_onevision(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    chosen = {
        "vision_config": hf.SiglipVisionConfig(**_vision(vision, 12), vision_use_head=False),
        "text_config": hf.Qwen2Config(**_text(decoder)),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[12, 24], [24, 12], [24, 24], [36, 24]],
        "vision_aspect_ratio": "anyres_max_2",  # so that three or more tiles are shrunk
    }
    return hf.LlavaOnevisionConfig(**{**chosen, **changes})


def _video_llava(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    chosen = {
        "vision_config": hf.CLIPVisionConfig(**_vision(vision, 12)),
        "text_config": hf.LlamaConfig(**_text(decoder)),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_seq_length": 9,
        "video_seq_length": 20,
    }
    return hf.VideoLlavaConfig(**{**chosen, **changes})


def _qwen2_vl(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    tower = _qwen_tower(vision, embed_dim=16, hidden_size=32, mlp_ratio=2)
    return hf.Qwen2VLConfig(**{**_qwen(tower, decoder), **changes})


def _qwen2_5_vl(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    # Windows of 2x2 merged cells everywhere but in the last layer.
    shape = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
    tower = _qwen_tower(vision, **shape, window_size=16, fullatt_block_indexes=[vision - 1])
    return hf.Qwen2_5_VLConfig(**{**_qwen(tower, decoder), **changes})


def _qwen3_vl(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    shape = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
    tower = _qwen_tower(vision, **shape, num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    return hf.Qwen3VLConfig(**{**_qwen(tower, decoder, head_dim=8), **changes})


def _qwen_tower(layers: int, **more: Any) -> dict[str, Any]:
    return {"depth": layers, "num_heads": 2, "patch_size": 4, **more}


def _qwen(tower: dict[str, Any], decoder: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {
        "vision_config": tower,
        "text_config": _text(decoder, rope_parameters=rope, **more),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }


def _internvl(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    chosen = {
        "vision_config": _vision(vision, 16, layer_scale_init_value=1.0),
        "text_config": hf.Qwen2Config(**_text(decoder)),
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    return hf.InternVLConfig(**{**chosen, **changes})


def _idefics3(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    return hf.Idefics3Config(**{**_idefics(decoder, vision), **changes})


def _smolvlm(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    return hf.SmolVLMConfig(**{**_idefics(decoder, vision), **changes})


def _idefics(decoder: int, vision: int) -> dict[str, Any]:
    return {
        "vision_config": _vision(vision, 24),
        "text_config": hf.LlamaConfig(**_text(decoder)),
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }


def _gemma3(decoder: int, vision: int, changes: dict[str, Any]) -> Any:
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(decoder)]
    chosen = {
        "vision_config": hf.SiglipVisionConfig(**_vision(vision, 24), vision_use_head=False),
        "text_config": hf.Gemma3TextConfig(
            **_text(decoder, head_dim=8, query_pre_attn_scalar=8, sliding_window=256, layer_types=kinds)
        ),
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
        "mm_tokens_per_image": 9,
        "tie_word_embeddings": False,  # tied random weights answer every token with itself
    }
    return hf.Gemma3Config(**{**chosen, **changes})


_MODELS: dict[str, tuple[str, Callable[[int, int, dict[str, Any]], Any]]] = {
    "llava_next": ("LlavaNextForConditionalGeneration", _llava_next),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", _llava_onevision),
    "video_llava": ("VideoLlavaForConditionalGeneration", _video_llava),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", _qwen2_vl),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "internvl": ("InternVLForConditionalGeneration", _internvl),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics3),
    "smolvlm": ("SmolVLMForConditionalGeneration", _smolvlm),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
}

FAMILIES: tuple[str, ...] = tuple(_MODELS)
VIDEO_FAMILIES: tuple[str, ...] = ("llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


# Inputs ---------------------------------------------------------------------------------------------------------------
def inputs(family: str, model: Any, batch: int = 2, seed: int = 0, images: int = 1, video: bool = False) -> Inputs:
    """Keyword arguments for `model(...)` and `model.generate(...)`: a left-padded batch.

    images: how many images each prompt has, with text before, between and after. Their sizes differ where the family
        allows it. Prompt b ends with 2 * b words more than the first.
    video: one video in each prompt, after its images; images may then be 0.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    return _INPUTS[family](model, batch, images, int(video), generator)


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _prompts(rows: Sequence[Sequence[Sequence[int]]], generator: torch.Generator) -> Inputs:
    """Left-padded prompts of text around the given pieces of ids; row b has rows[b] of them."""

    def words(n: int) -> list[int]:
        return torch.randint(3, WORDS, (n,), generator=generator).tolist()

    prompts = []
    for b, pieces in enumerate(rows):
        ids = words(3)
        for piece in pieces:
            ids += [*piece, *words(3)]
        prompts.append(ids + words(2 * b))
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def _shared_out(counts: Sequence[int], batch: int, token: int, around: tuple[int, ...] = ()) -> list[list[list[int]]]:
    """Runs of placeholders, as many for each prompt, between the first and last of `around` where given."""
    runs = [[*around[:1], *[token] * count, *around[1:]] for count in counts]
    each = len(runs) // batch
    return [runs[b * each : (b + 1) * each] for b in range(batch)]


ANYRES = torch.tensor([[14, 40], [36, 30], [9, 32], [40, 16]])
"""Sizes (height, width) that choose different pinpoints and are cropped along different sides."""


def _llava_next_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    sizes = ANYRES[torch.arange(batch * images) % len(ANYRES)]
    pixels = _noise(generator, len(sizes), 5, 3, 16, 16).to(model.dtype)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    prompts = _prompts(_shared_out(list(map(len, features)), batch, IMAGE), generator)
    return {**prompts, "pixel_values": pixels, "image_sizes": sizes}


ONEVISION = torch.tensor([[11, 30], [40, 28], [26, 20]])
"""Sizes that choose two tiles, six (shrunk) and four (shrunk)."""


def _onevision_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    found: Inputs = {}
    rows: list[list[list[int]]] = [[] for _ in range(batch)]
    if images:
        sizes = ONEVISION[torch.arange(batch * images) % len(ONEVISION)]
        found["image_sizes"] = sizes
        found["pixel_values"] = _noise(generator, len(sizes), 7, 3, 12, 12).to(model.dtype)
        if images > 1:
            found["batch_num_images"] = torch.tensor([images] * batch)
        with torch.no_grad():
            features = model.model.get_image_features(**found, return_dict=True).pooler_output
        for row, pieces in zip(rows, _shared_out(list(map(len, features)), batch, IMAGE), strict=True):
            row += pieces
    if videos:
        found["pixel_values_videos"] = _noise(generator, batch * videos, 2, 3, 12, 12).to(model.dtype)
        each = 2 * 2 * 2 + 1  # two frames of 3x3 patches pooled to 2x2, and a newline
        for row, pieces in zip(rows, _shared_out([each] * (batch * videos), batch, VIDEO), strict=True):
            row += pieces
    return {**_prompts(rows, generator), **found}


def _video_llava_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    pieces = [[IMAGE] * 9] * images + [[VIDEO] * (2 * 10)] * videos
    found: Inputs = {}
    if images:
        # The argument's name changed with the versions of transformers.
        known = inspect.signature(model.model.get_image_features).parameters
        name = "pixel_values" if "pixel_values" in known else "pixel_values_images"
        found[name] = _noise(generator, batch * images, 3, 12, 12).to(model.dtype)
    if videos:
        found["pixel_values_videos"] = _noise(generator, batch * videos, 2, 3, 12, 12).to(model.dtype)
    return {**_prompts([pieces] * batch, generator), **found}


GRIDS = torch.tensor([[1, 6, 8], [1, 8, 4], [1, 4, 6]])
VIDEO_GRIDS = torch.tensor([[2, 4, 4], [3, 4, 6]])


def _qwen_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    rows: list[list[list[int]]] = [[] for _ in range(batch)]
    found: Inputs = {}
    for count, table, name, pixels, token in (
        (images, GRIDS, "image_grid_thw", "pixel_values", IMAGE),
        (videos, VIDEO_GRIDS, "video_grid_thw", "pixel_values_videos", VIDEO),
    ):
        if count:
            grids = table[torch.arange(batch * count) % len(table)]
            found[name] = grids
            found[pixels] = _noise(generator, int(grids.prod(1).sum()), width).to(model.dtype)
            for number, (t, h, w) in enumerate(grids.tolist()):
                each = h * w // vision.spatial_merge_size**2
                piece = [START, *[token] * (t * each), END]
                if model.config.model_type == "qwen3_vl" and t > 1:  # each frame behind its timestamp
                    piece = [id for frame in range(t) for id in (3 + frame, START, *[token] * each, END)]
                rows[number // count].append(piece)
    prompts = _prompts(rows, generator)
    kinds = (prompts["input_ids"] == IMAGE).int() + 2 * (prompts["input_ids"] == VIDEO).int()
    return {**prompts, **found, "mm_token_type_ids": kinds}


def _internvl_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    tiles = [1 + (number + 1) % 3 for number in range(batch * images)]  # 2, 3, 1, ...
    prompts = _prompts(_shared_out([4 * n for n in tiles], batch, IMAGE, (START, END)), generator)
    return {**prompts, "pixel_values": _noise(generator, sum(tiles), 3, 16, 16).to(model.dtype)}


def _idefics_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    """Prompt b has b tiles more than the first; what the others lack is padded with zeros, as the processors do."""
    tiles = [images + b for b in range(batch)]
    prompts = _prompts([[[START, *[IMAGE] * 9, START]] * n for n in tiles], generator)
    pixels = _noise(generator, batch, max(tiles), 3, 24, 24)
    mask = torch.zeros(batch, max(tiles), 24, 24, dtype=torch.bool)
    for b, n in enumerate(tiles):
        pixels[b, n:] = 0
        mask[b, :n] = True
    mask[0, 0, 16:] = False  # one tile is padded below
    return {**prompts, "pixel_values": pixels.to(model.dtype), "pixel_attention_mask": mask}


def _gemma3_inputs(model: Any, batch: int, images: int, videos: int, generator: torch.Generator) -> Inputs:
    counts = [model.config.mm_tokens_per_image] * (batch * images)
    prompts = _prompts(_shared_out(counts, batch, IMAGE, (START, END)), generator)
    pixels = _noise(generator, batch * images, 3, 24, 24).to(model.dtype)
    return {**prompts, "pixel_values": pixels, "token_type_ids": (prompts["input_ids"] == IMAGE).long()}


_INPUTS: dict[str, Callable[[Any, int, int, int, torch.Generator], Inputs]] = {
    "llava_next": _llava_next_inputs,
    "llava_onevision": _onevision_inputs,
    "video_llava": _video_llava_inputs,
    "qwen2_vl": _qwen_inputs,
    "qwen2_5_vl": _qwen_inputs,
    "qwen3_vl": _qwen_inputs,
    "internvl": _internvl_inputs,
    "idefics3": _idefics_inputs,
    "smolvlm": _idefics_inputs,
    "gemma3": _gemma3_inputs,
}
