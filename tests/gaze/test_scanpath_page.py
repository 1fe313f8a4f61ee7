"""The page of scanpaths has every picture in it, says what each shows, and fetches nothing."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlattn.viz.scanpath import Panel, attention_panels, draw_scene
from vlattn.viz.scanpath_page import SearchShown, write_scanpath_page

SCREEN = (40, 20)
BOXES = np.array([[0, 0, 20, 20], [20, 0, 20, 20]], float)
PICTURE = Image.new("RGB", SCREEN, (0, 90, 160))


@pytest.fixture
def page(tmp_path: Path) -> str:
    people = Panel("cup: person <s1> & co", PICTURE, np.array([[5.0, 5.0], [30.0, 10.0]]), BOXES, SCREEN, 1)
    steps = attention_panels(PICTURE, BOXES, SCREEN, [1], np.array([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]), 1, ["a", "b"])
    shown = [SearchShown("cup in s<1>", [people], steps), SearchShown("dog in s2", [people])]
    path = write_scanpath_page("Where people looked", ["2 of 9 searches"], shown, tmp_path / "deep")
    assert path == tmp_path / "deep" / "index.html"
    return path.read_text(encoding="utf-8")


def test_each_picture_is_in_the_page_with_what_it_shows(page: str) -> None:
    pictures = re.findall(
        r'<figure><img src="data:image/jpeg;base64,([^"]+)"[^>]*alt="([^"]+)"><figcaption>([^<]+)', page
    )
    assert [caption for _, _, caption in pictures] == [
        "cup: person &lt;s1&gt; &amp; co",
        "step 1, b: 70% (end: 10%)",
        "step 2, the end: 80%",
        "cup: person &lt;s1&gt; &amp; co",
    ]
    assert pictures[0][1] == "cup: person &lt;s1&gt; &amp; co; 2 fixations"
    drawn = Image.open(io.BytesIO(base64.b64decode(pictures[0][0])))
    panel = Panel("", PICTURE, np.array([[5.0, 5.0], [30.0, 10.0]]), BOXES, SCREEN, 1)
    wanted = draw_scene(panel)
    assert drawn.size == wanted.size == (420, 210)
    assert np.abs(np.asarray(drawn, int) - np.asarray(wanted, int)).mean() < 3


def test_it_opens_from_disk_and_fetches_nothing(page: str) -> None:
    assert page.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert "<script" not in page
    assert not re.search(r"https?:|url\(|@import", page)
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(one.startswith(("data:image/jpeg;base64,", "#")) for one in sources)


def test_every_search_can_be_reached_from_the_top(page: str) -> None:
    wanted = set(re.findall(r'href="#([^"]+)"', page))
    assert wanted == {"search-1", "search-2"}
    assert wanted <= set(re.findall(r'<section id="([^"]+)"', page))
    assert '<h2 id="search-1-title">cup in s&lt;1&gt;</h2>' in page
    assert page.count("step by step") == 1  # a search without steps has no heading for them
