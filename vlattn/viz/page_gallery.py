"""The gallery: what each arm kept of each scene, said about it, and answered; one switch chooses the arm for all."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.viz.page_chart import stem
from vlattn.viz.page_file import data_uri
from vlattn.viz.page_html import Html, element, join, text, unseen
from vlattn.viz.page_numbers import look, number

SHOWN_QUESTIONS = 6
"""More questions than these are folded away."""

Record = dict[str, Any]


def switch(arms: Sequence[Record], chosen: int) -> Html:
    """Radio buttons, one group of budgets per family; `chosen` is the arm that is shown first."""
    groups: dict[str, list[Html]] = {}
    titles: dict[str, str | None] = {}
    for i, arm in enumerate(arms):
        name, budget = str(arm["name"]), str(arm["visual_tokens"])
        short = name.endswith(f" {budget}")
        label = join([unseen(f"{stem(arm)} "), budget]) if short else text(name)
        box = element("input", type="radio", name="arm", id=f"arm-{i}", value=name, checked=i == chosen)
        key = f"{arm['family']} {stem(arm)}" if short else name
        groups.setdefault(key, []).append(element("label", box, element("span", label)))
        titles[key] = stem(arm) if short else None
    parts = []
    for key, buttons in groups.items():
        title = titles[key]
        heading = title and element("span", title, class_="family", aria_hidden="true")
        parts.append(element("div", heading, element("div", *buttons, class_="segments"), class_="group"))
    return element("fieldset", element("legend", "Arm shown in every scene", class_="unseen"), *parts)


def summary(arms: Sequence[Record]) -> Html:
    """One line about the arm that is shown."""
    lines = []
    for i, arm in enumerate(arms):
        figures = f"POPE F1 {number(look(arm, 'pope', 'mean_f1', 'value'))}, "
        figures += f"CHAIR-i {number(look(arm, 'chair', 'chair_i', 'value'))}"
        lines.append(element("p", element("strong", arm["name"]), f" {figures}", class_=f"arm arm-{i}"))
    return element("div", *lines, class_="summary")


def visibility(n_arms: int) -> Html:
    """The style rules by which a checked radio button shows its arm."""
    return Html("\n".join(f".gallery:has(#arm-{i}:checked) .arm-{i}{{visibility:visible}}" for i in range(n_arms)))


def scenes(arms: Sequence[Record], examples: Sequence[Record], images: Path) -> Html:
    """One card per example."""
    return element("ol", *(_card(n, arms, e, images) for n, e in enumerate(examples, 1)), class_="scenes")


def _card(n: int, arms: Sequence[Record], example: Record, images: Path) -> Html:
    rows, cols = (int(side) for side in example["grid"])
    objects = [str(name) for name in example["objects"]]
    alt = f"Scene {n}: {', '.join(objects)}" if objects else f"Scene {n}: no annotated object"
    picture = element("img", src=data_uri(images / str(example["image"])), alt=alt)
    layers, views = [], []
    for i, arm in enumerate(arms):
        shown = example["arms"].get(arm["name"])
        if shown is None:
            views.append(element("div", element("p", f"{arm['name']}: no record"), class_=f"arm arm-{i}"))
            continue
        if shown["kept"] is not None:
            layers.append(_overlay(shown["kept"], rows, cols, f"arm arm-{i}"))
        views.append(_view(arm, shown, rows * cols, f"arm arm-{i}"))
    chips = element("ul", *(element("li", name) for name in objects), class_="chips", aria_label="Objects in the scene")
    scene = element("div", picture, *layers, class_="scene")
    return element("li", scene, chips, element("div", *views, class_="views"), class_="card")


def _overlay(kept: Collection[int], rows: int, cols: int, class_: str) -> Html:
    """A veil over the patches that were dropped, and a contour around those that were kept."""
    inside = set(kept)
    if not inside <= set(range(rows * cols)):
        raise InputError(f"kept={sorted(inside)} leaves the grid of {rows} x {cols} patches; give row-major patch ids")
    veil, contour = [], []
    for row in range(rows):
        line = "".join("x" if row * cols + col in inside else "-" for col in range(cols))
        veil += [f"M{run.start()} {row}h{len(run[0])}v1h-{len(run[0])}z" for run in re.finditer("-+", line)]
    for row, col in (divmod(patch, cols) for patch in sorted(inside)):
        if col == 0 or row * cols + col - 1 not in inside:
            contour.append(f"M{col} {row}v1")
        if col == cols - 1 or row * cols + col + 1 not in inside:
            contour.append(f"M{col + 1} {row}v1")
        if (row - 1) * cols + col not in inside:
            contour.append(f"M{col} {row}h1")
        if (row + 1) * cols + col not in inside:
            contour.append(f"M{col} {row + 1}h1")
    return element(
        "svg",
        element("path", d="".join(veil), class_="veil"),
        element("path", d="".join(contour), class_="contour"),
        viewBox=f"0 0 {cols} {rows}",
        preserveAspectRatio="none",
        class_=class_,
        role="img",
        aria_label=f"{len(inside)} of {rows * cols} patches lit",
    )


def _view(arm: Record, shown: Record, patches: int, class_: str) -> Html:
    kept = patches if shown["kept"] is None else len(set(shown["kept"]))
    name = element("p", element("strong", arm["name"]), f" {kept} of {patches} patches", class_="name")
    caption = element("blockquote", _caption(str(shown["caption"]), shown["mentions"]))
    return element("div", name, caption, _answers(shown["answers"]), class_=class_)


def _caption(caption: str, mentions: Sequence[Record]) -> Html:
    """The caption with its object mentions marked at their spans."""
    parts: list[object] = []
    at = 0
    for mention in sorted(mentions, key=lambda m: m["start"]):
        start, end = int(mention["start"]), int(mention["end"])
        if not at <= start < end <= len(caption):
            raise InputError(f"mention {start} to {end} does not fit caption {caption!r}; give spans in order, apart")
        wrong = bool(mention["hallucinated"])
        said = f"{mention['node']}: {'not in the image' if wrong else 'in the image'}"
        note = unseen(" (not in the image)") if wrong else None
        word = element("mark", caption[start:end], title=said, class_="wrong" if wrong else "right")
        parts += [caption[at:start], word, note]
        at = end
    return join([*parts, caption[at:]])


def _answers(answers: Sequence[Record]) -> Html:
    rows = [_answer(answer) for answer in answers]
    right = sum(answer["pred"] == answer["label"] for answer in answers)
    heading = element("p", f"{right} of {len(rows)} answers right", class_="score") if rows else None
    folded = None
    if len(rows) > SHOWN_QUESTIONS:
        more = element("summary", f"{len(rows) - SHOWN_QUESTIONS} more questions")
        folded = element("details", more, element("ul", *rows[SHOWN_QUESTIONS:], class_="answers"))
    shown = element("ul", *rows[:SHOWN_QUESTIONS], class_="answers") if rows else None
    return join([heading, shown, folded])


def _answer(answer: Record) -> Html:
    right = answer["pred"] == answer["label"]
    mark = element("span", "✓" if right else "✗", class_="tick", aria_hidden="true")
    said = element("span", str(answer["raw"]).strip() or "(empty)", class_="said")
    truth = None if right else element("span", f"should be {answer['label']}", class_="truth")
    spoken = unseen(" right" if right else " wrong, ")
    reply = element("span", said, spoken, truth, class_="reply")
    asked = element("span", answer["question"], " ")
    return element("li", mark, asked, reply, class_="right" if right else "wrong")
