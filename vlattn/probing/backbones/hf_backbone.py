"""Vision transformers of Hugging Face: ViT, CLIP, SigLIP, DINOv2 and DINOv3, MAE, and what is built alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones.base import FinalNorm
from vlattn.probing.backbones.blocks import BlockBackbone
from vlattn.probing.backbones.hf_images import hf_images
from vlattn.probing.backbones.transforms import ImageSettings
from vlattn.runtime.hooks import HookSet

_NORMS = ("post_layernorm", "layernorm", "norm", "layer_norm", "final_layer_norm")


class HFBackbone(BlockBackbone):
    """A Hugging Face vision transformer that takes pixel_values [B, 3, H, W].

    As it ends its tokens are `last_hidden_state`. ViT, SigLIP and DINO norm that; CLIP norms the pooled CLS alone, so
    its tokens are un-normed unless `final_norm=True`. Whether they are is seen in a run, not looked up. CLS is not
    projected. MAE runs on all patches, unmasked and in order. Images of another size than the model's get interpolated
    positions where the model can.

    blocks: the blocks in order; None finds them.
    """

    library = "hf"

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        images: ImageSettings | None = None,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
        blocks: Sequence[nn.Module] | None = None,
    ) -> None:
        module = vision_part(model)
        self._settings: Any = module.config
        _require_pixels_alone(module)
        cls, registers = _prefix(module)
        super().__init__(
            module,
            blocks=_blocks(module) if blocks is None else blocks,
            norm=_final_norm(module),
            cls=cls,
            registers=registers,
            name=name,
            images=images or hf_images(module.config),
            layer=layer,
            final_norm=final_norm,
        )

    @cached_property
    def _seen_normed(self) -> bool:
        """Whether the norm's output is what the model calls its last hidden state."""
        norm, hooks, seen = self._norm, HookSet(), []
        if norm is None:
            return False
        hooks.after(norm, lambda module, args, output: seen.append(output))
        try:
            with torch.no_grad():
                last = self._call(torch.zeros(1, 3, *self.images.size).to(self._weight)).last_hidden_state
        finally:
            hooks.remove()
        return any(output is last for output in seen)

    @property
    def _normed_by_library(self) -> bool:
        return self._seen_normed

    def _call(self, pixels: torch.Tensor) -> Any:
        arguments: dict[str, Any] = {"pixel_values": pixels}
        known = inspect.signature(self.module.forward).parameters
        if "interpolate_pos_encoding" in known and pixels.shape[2:] != _pair(self._settings.image_size):
            arguments["interpolate_pos_encoding"] = True
        masking: Any = nullcontext()
        if "noise" in known:  # MAE shuffles its patches by noise and drops the last of them
            rows, columns = self._grid(pixels)
            arguments["noise"] = torch.arange(rows * columns, device=pixels.device).expand(len(pixels), -1)
            masking = _unmasked(self._settings)
        with masking:
            return self.module(**arguments)

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        rows, columns = _pair(self._settings.patch_size)
        return pixels.shape[2] // rows, pixels.shape[3] // columns


def vision_part(model: Any) -> Any:
    """The vision transformer inside a model: of CLIP the image side, of a classifier what is under its head."""
    base = getattr(model, "base_model", model)
    part = base if "pixel_values" in inspect.signature(base.forward).parameters else model  # not DINOv3's bare encoder
    while hasattr(part, "vision_model"):
        part = part.vision_model
    return part


def _require_pixels_alone(module: nn.Module) -> None:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in positional and p.name != "pixel_values"]
    if needed:
        raise InputError(
            f"model: {type(module).__name__} needs {', '.join(needed)} beside pixels; give a vision transformer that "
            "takes pixel_values alone"
        )


def _blocks(module: Any) -> Sequence[nn.Module]:
    """Its longest list of modules of one class: layers are `layers`, `layer`, ..., by version and family."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len({type(m) for m in part}) == 1]
    if not lists:
        raise InputError(
            f"model: {type(module).__name__} has no list of equal blocks; give a vision transformer, or a timm model"
        )
    longest = max(lists, key=len)
    return list(longest)


def _final_norm(module: Any) -> nn.Module | None:
    norms = (getattr(module, name, None) for name in _NORMS)
    return next((norm for norm in norms if norm is not None and not isinstance(norm, nn.Identity)), None)


def _prefix(module: nn.Module) -> tuple[int, int]:
    """How many CLS tokens and registers stand in front of the patches, by the embeddings that make them."""
    cls = registers = 0
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("cls_token", "class_embedding"):
            cls = 1
        elif last in ("register_tokens", "distillation_token"):
            registers += parameter.shape[1]
    return cls, registers


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@contextmanager
def _unmasked(config: Any) -> Iterator[None]:
    before, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = before


def load_hf(name: str, *, pretrained: bool, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    """A model by repository or folder and its image processor, None where it has none."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        processor = None
    if not pretrained:
        return AutoModel.from_config(AutoConfig.from_pretrained(name)), processor
    return AutoModel.from_pretrained(name, dtype=dtype or torch.float32), processor
