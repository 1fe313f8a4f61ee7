"""The gates of DyVTE: small networks, one for each decoder layer, that say when text has seen enough of the image.

"Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
arXiv 2411.19628. What a gate reads follows the released code: the mean of the text after the image and the last token.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for

WEIGHTS, CONFIG = "gates.safetensors", "gates.json"
_FORMAT = "vlattn-dyvte-1"


# What a gate reads ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GateSpan:
    """Which states of a prompt a gate reads.

    mean: bool [B, T], the text after the first visual token, without the last token; may be empty in a row.
    last: int64 [B], the index of each prompt's last token.
    """

    mean: torch.Tensor
    last: torch.Tensor


def text_after_image(visual: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """How many text tokens follow the first visual token of each prompt; all of them in a prompt without any.

    With several images that is also what stands between them. Newline tokens of tiled images are visual like the rest.

    Args:
        visual: bool [B, T], True at visual tokens.
        prompt: bool [B, T], True at the tokens of the prompt: False on padding and on an answer that follows.

    Returns:
        int64 [B].

    Raises:
        InputError: a prompt ends with a visual token, so that there is no text for a gate to read.
    """
    behind = (visual.cumsum(1) > 0) | ~visual.any(1, keepdim=True)  # [B, T]
    after = (behind & prompt & ~visual).sum(1)
    places = torch.arange(prompt.shape[1], device=prompt.device)
    ends_visual = torch.where(prompt, places, -1).amax(1) == torch.where(prompt & visual, places, -1).amax(1)
    if bool(ends_visual.any()):
        raise InputError(
            "input_ids: a prompt ends with a visual token, and the gates of DyVTE read the text behind it; "
            "put the question after the image"
        )
    return after


def gate_span(text: torch.Tensor, after: torch.Tensor) -> GateSpan:
    """Find the states that gates read, also where some visual tokens have left already.

    Args:
        text: bool [B, T], the prompt's text: False on visual tokens, on padding and on an answer that follows.
        after: int64 [B], how many of them follow the first visual token, at least 1.
    """
    from_end = text.flip(1).cumsum(1).flip(1)  # [B, T]: 1 at a prompt's last text token
    places = torch.arange(text.shape[1], device=text.device)
    return GateSpan(text & (from_end > 1) & (from_end <= after[:, None]), torch.where(text, places, -1).amax(1))


def gate_input(hidden: torch.Tensor, span: GateSpan) -> torch.Tensor:
    """Mean state of the text after the image, then the state of the last token; the last token twice where there is no
    such text.

    Args:
        hidden: output of a decoder layer [B, T, C], before any norm.
        span: which states to read.

    Returns:
        [B, 2C], fp32 for half-precision states, the states' dtype otherwise.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    last = hidden[torch.arange(len(hidden), device=hidden.device), span.last].to(wide)  # [B, C]
    text = span.mean.any(0).nonzero().flatten()  # a few columns of a long prompt
    # Not a product with the mask: what stands at other positions, NaN included, must not matter.
    read = hidden[:, text].to(wide).masked_fill(~span.mean[:, text, None], 0)  # [B, n, C]
    count = span.mean.sum(1, keepdim=True)  # [B, 1]
    mean = torch.where(count > 0, read.sum(1) / count.clamp(min=1), last)  # [B, C]
    return torch.cat([mean, last], 1)


# What it says ---------------------------------------------------------------------------------------------------------
def wants_exit(logits: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Whether the probability of class 1 (exit) is above `threshold`; at 0.5 strictly logit 1 > logit 0, as released.

    Args:
        logits: [B, 2], class 0 is keep and class 1 is exit.
        threshold: from 0 (always) to 1 (never).

    Returns:
        bool [B]; NaN logits keep.
    """
    margin = -math.inf if threshold <= 0 else math.inf if threshold >= 1 else math.log(threshold / (1 - threshold))
    return logits[:, 1] - logits[:, 0] > margin


class Gate(nn.Module):
    """W2 GELU(W1 u), without biases and with the exact GELU. w1: [hidden, 2C]; w2: [2, hidden]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden, 2 * width))
        self.w2 = nn.Parameter(torch.empty(2, hidden))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """[B, 2C] -> logits [B, 2], in the dtype of the weights."""
        return F.linear(F.gelu(F.linear(u.to(self.w1.dtype), self.w1)), self.w2)


