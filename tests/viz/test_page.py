"""The page shows what the results say, escaped, in one file that needs nothing else."""

from __future__ import annotations

import base64
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlattn.errors import InputError
from vlattn.viz.page import featured, headline, write_page
from vlattn.viz.page_html import VOID, element, text
from vlattn.viz.page_numbers import number, probability, signed, size, span, times

EVIL = "<script>alert(1)</script> \"quoted\" & 'single'"
ADDRESSES = ("src", "href", "xlink:href", "srcset", "action", "formaction", "poster", "data", "style")


@dataclass
class Node:
    """An element of a parsed page."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    def all(self, tag: str | None = None, class_: str | None = None) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                classes = (child.attributes.get("class") or "").split()
                if tag in (None, child.tag) and (class_ is None or class_ in classes):
                    yield child
                yield from child.all(tag, class_)

    def one(self, tag: str | None = None, class_: str | None = None) -> Node:
        return next(self.all(tag, class_))

    @property
    def text(self) -> str:
        """What is seen: without what is written for screen readers alone."""
        return "".join(
            child if isinstance(child, str) else "" if child.attributes.get("class") == "unseen" else child.text
            for child in self.children
        )

    @property
    def heard(self) -> str:
        """All text, what is written for screen readers alone included."""
        return "".join(child if isinstance(child, str) else child.heard for child in self.children)


class Reader(HTMLParser):
    """Builds the tree and insists that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def estimate(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": value and value - 0.02, "high": value and value + 0.02}


def make_arm(name: str, family: str, tokens: int, f1: float | None, ratio: float | None) -> dict[str, Any]:
    spread = {"median": ratio, "q1": ratio and ratio - 0.03, "q3": ratio and ratio + 0.03}
    split = {"f1": estimate(f1), "accuracy": estimate(f1), "yes_ratio": 0.5}
    return {
        "name": name,
        "method": family,
        "family": family,
        "visual_tokens": tokens,
        "pope": {
            "mean_f1": estimate(f1),
            "mean_accuracy": estimate(f1),
            "splits": dict.fromkeys(("random", "popular", "adversarial"), split),
        },
        "chair": {key: estimate(0.2) for key in ("chair_s", "chair_i", "recall", "f1")} | {"length": 22.1},
        "cost": {
            "prefill_ratio": spread,
            "total_ratio": spread,
            "kv_bytes": 4096,
            "kv_ratio": ratio,
            "flops_ratio": 0.3,
        },
    }


@pytest.fixture
def results() -> dict[str, Any]:
    arms = [make_arm("vanilla", "vanilla", 12, 0.951, 1.0)]
    arms += [
        make_arm(f"FlowCut {n}", "flowcut", n, f1, r) for n, f1, r in ((6, 0.94, 0.8), (3, 0.923, 0.617), (1, 0.8, 0.5))
    ]
    arms += [
        make_arm(f"Random {n}", "random", n, f1, r) for n, f1, r in ((6, 0.91, 0.8), (3, 0.87, 0.6), (1, 0.7, 0.5))
    ]
    pairs = (("vanilla", "FlowCut 3", -0.028, -0.04, -0.01), ("Random 3", "FlowCut 3", 0.053, 0.03, 0.08))
    return {
        "title": "vlattn demo",
        "model": {"name": "tiny", "visual_tokens": 12, "parameters": 4_100_000},
        "data": {"name": "tiny COCO val", "images": 60, "questions": 1080},
        "environment": {"python": "3.11", "torch": "2.7", "machine": "a machine", "threads": 2},
        "seconds": 150.2,
        "arms": arms,
        "comparisons": [
            {"a": a, "b": b, "metric": "POPE mean F1", "difference": d, "low": low, "high": high, "p": 0.0002}
            for a, b, d, low, high in pairs
        ],
        "commands": ["vlattn demo", "vlattn eval pope --model tiny"],
    }


def say(kept: list[int] | None, caption: str, words: dict[str, bool], pred: str = "yes") -> dict[str, Any]:
    mentions = []
    for word, hallucinated in words.items():
        start = caption.index(word)
        span_ = {"start": start, "end": start + len(word)}
        mentions.append({**span_, "word": word, "node": word, "hallucinated": hallucinated})
    answer = {"question": "Is there a dog in the image?", "label": "yes", "raw": pred, "pred": pred}
    return {"kept": kept, "caption": caption, "mentions": mentions, "answers": [answer]}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2):
        Image.new("RGB", (8, 6), (40 * i, 90, 30)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def examples(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Two scenes of 3 x 4 patches; a pruned arm keeps its first tokens of a fixed order, which differs per scene."""
    found = []
    for i, order in enumerate(([5, 6, 0, 11, 3, 8], [11, 1, 2, 7, 4, 9]), 1):
        arms = {}
        for arm in results["arms"]:
            kept = None if arm["family"] == "vanilla" else order[: arm["visual_tokens"]]
            arms[arm["name"]] = say(
                kept, "a dog, a cat and a dog bowl.", {"dog": False, "cat": True}, "no" if kept else "yes"
            )
        found.append({"image": f"{i}.png", "grid": [3, 4], "objects": ["dog", "sports ball"], "arms": arms})
    return found


def render(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> Node:
    return parse(write_page(results, examples, images, images.parent / "out").read_text(encoding="utf-8"))


def lit(overlay: Node) -> set[int]:
    """The patches that the veil leaves free, read from its path."""
    _, _, cols, rows = (int(n) for n in str(overlay.attributes["viewbox"]).split())
    dark: set[int] = set()
    path = str(overlay.one("path", "veil").attributes["d"])
    runs = re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path)
    assert "".join(f"M{x} {y}h{n}v1h-{m}z" for x, y, n, m in runs) == path
    for x, y, n, _ in runs:
        dark |= {int(y) * cols + int(x) + i for i in range(int(n))}
    return set(range(rows * cols)) - dark


def test_it_writes_index_html_and_returns_its_path(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path, tmp_path: Path
) -> None:
    path = write_page(results, examples, images, tmp_path / "a" / "b")
    assert path == tmp_path / "a" / "b" / "index.html"
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]


def test_nothing_is_fetched(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    page = render(results, examples, images)
    ids = {node.attributes["id"] for node in page.all() if "id" in node.attributes}
    for node in page.all():
        assert node.tag not in ("link", "iframe", "object", "embed", "base")
        for name in ADDRESSES:
            value = node.attributes.get(name)
            if value is not None:
                assert value.startswith("data:image/") or (value[0] == "#" and value[1:] in ids), (
                    node.tag,
                    name,
                    value,
                )
    assert not re.search(r"url\(|@import|https?:|//\w", page.one("style").text)
    assert not re.search(r"fetch|import\(|XMLHttp|https?:", page.one("script").text)
    policy = next(n for n in page.all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy.attributes["content"])


def test_images_are_embedded_unchanged(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    for i, image in enumerate(render(results, examples, images).all("img"), 1):
        head, data = str(image.attributes["src"]).split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == (images / f"{i}.png").read_bytes()
        assert image.attributes["alt"] == f"Scene {i}: dog, sports ball"


def test_the_headline_is_computed(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    line = "FlowCut keeps 3 of 12 visual tokens: POPE F1 0.92 against 0.95, prefill 0.62×, KV cache 0.62×"
    assert headline(results) == line
    page = render(results, examples, images)
    assert page.one("h1").text == line
    figures = [tile.text for tile in page.one("dl", "tiles").all("dd", "figure")]
    assert figures == ["3", "0.923", "0.200", "0.62×", "0.62×", "0.30×"]
    assert [li.one("strong").text for li in page.one("ul", "lead").all("li")] == ["−0.028", "+0.053"]


def test_a_bad_number_is_worded_like_a_good_one(results: dict[str, Any]) -> None:
    arm = featured(results["arms"])
    assert arm is not None
    arm["pope"]["mean_f1"]["value"], arm["cost"]["prefill_ratio"]["median"] = 0.1, 3.0
    assert "POPE F1 0.10 against 0.95, prefill 3.00×" in headline(results)


def test_the_headline_takes_the_middle_budget(results: dict[str, Any]) -> None:
    assert [featured(results["arms"][:n])["name"] for n in (4, 3, 2)] == ["FlowCut 3", "FlowCut 3", "FlowCut 6"]  # type: ignore[index]
    assert featured(results["arms"][:1]) is None
    assert headline({**results, "arms": results["arms"][:1]}) == "vlattn demo"


def test_lit_patches_are_the_kept_ones(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    cards = list(render(results, examples, images).all("li", "card"))
    assert len(cards) == len(examples)
    for card, example in zip(cards, examples, strict=True):
        for i, arm in enumerate(results["arms"]):
            kept = example["arms"][arm["name"]]["kept"]
            overlays = list(card.one("div", "scene").all("svg", f"arm-{i}"))
            assert [lit(svg) for svg in overlays] == ([] if kept is None else [set(kept)])
            if kept is not None:
                assert overlays[0].attributes["aria-label"] == f"{len(kept)} of 12 patches lit"


@pytest.mark.parametrize("kept", [[], list(range(12))])
def test_all_or_no_patches_may_be_lit(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path, kept: list[int]
) -> None:
    examples[0]["arms"]["FlowCut 3"]["kept"] = kept
    card = render(results, examples, images).one("li", "card")
    assert lit(card.one("div", "scene").one("svg", "arm-2")) == set(kept)


def test_one_switch_shows_every_arm(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    page = render(results, examples, images)
    radios = list(page.one("fieldset").all("input"))
    assert [r.attributes["value"] for r in radios] == [arm["name"] for arm in results["arms"]]
    assert [r.attributes["value"] for r in radios if "checked" in r.attributes] == ["FlowCut 3"]
    assert [label.heard for label in page.one("fieldset").all("label")] == [arm["name"] for arm in results["arms"]]
    assert [label.text for label in page.one("fieldset").all("label")] == ["vanilla", *("6", "3", "1") * 2]
    style = page.one("style").text
    for radio in radios:
        assert (
            f".gallery:has(#{radio.attributes['id']}:checked) .{radio.attributes['id']}{{visibility:visible}}" in style
        )
    for card in page.all("li", "card"):
        views = list(card.one("div", "views").all("div", "arm"))
        assert [view.one("strong").text for view in views] == [arm["name"] for arm in results["arms"]]


def test_mentions_are_marked_at_their_spans(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path
) -> None:
    page = render(results, examples, images)
    for quote in page.all("blockquote"):
        assert quote.text == "a dog, a cat and a dog bowl."
        spans, at = [], 0
        for child in quote.children:
            if isinstance(child, str):
                at += len(child)
            elif child.tag == "mark":
                spans.append((at, at + len(child.text), child.attributes["class"], child.attributes["title"]))
                at += len(child.text)
        assert spans == [(2, 5, "right", "dog: in the image"), (9, 12, "wrong", "cat: not in the image")]
        assert [n.children for n in quote.all("span", "unseen")] == [[" (not in the image)"]]


def test_answers_are_marked_by_more_than_colour(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path
) -> None:
    views = list(render(results, examples, images).one("div", "views").all("div", "arm"))
    right, wrong = (view.one("ul", "answers").one("li") for view in views[:2])
    assert (right.attributes["class"], right.one("span", "tick").text, right.one("span", "said").text) == (
        "right",
        "✓",
        "yes",
    )
    assert (wrong.attributes["class"], wrong.one("span", "tick").text, wrong.one("span", "said").text) == (
        "wrong",
        "✗",
        "no",
    )
    assert wrong.one("span", "truth").text == "should be yes"
    assert [view.one("p", "score").text for view in views[:2]] == ["1 of 1 answers right", "0 of 1 answers right"]


def test_many_questions_are_folded_but_all_there(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path
) -> None:
    shown = examples[0]["arms"]["vanilla"]
    shown["answers"] = shown["answers"] * 18
    view = render(results, examples, images).one("div", "views").one("div", "arm-0")
    assert view.one("summary").text == "12 more questions"
    assert len(list(view.all("li"))) == 18


def test_every_string_is_escaped(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    plain = render(copy.deepcopy(results), copy.deepcopy(examples), images)
    names = {arm["name"]: f"{EVIL} {arm['name']}" for arm in results["arms"]}

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {names.get(k, k) if key == "arms" else k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        if value in names and key in ("name", "a", "b"):
            return names[value]
        return (
            f"{value} {EVIL}" if isinstance(value, str) and key not in ("family", "image", "label", "pred") else value
        )

    evil = render(spoil(results), spoil(examples), images)
    assert [n.tag for n in evil.all()] == [n.tag for n in plain.all()]
    assert len(list(evil.all("script"))) == 1
    assert sum(EVIL in node.text for node in evil.all("blockquote")) == len(examples) * len(names)
    for tag in ("title", "h1", "th", "td", "mark", "blockquote", "code", "dd"):
        allowed = ("mark",) if tag == "mark" else ()
        assert tag in allowed or any(EVIL in node.text for node in evil.all(tag)), tag
    assert all(set(n.attributes) == set(m.attributes) for n, m in zip(evil.all(), plain.all(), strict=True))


def test_missing_values_read_na(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    def blank(value: Any) -> Any:
        return {k: blank(v) for k, v in value.items()} if isinstance(value, dict) else None

    for arm in results["arms"]:
        arm.update({part: blank(arm[part]) for part in ("pope", "chair", "cost")})
    for entry in results["comparisons"]:
        entry.update(difference=None, low=None, high=None, p=None)
    page = render(results, examples, images)
    assert page.one("h1").text.endswith("POPE F1 n/a against n/a, prefill n/a, KV cache n/a")
    quality, cost, pairs, splits = page.all("table")
    for table in (quality, cost, splits):
        for row in table.one("tbody").all("tr"):
            assert {cell.text for cell in list(row.all("td"))[1:]} == {"n/a"}
    for row in pairs.one("tbody").all("tr"):
        assert [cell.text for cell in row.all("td")][1:] == ["n/a"] * 4
    assert [svg.one("text").text for svg in page.one("div", "charts").all("svg")] == ["n/a"] * 3
    seen = " ".join(node.text for node in page.all("main"))
    assert not re.search(r"\b(None|nan|inf)\b", seen)


def test_tables_hold_the_figures(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    quality, cost, pairs, splits = render(results, examples, images).all("table")
    first = [[cell.text for cell in row.all("td")][:2] for row in quality.one("tbody").all("tr")]
    assert first[2] == ["3", "0.9230.903–0.943"]
    assert [cell.text for cell in list(cost.one("tbody").all("tr"))[2].all("td")] == [
        *("3", "0.62×0.59–0.65", "0.62×0.59–0.65", "0.62×", "4.0 KiB", "0.30×")
    ]
    assert [[cell.text for cell in row.children if isinstance(cell, Node)] for row in pairs.one("tbody").all("tr")] == [
        ["FlowCut 3 minus vanilla", "POPE mean F1", "−0.028", "−0.040 to −0.010", "< 0.001", "FlowCut 3 is lower"],
        ["FlowCut 3 minus Random 3", "POPE mean F1", "+0.053", "0.030 to 0.080", "< 0.001", "FlowCut 3 is higher"],
    ]
    for table in (quality, cost, splits):
        top, low = table.one("thead").all("tr")
        wide = sum(int(th.attributes.get("colspan") or 1) for th in top.all("th"))
        assert wide == len(list(low.all("th"))) + 2
        for row in table.one("tbody").all("tr"):
            assert len([c for c in row.children if isinstance(c, Node)]) == wide


def test_charts_draw_each_arm_at_its_value(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path
) -> None:
    chart = render(results, examples, images).one("div", "charts").one("svg")
    tips = [title.text for title in chart.all("title")]
    assert sorted(tip.split(":")[0] for tip in tips) == sorted(arm["name"] for arm in results["arms"])
    assert "FlowCut 3: 0.923 (0.903–0.943)" in tips
    assert all(tip in str(chart.attributes["aria-label"]) for tip in tips)
    circles = [(float(str(c.attributes["cx"])), float(str(c.attributes["cy"]))) for c in chart.all("circle")]
    assert circles == sorted(circles)  # budgets 1, 3, 6 from left to right
    values = (0.8, 0.923, 0.94)
    slopes = [(circles[i][1] - circles[0][1]) / (values[i] - values[0]) for i in (1, 2)]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.01)
    assert slopes[0] < 0  # a higher value stands higher


def test_one_arm_with_one_value_still_draws(
    results: dict[str, Any], examples: list[dict[str, Any]], images: Path
) -> None:
    results["arms"], results["comparisons"] = results["arms"][:1], []
    page = render(results, examples, images)
    assert page.one("h1").text == "vlattn demo"
    assert page.one("div", "charts").one("title").text == "vanilla: 0.951 (0.931–0.971)"


def test_bad_examples_say_what_is_wrong(results: dict[str, Any], examples: list[dict[str, Any]], images: Path) -> None:
    def broken(change: Any) -> list[dict[str, Any]]:
        spoilt = copy.deepcopy(examples)
        change(spoilt[0])
        return spoilt

    outside = broken(lambda e: e["arms"]["FlowCut 3"].update(kept=[12]))
    with pytest.raises(InputError, match="3 x 4 patches"):
        render(results, outside, images)
    far = broken(lambda e: e["arms"]["FlowCut 3"]["mentions"][0].update(end=99))
    with pytest.raises(InputError, match="mention 2 to 99"):
        render(results, far, images)
    with pytest.raises(InputError, match="is missing"):
        render(results, broken(lambda e: e.update(image="none.png")), images)


def test_numbers_as_words() -> None:
    assert [number(0.12345), number(-0.5), number(None), number(float("nan")), number(True)] == [
        *("0.123", "−0.500", "n/a", "n/a", "n/a")
    ]
    assert [signed(0.1), signed(-0.1), signed(None)] == ["+0.100", "−0.100", "n/a"]
    assert [times(0.614), times(None), span(0.1, None), span(0, 1, 1)] == ["0.61×", "n/a", "n/a", "0.0–1.0"]
    assert [probability(0.0002), probability(0.27), probability(None)] == ["< 0.001", "0.270", "n/a"]
    assert [size(512), size(2048), size(3 << 20), size(5 << 30), size(None)] == [
        *("512 B", "2.0 KiB", "3.0 MiB", "5.0 GiB", "n/a")
    ]


def test_elements_escape_text_and_attributes() -> None:
    assert element("p", EVIL, title=EVIL) == f'<p title="{text(EVIL)}">{text(EVIL)}</p>'
    assert "<script" not in element("p", EVIL, title=EVIL)
    assert element("input", checked=True, value=None, disabled=False, aria_label="x", class_="y") == (
        '<input checked aria-label="x" class="y">'
    )
    assert element("div", element("b", "<"), None, 3) == "<div><b>&lt;</b>3</div>"
