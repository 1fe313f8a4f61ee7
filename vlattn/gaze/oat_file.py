"""A trained OAT as one safetensors file that says how to build the model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlattn.errors import InputError
from vlattn.gaze.crops import CropLooks, FeatureLooks
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.trial import GazeSet
from vlattn.runtime.run_folder import replacing

_FORMAT = "vlattn OAT 1"


def save_oat(model: OAT, path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write a model. about: plain data to keep beside the weights, such as the backbone whose features it takes."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"config": model.config.to_json(), "about": dict(about or {})})
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(out) as partial:
        save_file(state, str(partial), metadata={"format": _FORMAT, "oat": record})
    return out


def load_oat(path: str | Path, device: str | torch.device = "cpu") -> tuple[OAT, dict[str, Any]]:
    """A model that `save_oat` wrote, in eval mode, and what it was saved with.

    path: the file, or the folder of a run, which holds it as `model.safetensors`.

    Raises:
        InputError: no such file, or one of something else.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    try:
        with safe_open(str(file), framework="pt") as opened:
            found = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"model: {str(file)!r} cannot be read ({error}); give a folder that training has finished"
        ) from None
    if found.get("format") != _FORMAT:
        raise InputError(f"model: {str(file)!r} holds no OAT; give what vlattn gaze train wrote")
    record = json.loads(found["oat"])
    config = OATConfig.from_json(record["config"])
    model = OAT(replace(config, table_steps=1))  # the file has a learned table as it was fitted
    model.config = config
    model.load_state_dict(state)
    return model.to(device).eval(), record["about"]


def make_looks(gaze: GazeSet, config: OATConfig, backbone: Any = None) -> CropLooks | FeatureLooks:
    """What a model of this config sees of the objects of a set.

    Raises:
        InputError: it takes features and there is no backbone, or one of another width.
    """
    if config.appearance == "cnn":
        return CropLooks(gaze, *config.crop, order=config.order)
    if backbone is None:
        raise InputError("backbone: got None, but the model takes features; give the backbone it was trained on")
    looks = FeatureLooks(gaze, backbone)
    if looks.shape != (config.features,):
        raise InputError(
            f"backbone: {backbone.name} has features of width {looks.shape[0]}, the model takes {config.features}; "
            "give the backbone it was trained on"
        )
    return looks
