"""Maps of an attentive probe's queries: numbers about them, groups, and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.viz.query_maps import (
    draw_query_maps,
    group_maps,
    group_queries,
    mean_cosine,
    overlay,
    query_entropy,
    summarise,
)


def spots(places: list[int], size: int = 16) -> torch.Tensor:
    """A map for each place, nearly all of it there."""
    maps = torch.full((len(places), size), 0.01 / size)
    maps[torch.arange(len(places)), torch.tensor(places)] += 0.99
    return maps / maps.sum(-1, keepdim=True)


def test_entropy_is_log_n_for_even_maps_and_zero_for_one_place() -> None:
    maps = torch.stack([torch.full((8,), 1 / 8), torch.eye(8)[3]])
    torch.testing.assert_close(query_entropy(maps), torch.tensor([math.log(8), 0.0]))


def test_the_mean_cosine_is_that_of_all_pairs_of_queries() -> None:
    maps = torch.rand(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = []
    for image in maps:
        pairs = [
            float(a @ b / (a.norm() * b.norm())) for i, a in enumerate(image) for j, b in enumerate(image) if i != j
        ]
        expected.append(sum(pairs) / len(pairs))
    torch.testing.assert_close(mean_cosine(maps), torch.tensor(expected, dtype=torch.float64))
    assert mean_cosine(maps[:, :1]).tolist() == [0, 0]
    copies = maps[:1, :1].expand(1, 4, 9)
    assert summarise(copies)["mean_cosine"] == pytest.approx(1)
    assert summarise(torch.eye(9)[None, :4])["mean_cosine"] == pytest.approx(0)


def test_queries_that_look_alike_share_a_group_whatever_their_order() -> None:
    places = [0, 5, 0, 10, 5, 0, 15, 10]
    maps = torch.stack([spots(places), spots([(p + 1) % 16 for p in places])])
    member = group_queries(maps, 4)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            assert (member[i] == member[j]) == (a == b)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    shuffled = group_queries(maps[:, order], 4)
    assert all(
        (shuffled[i] == shuffled[j]) == (member[order[i]] == member[order[j]]) for i in range(8) for j in range(8)
    )


def test_few_queries_are_groups_of_their_own() -> None:
    assert group_queries(torch.rand(3, 5, 4), 8).tolist() == [0, 1, 2, 3, 4]


def test_a_group_map_is_the_mean_of_its_queries() -> None:
    maps, member = torch.rand(2, 5, 6), torch.tensor([0, 1, 0, 2, 1])
    found = group_maps(maps, member)
    torch.testing.assert_close(found[:, 0], (maps[:, 0] + maps[:, 2]) / 2)
    torch.testing.assert_close(found[:, 2], maps[:, 3])


def test_a_pixel_has_the_hue_of_the_group_that_attends_to_it_most() -> None:
    maps = torch.zeros(2, 16)
    maps[0, :4], maps[1, 12:] = 0.25, 0.25  # the top row and the bottom row of a grid of four
    found = np.asarray(overlay(Image.new("RGB", (64, 64), "black"), maps, (4, 4))).astype(int)
    red, cyan = found[2, 32], found[61, 32]
    assert red[0] > red[1] + 100
    assert cyan[1] > cyan[0] + 100
    assert found[32, 32].tolist() == [26, 26, 26]  # a tenth of white: nobody looks


def test_a_sheet_has_a_column_for_each_image(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue", "green")]
    out = draw_query_maps(pictures, torch.rand(3, 32, 16).softmax(-1), (4, 4), tmp_path / "maps" / "sheet.png")
    assert Image.open(out).size == (3 * 224, 448)
    with pytest.raises(InputError, match="pictures: got 2 for maps of 3 images"):
        draw_query_maps(pictures[:2], torch.rand(3, 32, 16), (4, 4), out)
    with pytest.raises(InputError, match=r"maps: got \[3, 16\]; give \[G, 15\]"):
        overlay(pictures[0], torch.rand(3, 16), (3, 5))
