"""The page that `vlattn demo` leaves behind: one HTML file with everything in it, which opens from disk offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from vlattn.viz.page_chart import charts, stem
from vlattn.viz.page_file import page_part, write_index
from vlattn.viz.page_gallery import scenes, summary, switch, visibility
from vlattn.viz.page_html import Html, element, join, pairs, text
from vlattn.viz.page_numbers import NA, look, number, percent, signed, size, span, times, whole
from vlattn.viz.page_tables import comparison_table, cost_table, quality_table, split_table

Record = dict[str, Any]

LED = 4
"""How many paired differences stand under the headline; the table has them all."""

READING = (
    ("Intervals", "95% bootstrap, resampling whole images: the questions about one image belong together."),
    ("Comparisons", "Differences on the same images, resampled together; the p-value is two-sided."),
    ("POPE", "Yes/no questions about objects; absent ones are random, popular, or usually seen with those present."),
    ("CHAIR", "Objects that a caption names and the image lacks: CHAIR-i per mention, CHAIR-s per caption."),
    ("Cost", "Ratios to vanilla on the same inputs; times are medians, with the middle half of the repeats below."),
)


def write_page(results: dict[str, Any], examples: list[dict[str, Any]], images: Path, out: Path) -> Path:
    """Write out/index.html from the results of all arms and some examples of them; return its path.

    An example's `grid` is (rows, columns) of patches over the whole image, `kept` its row-major patch ids or None for
    all of them, and `image` a file in `images`.
    """
    arms: list[Record] = results["arms"]
    lead = featured(arms)
    body = Template(page_part("page.html")).substitute(
        title=text(results["title"]),
        headline=_clauses(headline(results)),
        lead=_lead(results),
        setting=_setting(results),
        tiles=_tiles(results),
        charts=charts(arms),
        switch=switch(arms, arms.index(lead) if lead else 0),
        summary=summary(arms),
        scenes=scenes(arms, examples, images),
        tables=join(
            [quality_table(arms), cost_table(arms), comparison_table(results["comparisons"]), split_table(arms)]
        ),
        commands=element("pre", element("code", "\n".join(map(str, results["commands"]))), tabindex=0),
        environment=pairs(_environment(results)),
        reading=pairs(READING),
    )
    style = page_part("page.css") + visibility(len(arms))
    return write_index(results["title"], style, Html(body), out, scripts=True)


def featured(arms: Sequence[Record]) -> Record | None:
    """The arm that the headline is about: FlowCut's middle budget (the lower of two), whatever its numbers are."""
    budgets = sorted((arm for arm in arms if arm["family"] == "flowcut"), key=lambda arm: arm["visual_tokens"])
    return budgets[(len(budgets) - 1) // 2] if budgets else None


def headline(results: Record) -> str:
    """One sentence of figures about the featured arm, beside vanilla's."""
    arm, vanilla = featured(results["arms"]), _vanilla(results["arms"])
    if arm is None:
        return str(results["title"])
    f1, base = (number(look(a, "pope", "mean_f1", "value"), 2) for a in (arm, vanilla))
    prefill, cache = times(look(arm, "cost", "prefill_ratio", "median")), times(look(arm, "cost", "kv_ratio"))
    kept = f"{stem(arm)} keeps {whole(arm['visual_tokens'])} of {whole(_total(results))} visual tokens"
    return f"{kept}: POPE F1 {f1} against {base}, prefill {prefill}, KV cache {cache}"


def _clauses(sentence: str) -> Html:
    """A sentence that breaks its lines between clauses where it can."""
    return join((element("span", clause) for clause in re.split(r"(?<=[:,]) ", sentence)), " ")


def _vanilla(arms: Sequence[Record]) -> Record | None:
    return next((arm for arm in arms if arm["family"] == "vanilla"), None)


def _total(results: Record) -> Any:
    return look(results, "model", "visual_tokens")


def _lead(results: Record) -> Html:
    """The featured arm's first paired differences, worded as they are."""
    arm = featured(results["arms"])
    told = []
    for entry in [e for e in results["comparisons"] if arm is not None and arm["name"] in (e["a"], e["b"])][:LED]:
        ends = span(look(entry, "low"), look(entry, "high"), between=" to ")
        what = f"{entry['b']} minus {entry['a']}, {entry['metric']}: "
        value = element("strong", signed(look(entry, "difference")))
        told.append(element("li", what, value, f" (95% interval {ends})"))
    return element("ul", *told, class_="lead") if told else Html("")


def _setting(results: Record) -> Html:
    model, data = results["model"], results["data"]
    parts = (
        f"Model {model['name']}, {_millions(look(model, 'parameters'))} parameters",
        f"{data['name']}, {whole(look(data, 'images'))} images, {whole(look(data, 'questions'))} questions",
        f"{whole(look(results, 'seconds'))} seconds on {look(results, 'environment', 'machine') or NA}",
    )
    return element("ul", *(element("li", part) for part in parts), class_="setting")


def _millions(value: Any) -> str:
    return NA if number(value) == NA else f"{number(value / 1e6, 1)} M" if value >= 1e6 else whole(value)


def _tiles(results: Record) -> Html:
    """The headline's figures one by one, with what each is to be read against."""
    arm, vanilla = featured(results["arms"]), _vanilla(results["arms"])
    if arm is None:
        return Html("")
    tokens, cost = arm["visual_tokens"], arm["cost"]
    rival = next((a for a in results["arms"] if a["family"] == "random" and a["visual_tokens"] == tokens), None)

    def against(*path: str) -> list[str]:
        pairs = [(str(a["name"]), number(look(a, *path, "value"))) for a in (vanilla, rival) if a is not None]
        ends = span(look(arm, *path, "low"), look(arm, *path, "high"))
        return [NA if ends == NA else f"{ends} (95%)", *(f"{name} {value}" for name, value in pairs)]

    prefill = look(cost, "prefill_ratio")
    figures: list[tuple[str, str, list[str]]] = [
        ("Visual tokens", whole(tokens), [f"of {whole(_total(results))}", f"{percent(tokens, _total(results))} kept"]),
        ("POPE mean F1", number(look(arm, "pope", "mean_f1", "value")), against("pope", "mean_f1")),
        (
            "CHAIR-i",
            number(look(arm, "chair", "chair_i", "value")),
            [*against("chair", "chair_i"), "lower is better"],
        ),
        (
            "Prefill time",
            times(look(prefill, "median")),
            ["relative to vanilla", f"middle half {span(look(prefill, 'q1'), look(prefill, 'q3'), 2)}"],
        ),
        (
            "KV cache",
            times(look(cost, "kv_ratio")),
            [
                "relative to vanilla",
                size(look(cost, "kv_bytes")),
                f"vanilla {size(look(vanilla, 'cost', 'kv_bytes'))}",
            ],
        ),
        ("FLOPs", times(look(cost, "flops_ratio")), ["relative to vanilla"]),
    ]
    tiles = [
        element("div", element("dt", name), element("dd", value, class_="figure"), *(element("dd", n) for n in notes))
        for name, value, notes in figures
    ]
    return element("dl", *tiles, class_="tiles", aria_label=f"{arm['name']} in figures")


def _environment(results: Record) -> list[tuple[str, str]]:
    return [(key, NA if value is None else str(value)) for key, value in results["environment"].items()]
