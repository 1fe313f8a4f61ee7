"""HiPrune: the published vector, the choice in plain loops, and what a live model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.hiprune import HiPrune, hiprune_choice, neighborhood

Numbers = Callable[..., torch.Tensor]


def choice_by_loops(
    middle: torch.Tensor, deep: torch.Tensor, keep: int, grid: tuple[int, int], alpha: float, wrap: bool
) -> list[int]:
    """One image: [N], [N]; anchors, then buffers by the deep layer, then registers."""
    rows, columns = grid
    total = rows * columns
    anchors = sorted(range(total), key=lambda i: -float(middle[i]))[: round(keep * alpha / 5)]
    buffers: set[int] = set()
    for a in anchors:
        if wrap:
            buffers |= {min(max(a + s, 0), total - 1) for s in (-1, 1, -columns, columns)}
        else:
            row, column = divmod(a, columns)
            near = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
            buffers |= {r * columns + c for r, c in near if 0 <= r < rows and 0 <= c < columns}
    deepest = sorted(range(total), key=lambda i: -float(deep[i]))
    chosen = list(anchors)
    chosen += [i for i in deepest if i in buffers and i not in anchors]
    chosen += [i for i in deepest if i not in chosen]
    return sorted(chosen[:keep])


def test_the_published_vector_is_reproduced(formula: Numbers) -> None:
    middle, deep = ((6 * formula(k, 1, 577)).softmax(-1)[:, 1:] for k in (96, 97))
    anchors, buffers = [345, 137, 129], [105, 113, 128, 130, 136, 138, 153, 161, 321, 344, 346, 369]
    mask = torch.zeros(1, 576, dtype=torch.bool)
    mask[0, anchors] = True
    assert neighborhood(mask, (24, 24))[0].nonzero().flatten().tolist() == buffers
    kept = hiprune_choice(middle, deep, 64, (24, 24), alpha=0.25)[0].tolist()
    assert set(anchors + buffers) <= set(kept)
    assert middle[0].argsort(descending=True)[:3].tolist() == anchors
    registers = [i for i in kept if i not in anchors + buffers]
    assert len(registers) == 49
    assert kept[:5] == [9, 34, 42, 58, 60]
    assert kept[-3:] == [562, 571, 572]


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 7, 13, 64, 70])
@pytest.mark.parametrize("grid", [(7, 10), (10, 7), (1, 70), (70, 1)])
def test_the_choice_equals_plain_loops(grid: tuple[int, int], keep: int, alpha: float, wrap: bool) -> None:
    generator = torch.Generator().manual_seed(keep)
    middle, deep = (torch.rand(3, 70, generator=generator, dtype=torch.float64) for _ in range(2))
    found = hiprune_choice(middle, deep, keep, grid, alpha, wrap)
    assert found.shape == (3, keep)
    assert found.tolist() == [choice_by_loops(middle[b], deep[b], keep, grid, alpha, wrap) for b in range(3)]


@pytest.mark.parametrize(("keep", "anchors"), [(192, 4), (128, 3), (64, 1)])
def test_the_default_share_gives_the_published_number_of_anchors(keep: int, anchors: int) -> None:
    middle = torch.zeros(1, 576)
    spread = [25 + 50 * i for i in range(5)]  # so far apart that no two share a neighbour
    middle[0, spread] = torch.arange(5.0, 0.0, -1)
    deep = torch.arange(576.0)[None]  # the highest ids are the registers
    kept = hiprune_choice(middle, deep, keep, (24, 24))[0].tolist()
    assert [i in kept for i in spread] == [True] * anchors + [False] * (5 - anchors)


def test_only_wrapping_lets_a_row_end_touch_the_next_row() -> None:
    anchor = torch.zeros(1, 12, dtype=torch.bool)
    anchor[0, 3] = True  # the end of the first of three rows
    assert neighborhood(anchor, (3, 4), wrap=True)[0].nonzero().flatten().tolist() == [0, 2, 4, 7]
    assert neighborhood(anchor, (3, 4), wrap=False)[0].nonzero().flatten().tolist() == [2, 7]


def test_ties_go_to_the_lower_id() -> None:
    even = torch.zeros(1, 16)
    assert hiprune_choice(even, even, 4, (4, 4), alpha=0.0).tolist() == [[0, 1, 2, 3]]


# In a model -----------------------------------------------------------------------------------------------------------
TOWERS = [{}, {"strategy": "full"}, {"feature_layer": -1}, {"siglip": True, "feature_layer": -1}]


@pytest.mark.parametrize("options", TOWERS, ids=str)
@pytest.mark.parametrize(
    "method",
    [HiPrune(keep=9, object_layer=1, alpha=0.6), HiPrune(keep=20, object_layer=3, alpha=1.0, wrap=False)],
    ids=str,
)
def test_the_decoder_gets_anchors_buffers_and_registers_in_raster_order(
    llava: Any, prompts: Any, tiny: ModuleType, naive_tower: ModuleType, options: dict[str, Any], method: HiPrune
) -> None:
    model = llava(layers=4, **options)
    inputs, lead, ids = prompts(model, images=(1, 2)), int(options.get("strategy") == "full"), []
    cls, deep = int("siglip" not in options), model.config.vision_feature_layer % 5 - 1
    for pixels in inputs["pixel_values"]:
        middle, last = (
            naive_tower.look(model.model.vision_tower, pixels[None], layer).attention[0].mean((0, 1))[cls:]
            for layer in (method.object_layer - 1, deep)
        )
        ids.append(choice_by_loops(middle, last, method.keep - lead, (6, 6), method.alpha, method.wrap))
    stock = tiny.features(model, inputs["pixel_values"])
    expected = [
        image[list(range(lead)) + [i + lead for i in kept]].detach() for image, kept in zip(stock, ids, strict=True)
    ]
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    assert trace.kept.tolist() == ids


@pytest.mark.parametrize("layer", [4, 9])
def test_a_middle_layer_behind_the_features_is_refused(llava: Any, layer: int) -> None:
    with pytest.raises(InputError, match=f"object_layer: got {layer}; .* give 1 <= object_layer <= 3"):
        HiPrune(keep=9, object_layer=layer)(llava(layers=4)).attach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep: got 0"),
        ({"alpha": -0.1}, "alpha: got -0.1; give a number from 0.0 to 1.0"),
        ({"object_layer": 0}, "object_layer: got 0"),
        ({"wrap": "no"}, "wrap: got 'no'; give True or False"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HiPrune(**settings)
