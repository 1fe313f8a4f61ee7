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
from vlattn.models.sizes import SizeMemory, remembered, size_of
from vlattn.runtime.tokens import VisualTokens


class Adapter(ABC):
    """One model, seen through the parts that methods attach to. For a new family subclass it and register that."""

    model_types: tuple[str, ...] = ()
    """The `config.model_type` values this family answers to."""

    patchwise: bool = True
    """Whether each patch of the tower becomes one visual token, through a projector that works row by row."""

    many_tiles: bool = False
    """Whether one image may be cut into several encoder images, as with anyres."""

    mrope: bool = False
    """Whether positions are three-dimensional (time, height, width), as in Qwen-VL."""

    size_arguments: tuple[str, ...] = ()
    """The arguments of get_image_features and get_video_features that say how many tokens each image has, and where."""

    masks_above_decoder: bool = False
    """Whether the multimodal forward makes the decoder's masks, as in Gemma 3."""

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
    def towers(self) -> tuple[Any, ...]:
        """Every vision tower: one, in most families."""
        return (self.tower,)

    @property
    @abstractmethod
    def vision_layers(self) -> Sequence[Any]:
        """The tower's transformer layers, in order."""

    @property
    def encoders(self) -> tuple[Sequence[Any], ...]:
        """The layers of every vision tower: of one, in most families."""
        return (self.vision_layers,)

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

    @property
    def wrapper_ids(self) -> tuple[int, ...]:
        """Tokens that a family puts around an image, which leave together with it."""
        return ()

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
        """Rows and columns of the visual tokens of one tile (encoder image), CLS not counted.

        Raises InputError in families whose images have any size; `visual_tokens` knows those of a prompt.
        """

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

    @property
    def deepstack_layers(self) -> int:
        """How many decoder layers, from the first on, add features of the tower to the visual tokens they put out."""
        return 0

    # A prompt ---------------------------------------------------------------------------------------------------------
    def visual_kinds(self, call: Mapping[str, Any]) -> torch.Tensor:
        """Which placeholder each position holds, int64 [B, T]: an index into `placeholder_ids`, -1 for text.

        By input_ids, or where there are none by inputs_embeds that equal a placeholder's embedding.
        """
        found = self.places_of(self.placeholder_ids, call)
        kinds = torch.full_like(found[0], -1, dtype=torch.int64)
        for kind, here in enumerate(found):
            kinds[here] = kind
        return kinds

    def places_of(self, ids: Sequence[int], call: Mapping[str, Any]) -> list[torch.Tensor]:
        """Where a prompt has each of some tokens, bool [B, T] each, by their ids or by their embedding."""
        input_ids, inputs_embeds = call.get("input_ids"), call.get("inputs_embeds")
        if input_ids is not None:
            return [input_ids == i for i in ids]
        if inputs_embeds is None:
            raise InputError("input_ids: got neither input_ids nor inputs_embeds; give one of them")
        return [(inputs_embeds == embedding).all(-1) for embedding in self._embeddings_of(ids, inputs_embeds)]

    def _embeddings_of(self, ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """[ids, D], through the embedding module: some families scale what the table holds."""
        embedding = self.language_model.get_input_embeddings()
        if ids and max(ids) >= embedding.num_embeddings:
            raise InputError(
                f"inputs_embeds: the tokens {tuple(ids)} lie outside the {embedding.num_embeddings} embeddings of this "
                "model, so they cannot be found by value; give input_ids"
            )
        return embedding(torch.tensor(ids, dtype=torch.int64, device=like.device)).to(like.dtype)

    def visual_mask(self, call: Mapping[str, Any]) -> torch.Tensor:
        """Where a prompt has placeholders, bool [B, T], by their ids or by their embedding."""
        return self.visual_kinds(call) >= 0

    def remember_sizes(self) -> SizeMemory:
        """Have features carry the sizes they are computed with, until `.remove()` of what this returns.

        Newer versions of transformers compute image features at the start of `generate` and hand the multimodal forward
        those alone, without the sizes that `visual_tokens` needs.
        """
        return SizeMemory(self.multimodal, self.size_arguments)

    def _sizes(self, call: Mapping[str, Any], name: str, modality: str) -> Any:
        """The argument `name` of a call (of pixels: their shape), or what its precomputed features carry of it."""
        if call.get(name) is not None:
            return size_of(name, call[name])
        features = (call.get("mm_encoder_outputs") or {}).get(modality)
        return remembered(features).get(name)

    def _required_sizes(self, call: Mapping[str, Any], name: str, modality: str = "image") -> Any:
        sizes = self._sizes(call, name, modality)
        if sizes is None:
            raise InputError(
                f"{name}: not given, and the {modality} features carry none, so the places of the {modality} tokens "
                f"cannot be told; pass {name} from this model's own processor, or let the features be computed inside "
                "the context"
            )
        return sizes

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """The visual positions [B, T] of a prompt.

        call: the keyword arguments of the multimodal forward: input_ids or inputs_embeds, and whatever tells the sizes
            of images in this family (image_sizes, image_grid_thw, ...).
        """
        return VisualTokens.from_placeholders(self.visual_mask(call), self.grid, leading=int(self.cls_in_features))

    def _whole_images(self, placeholders: int, each: int) -> int:
        """How many images of `each` features `placeholders` are."""
        if placeholders % each:
            raise InputError(
                f"input_ids: {placeholders} visual placeholders do not divide into images of {each} features; "
                "prepare the prompt with this model's own processor"
            )
        return placeholders // each

    def patches_stay_whole(self, visual: VisualTokens, call: Mapping[str, Any]) -> bool:
        """Whether each visual token of this prompt still is one patch: nothing pooled or resized on its way."""
        return self.patchwise

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

    def decoder_states(
        self, layer: int, name: str, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Queries (name "q") or keys ("k") [B, H, N, d] as attention sees them, from their projection [B, N, H * d]."""
        attention = self.decoder_attention(layer)
        heads = projected.unflatten(-1, (-1, attention.head_dim))  # [B, N, H, d]
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None:
            heads = norm.forward(heads)  # past its hooks: the layer's own call has fired them
        heads = heads.transpose(1, 2)
        none = heads[:, :0]
        return (
            self.rotate(layer, heads, none, cos, sin)[0]
            if name == "q"
            else self.rotate(layer, none, heads, cos, sin)[1]
        )
