"""HTML that is escaped by construction: text is escaped where it enters an element, markup made here is not."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "img", "input", "meta"})


class Html(str):
    """Markup that is ready to stand in a page."""

    __slots__ = ()


def text(content: object) -> Html:
    """Anything as markup: Html as it is, everything else escaped."""
    return content if isinstance(content, Html) else Html(escape(str(content)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after another; None is left out."""
    return Html(text(between).join(text(part) for part in parts if part is not None))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """<tag attributes>content</tag>.

    An underscore in an attribute's name is a hyphen and one at its end is dropped (aria_label, class_); None and False
    leave the attribute out, True writes its bare name.
    """
    written = []
    for name, value in attributes.items():
        key = name.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{escape(str(value))}"')
    opening = f"<{tag}{''.join(written)}>"
    return Html(opening if tag in VOID else f"{opening}{join(content)}</{tag}>")


def unseen(content: object) -> Html:
    """Text for screen readers alone."""
    return element("span", content, class_="unseen")


def pairs(rows: Iterable[tuple[str, object]]) -> Html:
    """Terms with what they mean."""
    return element(
        "dl", *(element("div", element("dt", key), element("dd", value)) for key, value in rows), class_="pairs"
    )
