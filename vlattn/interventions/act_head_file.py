"""Which heads attention calibration edits: given by hand, or found once for a model and kept in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.interventions.dyvte_gates import ModelPrint
from vlattn.models.adapter import Adapter
from vlattn.runtime.run_folder import replacing

FORMAT = "vlattn-act-heads-1"

HeadMap = dict[int, tuple[int, ...]]


def chosen_heads(heads: Mapping[int, Sequence[int]] | str | Path, adapter: Adapter) -> HeadMap:
    """The heads to edit on a model, {layer: query heads}, both ascending; layers without heads are left out.

    Args:
        heads: {layer: heads}; a file that `write_heads` wrote; "auto" for the one embedded for the tiny model; or "all"
            for every head of layers 2 to L - 2.

    Raises:
        InputError: a layer or a head that the model does not have, or a file that is missing, unfinished, or was made
            for another model.
    """
    if isinstance(heads, str | Path):
        if str(heads) == "all":
            return every_head(adapter, default_layers(adapter))
        found: Mapping[int, Sequence[int]] = read_heads(embedded_heads() if str(heads) == "auto" else heads, adapter)
    elif isinstance(heads, Mapping):
        found = heads
    else:
        raise InputError(f"heads: got {heads!r}; give {{layer: heads}}, or the file that vlattn.calibrate_heads wrote")
    depth, count = len(adapter.decoder_layers), adapter.text_config.num_attention_heads
    checked = {}
    for layer, chosen in found.items():
        if not _is_index(layer, depth):
            raise InputError(f"heads: got layer {layer!r}; this decoder has layers 0 to {depth - 1}")
        if isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise InputError(f"heads: got {chosen!r} for layer {layer}; give a sequence of heads such as [0, 3]")
        wrong = [head for head in chosen if not _is_index(head, count)]
        if wrong:
            raise InputError(f"heads: got {wrong[0]!r} in layer {layer}; query heads are 0 to {count - 1}")
        if chosen:
            checked[layer] = tuple(sorted(set(chosen)))
    return dict(sorted(checked.items()))


def default_layers(adapter: Adapter) -> range:
    """Layers 2 to L - 2, where the paper looks for heads.

    Raises:
        InputError: the decoder has none.
    """
    depth = len(adapter.decoder_layers)
    if depth < 4:
        raise InputError(f"layers: a decoder of {depth} layers has none from 2 to L - 2; name the layers")
    return range(2, depth - 1)


def every_head(adapter: Adapter, layers: Sequence[int]) -> HeadMap:
    """All query heads of some layers."""
    return chosen_heads({layer: range(adapter.text_config.num_attention_heads) for layer in layers}, adapter)


def read_heads(path: str | Path, adapter: Adapter) -> HeadMap:
    """The heads in a file that `write_heads` wrote for a model like this one."""
    shown = f"heads: {str(path)!r}"
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown} cannot be read ({error}); give a file that vlattn.calibrate_heads or `vlattn calibrate act` wrote"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{shown} holds no heads; give a file that vlattn.calibrate_heads wrote")
    if "heads" not in content:
        raise InputError(f"{shown} is a calibration that was cut off; call vlattn.calibrate_heads again to go on")
    differ = ModelPrint(**content["model"]).differences(ModelPrint.of(adapter))
    if differ:
        raise InputError(
            f"{shown} was made for another model ({'; '.join(differ)}); heads do not carry over, so calibrate this one"
        )
    return {int(layer): tuple(heads) for layer, heads in content["heads"].items()}


def write_heads(path: str | Path, content: Mapping[str, Any], adapter: Adapter, name: str = "") -> None:
    """Write the state of a calibration; `content["heads"]`, once it is there, is {layer: heads}."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT, "model": dataclasses.asdict(ModelPrint.of(adapter, name)), **content}
    with replacing(file) as partial:  # a file that is there is whole
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def embedded_heads() -> Path:
    """The file of the tiny model's heads."""
    from vlattn.assets.paths import tiny_llava

    return tiny_llava() / "act_heads.json"


def _is_index(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
