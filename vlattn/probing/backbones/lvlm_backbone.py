"""The vision tower inside a vision-language model, through the adapter of its family."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.models.registry import adapter_for
from vlattn.probing.backbones.base import Backbone, FinalNorm
from vlattn.probing.backbones.blocks import BlockBackbone, read_block
from vlattn.probing.backbones.hf_backbone import HFBackbone
from vlattn.probing.backbones.hf_images import hf_images
from vlattn.probing.backbones.transforms import ImageSettings
from vlattn.runtime.hooks import HookSet


class TowerBackbone(HFBackbone):
    """A CLIP, SigLIP or InternViT tower; only it is held, the decoder may be freed.

    Where no layer is asked for, tokens are those that the model hands its projector: of its feature layer, before
    pooling, shuffling and the choice of patches without CLS.
    """

    library = "lvlm"

    def __init__(
        self,
        adapter: Adapter,
        *,
        name: str,
        images: ImageSettings,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
    ) -> None:
        layers = list(adapter.vision_layers)
        self._feature = adapter.feature_layer if layer is None else layer
        # Families that name a feature layer take it from the hidden states, before the final norm; InternVL takes the
        # last hidden state where that layer is the last, and families that name none always do.
        config = adapter.config
        named = getattr(config, "vision_feature_layer", None)
        self._normed = named is None or (config.model_type == "internvl" and named == -1)
        super().__init__(adapter.tower, blocks=layers, name=name, images=images, layer=layer, final_norm=final_norm)

    @property
    def _last(self) -> int:
        return self._feature

    @property
    def _normed_by_library(self) -> bool:
        return self._normed and self._norm is not None


class PackedTowerBackbone(BlockBackbone):
    """A Qwen-VL tower, which takes images of any size as one packed sequence of patches, merged after the last block.

    Tokens are those of single patches, before the merger, put back row by row. There is neither CLS nor final norm.
    Sides are multiples of patch size times merge size: 28 or 32.
    """

    library = "lvlm"

    def __init__(
        self,
        adapter: Adapter,
        *,
        name: str,
        images: ImageSettings,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
    ) -> None:
        self._settings: Any = adapter.tower.config
        super().__init__(
            adapter.tower,
            blocks=list(adapter.vision_layers),
            norm=None,
            cls=0,
            name=name,
            images=images,
            layer=layer,
            final_norm=final_norm,
        )

    @property
    def _normed_by_library(self) -> bool:
        return False

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        side = self._settings.patch_size
        cell = side * self._settings.spatial_merge_size
        height, width = pixels.shape[2:]
        if height % cell or width % cell:
            raise InputError(f"pixels: got {height} x {width}; {self.name} takes sides that are multiples of {cell}")
        return height // side, width // side

    def _call(self, pixels: torch.Tensor) -> Any:
        rows, columns = self._grid(pixels)
        grid = torch.tensor([[1, rows, columns]] * len(pixels), device=pixels.device)
        merge, frames = self._settings.spatial_merge_size, self._settings.temporal_patch_size
        return self.module(pack_patches(pixels, self._settings.patch_size, merge, frames), grid_thw=grid)

    def _hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        packed, _ = read_block(self._blocks[self.layer], lambda: self._call(pixels))  # [B * N, D]
        if hasattr(self._settings, "window_size"):
            back = torch.empty_like(packed)
            back[self._window_order(pixels)] = packed
            packed = back
        rows, columns = self._grid(pixels)
        merge = self._settings.spatial_merge_size
        cells = packed.view(len(pixels), rows // merge, columns // merge, merge, merge, -1)
        return cells.transpose(2, 3).reshape(len(pixels), rows * columns, -1)

    def _window_order(self, pixels: torch.Tensor) -> torch.Tensor:
        """int64 [B * N]: which patch stands at each place inside the tower, where they stand window by window.

        Seen in a run that ends before the first block, with each patch's embedding replaced by its number.
        """
        seen: list[torch.Tensor] = []

        def number(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(output), device=output.device, dtype=torch.float64)[:, None]

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Seen

        hooks = HookSet()
        hooks.after(self.module.patch_embed, number)
        hooks.before(self._blocks[0], look)
        try:
            self._call(pixels)
        except _Seen:
            pass
        finally:
            hooks.remove()
        return seen[0].flatten().long()


class _Seen(Exception):
    """Ends a run in front of the first block."""


def pack_patches(pixels: torch.Tensor, side: int, merge: int, frames: int) -> torch.Tensor:
    """Images [B, 3, H, W] as the packed patches [B * N, 3 * frames * side * side] of a Qwen-VL tower.

    Image by image, cell by cell of merge x merge patches, and row by row inside a cell; a still image fills all frames.
    """
    cells = pixels.unflatten(2, (-1, merge, side)).unflatten(5, (-1, merge, side))  # [B, 3, R, m, p, Q, m, p]
    patches = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)  # [B * N, 3, p, p]
    return patches[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)


def tower_backbone(
    model: Any,
    *,
    name: str,
    processor: Any = None,
    image_size: int | None = None,
    layer: int | None = None,
    final_norm: FinalNorm = "auto",
) -> Backbone:
    """The backbone of the tower inside a live vision-language model of a known family."""
    adapter = adapter_for(model)
    images = hf_images(adapter.tower.config, processor, image_size=image_size, fixed=True)
    kind = PackedTowerBackbone if isinstance(adapter, Qwen2VLAdapter) else TowerBackbone
    return kind(adapter, name=name, images=images, layer=layer, final_norm=final_norm)
