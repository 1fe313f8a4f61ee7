"""`vlattn sinks` draws the maps that `sink_map` returns, for the embedded model or a given picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlattn
import vlattn.viz.sinks as sinks_module
from vlattn.assets.paths import tiny_coco
from vlattn.cli.sinks import sinks
from vlattn.errors import InputError
from vlattn.eval.answer import chat_prompt
from vlattn.viz.sinks import sink_map


def test_a_picture_and_a_prompt_become_one_row_for_each_layer(
    invoke: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw = sinks_module.draw_sinks
    monkeypatch.setattr(sinks_module, "draw_sinks", lambda maps, *rest: (drawn.extend(maps), draw(maps, *rest))[1])
    picture = sorted(tiny_coco("val").images.iterdir())[4]
    prompt, out = "Is there a dog in the image?", tmp_path / "maps" / "sinks.png"
    result = invoke(
        sinks, "--image", picture, "--prompt", prompt, "--method", "var:move=0.6", "--layers", "3,4", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert Image.open(out).format == "PNG"
    model, processor = vlattn.load("tiny")
    text = chat_prompt(processor, prompt)
    inputs = processor(images=[[Image.open(picture).convert("RGB")]], text=[text], return_tensors="pt")
    for found, layer in zip(drawn, (3, 4), strict=True):
        expected = sink_map(model, inputs, vlattn.VAR(move=0.6), layer)
        assert found.layer == layer
        assert found.sinks.equal(expected.sinks)
        assert found.after.equal(expected.after)
        assert f"layer {layer}: {int(expected.sinks.sum())} sinks of 144" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--method", "vhr"), "method: got 'vhr'; give VAR"), (("--layers", "a"), "layers: got 'a'; give layer indices")],
)
def test_bad_arguments_are_told(invoke: Callable[..., Any], arguments: tuple[str, str], message: str) -> None:
    result = invoke(sinks, *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
