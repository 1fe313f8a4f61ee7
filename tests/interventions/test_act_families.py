"""Attention calibration on every model family: column means against full matrices, and both ways to edit all rows."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.interventions.act_run import ActRun
from vlattn.models.registry import families as known_families

HEADS = (0, 1, 3)


def build(family: str, matrix: ModuleType, families: ModuleType, tiny: ModuleType, attn: str) -> tuple[Any, Any]:
    return matrix.build(family, families, tiny, attn=attn, dtype=torch.float32)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", sorted(known_families()))
def test_column_means_are_those_of_the_full_attention_matrix(
    family: str, layer: int, matrix: ModuleType, families: ModuleType, tiny: ModuleType
) -> None:
    model, inputs = build(family, matrix, families, tiny, "eager")
    with torch.no_grad():
        full = model(**inputs, output_attentions=True).attentions[layer][:, list(HEADS)]  # [B, H, T, T]
        for rows in ("all", "text"):
            act = vlattn.ACT({layer: HEADS}, theta=0.02, min_rows=1, stat_rows=rows)  # type: ignore[arg-type]
            with act(model) as trace:
                model(**inputs)
            sinks: Any = trace.notes["sinks"]
            found = sinks[layer]
            for b in range(2):
                real = inputs["attention_mask"][b].nonzero()[:, 0].tolist()
                visual = found.visual[b].tolist()
                assert sum(visual) > 4
                behind = [i for i in real if not visual[i] and any(visual[:i])]
                counted = real if rows == "all" else behind
                torch.testing.assert_close(found.share[b], full[b][:, counted].mean(1), atol=1e-5, rtol=0)
                for h in range(len(HEADS)):
                    expected = []
                    for j in real[1:]:
                        seen = [float(full[b, h, i, j]) for i in counted if full[b, h, i, j] > 0]
                        if seen and sum(seen) / len(seen) > 0.02:
                            expected.append(j)
                    assert found.found[b, h].nonzero()[:, 0].tolist() == expected
    assert bool(found.found.any())


@pytest.mark.parametrize("family", sorted(known_families()))
def test_all_rows_edited_by_their_outputs_equal_all_rows_edited_by_their_weights(
    family: str, matrix: ModuleType, families: ModuleType, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(family, matrix, families, tiny, "sdpa")
    act = vlattn.ACT({1: HEADS, 2: HEADS}, theta=0.02, min_rows=1, literal=True)
    last = slice(-6, None)  # the end of either prompt, no padding
    with torch.no_grad():
        vanilla = model(**inputs).logits[:, last]
        with act(model):
            by_outputs = model(**inputs).logits[:, last]
        monkeypatch.setattr("vlattn.interventions.act.ActRun", functools.partial(ActRun, dense=True))
        with act(model):
            by_weights = model(**inputs).logits[:, last]
    torch.testing.assert_close(by_outputs, by_weights, atol=1e-4, rtol=0)
    assert float((by_outputs - vanilla).abs().max()) > 1e-2
