"""The maps are the weights that the model says it has; the figure shows them, and the borders lie between cells."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.var import VAR
from vlattn.viz.sinks import SinkMap, borders, draw_sinks, sink_map

METHOD = VAR(tau=1.5, sink_dims=(3, 7), min_visual_mass=0.05, rho_nonsink=0.3)


def text_rows(model: Any, inputs: dict[str, Any], layer: int, first: int, image: list[int]) -> torch.Tensor:
    """Mean weights of the rows from `first` on, over all heads, on an image's tokens; as the model says."""
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[layer]
    return weights[0, :, first:, image].mean((0, 1)).double()


def test_a_map_is_the_attention_of_the_text_behind_the_image(llava: Callable[..., Any], prompts: Any) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=3, attn="eager", dtype=torch.float32)
    inputs = prompts(model, images=(2,))
    visual = (inputs["input_ids"][0] == 63).nonzero().flatten().tolist()
    for number, image in enumerate((visual[:16], visual[16:])):
        found = sink_map(model, inputs, METHOD, layer=2, image=number)
        before = text_rows(model, inputs, 2, visual[-1] + 1, image).view(4, 4)
        with METHOD(model) as trace:
            after = text_rows(model, inputs, 2, visual[-1] + 1, image).view(4, 4)
        assert torch.allclose(found.before.double(), before, atol=1e-6)
        assert torch.allclose(found.after.double(), after, atol=1e-6)
        notes: Any = trace.notes
        places = [slot - 16 * number for slot in notes["visual_sinks"][2][0] if slot // 16 == number]
        assert found.sinks.flatten().nonzero().flatten().tolist() == places
    assert not torch.equal(found.before, found.after)


def test_an_image_of_a_padded_batch_is_found_in_its_prompt(llava: Callable[..., Any], prompts: Any) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=3)
    inputs = prompts(model, images=(1, 2))
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = {
        "input_ids": inputs["input_ids"][1:],
        "attention_mask": inputs["attention_mask"][1:],
        "pixel_values": inputs["pixel_values"][1:],
    }
    for number in range(2):
        found, expected = sink_map(model, inputs, METHOD, 2, 1 + number), sink_map(model, alone, METHOD, 2, number)
        assert torch.allclose(found.before, expected.before, atol=1e-12)
        assert torch.allclose(found.after, expected.after, atol=1e-12)
        assert torch.equal(found.sinks, expected.sinks)


def test_pruned_tokens_leave_gaps_and_the_model_is_left_as_it_was(
    llava: Callable[..., Any], prompts: Any, tiny: ModuleType
) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=3)
    inputs = prompts(model)
    with torch.no_grad():
        model(**inputs)
    hooks, settings = tiny.hooks_of(model), tiny.settings_of(model)
    found = sink_map(model, inputs, vlattn.compose(vlattn.FastV(keep=5, layer=2), METHOD), 2)
    assert int(found.after.isfinite().sum()) == 5
    assert int(found.before.isfinite().sum()) == 16
    assert not bool((found.sinks & found.after.isnan()).any())
    assert tiny.hooks_of(model) == hooks
    assert tiny.settings_of(model) == settings


def test_images_of_any_shape_have_their_own_grid_and_tiled_ones_their_small_view(families: ModuleType) -> None:
    for family, shape in (("qwen2_vl", (3, 4)), ("llava_next", (4, 4))):
        model = families.model(family)
        found = sink_map(model, families.inputs(family, model), METHOD, 2)
        assert tuple(found.before.shape) == shape
        assert bool(found.before.isfinite().all())
        assert float(found.before.sum()) < 1


@pytest.mark.parametrize(
    ("method", "layer", "image", "message"),
    [
        (METHOD, 9, 0, "layer: got 9, but this model's decoder has layers 0 to 3"),
        (METHOD, 1, 0, r"layer: got 1, but the method acts on layers \[2\]"),
        (vlattn.FastV(keep=5), 2, 0, "layer: got 2, but the method finds no sinks; give a VAR"),
        (METHOD, 2, 1, "image: got 1, but the prompts have 1 images"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(
    llava: Callable[..., Any], prompts: Any, method: Any, layer: int, image: int, message: str
) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=3)
    with pytest.raises(InputError, match=message):
        sink_map(model, prompts(model), method, layer, image)


def test_a_prompt_without_text_behind_its_image_is_refused(llava: Callable[..., Any], prompts: Any) -> None:
    model = llava(decoder_layers=4, image_size=16, layers=3)
    inputs = prompts(model)
    ends = {name: inputs[name][:, :19] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InputError, match="inputs: no text follows the image"):
        sink_map(model, {**inputs, **ends}, METHOD, 2)


def test_borders_are_the_sides_between_cells_that_differ() -> None:
    cells = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    cells[2, 3] = True

    def at(y: int, x: int) -> bool:
        return 0 <= y < 5 and 0 <= x < 7 and bool(cells[y, x])

    expected = {((x, y), (x, y + 1)) for y in range(5) for x in range(8) if at(y, x) != at(y, x - 1)}
    expected |= {((x, y), (x + 1, y)) for y in range(6) for x in range(7) if at(y, x) != at(y - 1, x)}
    found = borders(cells)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert len(borders(torch.ones(1, 1, dtype=torch.bool))) == 4


def example() -> SinkMap:
    sinks = torch.zeros(4, 6, dtype=torch.bool)
    sinks[1, 2] = True
    before = torch.full((4, 6), 0.01)
    before[1, 2] = 0.5
    after = torch.where(sinks, 0.3, 0.02)
    after[3, 5] = torch.nan
    return SinkMap(2, sinks, before, after)


def test_the_figure_is_written_with_a_row_for_each_map_and_says_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = Image.new("RGB", (60, 40), "white")
    one = draw_sinks([example()], picture, tmp_path / "new" / "one.png")
    three = draw_sinks([example()] * 3, picture, tmp_path / "three.png")
    with Image.open(one) as small, Image.open(three) as large:
        assert small.width == large.width
        assert abs(large.height - 3 * small.height) <= 3
        assert len(small.convert("RGB").getcolors(small.width * small.height) or []) > 20
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        text = draw_sinks([example()], picture, tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "layer 2: 1 sinks of 24" in text
    assert "before: 73.0% on the image" in text
    assert "after: 74.0%" in text
    assert "+1.0 points" in text


def test_nothing_to_draw_and_a_missing_library_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (60, 40))
    with pytest.raises(InputError, match="maps: got none"):
        draw_sinks([], picture, tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs matplotlib.*vlattn\[viz\]"):
        draw_sinks([example()], picture, tmp_path / "none.png")
