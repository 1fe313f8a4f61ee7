"""How many tokens entered each layer of a live model, measured: towers that merge, tile or window need no formula."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet, as_keywords, cached_length


class LayerLengths:
    """A context that watches one model; every prefill inside it overwrites what the last one left.

    with LayerLengths(model) as seen: model(**inputs)

    Enter it inside an intervention, so that it sees the sequences that the intervention has shortened. What is dropped
    in the middle of a layer, as token merging does, counts from the next layer on.

    batch: prompts of the prefill.
    decoder: for each decoder layer, the positions that entered it, left padding included.
    tower: for each vision layer, of all towers, the lengths of the sequences that it attended within: one for each
        image or tile, or, where a tower packs all images into one sequence, one for each image or window.
    tower_width: for each vision layer, the width of its hidden states.
    tower_weights: for each vision layer, the numbers in its matrices: MACs per token.
    projector: MACs of the matrices between tower and decoder, at the rows that went through them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adapter = adapter_for(model)
        self._hooks = HookSet()
        self._vision = [layer for encoder in self._adapter.encoders for layer in encoder]
        self._prefill = self._finished = False
        self.tower_weights = [matrix_weights(layer) for layer in self._vision]
        self._forget()

    def _forget(self) -> None:
        self._finished = False
        self.batch, self.projector = 0, 0
        self.decoder: list[int] = [0] * len(self._adapter.decoder_layers)
        self.tower: list[list[int]] = [[] for _ in self._vision]
        self.tower_width = [0] * len(self.tower)

    def __enter__(self) -> LayerLengths:
        adapter = self._adapter
        self._hooks.before(adapter.multimodal, self._start)
        self._hooks.after(adapter.multimodal, self._finish)
        for tower in towers(adapter):
            self._hooks.before(tower, self._start_tower)
        for number, layer in enumerate(self._vision):
            self._hooks.before(layer, self._see_vision(number))
        for number, layer in enumerate(adapter.decoder_layers):
            self._hooks.before(layer, self._see_decoder(number))
        for module in _between(adapter):
            self._hooks.after(module, self._see_matrices(module))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hooks.remove()

    def require(self) -> LayerLengths:
        """This, or an InputError where no prefill was seen."""
        if not self.batch:
            raise InputError("lengths: no prefill was seen; run the model inside the context first")
        return self

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prefill = not cached_length(as_keywords(module, args, kwargs))
        if self._prefill and self._finished:
            self._forget()

    def _start_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # `generate` of newer transformers runs the tower before it calls the model.
        if self._finished:
            self._forget()

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._finished |= self._prefill

    def _see_vision(self, number: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _hidden(args, kwargs)
            self.tower_width[number] = hidden.shape[-1]
            seams = as_keywords(module, args, kwargs).get("cu_seqlens")
            if isinstance(seams, torch.Tensor):
                self.tower[number] += seams.diff().tolist()
            else:
                self.tower[number] += [hidden.shape[-2]] * (hidden.numel() // (hidden.shape[-2] * hidden.shape[-1]))

        return see

    def _see_decoder(self, number: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._prefill:
                self.batch, self.decoder[number] = _hidden(args, kwargs).shape[:2]

        return see

    def _see_matrices(self, owner: nn.Module) -> Callable[..., None]:
        weights = _own_weights(owner)

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            self.projector += out.numel() // out.shape[-1] * weights

        return see


def matrix_weights(module: nn.Module) -> int:
    """Numbers in all matrices of a module: linear layers, and matrices that it holds as bare parameters."""
    return sum(map(_own_weights, module.modules()))


def _own_weights(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.Embedding):
        return 0
    return sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)


def towers(adapter: Adapter) -> list[nn.Module]:
    """The parts of the multimodal module that hold vision layers: two where videos have their own, else one."""
    wanted = [encoder[0] for encoder in adapter.encoders]
    return [
        part for part in adapter.multimodal.children() if any(m is layer for m in part.modules() for layer in wanted)
    ]


def _between(adapter: Adapter) -> list[nn.Module]:
    """What holds matrices in the projector, or in the tower outside its layers, where some families have mergers."""
    layers = {id(m) for encoder in adapter.encoders for layer in encoder for m in layer.modules()}
    found = {id(m): m for part in (*towers(adapter), adapter.projector) for m in part.modules()}
    return [m for key, m in found.items() if key not in layers and _own_weights(m)]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
