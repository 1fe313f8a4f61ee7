"""Scanpaths over scenes: numbered fixations, what is predicted beside what people did, and where a model looked next.

Attention over objects is the output of "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv
2407.13335: at each step the chance of every object, and of the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlattn.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 420
"""Pixels of the longer side of a panel."""
TARGET, FIRST, LAST, TINT = (30, 140, 60), (33, 102, 172), (178, 24, 43), (230, 97, 1)
INK, MARGIN, FRAME = (20, 20, 20), 8, 3


@dataclass(frozen=True)
class Panel:
    """A scene with a path.

    title: above it. picture: the scene. points: [n, 2], x and y in pixels of `screen`, as boxes are.
    boxes: [P, 4] x, y, width, height. target: index of the target's box, framed in green; None frames nothing.
    screen: width and height.
    chances: [P], tints each box by it; None tints nothing. chosen: index of the box that was looked at next, framed in
        black, inside the target's frame where it is the same; None frames nothing.
    """

    title: str
    picture: Image
    points: np.ndarray
    boxes: np.ndarray
    screen: tuple[int, int]
    target: int | None = None
    chances: np.ndarray | None = None
    chosen: int | None = None


def draw_scene(panel: Panel, large: int = LARGE) -> Image:
    """One panel without its title, the longer side `large` pixels.

    Fixations go from blue to red in order, each with its number; one that stays where the last was is drawn beside it.

    Raises:
        InputError: points, boxes or chances of other shapes, or not finite.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    points, boxes = _array("points", panel.points, 2), _array("boxes", panel.boxes, 4)
    scale = large / max(panel.screen)
    size = tuple(max(1, round(side * scale)) for side in panel.screen)
    scene = panel.picture.convert("RGB").resize(size, Images.Resampling.BICUBIC)  # type: ignore[arg-type]
    if panel.chances is not None:
        scene = _tinted(scene, boxes * scale, panel.chances)
    draw = ImageDraw.Draw(scene, "RGBA")
    for name, index, colour, inside in (("target", panel.target, TARGET, 0), ("chosen", panel.chosen, INK, FRAME)):
        if index is None:
            continue
        if not 0 <= index < len(boxes):
            raise InputError(f"{name}: got {index}; give an index of one of {len(boxes)} boxes")
        draw.rectangle(_corners(boxes[index] * scale, inside), outline=colour, width=FRAME)
    radius = max(9, large // 42)
    _draw_path(draw, _apart(points * scale, radius), radius)
    return scene


def draw_panel(panel: Panel, large: int = LARGE) -> Image:
    """One panel as `draw_scene` draws it, with its title above."""
    from PIL import Image as Images
    from PIL import ImageDraw

    scene = draw_scene(panel, large)
    titled = Images.new("RGB", (scene.width, scene.height + 22), "white")
    titled.paste(scene, (0, 22))
    ImageDraw.Draw(titled).text((2, 4), _fitting(panel.title, scene.width), fill=INK, font=_font(13))
    return titled


def draw_sheet(rows: Sequence[Sequence[Panel]], out: str | Path, large: int = LARGE) -> Path:
    """Write panels in rows as one PNG; the folder is made.

    Raises:
        InputError: as `draw_panel` does, or no panel.
    """
    from PIL import Image as Images

    drawn = [[draw_panel(panel, large) for panel in row] for row in rows if row]
    if not drawn:
        raise InputError("rows: got no panel; give at least one")
    widths = [sum(one.width + MARGIN for one in row) + MARGIN for row in drawn]
    heights = [max(one.height for one in row) + MARGIN for row in drawn]
    sheet = Images.new("RGB", (max(widths), sum(heights) + MARGIN), "white")
    top = MARGIN
    for row, height in zip(drawn, heights, strict=True):
        left = MARGIN
        for one in row:
            sheet.paste(one, (left, top))
            left += one.width + MARGIN
        top += height
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)
    return path


