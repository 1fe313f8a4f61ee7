"""Positions whose dot products say how far apart cells are; and grids that are found in boxes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlattn.errors import InputError
from vlattn.gaze.oat_layout import find_grid, scene_cells
from vlattn.gaze.positions import (
    PositionTable,
    axis_width,
    closed_form_table,
    distance_kernel,
    learned_table,
    sinusoids,
)
from vlattn.gaze.trial import Scene, SceneObject

ROW_0 = [1, 0.882, 0.607, 0.325, 0.135, 0.044, 0.011, 0.003]


def cosines(table: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(table, axis=1)
    return table @ table.T / np.outer(norms, norms)


@pytest.mark.parametrize("rows", [2, 11, 14, 40, 86])
@pytest.mark.parametrize("sigma", [1.5, 2.0, 2.5])
def test_the_gram_matrix_of_the_closed_form_is_the_kernel_and_norms_are_equal(rows: int, sigma: float) -> None:
    table = closed_form_table(rows, sigma, 8.76)
    assert table.shape == (rows, 86)
    for i in range(rows):
        for j in range(rows):
            assert table[i] @ table[j] == pytest.approx(8.76**2 * np.exp(-((i - j) ** 2) / (2 * sigma**2)), abs=1e-4)
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), 8.76, atol=1e-6)


def test_the_first_row_has_the_similarities_of_the_published_table() -> None:
    np.testing.assert_allclose(cosines(closed_form_table(14))[0, :8], ROW_0, atol=1e-3)


def test_the_fit_reaches_the_published_similarities_with_equal_norms() -> None:
    table = learned_table(11, steps=1200)
    np.testing.assert_allclose(cosines(table)[0, :8], ROW_0, atol=5e-3)
    norms = np.linalg.norm(table, axis=1)
    assert norms.std() / norms.mean() < 1e-2


def test_sinusoids_are_those_of_the_formula() -> None:
    for place in (0, 3, 7.5):
        for channel in range(86):
            angle = place * 10000 ** (-(channel // 2) * 2 / 86)
            expected = np.sin(angle) if channel % 2 == 0 else np.cos(angle)
            assert sinusoids(np.array(place))[channel] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["distance", "learned", "sinusoidal"])
def test_an_encoding_is_three_rows_of_one_table_cut_to_its_width(kind: str) -> None:
    table = PositionTable(kind, steps=5)
    assert (axis_width(256), table.weight.shape) == (86, (14, 86))
    found = table(torch.tensor([[3.0, 12.0, 1.0], [0.0, 5.0, 0.0]]))
    for row, (r, c, flag) in zip(found, [(3, 12, 1), (0, 5, 0)], strict=True):
        expected = torch.cat((table.weight[r], table.weight[c], table.weight[flag]))[:256]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_nowhere_is_zeros() -> None:
    table = PositionTable()
    found = table(torch.tensor([-1.0, -1.0, 1.0]))
    assert not found[:172].any()
    torch.testing.assert_close(found[172:], table.weight[1, :84])


def test_shifting_both_cells_keeps_the_dot_product() -> None:
    table = PositionTable()
    first, second, shift = (np.array(v, float) for v in ((1, 2, 0), (4, 3, 0), (5, 8, 0)))
    pairs = [(first, second), (first + shift, second + shift)]
    products = [float(table(a) @ table(b)) for a, b in pairs]
    assert products[0] == pytest.approx(products[1], abs=1e-2)
    kernel = distance_kernel(14)
    assert products[0] == pytest.approx(8.76**2 * (kernel[0, 3] + kernel[0, 1] + 1), abs=1e-2)


def test_between_rows_dot_products_are_the_kernel_too() -> None:
    table, rng = PositionTable(), np.random.default_rng(0)
    cells = np.concatenate([rng.uniform(0, 13, (40, 2)), np.zeros((40, 1))], 1)
    found = table(cells).double().numpy() / 8.76
    expected = np.exp(-((cells[:, None] - cells[None]) ** 2) / 8).sum(-1)
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-4)


@pytest.mark.parametrize("cell", [(14, 0, 0), (-2, 0, 0), (-0.5, 0, 0)])
def test_a_cell_outside_the_table_is_refused(cell: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"cells: got .* rows 0 to 13"):
        PositionTable()(np.array(cell, float))


def test_more_rows_than_channels_are_refused() -> None:
    with pytest.raises(InputError, match="rows: got 87 for 86"):
        closed_form_table(87)


@pytest.mark.parametrize(("rows", "columns", "start"), [(2, 11, (1, 5)), (3, 9, (1, 4)), (6, 14, (3, 7))])
def test_a_shelf_has_whole_cells_and_begins_in_the_published_one(
    oat: Any, rows: int, columns: int, start: tuple[int, int]
) -> None:
    cells, begun = scene_cells(oat.shelf("s", rows, columns))
    assert cells.tolist() == [[r, c] for r in range(rows) for c in range(columns)]
    assert begun.tolist() == list(start)


def test_a_grid_is_found_whatever_the_order_of_its_objects(oat: Any) -> None:
    scene = oat.shelf("s", 2, 3)
    found = find_grid(replace(scene, objects=scene.objects[::-1]))
    assert found is not None
    assert found.tolist() == [[1, 2], [1, 1], [1, 0], [0, 2], [0, 1], [0, 0]]


def test_scattered_objects_have_their_centres_in_units_of_the_longer_side() -> None:
    boxes = [(0, 0, 100, 100), (300, 30, 40, 40), (90, 150, 20, 20), (200, 180, 200, 20)]
    scene = Scene("s", 400, 200, tuple(SceneObject("o", box) for box in boxes))
    assert find_grid(scene) is None
    cells, begun = scene_cells(scene)
    expected = [[(y + h / 2) * 13 / 400, (x + w / 2) * 13 / 400] for x, y, w, h in boxes]
    np.testing.assert_allclose(cells, expected)
    np.testing.assert_allclose(begun, [100 * 13 / 400, 200 * 13 / 400])


def test_a_grid_larger_than_the_table_is_scaled_into_it(oat: Any) -> None:
    cells, begun = scene_cells(oat.shelf("s", 2, 30))
    assert cells.max() <= 13
    assert begun.max() <= 13


@pytest.mark.parametrize("count", [0, 1])
def test_a_scene_of_at_most_one_object_has_no_grid(count: int) -> None:
    scene = Scene("s", 10, 10, tuple(SceneObject("o", (0, 0, 10, 10)) for _ in range(count)))
    assert find_grid(scene) is None
    assert scene_cells(scene)[0].shape == (count, 2)
