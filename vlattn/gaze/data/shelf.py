"""The authors' shelf data: people searching wine and yogurt shelves for a product, one row per fixation.

"OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335. Columns: ID (trial), Question
(layout, beginning with Q1 for wine, Q2 for shampoo, Q3 for yogurt), Target (its name), T_Package (its place, from 1),
Choice (fixated place, from 1), X, Y (pixels of a screen of 1680 x 1050), Sub_ID. Places count row by row from the top
left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.data.shelf_grid import grid_boxes
from vlattn.gaze.data.table_file import read_table
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial
from vlattn.gaze.trial_check import check_gaze

COLUMNS = ("ID", "Question", "Target", "T_Package", "Choice", "X", "Y", "Sub_ID")
SCREEN = (1680, 1050)


@dataclass(frozen=True)
class Shelf:
    """A kind of shelf. cell: width and height in pixels; the shelf stands on the lower edge of the screen."""

    name: str
    rows: int
    columns: int
    cell: tuple[int, int]

    @property
    def places(self) -> int:
        return self.rows * self.columns


SHELVES: Mapping[str, Shelf] = {"Q1": Shelf("wine", 2, 11, (152, 449)), "Q3": Shelf("yogurt", 3, 9, (186, 305))}
"""By prefix of the layout. The shampoo shelves (Q2) of the file were not used, and their cells are not known."""


def read_shelf(
    path: str | Path,
    *,
    sheet: str | None = None,
    kinds: Sequence[str] = ("wine", "yogurt"),
    images: str | Path | None = None,
) -> GazeSet:
    """Read the authors' spreadsheet.

    Args:
        path: the spreadsheet, or the same as CSV.
        sheet: the sheet's name; None takes the first.
        kinds: "wine", "yogurt" or both; rows of other layouts are left out.
        images: a folder with a picture LAYOUT.png of each layout's screen; None leaves scenes without.

    Returns:
        A scene for each layout and a trial for each ID, in the order of the rows, with `objects` as the file says them
        (not by boxes) and counted from 0. No durations.

    Raises:
        InputError: what is wrong, with file, trial and column.
    """
    for kind in kinds:
        require_choice("kinds", kind, [shelf.name for shelf in SHELVES.values()])
    names, rows = read_table(path, sheet)
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(f"{path}: lacks the column {missing[0]}; it needs {', '.join(COLUMNS)}")
    scenes: dict[str, Scene] = {}
    gathered: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        shelf = _shelf(row, str(path))
        if shelf is None or shelf.name not in kinds:
            continue
        layout = _text(row, "Question", str(path))
        if layout not in scenes:
            scenes[layout] = _scene(layout, shelf, images is not None)
        gathered.setdefault(_text(row, "ID", str(path)), []).append(row)
    if not gathered:
        raise InputError(f"{path}: has no rows of {' or '.join(kinds)}; give a table with layouts Q1 or Q3")
    trials = tuple(_trial(name, of_one, scenes, str(path)) for name, of_one in gathered.items())
    found = GazeSet(scenes, trials, None if images is None else Path(images))
    check_gaze(found, str(path))
    return found


def _shelf(row: dict[str, Any], path: str) -> Shelf | None:
    layout, where = _text(row, "Question", path), f"{path}: trial {_text(row, 'ID', path)!r}"
    if layout[:2] not in {*SHELVES, "Q2"}:
        raise InputError(f"{where}: Question is {layout!r}; give a layout that begins with Q1, Q2 or Q3")
    return SHELVES.get(layout[:2])


def _scene(layout: str, shelf: Shelf, pictured: bool) -> Scene:
    top = SCREEN[1] - shelf.rows * shelf.cell[1]
    boxes = grid_boxes(shelf.rows, shelf.columns, shelf.cell, (0, top))
    objects = tuple(SceneObject(f"{shelf.name} {place}", box) for place, box in enumerate(boxes, 1))
    return Scene(layout, *SCREEN, objects, f"{layout}.png" if pictured else None)


def _trial(name: str, rows: list[dict[str, Any]], scenes: Mapping[str, Scene], path: str) -> Trial:
    where = f"{path}: trial {name!r}"
    same = {}
    for column in ("Question", "Target", "T_Package", "Sub_ID"):
        values = list(dict.fromkeys(_text(row, column, where) for row in rows))
        if len(values) > 1:
            raise InputError(
                f"{where}: {column} is both {values[0]} and {values[1]}; give each trial one ID of its own"
            )
        same[column] = values[0]
    places = len(scenes[same["Question"]].objects)
    fixations = tuple(Fixation(_number(row, "X", where), _number(row, "Y", where)) for row in rows)
    objects = tuple(_place(row, "Choice", places, where) for row in rows)
    wanted = _place(rows[0], "T_Package", places, where)
    return Trial(name, same["Question"], same["Target"], same["Sub_ID"], fixations, objects, target_object=wanted)


def _text(row: dict[str, Any], column: str, where: str) -> str:
    """A cell as text; spreadsheets make 12 into 12.0."""
    value = row.get(column, "")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text:
        raise InputError(f"{where}: {column} is empty; fill it in, or leave the row out")
    return text


def _number(row: dict[str, Any], column: str, where: str) -> float:
    text = _text(row, column, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {column} is {text!r}; give a finite number of pixels")
    return value


def _place(row: dict[str, Any], column: str, places: int, where: str) -> int:
    """An index from 0 of a place that the file counts from 1."""
    text = _text(row, column, where)
    if not text.isdecimal() or not 1 <= int(text) <= places:
        raise InputError(f"{where}: {column} is {text!r}; give a place from 1 to {places}")
    return int(text) - 1
