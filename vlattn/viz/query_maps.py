"""Where the queries of an attentive probe look: their maps over images, grouped and coloured, and numbers about them.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178, shows its queries
like this: each group of queries has a hue, and each pixel the hue of the group that attends to it most.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from vlattn.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

GROUPS = 8
STEPS = 25


def query_entropy(maps: torch.Tensor) -> torch.Tensor:
    """Entropy of each query's attention in nats, [..., M, N] -> [..., M]; log N where it looks everywhere alike."""
    return -(maps * maps.clamp(min=1e-30).log()).sum(-1)


def mean_cosine(maps: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the maps of different queries, [..., M, N] -> [...]: 1 for copies, 0 where they complement
    each other; 0 for a single query."""
    count = maps.shape[-2]
    if count < 2:
        return maps.new_zeros(maps.shape[:-2])
    unit = F.normalize(maps, dim=-1)
    total = (unit @ unit.transpose(-1, -2)).sum((-1, -2))
    return (total - count) / (count * (count - 1))


def group_queries(maps: torch.Tensor, groups: int = GROUPS) -> torch.Tensor:
    """Group queries whose maps are alike, over all images together, so that a colour means the same in each.

    Deterministic k-means by cosine: the first centre is the query of highest entropy, each next one the query farthest
    from the centres so far, then at most 25 rounds of Lloyd's algorithm.

    Args:
        maps: [images, M, N], rows that sum to 1.
        groups: how many; with M queries or more, each query is a group of its own.

    Returns:
        int64 [M], the group of each query.
    """
    if maps.ndim != 3 or groups < 1:
        raise InputError(f"maps, groups: got {list(maps.shape)} and {groups}; give [images, M, N] and at least 1")
    count = maps.shape[1]
    if count <= groups:
        return torch.arange(count)
    unit = F.normalize(maps.double().transpose(0, 1).flatten(1), dim=-1)  # [M, images * N]
    chosen = [int(query_entropy(maps.double()).mean(0).argmax())]
    while len(chosen) < groups:
        nearest = (unit @ unit[chosen].T).amax(1)
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    centres = unit[chosen]
    member = torch.full((count,), -1)
    for _ in range(STEPS):
        closest = (unit @ centres.T).argmax(1).cpu()
        if torch.equal(closest, member):
            break
        member = closest
        for group in range(groups):
            if bool((member == group).any()):  # an empty group stays where it was
                centres[group] = F.normalize(unit[member == group].mean(0), dim=0)
    return member


def group_maps(maps: torch.Tensor, member: torch.Tensor, groups: int | None = None) -> torch.Tensor:
    """The mean map of each group, [images, M, N] -> [images, G, N]; zeros for a group of nobody."""
    count = int(member.max()) + 1 if groups is None else groups
    share = F.one_hot(member, count).to(maps).T  # [G, M]
    return (share / share.sum(1, keepdim=True).clamp(min=1)) @ maps


def overlay(picture: Image, maps: torch.Tensor, grid: tuple[int, int]) -> Image:
    """An image with the groups of its queries in colour.

    The photograph is grey and dimmed; each pixel has the hue of the group that attends to it most, the stronger the
    closer this is to the group's 99th percentile, and none below its 65th.

    Args:
        picture: the image as the backbone saw it.
        maps: [G, N] for N = rows x columns patches.
        grid: rows and columns.
    """
    import numpy as np
    from PIL import Image as Images

    rows, columns = grid
    if maps.ndim != 2 or maps.shape[1] != rows * columns:
        raise InputError(f"maps: got {list(maps.shape)}; give [G, {rows * columns}] for a grid of {rows} x {columns}")
    width, height = picture.size
    large = F.interpolate(
        maps.float().reshape(1, -1, rows, columns), size=(height, width), mode="bilinear", align_corners=False
    )[0]  # [G, H, W]
    top, group = large.max(0)
    low, high = torch.quantile(_thinned(top.flatten()), torch.tensor([0.65, 0.99]))
    opacity = ((top - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).pow(0.55)[..., None].numpy()
    colours = np.array([_hue(g, maps.shape[0]) for g in range(maps.shape[0])])[group.numpy()]
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    ground = np.repeat(0.55 * grey + 0.10, 3, axis=-1)
    mixed = (1 - opacity) * ground + opacity * colours
    return Images.fromarray((255 * mixed.clip(0, 1)).round().astype("uint8"))


def draw_query_maps(
    pictures: Sequence[Image], maps: torch.Tensor, grid: tuple[int, int], out: str | Path, *, groups: int = GROUPS
) -> Path:
    """Write images above their query maps as one picture.

    Args:
        pictures: as the backbone saw them.
        maps: [images, M, N], patch tokens alone.
        grid: rows and columns of the patches.
        out: the file.
        groups: how many colours at most.
    """
    from PIL import Image as Images

    if not pictures or len(pictures) != len(maps):
        raise InputError(f"pictures: got {len(pictures)} for maps of {len(maps)} images; give one for each")
    member = group_queries(maps, groups)
    grouped = group_maps(maps, member, int(member.max()) + 1)
    side = 224
    sheet = Images.new("RGB", (side * len(pictures), 2 * side), "white")
    for column, (picture, one) in enumerate(zip(pictures, grouped, strict=True)):
        shown = picture.convert("RGB").resize((side, side))
        sheet.paste(shown, (column * side, 0))
        sheet.paste(overlay(shown, one, grid), (column * side, side))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _thinned(values: torch.Tensor, most: int = 1 << 20) -> torch.Tensor:
    """Evenly spaced values: quantiles of huge pictures need no more, and torch takes no more."""
    return values[:: -(-len(values) // most)]


def _hue(group: int, groups: int) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(group / max(groups, 1), 0.85, 1.0)


def summarise(maps: torch.Tensor) -> dict[str, Any]:
    """How widely queries look and how much they differ, means over images: entropy in nats (and as a share of log N),
    and the mean pairwise cosine."""
    entropy = query_entropy(maps.double())
    most = torch.tensor(float(maps.shape[-1])).double().log()
    return {
        "entropy": float(entropy.mean()),
        "entropy_share": float((entropy / most).mean()) if maps.shape[-1] > 1 else 0.0,
        "mean_cosine": float(mean_cosine(maps.double()).mean()),
    }
