"""`vlattn vhd` draws the map that `vlattn.vhd` returns, for the embedded model or a given picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlattn
import vlattn.viz.heads as heads_module
from vlattn.assets.paths import tiny_coco
from vlattn.cli.vhd import vhd
from vlattn.errors import InputError
from vlattn.eval.answer import chat_prompt
from vlattn.interventions.vhr import VHR


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was handed to `draw_heads`, which runs as ever."""
    calls: list[dict[str, Any]] = []
    draw = heads_module.draw_heads

    def record(panels: Any, out: Path, **how: Any) -> Path:
        calls.append({"panels": panels, **how})
        return draw(panels, out, **how)

    monkeypatch.setattr(heads_module, "draw_heads", record)
    return calls


def embedded(path: Path, prompt: str) -> tuple[Any, Any]:
    model, processor = vlattn.load("tiny")
    text = chat_prompt(processor, prompt)
    return model, processor(images=[[Image.open(path).convert("RGB")]], text=[text], return_tensors="pt")


def test_a_picture_and_a_prompt_become_a_map_with_the_heads_of_vhr(
    invoke: Callable[..., Any], tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    picture = sorted(tiny_coco("val").images.iterdir())[4]
    prompt = "Is there a dog in the image?"
    out = tmp_path / "maps" / "map.png"
    result = invoke(vhd, "--image", picture, "--prompt", prompt, "--out", out, "--reinforced", "alpha=3,layers=[2,4]")
    assert result.exit_code == 0, result.output
    assert Image.open(out).format == "PNG"
    assert str(out) in result.output.replace("\n", "")
    assert "6 of 36 heads are reinforced" in result.output
    model, inputs = embedded(picture, prompt)
    plain = vlattn.vhd(model, inputs)[0]
    with VHR(alpha=3, layers=(2, 4))(model) as trace:
        reinforced = vlattn.vhd(model, inputs)[0]
    (call,) = drawn
    before, after = call["panels"].values()
    assert before == plain.tolist()
    assert after == reinforced.tolist()
    marks = next(iter(call["chosen"].values()))
    notes: Any = trace.notes
    assert marks[2] == notes["heads"][2][0].tolist()
    assert marks[4] == notes["heads"][4][0].tolist()
    assert [sum(row) for row in marks] == [0, 0, 3, 0, 3, 0]
    layer, head = divmod(int(plain.argmax()), 6)
    assert f"most in layer.head {layer}.{head} ({plain.max().item():.3g})" in result.output


def test_the_knockout_of_an_embedded_scene_needs_no_picture(
    invoke: Callable[..., Any], tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    result = invoke(vhd, "--knockout", "--out", tmp_path / "map.png")
    assert result.exit_code == 0, result.output
    model, inputs = embedded(sorted(tiny_coco("val").images.iterdir())[0], "Please describe this image in detail.")
    (call,) = drawn
    assert call["label"] == "knock-out VHD"
    assert list(call["panels"].values()) == [vlattn.vhd_knockout(model, inputs)[0].tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "map.svg"), r"out: got 'map.svg'"),
        (("--reinforced", "alpha=1"), "alpha other than 1"),
        (("--reinforced", "alpha=2+fastv:keep=3"), "settings of VHR alone"),
        (("--reinforced", "beta=2"), "'beta=2' is no setting of vhr"),
        (("--image", "missing.jpg"), "missing.jpg does not exist"),
    ],
)
def test_bad_input_is_said_in_one_line(invoke: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    result = invoke(vhd, *arguments)
    assert isinstance(result.exception, InputError)
    assert message.replace("\\", "") in str(result.exception)
