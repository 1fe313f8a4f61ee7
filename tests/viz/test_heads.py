"""The heat-map of heads has one cell for each, where it belongs, on one scale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlattn.errors import InputError
from vlattn.viz.heads import COLOURS, draw_heads


def shade(share: float) -> tuple[int, ...]:
    import matplotlib

    return tuple(int(channel) for channel in matplotlib.colormaps[COLOURS](share, bytes=True)[:3])


def share_of_pixels(path: Path, wanted: tuple[int, ...]) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return float((pixels == np.array(wanted)).all(-1).mean())


def places_of(path: Path, wanted: tuple[int, ...]) -> tuple[float, float]:
    """The mean row and column of the pixels of one colour, as shares of the picture."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = (pixels == np.array(wanted)).all(-1).nonzero()
    return float(rows.mean() / pixels.shape[0]), float(columns.mean() / pixels.shape[1])


def test_layers_go_upwards_and_heads_to_the_right(tmp_path: Path) -> None:
    table = [[0.0] * 8 for _ in range(6)]
    table[5][1] = 2.0  # the last layer's second head
    table[1][6] = 1.0
    out = draw_heads({"map": table}, tmp_path / "new" / "map.png")
    assert out == tmp_path / "new" / "map.png"
    # The scale beside the map shows these colours as well, in a strip at the right; the cell outweighs it.
    top, right = places_of(out, shade(1.0)), places_of(out, shade(0.5))
    assert top[0] < right[0]
    assert top[1] < right[1]


def test_panels_share_one_scale(tmp_path: Path) -> None:
    alone = draw_heads({"half": [[1.0, 1.0], [1.0, 1.0]]}, tmp_path / "alone.png")
    beside = draw_heads({"half": [[1.0, 1.0]] * 2, "whole": [[2.0, 2.0]] * 2}, tmp_path / "beside.png")
    assert share_of_pixels(alone, shade(1.0)) > 0.1
    assert share_of_pixels(beside, shade(0.5)) > 0.1
    assert share_of_pixels(beside, shade(1.0)) > 0.1


def test_chosen_heads_get_a_mark_that_can_be_seen_on_any_shade(tmp_path: Path) -> None:
    table = [[0.0, 1.0], [0.0, 1.0]]
    bare = draw_heads({"map": table}, tmp_path / "bare.png")
    none = draw_heads({"map": table}, tmp_path / "none.png", chosen={"map": [[False, False], [False, False]]})
    dark = draw_heads({"map": table}, tmp_path / "dark.png", chosen={"map": [[True, False], [False, False]]})
    bright = draw_heads({"map": table}, tmp_path / "bright.png", chosen={"map": [[False, True], [False, False]]})
    white, black = (255, 255, 255), (0, 0, 0)
    assert share_of_pixels(dark, white) > share_of_pixels(none, white)
    assert share_of_pixels(bright, black) > share_of_pixels(none, black)
    assert bare.read_bytes() != none.read_bytes()  # the line that says what dots mean


def test_nothing_but_zeros_and_real_sizes_can_be_drawn(tmp_path: Path) -> None:
    assert share_of_pixels(draw_heads({"map": [[0.0]]}, tmp_path / "zero.png"), shade(0.0)) > 0.05
    large = draw_heads({"a": [[float(h) for h in range(32)]] * 32, "b": [[1.0] * 32] * 32}, tmp_path / "large.png")
    width, height = Image.open(large).size
    assert 1500 < width < 4000
    assert 800 < height < 2500


@pytest.mark.parametrize(
    ("panels", "chosen", "message"),
    [
        ({}, None, "panels: got none"),
        ({"a": [1.0, 2.0]}, None, r"'a' has shape \[2\]"),
        ({"a": [[]]}, None, r"'a' has shape \[1, 0\]"),
        ({"a": [[1.0]], "b": [[1.0, 2.0]]}, None, r"'b' has shape \[1, 2\]"),
        ({"a": [[1.0]]}, {"a": [[True, True]]}, r"'a' has shape \[1, 2\]"),
        ({"a": [[1.0]]}, {"b": [[True]]}, "chosen: 'b' is the title of no panel; give 'a'"),
        ({"a": [[-1.0]]}, None, "negative or not finite"),
        ({"a": [[float("nan")]]}, None, "negative or not finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, panels: Any, chosen: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_heads(panels, tmp_path / "map.png", chosen=chosen)


def test_another_format_is_refused_and_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"ends in \.png"):
        draw_heads({"a": [[1.0]]}, tmp_path / "map.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install 'vlattn"):
        draw_heads({"a": [[1.0]]}, tmp_path / "map.png")
