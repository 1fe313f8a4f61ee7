"""Where an object lies, as a vector whose dot products fall with distance; and the two tables it is compared with.

"OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335. One table W [R, width] serves
rows, columns and the target flag: PE(row, column, flag) = concat(W[row], W[column], W[flag]), cut to its width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from vlattn.checks import require_choice, require_count, require_positive
from vlattn.errors import InputError

KINDS = ("distance", "learned", "sinusoidal")
NOWHERE = -1.0
"""The cell that no position has: zeros, as the special rows of the reference's tables."""


def distance_kernel(rows: int, sigma: float = 2.0) -> np.ndarray:
    """float64 [R, R]: exp(-(i - j)^2 / (2 sigma^2)), the cosine that two cells are meant to have."""
    require_count("rows", rows)
    require_positive("sigma", sigma)
    index = np.arange(rows, dtype=np.float64)
    return np.asarray(np.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2)))


def closed_form_table(rows: int, sigma: float = 2.0, scale: float = 8.76, width: int = 86) -> np.ndarray:
    """float64 [R, width]: scale * G^(1/2), zeros behind. Its Gram matrix is scale^2 G exactly, so norms are equal.

    The paper fits such a table by gradient descent (`learned_table`); the symmetric root needs none of that.

    Raises:
        InputError: more rows than columns.
    """
    _require_room(rows, width)
    values, vectors = np.linalg.eigh(distance_kernel(rows, sigma))
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return np.pad(scale * root, ((0, 0), (0, width - rows)))


def learned_table(
    rows: int, sigma: float = 2.0, width: int = 86, *, steps: int = 10_000, lr: float = 0.01, seed: int = 0
) -> np.ndarray:
    """float64 [R, width]: the reference's fit, for parity with it.

    W starts as N(0, 1); Adam lowers [sum (cos(W_i, W_j) - G_ij)^2 + mean (|W_i| - mean |W|)^2] / (R (R - 1)). Norms
    become equal, to a size that the start decides.
    """
    require_count("rows", rows, 2)
    require_count("steps", steps)
    wanted = torch.from_numpy(distance_kernel(rows, sigma)).float()
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            norms = table.norm(dim=1)
            cosines = (table @ table.T) / (norms[:, None] * norms)
            loss = ((cosines - wanted) ** 2).sum() + ((norms - norms.mean()) ** 2).mean()
            optimizer.zero_grad()
            (loss / (rows * (rows - 1))).backward()
            optimizer.step()
    return table.detach().double().numpy()


def sinusoids(places: np.ndarray, width: int = 86, base: float = 10_000.0) -> np.ndarray:
    """float64 [..., width] of places [...]: sin and cos in turn, frequencies base^(-2k / width). The usual baseline."""
    frequencies = base ** (-np.arange(0, width, 2) / width)
    angles = np.asarray(places, np.float64)[..., None] * frequencies
    return np.stack((np.sin(angles), np.cos(angles)), -1).reshape(*angles.shape[:-1], -1)[..., :width]


def axis_width(width: int) -> int:
    """Channels of one of the three axes of an encoding `width` wide; 86 for 256."""
    return 2 * math.ceil(width / 6)


class PositionTable(nn.Module):
    """Cells (row, column, flag) [..., 3] to encodings [..., width].

    Cells may lie between rows: irregular layouts have no grid. `distance` then takes the features of the same kernel
    at that place, k(u, 0..R-1) G^(-1/2), which are the table's rows where u is whole, and whose dot products are the
    kernel's to about 1e-4 in between; `sinusoidal` is defined everywhere; `learned` takes the nearest row. A cell of
    -1 is nowhere: zeros. Not trained with the model.

    kind: `distance` (closed form), `learned` or `sinusoidal`. rows: R, the longest side of a grid.
    """

    weight: torch.Tensor  # float64 [R, axis width], on the CPU in effect: see `forward`

    def __init__(
        self, kind: str = "distance", width: int = 256, rows: int = 14, sigma: float = 2.0, scale: float = 8.76,
        *, steps: int = 10_000, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        require_choice("positions", kind, KINDS)
        require_count("rows", rows, 2)
        self.kind, self.width, self.rows, self.sigma, self.scale = kind, width, rows, sigma, scale
        self.axis = axis_width(width)
        if kind == "distance":
            table = closed_form_table(rows, sigma, scale, self.axis)
        elif kind == "learned":
            table = learned_table(rows, sigma, self.axis, steps=steps, seed=seed)
        else:
            table = sinusoids(np.arange(rows), self.axis)
        self.register_buffer("weight", torch.from_numpy(table).float())

    def forward(self, cells: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 [..., width], on the device of the table.

        cells: [..., 3] rows, columns and flags; those on a CPU cost an accelerator no wait.

        Raises:
            InputError: a cell outside the table.
        """
        given = np.asarray(cells.detach().cpu() if isinstance(cells, torch.Tensor) else cells, np.float64)
        if given.size and (given.max() > self.rows - 1 + 1e-9 or ((given < 0) & (given != NOWHERE)).any()):
            raise InputError(
                f"cells: got {given.min():g} to {given.max():g}; this table has rows 0 to {self.rows - 1}: give "
                f"a model of more rows, or scale the layout"
            )
        found = self._at(given).reshape(*given.shape[:-1], -1)[..., : self.width]
        return torch.from_numpy(np.ascontiguousarray(found, np.float32)).to(self.weight.device)

    def _at(self, places: np.ndarray) -> np.ndarray:
        """float64 [..., axis width]."""
        if self.kind == "sinusoidal":
            found = sinusoids(places, self.axis)
        elif self.kind == "distance" and (places != places.round()).any():
            found = self._between(places)
        else:
            found = self.weight.detach().cpu().double().numpy()[places.round().clip(min=0).astype(int)]
        return np.where(places[..., None] == NOWHERE, 0.0, found)

    def _between(self, places: np.ndarray) -> np.ndarray:
        """Features of the kernel at any place. In float64: the root's inverse is large."""
        values, vectors = np.linalg.eigh(distance_kernel(self.rows, self.sigma))
        inverse = (vectors / np.sqrt(values.clip(min=1e-14))) @ vectors.T
        near = np.exp(-((places[..., None] - np.arange(self.rows)) ** 2) / (2 * self.sigma**2))
        return np.pad(self.scale * near @ inverse, [(0, 0)] * places.ndim + [(0, self.axis - self.rows)])


def _require_room(rows: int, width: int) -> None:
    require_count("rows", rows)
    if rows > width:
        raise InputError(f"rows: got {rows} for {width} channels an axis; give at most {width}, or a wider encoding")