# The gates of a model -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelPrint:
    """What gates must know of the model they were trained on. `name` informs, the other fields must agree."""

    model_type: str
    hidden_size: int
    layers: int
    vocabulary: int
    name: str = ""

    @classmethod
    def of(cls, adapter: Adapter, name: str = "") -> ModelPrint:
        text = adapter.text_config
        return cls(adapter.config.model_type, text.hidden_size, len(adapter.decoder_layers), text.vocab_size, name)

    def differences(self, other: ModelPrint) -> list[str]:
        """`field a, not b` for each field that must agree and does not."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "name"]
        return [
            f"{name} {getattr(self, name)!r}, not {getattr(other, name)!r}"
            for name in fields
            if getattr(self, name) != getattr(other, name)
        ]


class DyVTEGates(nn.Module):
    """One gate for each decoder layer of a model.

    made_for: the model.
    gate_hidden: width of the hidden layer; 2048 in the released code.
    seed: of the xavier-uniform weights; None leaves them to be loaded.
    training_record (attribute): how they were trained, plain data that is saved with them.
    """

    def __init__(self, made_for: ModelPrint, gate_hidden: int = 2048, seed: int | None = 0) -> None:
        super().__init__()
        if isinstance(gate_hidden, bool) or not isinstance(gate_hidden, int) or gate_hidden < 1:
            raise InputError(f"gate_hidden: got {gate_hidden!r}; give a positive integer such as 2048")
        self.made_for, self.gate_hidden = made_for, gate_hidden
        self.training_record: dict[str, Any] = {}
        self.layers = nn.ModuleList([Gate(made_for.hidden_size, gate_hidden) for _ in range(made_for.layers)])
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for weight in self.parameters():
                nn.init.xavier_uniform_(weight, generator=generator)

    def __repr__(self) -> str:
        # Runs are recorded by the repr of their method: it must tell gates apart, and tell them briefly.
        total = sum(float(weight.detach().double().abs().sum()) for weight in self.parameters())
        return f"DyVTEGates({self.made_for.name or self.made_for.model_type}, {self.gate_hidden}, sum {total:.6g})"

    def gate(self, layer: int) -> Gate:
        """The gate after decoder layer `layer`."""
        return cast(Gate, self.layers[layer])

    def forward(self, layer: int, u: torch.Tensor) -> torch.Tensor:
        """Logits [B, 2] of the gate after decoder layer `layer` for its input [B, 2C]."""
        return self.gate(layer)(u)

    def check(self, adapter: Adapter) -> None:
        """Raise InputError unless the gates were made for this model."""
        differ = self.made_for.differences(ModelPrint.of(adapter))
        if differ:
            raise InputError(
                f"gates: they were made for {self.made_for.name or 'another model'} ({'; '.join(differ)}); "
                "train gates for this model with `vlattn train dyvte`, or carry these over with gates.adopt(model)"
            )

    def adopt(self, model: nn.Module) -> DyVTEGates:
        """The same gates for another model of the same width and depth; the paper finds that they carry over."""
        mine, other = self.made_for, ModelPrint.of(adapter_for(model), self.made_for.name)
        if (mine.hidden_size, mine.layers) != (other.hidden_size, other.layers):
            raise InputError(
                f"gates: made for {mine.layers} layers of width {mine.hidden_size}, but the model has {other.layers} "
                f"of width {other.hidden_size}; only gates of the same shape carry over"
            )
        adopted = DyVTEGates(other, self.gate_hidden, seed=None)
        adopted.load_state_dict(self.state_dict())
        adopted.training_record = self.training_record
        return adopted

    def save(self, folder: str | Path) -> None:
        """Write `gates.safetensors` (fp32) and `gates.json`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: w.detach().float().cpu().contiguous() for name, w in self.state_dict().items()}
        save_file(weights, str(path / WEIGHTS))
        config = {
            "format": _FORMAT,
            "model": dataclasses.asdict(self.made_for),
            "gate_hidden": self.gate_hidden,
            "training": self.training_record,
        }
        (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_gates(folder: str | Path) -> DyVTEGates:
    """Read what `DyVTEGates.save` wrote; "auto" is the embedded gates of the tiny model.

    Raises:
        InputError: no such folder, or its files are not gates.
    """
    path = embedded_gates() if str(folder) == "auto" else Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise InputError(
            f"gates: {str(folder)!r} holds no {' and no '.join(missing)}; give a folder that `vlattn train dyvte` wrote"
        )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != _FORMAT:
            raise KeyError("format")
        gates = DyVTEGates(ModelPrint(**config["model"]), config["gate_hidden"], seed=None)
        gates.load_state_dict(load_file(str(path / WEIGHTS)))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"gates: {str(folder)!r} cannot be read ({reason}); train them again or restore it") from None
    gates.training_record = config.get("training", {})
    return gates.requires_grad_(False)


def embedded_gates() -> Path:
    """The folder of the tiny model's gates."""
    from vlattn.assets.paths import tiny_llava

    return tiny_llava().parent / "tiny_gates" / "dyvte"
