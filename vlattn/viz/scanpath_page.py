"""The page that `vlattn gaze show` leaves behind: paths and attention of each search, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlattn.viz.page_file import page_part, picture_uri, write_index
from vlattn.viz.page_html import Html, element, join, pairs
from vlattn.viz.scanpath import Panel, draw_scene

READING = (
    ("Fixations", "Numbered in order, from blue to red: where people looked; of a model, the middle of objects."),
    ("Green frame", "The target of the search."),
    ("Orange", "How likely the model held each object to be fixated next; the stronger, the likelier."),
    ("Black frame", "Where it went next. Its chance is in the caption, beside the chance that the search ends."),
)
LARGE, SMALL = 420, 300
"""Pixels of the longer side of paths, and of steps."""


@dataclass(frozen=True)
class SearchShown:
    """One search. title: such as its target and scene. paths: what people did and what is predicted. steps: of the
    first predicted path, as `attention_panels` makes them."""

    title: str
    paths: Sequence[Panel]
    steps: Sequence[Panel] = ()


def write_scanpath_page(title: str, setting: Sequence[str], searches: Sequence[SearchShown], out: Path) -> Path:
    """Write out/index.html and return its path.

    setting: short lines under the title: the model, the data, how paths were made.
    """
    links = (element("a", one.title, href=f"#search-{n}") for n, one in enumerate(searches, 1))
    header = element(
        "header",
        element("p", "Scanpaths", class_="eyebrow"),
        element("h1", title),
        element("ul", *(element("li", line) for line in setting), class_="setting"),
        element("nav", join(links, " "), aria_label="Searches"),
    )
    reading = element("section", element("h2", "How to read this page"), pairs(READING))
    main = element("main", *(_search(n, one) for n, one in enumerate(searches, 1)))
    return write_index(title, page_part("page.css"), join([header, main, element("footer", reading)]), out)


def _search(number: int, one: SearchShown) -> Html:
    steps = None
    if one.steps:
        steps = join([element("h3", "Attention over objects, step by step"), _figures(one.steps, SMALL, "steps")])
    name = f"search-{number}"
    return element(
        "section",
        element("h2", one.title, id=f"{name}-title"),
        _figures(one.paths, LARGE, "paths"),
        steps,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def _figures(panels: Sequence[Panel], large: int, class_: str) -> Html:
    made = []
    for panel in panels:
        picture = draw_scene(panel, large)
        image = element(
            "img",
            src=picture_uri(picture),
            width=picture.width,
            height=picture.height,
            alt=f"{panel.title}; {len(panel.points)} fixations",
        )
        made.append(element("figure", image, element("figcaption", panel.title)))
    return element("div", *made, class_=class_)
