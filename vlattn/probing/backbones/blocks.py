"""Reading a transformer at one of its blocks, by a hook that is there for the length of one call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones.base import Backbone, FinalNorm
from vlattn.probing.backbones.transforms import ImageSettings
from vlattn.probing.tokens import Tokens
from vlattn.runtime.hooks import HookSet


class _Reached(Exception):
    """Ends a forward whose rest nobody needs."""


def read_block(block: nn.Module, call: Callable[[], Any], *, stop: bool = True) -> tuple[torch.Tensor, Any]:
    """Run `call` and see what `block` puts out.

    stop: end the call right behind the block; nothing after it is computed.

    Returns:
        (the block's output, what the call returned: None where it was ended).
    """
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        if stop:
            raise _Reached

    hooks, result = HookSet(), None
    hooks.after(block, look)
    try:
        result = call()
    except _Reached:
        pass
    finally:
        hooks.remove()
    if not seen:
        raise InputError(
            f"model: its forward does not pass through the block {type(block).__name__}, so nothing was read"
        )
    return seen[0], result


def flatten_map(features: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Feature map [B, D, rows, columns] as tokens [B, rows * columns, D], and its grid."""
    return features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])


class BlockBackbone(Backbone):
    """A transformer whose blocks hand on one sequence [B, T, D]: CLS, then registers, then patches row by row.

    blocks: its blocks in order.
    norm: its final norm, or None.
    cls, registers: how many tokens of each kind stand in front of the patches.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None,
        cls: int,
        registers: int = 0,
        name: str,
        images: ImageSettings,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
    ) -> None:
        self._blocks, self._final = list(blocks), (norm,)  # in containers: the modules belong to `module`
        self._cls, self._registers = cls, registers
        super().__init__(module, name=name, images=images, layer=layer, final_norm=final_norm)

    @property
    def depth(self) -> int:
        return len(self._blocks)

    @property
    def _norm(self) -> nn.Module | None:
        return self._final[0]

    @abstractmethod
    def _call(self, pixels: torch.Tensor) -> Any:
        """The library's own forward."""

    @abstractmethod
    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of pixels [B, 3, H, W]."""

    def _hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        """The block's tokens [B, T, D], before any norm behind it."""
        return read_block(self._blocks[self.layer], lambda: self._call(pixels))[0]

    def _read(self, pixels: torch.Tensor) -> Tokens:
        return self._split(self._hidden(pixels), self._grid(pixels))

    def _split(self, hidden: torch.Tensor, grid: tuple[int, int]) -> Tokens:
        if self.final_norm and self._norm is not None:
            hidden = self._norm(hidden)
        first = self._cls + self._registers
        return Tokens(
            patches=hidden[:, first:],
            cls=hidden[:, 0] if self._cls else None,
            grid=grid,
            registers=hidden[:, self._cls : first] if self._registers else None,
        )
