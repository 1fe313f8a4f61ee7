"""Optimisers of probes. Each also steps stacked parameters [R, ...], whose R slices are parameters of R heads.

A slice has its own learning rate, its own norms, and steps as it would alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from vlattn.errors import InputError

Rate = float | Sequence[float] | torch.Tensor


class SliceOptimizer(torch.optim.Optimizer, ABC):
    """p <- p - lr * direction, where a subclass says the direction.

    params: parameters or parameter groups, as torch's optimisers take them.
    lr: a number, or with `stacked` also R numbers, one for each slice; may be set anew in `param_groups` at any time.
    stacked: parameters are [R, ...] and hold R slices; else each is one whole.
    """

    def __init__(self, params: Iterable[Any], lr: Rate, stacked: bool, weight_decay: float, **settings: float) -> None:
        rates = torch.as_tensor(lr, dtype=torch.float64).reshape(-1)
        if not bool((rates >= 0).all()):
            raise InputError(f"lr: got {lr}; give numbers of at least 0")
        if weight_decay < 0:
            raise InputError(f"weight_decay: got {weight_decay}; give a number of at least 0")
        if len(rates) > 1 and not stacked:
            raise InputError(
                f"lr: got {len(rates)} numbers; give one, or stacked=True for parameters [{len(rates)}, ...]"
            )
        if not isinstance(lr, float | int | torch.Tensor):
            lr = rates
        super().__init__(params, {"lr": lr, "stacked": stacked, "weight_decay": weight_decay, **settings})
        for group in self.param_groups:
            slices = group["lr"].numel() if isinstance(group["lr"], torch.Tensor) else 1
            for p in group["params"] if slices > 1 else []:
                if p.shape[:1] != (slices,):
                    raise InputError(
                        f"lr: got {slices} numbers for a parameter {list(p.shape)}; give one for each slice"
                    )

    @abstractmethod
    def _direction(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        live: torch.Tensor | None,
    ) -> torch.Tensor:
        """What lr times is taken from `p`; updates `state`, in slices that are not `live` not."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, live: torch.Tensor | None = None
    ) -> Any:
        """One step from the gradients; parameters without one are passed over.

        Args:
            closure: makes the loss and the gradients anew; its result is returned.
            live: bool [R], False for slices that stay as they are, state included, as if they had not been stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mask = None if live is None else along_slices(live, p)
                    grad = p.grad if mask is None else torch.where(mask, p.grad, torch.zeros_like(p.grad))
                    direction = self._direction(p, grad, self.state[p], group, mask)
                    _descend(p, direction, group["lr"], mask)
        return loss


def along_slices(values: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[R] as [R, 1, ..., 1], to go with the slices of `p`."""
    return values.reshape(-1, *[1] * (p.ndim - 1))


def _descend(p: torch.Tensor, direction: torch.Tensor, lr: float | torch.Tensor, live: torch.Tensor | None) -> None:
    if live is not None:
        direction = torch.where(live, direction, torch.zeros_like(direction))
    if isinstance(lr, torch.Tensor):  # stays where it is: reading it would wait for the device
        p.addcmul_(direction, along_slices(lr.to(p), p) if lr.numel() > 1 else lr.to(p), value=-1)
    else:
        p.add_(direction, alpha=-lr)


def _keep(state: torch.Tensor, new: torch.Tensor, live: torch.Tensor | None) -> None:
    state.copy_(new if live is None else torch.where(live, new, state))


def _momentum(
    p: torch.Tensor,
    grad: torch.Tensor,
    momentum: float,
    state: dict[str, Any],
    live: torch.Tensor | None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """mu <- momentum * mu + factor * grad, from mu = 0."""
    if momentum == 0:
        return grad if factor is None else grad * factor
    if "mu" not in state:
        state["mu"] = torch.zeros_like(p)
    mu: torch.Tensor = state["mu"]
    decayed = mu.mul_(momentum) if live is None else mu * momentum
    new = decayed.add_(grad) if factor is None else decayed.addcmul_(grad, factor)
    if live is not None:
        _keep(mu, new, live)
    return mu


class LARS(SliceOptimizer):
    """Layer-wise adaptive rate scaling: the length of a step follows the length of the weight.

    "Large Batch Training of Convolutional Networks", arXiv 1708.03888, as probes of masked autoencoders use it. For
    tensors with more than one dimension g <- g + weight_decay p, then g <- g trust |p| / |g|, where the factor is 1 if
    either norm is 0; others (biases, gains of norms) keep their gradient and have no weight decay. Then
    mu <- momentum mu + g and p <- p - lr mu. A single query stored as [1, D] has two dimensions and is scaled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Rate,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        stacked: bool = False,
    ) -> None:
        super().__init__(params, lr, stacked, weight_decay, momentum=momentum, trust=trust)

    def _direction(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        live: torch.Tensor | None,
    ) -> torch.Tensor:
        lead, factor = int(group["stacked"]), None
        if p.ndim - lead > 1:
            if group["weight_decay"]:
                grad = grad.add(p, alpha=group["weight_decay"])
            dims = tuple(range(lead, p.ndim))
            weight = torch.linalg.vector_norm(p, dim=dims, keepdim=True)
            update = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
            both = (weight > 0) & (update > 0)
            factor = torch.where(both, group["trust"] * weight / update, torch.ones_like(weight))
        return _momentum(p, grad, group["momentum"], state, live, factor)


class SGD(SliceOptimizer):
    """Gradient descent with momentum as in `torch.optim.SGD`, and its defaults."""

    def __init__(
        self, params: Iterable[Any], lr: Rate, momentum: float = 0.0, weight_decay: float = 0.0, stacked: bool = False
    ) -> None:
        super().__init__(params, lr, stacked, weight_decay, momentum=momentum)

    def _direction(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        live: torch.Tensor | None,
    ) -> torch.Tensor:
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        return _momentum(p, grad, group["momentum"], state, live)


class AdamW(SliceOptimizer):
    """Adam with decoupled weight decay as in `torch.optim.AdamW` (arXiv 1711.05101), and its defaults."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: Rate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        stacked: bool = False,
    ) -> None:
        super().__init__(params, lr, stacked, weight_decay, beta1=betas[0], beta2=betas[1], eps=eps)

    def _direction(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        live: torch.Tensor | None,
    ) -> torch.Tensor:
        beta1, beta2 = group["beta1"], group["beta2"]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            # One count for each slice, as those that were not live have taken fewer steps.
            count = p.new_zeros(len(p) if group["stacked"] else 1)
            state["steps"] = along_slices(count, p) if group["stacked"] else count
        mean, square, steps = state["mean"], state["square"], state["steps"]
        _keep(steps, steps + 1, live)
        _keep(mean, torch.lerp(mean, grad, 1 - beta1), live)
        _keep(square, square * beta2 + grad * grad * (1 - beta2), live)
        # A slice that never was live has taken no step, and divides by a clamp instead of 0.
        taken = steps.clamp_min(1)
        # 1 - beta^steps, without the cancellation that this has in fp32.
        first, second = (-torch.expm1(taken * math.log(beta)) for beta in (beta1, beta2))
        root = (square / second).sqrt_().add_(group["eps"])
        direction = mean / first / root
        return direction.add_(p, alpha=group["weight_decay"]) if group["weight_decay"] else direction


OPTIMIZERS: dict[str, type[SliceOptimizer]] = {"lars": LARS, "sgd": SGD, "adamw": AdamW}
