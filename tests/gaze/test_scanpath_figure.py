"""Pictures of scanpaths: what is drawn is where the data says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlattn.errors import InputError
from vlattn.viz.scanpath import INK, LAST, TARGET, TINT, Panel, attention_panels, draw_panel, draw_sheet, in_rows

SCREEN = (400, 200)
BOXES = np.array([[0, 0, 100, 200], [100, 0, 100, 200], [200, 0, 100, 200], [300, 0, 100, 200]], float)
TITLE = 22


def panel(**changes: object) -> Panel:
    given = {"title": "t", "picture": Image.new("RGB", (40, 20), (0, 0, 90)), "points": np.zeros((0, 2))}
    return Panel(**{**given, "boxes": BOXES, "screen": SCREEN, **changes})  # type: ignore[arg-type]


def pixels(one: Panel) -> np.ndarray:
    """[200, 400, 3], the scene at its own size without the title."""
    return np.asarray(draw_panel(one, 400))[TITLE:].astype(int)


def near(found: np.ndarray, x: int, y: int, colour: tuple[int, int, int], within: int = 60) -> bool:
    around = found[max(0, y - 9) : y + 10, max(0, x - 9) : x + 10].reshape(-1, 3)
    return bool((np.abs(around - np.array(colour)).max(1) < within).any())


def test_a_fixation_is_drawn_where_it_is_and_the_last_in_red() -> None:
    found = pixels(panel(points=np.array([[50.0, 100.0], [350.0, 60.0]])))
    assert found.shape == (200, 400, 3)
    assert near(found, 350, 60, LAST)
    assert not near(found, 350, 160, LAST)
    assert (found[150, 200] == (0, 0, 90)).all()  # nothing is drawn there


def test_the_target_is_framed() -> None:
    found = pixels(panel(target=2))
    assert (np.abs(found[100, 200] - np.array(TARGET)) < 5).all()
    assert (found[100, 100] == (0, 0, 90)).all()


def test_the_object_that_was_looked_at_next_is_framed_in_black() -> None:
    found = pixels(panel(target=2, chosen=1))
    assert (np.abs(found[100, 104] - np.array(INK)) < 5).all()
    assert (found[100, 96] == (0, 0, 90)).all()
    both = pixels(panel(target=2, chosen=2))
    assert [tuple(both[100, x]) for x in (201, 204)] == [TARGET, INK]


def test_likelier_objects_are_tinted_more() -> None:
    found = pixels(panel(chances=np.array([0.0, 0.2, 0.8, 0.0])))
    away = [np.abs(found[100, x] - np.array(TINT)).sum() for x in (50, 150, 250, 350)]
    assert away[2] < away[1] < away[0] == away[3]


def test_fixations_on_the_same_spot_do_not_hide_each_other() -> None:
    once, often = (pixels(panel(points=np.full((n, 2), [200.0, 100.0]))) for n in (1, 4))
    drawn = [(one != (0, 0, 90)).any(-1).sum() for one in (once, often)]
    assert drawn[1] > 2.5 * drawn[0]


def test_an_empty_path_is_the_scene_alone() -> None:
    assert (pixels(panel()) == (0, 0, 90)).all()


def test_attention_has_a_panel_for_each_step_and_the_end() -> None:
    chances = np.array([[0.1, 0.2, 0.7, 0, 0], [0.25, 0.25, 0.25, 0, 0.25], [0, 0, 0.1, 0, 0.9]])
    panels = attention_panels(Image.new("RGB", (40, 20)), BOXES, SCREEN, [2, 0], chances, 2)
    assert [one.title for one in panels] == [
        "step 1, 2: 70% (end: 0%)",
        "step 2, 0: 25% (end: 25%)",
        "step 3, the end: 90%",
    ]
    assert [one.chosen for one in panels] == [2, 0, None]
    named = attention_panels(Image.new("RGB", (40, 20)), BOXES, SCREEN, [2, 0], chances, 2, ["a", "b", "cup", "d"])
    assert named[0].title == "step 1, cup: 70% (end: 0%)"
    assert [one.points.tolist() for one in panels] == [[], [[250, 100]], [[250, 100], [50, 100]]]
    np.testing.assert_array_equal(panels[1].chances, chances[1, :4])
    with pytest.raises(InputError, match=r"chances: got shape \[3, 5\] for 1 fixations among 4 objects"):
        attention_panels(Image.new("RGB", (40, 20)), BOXES, SCREEN, [2], chances)


def test_a_sheet_has_rows_and_the_same_panels_give_the_same_bytes(tmp_path: Path) -> None:
    panels = [panel(title=f"panel {n}", points=np.array([[10.0 * n, 20.0]])) for n in range(5)]
    rows = in_rows(panels, 2)
    assert [len(row) for row in rows] == [2, 2, 1]
    first, second = (draw_sheet(rows, tmp_path / f"deep/{name}.png", 200) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert Image.open(first).size == (2 * 208 + 8, 3 * (100 + TITLE + 8) + 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": np.array([[1.0, np.nan]])}, "points: got shape"),
        ({"points": np.zeros((2, 3))}, r"points: got shape \[2, 3\]"),
        ({"target": 4}, "target: got 4"),
        ({"chosen": -1}, "chosen: got -1"),
        ({"chances": np.zeros(3)}, r"chances: got shape \[3\]; give 4"),
    ],
)
def test_bad_panels_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_panel(panel(**changes))


def test_a_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows: got no panel"):
        draw_sheet([], tmp_path / "x.png")
