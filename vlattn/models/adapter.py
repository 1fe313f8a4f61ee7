"""What vlattn needs to know about a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.runtime.tokens import VisualTokens


class Adapter(ABC):
    """One model, seen through the parts that methods attach to. For a new family subclass it and register that."""

    model_types: tuple[str, ...] = ()
    """The `config.model_type` values this family answers to."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # what a family's modules are called is known at run time only
        self.config: Any = model.config

    # Where things are -------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def multimodal(self) -> Any:
        """The module whose forward takes input_ids and images, and calls the language model."""

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
        """From vision features [images, P, C] to the decoder's width [images, P, D]."""

    @property
    @abstractmethod
    def language_model(self) -> Any:
        """The decoder without its head; takes inputs_embeds."""

    # What it is like --------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The placeholder of a visual feature in input_ids."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one image."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether slot 0 of the tower's sequence is a CLS token."""

    @property
    @abstractmethod
    def cls_in_features(self) -> bool:
        """Whether CLS is handed to the decoder as a visual feature of its own."""

    @property
    @abstractmethod
    def feature_layer(self) -> int:
        """0-based index of the vision layer whose output becomes the image feature."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    def visual_tokens(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> VisualTokens:
        """Find the visual positions [B, T] of a prompt by its placeholders, as ids or as their embedding."""
        if input_ids is not None:
            mask = input_ids == self.image_token_id
        elif inputs_embeds is not None:
            embed = self.language_model.get_input_embeddings()
            mask = (inputs_embeds == embed.weight[self.image_token_id].to(inputs_embeds.dtype)).all(-1)
        else:
            raise InputError("input_ids: got neither input_ids nor inputs_embeds; give one of them")
        return VisualTokens.from_placeholders(mask, self.grid, leading=int(self.cls_in_features))
