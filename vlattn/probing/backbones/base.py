"""A frozen backbone: pixels in, tokens out, whatever library it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones.transforms import Augment, ImageSettings, Transform, eval_transform, train_transform
from vlattn.probing.tokens import TokenKind, Tokens

FinalNorm = bool | Literal["auto"]


class Backbone(nn.Module, ABC):
    """Gives the tokens of images, always in eval mode and without gradients.

    `train()` does nothing to it, and what it is called with and gives has no graph. The wrapped model is used as it is:
    where a live one was in train mode it is so again after each call, and no class of any library is edited.

    module: the wrapped model.
    name: what it was loaded by.
    images: the pixels it takes.
    layer: the block whose tokens are read, 0-based.
    whole: whether the tokens are those that the library's own forward ends with.
    final_norm: whether the tokens have passed the model's final norm.
    """

    library: ClassVar[str]

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        images: ImageSettings,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
    ) -> None:
        super().__init__()
        if not (isinstance(final_norm, bool) or final_norm == "auto"):
            raise InputError(f"final_norm: got {final_norm!r}; give True, False or 'auto'")
        self.module: Any = module
        self.name, self.images = name, images
        self.training = False
        self._asked = layer, final_norm
        whole_number = isinstance(layer, int) and not isinstance(layer, bool)
        if layer is not None and not (whole_number and 0 <= layer < self.depth):
            raise InputError(
                f"layer: got {layer!r}; {name} has blocks 0 to {self.depth - 1}, counted from 0: "
                "give one of them, or None for what its own forward ends with"
            )
        if final_norm is True and self._norm is None:
            raise InputError(
                f"final_norm: {name} has no final norm that works token by token; give 'auto', which takes its tokens "
                "as they are"
            )

    # What a library's class says ---------------------------------------------------------------------------------
    @property
    @abstractmethod
    def depth(self) -> int:
        """How many blocks can be read."""

    @property
    @abstractmethod
    def _norm(self) -> nn.Module | None:
        """The final norm, where there is one that works on [..., D]."""

    @property
    @abstractmethod
    def _normed_by_library(self) -> bool:
        """Whether the tokens that the library's own forward ends with have passed the final norm."""

    @abstractmethod
    def _read(self, pixels: torch.Tensor) -> Tokens:
        """Tokens of pixels [B, 3, H, W]."""

    @property
    def _last(self) -> int:
        """The block that is read where no layer is asked for."""
        return self.depth - 1

    # What follows from it ----------------------------------------------------------------------------------------
    @property
    def layer(self) -> int:
        layer = self._asked[0]
        return self._last if layer is None else layer  # block 0 is a block, too

    @property
    def final_norm(self) -> bool:
        layer, final_norm = self._asked
        if isinstance(final_norm, bool):
            return final_norm
        return layer is None and self._normed_by_library

    @property
    def whole(self) -> bool:
        return self._asked[0] is None and self.final_norm == self._normed_by_library

    def forward(self, pixels: torch.Tensor) -> Tokens:
        """Tokens of pixels [B, 3, H, W], normalised as `transform` does, in the model's dtype on its device.

        Raises:
            InputError: another shape, or a size that the model cannot take.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise InputError(
                f"pixels: got {pixels.dtype} of shape {list(pixels.shape)}; give floating-point pixels [B, 3, H, W], "
                "as `transform` makes them"
            )
        weight = self._weight
        with torch.no_grad(), _evaluating(self.module):
            return self._read(pixels.to(weight.device, weight.dtype, non_blocking=True))

    def train(self, mode: bool = True) -> Backbone:
        """Does nothing: a frozen backbone stays in eval mode."""
        return self

    def transform(self, train: bool, *, augment: Augment = "auto") -> Transform:
        """PIL image -> float32 [3, H, W] at this model's size, mean and std.

        Args:
            train: random crop and flip, or the one view of evaluation.
            augment: `standard` or `aimv2`, see `vlattn.probing.backbones.transforms`; `auto` is what the library itself
                does for open_clip models, and `standard` for all others.
        """
        if augment not in ("auto", "standard", "aimv2"):
            raise InputError(f"augment: got {augment!r}; give 'auto', 'standard' or 'aimv2'")
        if augment == "auto":
            return self._own_transform(train)
        return train_transform(self.images, augment) if train else eval_transform(self.images)

    def _own_transform(self, train: bool) -> Transform:
        return train_transform(self.images) if train else eval_transform(self.images)

    @property
    def _weight(self) -> torch.Tensor:
        return next(p for p in self.module.parameters() if p.is_floating_point())

    @cached_property
    def _sample(self) -> Tokens:
        """Tokens of one black image: what widths and grid are read from."""
        return self(torch.zeros(1, 3, *self.images.size))

    @property
    def dim(self) -> int:
        """Width D of the patch tokens."""
        return self._sample.patches.shape[-1]

    @property
    def cls_dim(self) -> int | None:
        """Width of the CLS token; None where there is none."""
        return self._sample.cls.shape[-1] if self._sample.cls is not None else None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the patches at the model's own image size."""
        return self._sample.grid

    @property
    def has_cls(self) -> bool:
        """Whether there is a CLS token."""
        return self._sample.cls is not None

    def width(self, kind: TokenKind = "patch") -> int:
        """Width of the tokens that `Tokens.choose(kind)` gives; raises as that does."""
        return self._sample.choose(kind).shape[-1]

    def describe(self) -> dict[str, Any]:
        """What is recorded with results: everything that decides the numbers, as JSON types."""
        sample = self._sample
        return {
            "name": self.name,
            "library": self.library,
            "layer": self.layer,
            "depth": self.depth,
            "final_norm": self.final_norm,
            "size": list(self.images.size),
            "mean": list(self.images.mean),
            "std": list(self.images.std),
            "mean_and_std_from": self.images.source,
            "grid": list(sample.grid) if sample.grid else None,
            "dim": self.dim,
            "cls_dim": self.cls_dim,
            "registers": 0 if sample.registers is None else sample.registers.shape[1],
            "dtype": str(self._weight.dtype).removeprefix("torch."),
            "versions": {name: _version(name) for name in ("torch", "torchvision", _PACKAGES[self.library])},
        }


_PACKAGES = {"timm": "timm", "open_clip": "open_clip_torch", "hf": "transformers", "lvlm": "transformers"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