def attention_panels(
    picture: Image,
    boxes: np.ndarray,
    screen: tuple[int, int],
    path: Sequence[int],
    chances: np.ndarray,
    target: int | None = None,
    labels: Sequence[str] | None = None,
) -> list[Panel]:
    """A panel for each step: the fixations so far, and how likely each object is next.

    Args:
        path: indices of the objects that were fixated, T of them.
        chances: [T + 1, P + 1], of each object and, last, of the end; row t before fixation t.
        labels: what titles call the P objects; None takes their numbers.
    """
    boxes, chances = _array("boxes", boxes, 4), np.asarray(chances, np.float64)
    if chances.shape != (len(path) + 1, len(boxes) + 1):
        raise InputError(
            f"chances: got shape {list(chances.shape)} for {len(path)} fixations among {len(boxes)} objects; give "
            f"[{len(path) + 1}, {len(boxes) + 1}]"
        )
    centers = boxes[:, :2] + boxes[:, 2:] / 2
    panels = []
    for time, row in enumerate(chances):
        chosen = path[time] if time < len(path) else None
        title = f"step {time + 1}, the end: {row[-1]:.0%}"
        if chosen is not None:
            name = chosen if labels is None else labels[chosen]
            title = f"step {time + 1}, {name}: {row[chosen]:.0%} (end: {row[-1]:.0%})"
        so_far = centers[list(path[:time])].reshape(-1, 2)
        panels.append(Panel(title, picture, so_far, boxes, screen, target, row[:-1], chosen))
    return panels


def in_rows(panels: Sequence[Panel], columns: int) -> list[Sequence[Panel]]:
    """So many panels a row."""
    return [panels[first : first + columns] for first in range(0, len(panels), columns)]


def _draw_path(draw: Any, points: np.ndarray, radius: int) -> None:
    colours = [_mixed(n / max(1, len(points) - 1)) for n in range(len(points))]
    for colour, start, stop in zip(colours, points, points[1:], strict=False):
        draw.line([*start, *stop], fill=(255, 255, 255, 200), width=6)
        draw.line([*start, *stop], fill=colour, width=3)
    for number, (colour, (x, y)) in enumerate(zip(colours, points, strict=True)):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(*colour, 230), outline="white", width=2)
        draw.text((x, y), str(number + 1), fill="white", font=_font(round(radius * 1.15)), anchor="mm")


def _apart(points: np.ndarray, radius: int) -> np.ndarray:
    """Points of which none hides another: those on an earlier one move out on a spiral around it."""
    placed: list[np.ndarray] = []
    for point in points:
        turn, moved = 0, point
        while any(math.dist(moved, other) < 1.4 * radius for other in placed) and turn < 60:
            turn += 1
            angle, away = turn * 0.9, radius * (1.2 + 0.16 * turn)
            moved = point + away * np.array([math.cos(angle), math.sin(angle)])
        placed.append(moved)
    return np.array(placed).reshape(-1, 2)


def _tinted(scene: Image, boxes: np.ndarray, chances: np.ndarray) -> Image:
    """The scene greyed, each box in colour as likely as it is; the likelier, the stronger."""
    from PIL import Image as Images
    from PIL import ImageDraw

    given = np.asarray(chances, np.float64)
    if given.shape != (len(boxes),) or not np.isfinite(given).all():
        raise InputError(f"chances: got shape {list(given.shape)}; give {len(boxes)} finite numbers, one for each box")
    grey = Images.blend(scene.convert("L").convert("RGB"), Images.new("RGB", scene.size, "white"), 0.45)
    draw = ImageDraw.Draw(grey, "RGBA")
    for index in np.argsort(given):  # the likeliest on top
        strength = float(np.clip(given[index], 0, 1)) ** 0.5
        draw.rectangle(_corners(boxes[index]), fill=(*TINT, round(215 * strength)))
    return grey


def _corners(box: np.ndarray, inside: float = 0) -> list[float]:
    """Of a box, or of one so many pixels inside it, as far as it has room."""
    x, y, width, height = (float(value) for value in box)
    inside = min(inside, (min(width, height) - 1) / 2)
    return [x + inside, y + inside, x + width - 1 - inside, y + height - 1 - inside]


def _mixed(share: float) -> tuple[int, int, int]:
    a, b = FIRST, LAST
    return tuple(round((1 - share) * one + share * two) for one, two in zip(a, b, strict=True))  # type: ignore[return-value]


def _fitting(text: str, width: int) -> str:
    """As much of a title as there is room for."""
    font = _font(13)
    while text and font.getlength(text) > width - 4:
        text = text[:-2].rstrip(" .") + "." if len(text) > 2 else ""
    return text


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _array(name: str, value: np.ndarray, columns: int) -> np.ndarray:
    found = np.asarray(value, np.float64).reshape(-1, columns) if np.size(value) == 0 else np.asarray(value, np.float64)
    if found.ndim != 2 or found.shape[1] != columns or not np.isfinite(found).all():
        raise InputError(f"{name}: got shape {list(np.shape(value))}; give finite numbers [n, {columns}]")
    return found
