"""Many copies of one probe head, trained at once on one stream of features: a search over learning rates for one pass.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178, searches seven.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.head import MOMENTUM, ProbeHead, check_batch
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.branches import Branches, BranchLosses
from vlattn.probing.poolers.ep import EP

_VMAPPED: tuple[type[Pooler], ...] = (EP,)
"""Poolers that vmap makes faster: R heads of M queries are one of R M. For others it falls back to copies of the tokens
or to loops of its own, and took up to twice the time of R calls."""


@dataclass(frozen=True)
class BankOut:
    """What R heads give in training.

    logits: [R, B, K].
    branch_logits: [R, B, M, K]; None where the branches have no classifiers.
    attention: each head's maps of its branches [B, ..., M, N]; None where the pooler has no losses of its own.
    """

    logits: torch.Tensor
    branch_logits: torch.Tensor | None = None
    attention: tuple[torch.Tensor, ...] | None = None


class HeadBank(nn.Module):
    """R heads with the same first weights, as one module whose parameters and buffers are stacked to [R, ...].

    Heads share nothing but the tokens they see: gradients, running statistics and what an optimiser of
    `vlattn.probing.optim` with stacked=True does are those of R heads trained one by one, up to rounding. `stacked` has
    the names of a `ProbeHead`'s state dict, each value with R in front.

    head: copied, not touched.
    copies: R.
    vmap: whether poolers run under torch.func.vmap, or one after the other; None is what is faster.
    """

    def __init__(self, head: ProbeHead, copies: int, vmap: bool | None = None) -> None:
        super().__init__()
        require_count("copies", copies)
        self.copies = copies
        self.vmap = copies > 1 and isinstance(head.pooler, _VMAPPED) if vmap is None else vmap
        self.stacked = _with_tensors(head, lambda tensor: tensor.expand(copies, *tensor.shape))
        # Without weights, and in a tuple so that they are no submodules: they lend their forward, and their own
        # generators where they draw, to the slices.
        self._poolers = tuple(copy.deepcopy(head.pooler).to("meta") for _ in range(copies))
        self.branch_losses: BranchLosses | None = head.pooler.branch_losses
        self.train(head.training)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [R, B, K] of tokens [B, N, D].

        Raises:
            InputError: one image in training mode.
        """
        check_batch(tokens, self.training)
        return self._classify(self._normalise(self._pool(tokens)))

    def read(self, tokens: torch.Tensor) -> BankOut:
        """`forward`, and what the losses of a pooler with branches need besides.

        Raises:
            InputError: one image in training mode.
        """
        if self.branch_losses is None:
            return BankOut(self(tokens))
        check_batch(tokens, self.training)
        seen = self._branches(tokens)
        logits = self._classify(self._normalise(torch.stack([one.feature for one in seen], 1)))
        classifiers, branch_logits = self.stacked.branch_classifiers, None
        if classifiers is not None:
            branch_logits = classifiers.of_stacked(torch.stack([one.features for one in seen]))
        return BankOut(logits, branch_logits, tuple(one.attention for one in seen))

    def train(self, mode: bool = True) -> HeadBank:
        for pooler in self._poolers:
            pooler.train(mode)
        return super().train(mode)

    def slice_state(self, index: int) -> dict[str, torch.Tensor]:
        """State dict of head `index`, as views into the stacked tensors."""
        if not 0 <= index < self.copies:
            raise InputError(f"index: got {index}; this bank has heads 0 to {self.copies - 1}")
        return {name: value[index] for name, value in self.stacked.state_dict().items()}

    def head(self, index: int) -> ProbeHead:
        """A copy of head `index`, on its own."""
        self.slice_state(index)  # refuses what is none
        return _with_tensors(self.stacked, lambda tensor: tensor[index])

    def draws(self) -> list[Mapping[str, Any]]:
        """States of the generators that poolers have of their own, which no state dict holds."""
        return [generator.bit_generator.state for generator in self._generators()]

    def load_draws(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on drawing from where `draws` was called."""
        for generator, state in zip(self._generators(), states, strict=True):
            generator.bit_generator.state = state

    def _generators(self) -> Iterator[np.random.Generator]:
        for pooler in self._poolers:
            for module in pooler.modules():
                yield from (value for value in vars(module).values() if isinstance(value, np.random.Generator))

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [B, R, W]."""
        state = _tensors(self.stacked.pooler)
        if not state:  # nothing in which heads could differ
            return self._poolers[0](tokens)[:, None].expand(-1, self.copies, -1)
        if self.vmap:
            return vmap(lambda one: functional_call(self._poolers[0], one, (tokens,), strict=True), out_dims=1)(state)
        slices = _slices(state, self.copies)
        features = [
            functional_call(pooler, one, (tokens,), strict=True)
            for pooler, one in zip(self._poolers, slices, strict=True)
        ]
        return torch.stack(features, 1)

    def _branches(self, tokens: torch.Tensor) -> list[Branches]:
        """What the branches of each head see, one head after the other, as most poolers run."""
        state = {f"pooler.{name}": value for name, value in _tensors(self.stacked.pooler).items()}
        return [
            functional_call(_AsForward(pooler), one, (tokens,), strict=True)
            for pooler, one in zip(self._poolers, _slices(state, self.copies), strict=True)
        ]

    def _normalise(self, pooled: torch.Tensor) -> torch.Tensor:
        """The heads' batch norms as one over [B, R W], which channel by channel is the same."""
        state, norm = dict(self.stacked.norm.named_buffers()), self.stacked.norm
        if self.training:
            state["num_batches_tracked"].add_(1)
        mean, variance = state["running_mean"].view(-1), state["running_var"].view(-1)
        flat = F.batch_norm(pooled.flatten(1), mean, variance, training=self.training, momentum=MOMENTUM, eps=norm.eps)
        return flat.view(pooled.shape)

    def _classify(self, features: torch.Tensor) -> torch.Tensor:
        linear = self.stacked.classifier
        return torch.baddbmm(linear.bias[:, None], features.transpose(0, 1), linear.weight.transpose(1, 2))


class _AsForward(nn.Module):
    """A pooler's `branches` as a forward, which is what `functional_call` runs on other weights."""

    def __init__(self, pooler: Any) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, tokens: torch.Tensor) -> Branches:
        found: Branches = self.pooler.branches(tokens)
        return found


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _slices(state: Mapping[str, torch.Tensor], count: int) -> Iterator[dict[str, torch.Tensor]]:
    return ({name: value[index] for name, value in state.items()} for index in range(count))


def _with_tensors(head: ProbeHead, change: Callable[[torch.Tensor], torch.Tensor]) -> ProbeHead:
    """A copy of `head` with every parameter and buffer changed, each in memory of its own."""
    changed = copy.deepcopy(head)
    for module in changed.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_own(change(parameter.detach())), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _own(change(buffer)))
    return changed


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
