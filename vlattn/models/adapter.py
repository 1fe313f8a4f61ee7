"""What vlattn needs to know about a model family."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.runtime.tokens import VisualTokens


class Adapter(ABC):
    """One model, seen through the parts that methods attach to. For a new family subclass it and register that."""

    model_types: tuple[str, ...] = ()
    """The `config.model_type` values this family answers to."""

    patchwise: bool = True
    """Whether each patch of the tower becomes one visual token, through a projector that works row by row."""

    mrope: bool = False
    """Whether positions are three-dimensional (time, height, width), as in Qwen-VL."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # what a family's modules are called is known at run time only
        self.config: Any = model.config

    # Where things are -------------------------------------------------------------------------------------------------
    @property
    def multimodal(self) -> Any:
        """The module whose forward takes input_ids and images, and calls the language model."""
        # ...ForConditionalGeneration wraps a ...Model; either may be given.
        return self.model.model if hasattr(self.model, "lm_head") else self.model

    @property
    @abstractmethod
    def tower(self) -> Any:
        """The vision tower."""

    @property
    @abstractmethod
    def vision_layers(self) -> Sequence[Any]:
        """The tower's transformer layers, in order."""

    @property
    @abstractmethod
    def projector(self) -> Any:
        """From vision features to the decoder's width."""

    @property
    def language_model(self) -> Any:
        """The decoder without its head; takes inputs_embeds."""
        return self.multimodal.language_model

    @property
    def decoder_layers(self) -> Sequence[Any]:
        """The decoder's transformer layers, in order."""
        return self.language_model.layers

    def vision_attention(self, layer: int) -> Any:
        """The attention module of a vision layer."""
        return self.vision_layers[layer].self_attn

    def decoder_attention(self, layer: int) -> Any:
        """The attention module of a decoder layer."""
        return self.decoder_layers[layer].self_attn

    # What it is like --------------------------------------------------------------------------------------------------
    @property
    def image_token_id(self) -> int:
        """The placeholder of a visual feature of an image in input_ids."""
        return self.config.image_token_id

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """All placeholders of visual features: images, and videos where the family has them."""
        return (self.image_token_id,)

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of one tile (encoder image), CLS not counted; where resolution is free,
        of the largest image."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether slot 0 of the tower's sequence is a CLS token."""

    @property
    def cls_in_features(self) -> bool:
        """Whether CLS is handed to the decoder as a visual feature of its own."""
        return False

    @property
    @abstractmethod
    def feature_layer(self) -> int:
        """0-based index of the vision layer whose output becomes the image feature."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def patches(self) -> int:
        """Visual tokens of one tile, CLS not counted."""
        return self.grid[0] * self.grid[1]

    # A prompt ---------------------------------------------------------------------------------------------------------
    def visual_mask(self, call: Mapping[str, Any]) -> torch.Tensor:
        """Where a prompt has placeholders, bool [B, T], by their ids or by their embedding."""
        input_ids, inputs_embeds = call.get("input_ids"), call.get("inputs_embeds")
        if input_ids is not None:
            return torch.isin(input_ids, torch.tensor(self.placeholder_ids, device=input_ids.device))
        if inputs_embeds is None:
            raise InputError("input_ids: got neither input_ids nor inputs_embeds; give one of them")
        table = self.language_model.get_input_embeddings().weight
        found = [(inputs_embeds == table[i].to(inputs_embeds.dtype)).all(-1) for i in self.placeholder_ids]
        return torch.stack(found).any(0)

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """The visual positions [B, T] of a prompt.

        call: the keyword arguments of the multimodal forward: input_ids or inputs_embeds, and whatever tells the sizes
            of images in this family (image_sizes, image_grid_thw, ...).
        """
        return VisualTokens.from_placeholders(self.visual_mask(call), self.grid, leading=int(self.cls_in_features))

    # Rotary position embedding of the decoder -------------------------------------------------------------------------
    def rotary(self, layer: int, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) that decoder layer `layer` gets for `position_ids` [B, N] ([3, B, N] with M-RoPE)."""
        module = self.language_model.rotary_emb
        if "layer_type" in inspect.signature(module.forward).parameters:
            return module(hidden, position_ids, self.text_config.layer_types[layer])
        return module(hidden, position_ids)

    def rotate(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, H, N, D] of decoder layer `layer` with their positions turned in."""
        home = sys.modules[type(self.decoder_attention(layer)).__module__]
        return home.apply_rotary_pos_emb(q, k, cos, sin)
