"""What a frozen backbone gives for a batch of images: patch tokens, and CLS and registers told apart from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from vlattn.errors import InputError

TokenKind = Literal["patch", "all", "cls"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of B images.

    patches: [B, N, D], row by row of the image.
    cls: [B, Dc], the class token; None where the backbone has none. Dc differs from D where it is projected (CLIP).
    grid: (rows, columns) of the patches, rows * columns = N; None where they lie on no grid.
    registers: [B, R, D], tokens that stand for no part of the image (registers, a distillation token); None for none.
    project: takes patches [B, N, D] to the width of a projected CLS [B, N, Dc]; None where CLS is not projected, or no
        projection fits both.
    """

    patches: torch.Tensor
    cls: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    registers: torch.Tensor | None = None
    project: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        shape = list(self.patches.shape)
        if len(shape) != 3 or shape[1] == 0:
            raise InputError(f"patches: got shape {shape}; give [B, N, D] with at least one patch")
        if self.grid is not None and self.grid[0] * self.grid[1] != shape[1]:
            raise InputError(
                f"grid: {self.grid[0]} x {self.grid[1]} cells for {shape[1]} patches; give the grid that the patches "
                "lie on, and no tower whose patches are being pruned"
            )
        if self.cls is not None and (self.cls.ndim != 2 or len(self.cls) != shape[0]):
            raise InputError(f"cls: got shape {list(self.cls.shape)}; give [{shape[0]}, Dc], one for each image")
        registers = self.registers
        if registers is not None and (registers.ndim != 3 or registers.shape[::2] != self.patches.shape[::2]):
            raise InputError(f"registers: got shape {list(registers.shape)}; give [{shape[0]}, R, {shape[2]}]")

    def choose(self, kind: TokenKind = "patch") -> torch.Tensor:
        """The tokens that a pooler gets.

        Args:
            kind: `patch` gives the patches [B, N, D]; `all` CLS in front of them [B, N + 1, D], both in the projected
                width where CLS is projected; `cls` CLS alone [B, 1, Dc]. Registers are never among them.

        Raises:
            InputError: there is no CLS, or CLS and patches differ in width and no projection takes one to the other.
        """
        if kind not in ("patch", "all", "cls"):
            raise InputError(f"kind: got {kind!r}; give 'patch', 'all' or 'cls'")
        if kind == "patch":
            return self.patches
        if self.cls is None:
            raise InputError(f"kind: {kind!r} needs a CLS token, which this backbone does not have; give 'patch'")
        first = self.cls[:, None]
        if kind == "cls":
            return first
        patches = self.patches
        if self.project is not None:
            with torch.no_grad():
                patches = self.project(patches)
        if patches.shape[-1] != first.shape[-1]:
            raise InputError(
                f"kind: 'all' joins CLS of width {first.shape[-1]} and patches of width {patches.shape[-1]}; "
                "give 'patch' or 'cls', or read the backbone before its projection with layer=..."
            )
        return torch.cat([first, patches], 1)
